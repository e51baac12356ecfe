"""The two 5B models as random numbers, ours and diffusers' under one signature, on any device.

Their configs are in diffusers' words; a folder of them without weights is a checkpoint to all that reads no
weights. Small ones have the same parts, for a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import weights
from benchmarks.dit import SUFFIXES
from sdv.lora import adapt
from sdv.models.wan_vae import MEAN, STD
from sdv.run.cost import load_nothing
from weights import tiny
from weights.tensors import rename, reverse

COGVIDEOX = {
    "transformer": {
        "num_attention_heads": 48, "in_channels": 16, "out_channels": 16, "time_embed_dim": 512,
        "text_embed_dim": 4096, "num_layers": 42, "sample_width": 90, "sample_height": 60,
        "sample_frames": 49, "max_text_seq_length": 226,
    },
    "vae": {
        "block_out_channels": [128, 256, 256, 512], "latent_channels": 16, "layers_per_block": 3,
        "norm_num_groups": 32,
    },
}  # fmt: skip
WAN = {
    "transformer": {
        "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48, "out_channels": 48,
        "text_dim": 4096, "freq_dim": 256, "ffn_dim": 14336, "num_layers": 30,
    },
    "vae": {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "latents_mean": list(MEAN),
        "latents_std": list(STD),
    },
}  # fmt: skip
T5_XXL = {"text_encoder": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}}
FULL = {"cogvideox": COGVIDEOX | T5_XXL, "wan": WAN | T5_XXL}
TARGETS = {
    "cogvideox": SUFFIXES,
    "wan": ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"],
}  # of a LoRA, in diffusers' names


def open_model(
    name: str, folder: Path, small: bool = False, layers: int | None = None
) -> tuple[weights.Layout, dict[str, dict]]:
    """A checkpoint folder without weights, read, of a transformer with all layers or some; its configs."""
    configs = {file: dict(content) for file, content in tiny.FAMILIES[name].items()}
    for part, sizes in {} if small else FULL[name].items():
        configs[f"{part}/config.json"] |= sizes
    if layers:
        configs["transformer/config.json"]["num_layers"] = layers
    vocabulary = tiny.train_vocabulary(tiny.CORPUS.strip().splitlines(), 256, umt5=name == "wan")
    tiny.write_configs(folder, configs, vocabulary)
    return weights.open_backbone(folder), {part: configs[f"{part}/config.json"] for part in FULL[name]}


@contextmanager
def made_as(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Modules made in it have parameters of this dtype, there, at once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def random_transformer(
    layout: weights.Layout, dtype: torch.dtype, device: str, rank: int = 0, alpha: float = 1.0
) -> nn.Module:
    """Ours, frozen, with a LoRA if it has a rank; activations stay about as large as they are."""
    with torch.device("meta"):
        dit = layout.parts["dit"].build().requires_grad_(False)
        if rank:
            adapt(dit, rank, alpha)
    for name, p in load_nothing(dit, dtype, device).named_parameters():
        if p.ndim > 1:
            p.normal_(std=0.01 if name.endswith("lora_B") else p[0].numel() ** -0.5)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    return dit


class Stock(nn.Module):
    """A transformer of diffusers, called as ours is: the reference is one more frame, thrown away."""

    def __init__(self, name: str, config: dict, dtype: torch.dtype, device: str, autocast: bool = False):
        super().__init__()
        import diffusers

        self.name, self.dtype, self.device, self.autocast = name, dtype, device, autocast
        with made_as(dtype, device):
            self.net = getattr(diffusers, config["_class_name"]).from_config(config)
        self.net.requires_grad_(False)
        self.ropes: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        wide = set(self.net._keep_in_fp32_modules or ())
        for path, parameter in self.net.named_parameters():
            if wide & set(path.split(".")):
                parameter.data = parameter.data.float()

    def rope(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        if (frames, height, width) not in self.ropes:
            cfg, grid = self.net.config, (height // 2, width // 2)
            crop = get_resize_crop_region_for_grid(grid, cfg.sample_width // 2, cfg.sample_height // 2)
            tables = get_3d_rotary_pos_embed(cfg.attention_head_dim, crop, grid, frames)
            self.ropes[frames, height, width] = tuple(table.to(self.device) for table in tables)
        return self.ropes[frames, height, width]

    def forward(
        self, video: Tensor, t: Tensor, text: Tensor, ref: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        frames = video if ref is None else torch.cat([ref, video], dim=2)
        first = frames.shape[2] - video.shape[2]
        with torch.autocast(self.device, self.dtype, enabled=self.autocast):
            if self.name == "cogvideox":
                rope = self.rope(*frames.shape[2:])
                out = self.net(frames.transpose(1, 2), text, t, image_rotary_emb=rope, return_dict=False)[0]
                return out.transpose(1, 2)[:, :, first:]
            if ref is not None:  # as in Wan's image-to-video: every token has its time, the picture's is 0
                one = frames.shape[3] * frames.shape[4] // 4  # tokens of a frame
                t = torch.cat([t.new_zeros(len(t), one), t[:, None].expand(-1, one * video.shape[2])], dim=1)
            return self.net(frames, t, text, return_dict=False)[0][:, :, first:]

    def adapt(self, rank: int, alpha: float, dtype: torch.dtype) -> None:
        """Give it peft's LoRA, of this dtype, and let every block recompute."""
        import peft

        with torch.device(self.device):
            self.net.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[self.name]))
        for path, parameter in self.net.named_parameters():
            if "lora_" in path:
                parameter.data = parameter.data.to(self.device, dtype)
            if "lora_B" in path:
                parameter.data.normal_(std=0.01)
        self.net.enable_gradient_checkpointing()


def stock_vae(config: dict, dtype: torch.dtype, device: str) -> nn.Module:
    import diffusers

    with made_as(dtype, device):
        return getattr(diffusers, config["_class_name"]).from_config(config).eval().requires_grad_(False)


@contextmanager
def two_blocks(dit: nn.Module) -> Iterator[None]:
    """In it, a transformer, ours or diffusers', has its first two blocks only."""
    owner = dit.net if isinstance(dit, Stock) else dit
    name = "transformer_blocks" if hasattr(owner, "transformer_blocks") else "blocks"
    blocks = getattr(owner, name)
    setattr(owner, name, blocks[:2])
    try:
        yield
    finally:
        setattr(owner, name, blocks)


def share(ours: nn.Module, theirs: nn.Module, names: dict) -> None:
    """Give diffusers' module the very numbers of ours. ValueError if it has more."""
    names, waiting = reverse(names), dict(theirs.named_parameters())
    for path, parameter in ours.named_parameters():
        other = waiting.pop(rename(path, names))
        other.data = parameter.data.view(other.shape).to(other.dtype)
    if waiting:
        raise ValueError(f"not in ours: {', '.join(sorted(waiting)[:4])}")
