"""What several test files share: one measure of error, tiny models, the scripts' command lines."""

import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import sample
import train
import weights.cogvideox
import weights.wan
from sdv.data.rows import PAIR, Clips, Pairs, Row, read_rows
from sdv.diagnostics import probe
from sdv.lora import add_lora, lora_parameters
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.models.text import Tokenizer
from sdv.models.wan_dit import WanDiT
from sdv.objectives import denoising_loss, draws_of
from sdv.run.settings import run as run_command
from weights.tensors import load_into, read_json
from weights.tiny import WAN_CONFIGS
from weights.vocabulary import read_pieces

ROOT = Path(__file__).parent.parent
MEDIA = ROOT / "tests" / "media"
SIZE = {"--height": 64, "--width": 96, "--frames": 9}
RUN = {
    "--pairs": MEDIA / "pairs", "--clips": MEDIA / "clips", **SIZE, "--rank": 8, "--alpha": 8,
    "--accumulate": 1, "--identity-batch": 2, "--motion-batch": 1, "--p-video": 0.5, "--lr": 0.01,
    "--warmup": 1, "--workers": 0,
}  # fmt: skip
# AdamW divides a gradient by its own size, and so the rounding errors of a tiny one; a large eps does not.
CALM = {"--eps": 1e-3, "--lr": 0.05}
TINY_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 7,
    "use_rotary_positional_embeddings": True,
}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def four_pairs(folder: Path) -> list[Row]:
    """Four pairs of the repository's pictures, each of two files of its own."""
    folder.mkdir()
    for i, picture in enumerate(("fig_tree.jpg", "lawn.jpg") * 2):
        names = {"reference_file_name": f"{i}_ref.jpg", "target_file_name": f"{i}_target.jpg"}
        for name in names.values():
            shutil.copy(MEDIA / "pairs" / picture, folder / name)
        with open(folder / "metadata.jsonl", "a") as file:
            file.write(json.dumps(names | {"prompt": f"picture {i}"}) + "\n")
    return read_rows(folder, PAIR)


# Oracles


def tokenizer(file: str | Path, *options, unk: int = 2, **more) -> Tokenizer:
    return Tokenizer(read_pieces(file, unk), *options, **more)


def load_dit(folder) -> CogVideoXDiT:
    with torch.device("meta"):
        dit = CogVideoXDiT(weights.cogvideox.dit_config(read_json(folder / "config.json")))
    load_into(dit, weights.cogvideox.DIT_NAMES, folder, "cpu", torch.float32)
    return dit.eval()


def build(family: type[nn.Module] = CogVideoXDiT) -> nn.Module:
    """A small transformer of random numbers."""
    if family is WanDiT:
        return WanDiT(weights.wan.dit_config(WAN_CONFIGS["transformer/config.json"]))
    return CogVideoXDiT(weights.cogvideox.dit_config(TINY_DIT))


def lora_pair(rank: int = 4, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, width) and B (width, rank) of one layer, the same every time."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(rank, width, generator=rng), torch.randn(width, rank, generator=rng)


def stock_rope(stock, frames: int, height: int, width: int):
    """The rotary table that diffusers' pipeline makes for a latent size."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    p = stock.config.patch_size
    grid = height // p, width // p
    crop = get_resize_crop_region_for_grid(
        grid, stock.config.sample_width // p, stock.config.sample_height // p
    )
    return get_3d_rotary_pos_embed(stock.config.attention_head_dim, crop, grid, frames)


def stock_predict(stock, video, t, text, ref=None):
    """Stock diffusers on one more, clean frame before the video, whose output is thrown away."""
    frames = video if ref is None else torch.cat([ref, video], dim=2)
    pred = stock(
        frames.transpose(1, 2),
        text,
        t,
        image_rotary_emb=stock_rope(stock, *frames.shape[2:]),
        return_dict=False,
    )[0]
    return pred.transpose(1, 2)[:, :, frames.shape[2] - video.shape[2] :]


def random_inputs(batch=2, frames=3, height=8, width=12, seed=1):
    rng = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 4, frames, height, width, generator=rng)
    ref = torch.randn(batch, 4, 1, height, width, generator=rng)
    text = torch.randn(batch, 7, 24, generator=rng)
    return video, torch.randint(1000, (batch,), generator=rng), text, ref


def assert_recomputing_changes_no_gradient(load: Callable[[], nn.Module], training: bool, inputs) -> None:
    """Of a backbone's LoRA, for none, half and all of the blocks, with attention kept and without."""
    gradients = []
    for share, kept in ((0.0, False), (1.0, False), (0.5, False), (1.0, True), (0.5, True)):
        dit = load().train(training)
        torch.manual_seed(0)
        add_lora(dit, 4, 4.0, dit.lora_targets)
        dit.recompute, dit.keep_attention = share, kept
        dit(*inputs).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lora_parameters(dit).values()]))
    assert gradients[0].norm() > 0
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


# The scripts


def status(main: Callable[[list[str]], int], *words) -> int:
    """Exit status of a command. What it would say of an error is on stderr."""
    try:
        run_command(lambda: main([str(word) for word in words]))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 1
    return 0


def argv(options: dict) -> list[str]:
    return [str(word) for flag, value in options.items() for word in (flag, value) if word != ""]


def run(monkeypatch, script, options: dict) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *argv(options)])
    script.main()


def state(out: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """{name: tensor} of a save, with the optimizer's and the gradients kept for surgery; samples taken."""
    folder = out / f"step-{step:06d}"
    training = torch.load(folder / "training.pt", weights_only=True)
    found = load_file(folder / "adapter.safetensors")
    found |= {f"{i}.{k}": v for i, entry in training["optimizer"]["state"].items() for k, v in entry.items()}
    for task, past in training["past"].items():
        found |= {f"{task}.{i}.{j}": g for i, grads in enumerate(past) for j, g in enumerate(grads)}
    return found, training["samples"]


def assert_same(a: Path, b: Path, step: int) -> None:
    (tensors, taken), (other, other_taken) = state(a, step), state(b, step)
    assert taken == other_taken
    assert tensors.keys() == other.keys()
    assert all(torch.equal(tensors[name], other[name]) for name in tensors)


def losses(out: Path) -> list[tuple]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["task"], row["loss"], row["grad_norm"]) for row in rows]


def assert_close(a, b, step):
    ours, theirs = (load_file(out / f"step-{step:06d}" / "adapter.safetensors") for out in (a, b))
    for half in ("lora_A", "lora_B"):
        mine, its = (torch.cat([t.flatten() for n, t in x.items() if half in n]) for x in (ours, theirs))
        assert (mine - its).norm() <= 1e-6 * its.norm()


@torch.no_grad()
def fixed_losses(backbone: Path, adapter: Path | None) -> dict[str, float]:
    """Each task's loss over the vendored media, on noise and times that do not change."""
    loaded = weights.load_backbone(backbone, log=lambda line: None)
    if adapter:
        weights.load_adapter(loaded.dit, adapter)
    ref_tokens = 64 * 96 // (loaded.layout.spatial_ratio * loaded.layout.patch) ** 2
    enc, cfg = train.Encoders(loaded.vae.encode, loaded.text, ref_tokens), train.Config(p_drop=0.0)
    data = {"identity": Pairs(MEDIA / "pairs", 64, 96), "motion": Clips(MEDIA / "clips", 9, 8, 64, 96)}
    found = {}
    for task, rows in data.items():
        values = []
        for i in range(len(rows)):
            batch = {k: v[None] if isinstance(v, torch.Tensor) else [v] for k, v in rows[i].items()}
            pair = train.PAIR_OF[task](batch, enc, cfg, draws_of((7, i), [(7, i, 0)]))
            for draw in range(4):
                loss = denoising_loss(loaded.dit, loaded.schedule, pair, draws_of((8,), [(8, i, draw)]))
                values.append(loss.value.item())
        found[task] = sum(values) / len(values)
    return found


# Disks


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Pictures


GRID = np.array(
    [[[250, 10, 10], [10, 250, 10], [10, 10, 250]], [[250, 250, 10], [10, 10, 10], [250, 250, 250]]], np.uint8
)  # six colours, no symmetry


def blocks(cell: int = 16) -> np.ndarray:
    """(2 cell, 3 cell, 3) picture that looks different in each of the eight orientations."""
    return GRID.repeat(cell, 0).repeat(cell, 1)


def encode(path: Path, pictures, pts, unit=Fraction(1, 1000), codec="libx264", tags=None, **options) -> Path:
    """RGB pictures with presentation stamps -> video file; B-frames as the encoder likes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "8", **options})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", unit
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for picture, stamp in zip(pictures, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = int(stamp), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def keep_what_is_filmed(monkeypatch) -> list[tuple]:
    """The arguments of every sample.generate from now on, which makes nine black frames of 64 x 96."""
    seen = []

    def generate(*arguments):
        seen.append(arguments)
        return torch.zeros(1, 3, 9, 64, 96)

    monkeypatch.setattr(sample, "generate", generate)
    return seen


def flat(levels, height: int = 32, width: int = 32) -> list[np.ndarray]:
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def chw(image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().mean().item()


# A model for gradients


class Toy(nn.Module):
    """Linear maps where a transformer has them, and a convolution."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.patch_in = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(width, width), "down": nn.Linear(width, 2 * width)})
            for _ in range(2)
        )


def toy(rank: int = 4, zero_b: bool = False) -> Toy:
    torch.manual_seed(0)
    model = Toy()
    add_lora(model, rank, rank, ("patch_in", "q", "down"))
    for name, parameter in lora_parameters(model).items():
        if not (zero_b and name.endswith("B")):
            nn.init.normal_(parameter)
    return model


def pull(params: dict, grads: dict) -> torch.Tensor:
    """A linear loss whose gradient is `grads`."""
    return sum((params[name] * grads[name]).sum() for name in grads)


def probe_of(model: nn.Module, wanted: list[dict]) -> dict:
    params = lora_parameters(model)
    return probe(model, [partial(pull, params, grads) for grads in wanted])
