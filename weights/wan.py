"""Wan 2.2 TI2V-5B checkpoints in the diffusers layout and in the original one, read into the same modules."""

import dataclasses
from pathlib import Path

from sdv.models.text import CLEANING, T5Config, T5Encoder, Tokenizer, UMT5TextEncoder
from sdv.models.wan_dit import WanConfig, WanDiT
from sdv.models.wan_vae import WanVAE, WanVAEConfig
from sdv.schedule import FlowMatching
from weights.cogvideox import T5_NAMES, t5_config
from weights.layout import Layout, Part, read_config
from weights.tensors import Names, read_json
from weights.vocabulary import read_pieces

# What the vendor samples away from: garish colours, overexposure, stillness, subtitles, painting, grey, low
# quality, compression, malformed hands, faces and limbs, clutter, three legs, crowds, walking backwards.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# ---------------------------------------------------------------------------------------- transformer
DIT_NAMES: Names = {
    "patch_embedding": "patch_in",
    "condition_embedder.text_embedder.linear_1": "text_in.0",
    "condition_embedder.text_embedder.linear_2": "text_in.2",
    "condition_embedder.time_embedder.linear_1": "time_in.0",
    "condition_embedder.time_embedder.linear_2": "time_in.2",
    "condition_embedder.time_proj": "time_out",
    "blocks.{}.scale_shift_table": "blocks.{}.modulation",
    "blocks.{}.attn1.to_q": "blocks.{}.attn.q",
    "blocks.{}.attn1.to_k": "blocks.{}.attn.k",
    "blocks.{}.attn1.to_v": "blocks.{}.attn.v",
    "blocks.{}.attn1.to_out.0": "blocks.{}.attn.out",
    "blocks.{}.attn1.norm_q": "blocks.{}.attn.norm_q",
    "blocks.{}.attn1.norm_k": "blocks.{}.attn.norm_k",
    "blocks.{}.norm2": "blocks.{}.norm_cross",
    "blocks.{}.attn2.to_q": "blocks.{}.cross.q",
    "blocks.{}.attn2.to_k": "blocks.{}.cross.k",
    "blocks.{}.attn2.to_v": "blocks.{}.cross.v",
    "blocks.{}.attn2.to_out.0": "blocks.{}.cross.out",
    "blocks.{}.attn2.norm_q": "blocks.{}.cross.norm_q",
    "blocks.{}.attn2.norm_k": "blocks.{}.cross.norm_k",
    "blocks.{}.ffn.net.0.proj": "blocks.{}.ff.up",
    "blocks.{}.ffn.net.2": "blocks.{}.ff.down",
    "scale_shift_table": "modulation",
    "proj_out": "proj_out",
}

DIT_NAMES_ORIGINAL: Names = {
    "patch_embedding": "patch_in",
    "text_embedding.{}": "text_in.{}",
    "time_embedding.{}": "time_in.{}",
    "time_projection.1": "time_out",
    "blocks.{}.modulation": "blocks.{}.modulation",
    "blocks.{}.self_attn.q": "blocks.{}.attn.q",
    "blocks.{}.self_attn.k": "blocks.{}.attn.k",
    "blocks.{}.self_attn.v": "blocks.{}.attn.v",
    "blocks.{}.self_attn.o": "blocks.{}.attn.out",
    "blocks.{}.self_attn.norm_q": "blocks.{}.attn.norm_q",
    "blocks.{}.self_attn.norm_k": "blocks.{}.attn.norm_k",
    "blocks.{}.norm3": "blocks.{}.norm_cross",
    "blocks.{}.cross_attn.q": "blocks.{}.cross.q",
    "blocks.{}.cross_attn.k": "blocks.{}.cross.k",
    "blocks.{}.cross_attn.v": "blocks.{}.cross.v",
    "blocks.{}.cross_attn.o": "blocks.{}.cross.out",
    "blocks.{}.cross_attn.norm_q": "blocks.{}.cross.norm_q",
    "blocks.{}.cross_attn.norm_k": "blocks.{}.cross.norm_k",
    "blocks.{}.ffn.0": "blocks.{}.ff.up",
    "blocks.{}.ffn.2": "blocks.{}.ff.down",
    "head.modulation": "modulation",
    "head.head": "proj_out",
}

# Fields with one supported value; absent means the library's default, which is that value.
DIT_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


def dit_config(json: dict) -> WanConfig:
    """transformer/config.json of the diffusers layout -> WanConfig. ValueError for what is not supported."""
    name = json.get("_class_name", "WanTransformer3DModel")
    if name != "WanTransformer3DModel":
        raise ValueError(
            f"_class_name = {name!r}; supported: 'WanTransformer3DModel', as Wan 2.2 TI2V-5B has"
        )
    for field, wanted in DIT_FIXED.items():
        if json.get(field, wanted) != wanted:
            raise ValueError(
                f"{field} = {json[field]!r}; supported: {wanted!r}, as in Wan 2.2 TI2V-5B. Models with an "
                "image encoder take their picture another way"
            )
    patch = tuple(json.get("patch_size", (1, 2, 2)))
    if patch[0] != 1 or patch[1] != patch[2]:
        raise ValueError(f"patch_size = {list(patch)}; supported: one frame of a square, [1, 2, 2]")
    _same_channels(json.get("in_channels", 16), json.get("out_channels", 16))
    return WanConfig(
        layers=json.get("num_layers", 40),
        heads=json.get("num_attention_heads", 40),
        head_dim=json.get("attention_head_dim", 128),
        hidden=json.get("ffn_dim", 13824),
        channels=json.get("in_channels", 16),
        patch=patch[1],
        freq_dim=json.get("freq_dim", 256),
        text_dim=json.get("text_dim", 4096),
        norm_eps=json.get("eps", 1e-6),
    )


def original_dit_config(json: dict) -> WanConfig:
    """config.json of the original layout -> WanConfig. ValueError for what is not supported."""
    if json.get("model_type") != "ti2v":
        raise ValueError(f"model_type = {json.get('model_type')!r}; supported: 'ti2v', Wan 2.2 TI2V-5B")
    _same_channels(json.get("in_dim", 16), json.get("out_dim", 16))
    heads = json.get("num_heads", 16)
    return WanConfig(
        layers=json.get("num_layers", 32),
        heads=heads,
        head_dim=json.get("dim", 2048) // heads,
        hidden=json.get("ffn_dim", 8192),
        channels=json.get("in_dim", 16),
        freq_dim=json.get("freq_dim", 256),
        text_dim=UMT5_XXL.dim,
        text_tokens=json.get("text_len", 512),
        norm_eps=json.get("eps", 1e-6),
    )


def _same_channels(channels_in: int, channels_out: int) -> None:
    if channels_in != channels_out:
        raise ValueError(
            f"{channels_in} channels in, {channels_out} out: an image-to-video model, which takes an image "
            "beside the noise; the method starts from a text-to-video model"
        )


# ------------------------------------------------------------------------------------- text encoder
UMT5_NAMES: Names = {theirs: ours for theirs, ours in T5_NAMES.items() if ours != "bias.table"}
UMT5_NAMES |= {"encoder.block.{}.layer.0.SelfAttention.relative_attention_bias": "blocks.{}.bias.table"}

UMT5_NAMES_ORIGINAL: Names = {
    "token_embedding": "embed",
    "blocks.{}.pos_embedding.embedding": "blocks.{}.bias.table",
    "blocks.{}.norm1": "blocks.{}.norm1",
    "blocks.{}.attn.q": "blocks.{}.attn.q",
    "blocks.{}.attn.k": "blocks.{}.attn.k",
    "blocks.{}.attn.v": "blocks.{}.attn.v",
    "blocks.{}.attn.o": "blocks.{}.attn.out",
    "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.ffn.gate.0": "blocks.{}.ff.gate",
    "blocks.{}.ffn.fc1": "blocks.{}.ff.up",
    "blocks.{}.ffn.fc2": "blocks.{}.ff.down",
    "norm": "norm",
}
UMT5_XXL = T5Config(vocab=256_384, bias_in_every_block=True)
UNK, EXTRA_IDS = 3, 300  # of UMT5's vocabulary


def umt5_config(json: dict) -> T5Config:
    """text_encoder/config.json -> T5Config. ValueError for any text encoder but UMT5."""
    if json.get("model_type", "umt5") != "umt5":
        raise ValueError(f"model_type = {json['model_type']!r}; Wan reads text with 'umt5'")
    shared = t5_config({"feed_forward_proj": "gated-gelu", **json, "model_type": "t5"})
    return dataclasses.replace(shared, bias_in_every_block=True)


# ------------------------------------------------------------------------------------------------ VAE
VAE_NAMES: Names = {
    "quant_conv": "encoder.posterior",
    "post_quant_conv": "decoder.latent_in",
    "encoder.down_blocks.{}.resnets.{}.norm{}": "encoder.levels.{}.blocks.{}.norm{}",
    "encoder.down_blocks.{}.resnets.{}.conv{}": "encoder.levels.{}.blocks.{}.conv{}",
    "encoder.down_blocks.{}.resnets.{}.conv_shortcut": "encoder.levels.{}.blocks.{}.shortcut",
    "encoder.down_blocks.{}.downsampler.resample.1": "encoder.levels.{}.resize",
    "encoder.down_blocks.{}.downsampler.time_conv": "encoder.levels.{}.time",
    "decoder.up_blocks.{}.resnets.{}.norm{}": "decoder.levels.{}.blocks.{}.norm{}",
    "decoder.up_blocks.{}.resnets.{}.conv{}": "decoder.levels.{}.blocks.{}.conv{}",
    "decoder.up_blocks.{}.resnets.{}.conv_shortcut": "decoder.levels.{}.blocks.{}.shortcut",
    "decoder.up_blocks.{}.upsampler.resample.1": "decoder.levels.{}.resize",
    "decoder.up_blocks.{}.upsampler.time_conv": "decoder.levels.{}.time",
}
VAE_NAMES_ORIGINAL: Names = {
    "conv1": "encoder.posterior",
    "conv2": "decoder.latent_in",
}
for _side, _level, _resize in (("encoder", "downsamples", 2), ("decoder", "upsamples", 3)):
    VAE_NAMES |= {
        f"{_side}.conv_in": f"{_side}.conv_in",
        f"{_side}.mid_block.resnets.0.norm{{}}": f"{_side}.middle.block1.norm{{}}",
        f"{_side}.mid_block.resnets.0.conv{{}}": f"{_side}.middle.block1.conv{{}}",
        f"{_side}.mid_block.attentions.0.norm": f"{_side}.middle.attention.norm",
        f"{_side}.mid_block.attentions.0.to_qkv": f"{_side}.middle.attention.to_qkv",
        f"{_side}.mid_block.attentions.0.proj": f"{_side}.middle.attention.proj",
        f"{_side}.mid_block.resnets.1.norm{{}}": f"{_side}.middle.block2.norm{{}}",
        f"{_side}.mid_block.resnets.1.conv{{}}": f"{_side}.middle.block2.conv{{}}",
        f"{_side}.norm_out": f"{_side}.norm_out",
        f"{_side}.conv_out": f"{_side}.conv_out",
    }
    VAE_NAMES_ORIGINAL |= {
        f"{_side}.conv1": f"{_side}.conv_in",
        f"{_side}.{_level}.{{}}.{_level}.{{}}.shortcut": f"{_side}.levels.{{}}.blocks.{{}}.shortcut",
        f"{_side}.{_level}.{{}}.{_level}.{_resize}.resample.1": f"{_side}.levels.{{}}.resize",
        f"{_side}.{_level}.{{}}.{_level}.{_resize}.time_conv": f"{_side}.levels.{{}}.time",
        f"{_side}.middle.1.norm": f"{_side}.middle.attention.norm",
        f"{_side}.middle.1.to_qkv": f"{_side}.middle.attention.to_qkv",
        f"{_side}.middle.1.proj": f"{_side}.middle.attention.proj",
        f"{_side}.head.0": f"{_side}.norm_out",
        f"{_side}.head.2": f"{_side}.conv_out",
    }
    # A residual block is a list, in which activations and dropout count too.
    _block = f"{_level}.{{}}.{_level}.{{}}"
    for _place, _layer in ((0, "norm1"), (2, "conv1"), (3, "norm2"), (6, "conv2")):
        VAE_NAMES_ORIGINAL |= {
            f"{_side}.{_block}.residual.{_place}": f"{_side}.levels.{{}}.blocks.{{}}.{_layer}",
            f"{_side}.middle.0.residual.{_place}": f"{_side}.middle.block1.{_layer}",
            f"{_side}.middle.2.residual.{_place}": f"{_side}.middle.block2.{_layer}",
        }

# Fields with one supported value and the library's default; Wan 2.1's VAE, for one, has no shortcuts.
VAE_FIXED = (
    ("is_residual", False, True),
    ("patch_size", None, 2),
    ("in_channels", 3, 12),
    ("out_channels", 3, 12),
    ("attn_scales", [], []),
)


def vae_config(json: dict) -> WanVAEConfig:
    """vae/config.json of the diffusers layout -> WanVAEConfig. ValueError for another autoencoder."""
    for field, default, wanted in VAE_FIXED:
        if json.get(field, default) != wanted:
            raise ValueError(f"{field} = {json.get(field, default)!r}; supported: {wanted!r}, as in Wan 2.2")
    channels = json.get("z_dim", 16)
    for field in ("latents_mean", "latents_std"):
        if len(json.get(field, ())) != channels:
            raise ValueError(f"{field} has {len(json.get(field, ()))} numbers, z_dim is {channels}")
    return WanVAEConfig(
        encoder_width=json.get("base_dim", 96),
        decoder_width=json.get("decoder_base_dim") or json.get("base_dim", 96),
        multipliers=tuple(json.get("dim_mult", (1, 2, 4, 4))),
        layers=json.get("num_res_blocks", 2),
        halve_time=tuple(json.get("temperal_downsample", (False, True, True))),
        latent_channels=channels,
        mean=tuple(json["latents_mean"]),
        std=tuple(json["latents_std"]),
    )


# ------------------------------------------------------------------------------------------ schedule
SAMPLER_OF = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}

# (field, the library's default, the supported value) of the first; of either, what no Wan has.
UNIPC_FIXED = (
    ("prediction_type", "epsilon", "flow_prediction"),
    ("use_flow_sigmas", False, True),
    ("solver_order", 2, 2),
    ("solver_type", "bh2", "bh2"),
    ("predict_x0", True, True),
    ("lower_order_final", True, True),
    ("final_sigmas_type", "zero", "zero"),
    ("thresholding", False, False),
)
FLOW_FIXED = (
    ("use_dynamic_shifting", False, False),
    ("use_karras_sigmas", False, False),
    ("use_exponential_sigmas", False, False),
    ("use_beta_sigmas", False, False),
    ("shift_terminal", None, None),
)


def schedule_from(json: dict) -> FlowMatching:
    """scheduler/scheduler_config.json -> the noise process. ValueError for another one."""
    name = json.get("_class_name")
    if name not in SAMPLER_OF:
        raise ValueError(f"_class_name = {name!r}: not Wan's; supported: {', '.join(SAMPLER_OF)}")
    unipc = SAMPLER_OF[name] == "unipc"
    for field, default, wanted in (UNIPC_FIXED if unipc else ()) + FLOW_FIXED:
        if json.get(field, default) != wanted:
            raise ValueError(f"{field} = {json.get(field, default)!r}; supported: {wanted!r}, as in Wan 2.2")
    return FlowMatching(
        train_steps=json.get("num_train_timesteps", 1000),
        shift=json.get("flow_shift" if unipc else "shift", 1.0),
        default_sampler=SAMPLER_OF[name],
    )


# ----------------------------------------------------------------------------------------- the folders
CONFIGS = {
    "dit": "transformer/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "schedule": "scheduler/scheduler_config.json",
}
DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_PTH, UMT5_PTH = "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"  # of the original layout
VAE_ORIGINAL = WanVAEConfig()  # which has no config for it


def is_wan(path: Path) -> bool:
    """Whether the folder of a checkpoint holds a Wan, in either layout."""
    configs = (path / file for file in (CONFIGS["dit"], "config.json"))
    found = next((file for file in configs if file.is_file()), None)
    return found is not None and str(read_json(found).get("_class_name")).startswith("Wan")


def read_layout(path: Path) -> Layout:
    """What the configs of a folder say. ValueError, with file and reason, for what is not supported."""
    return _diffusers_layout(path) if (path / CONFIGS["dit"]).is_file() else _original_layout(path)


def _diffusers_layout(path: Path) -> Layout:
    read_config(path / "model_index.json", _check_index)
    dit = read_config(path / CONFIGS["dit"], dit_config)
    dit = dataclasses.replace(dit, text_tokens=_text_tokens(path / "tokenizer/tokenizer_config.json"))
    vae = read_config(path / CONFIGS["vae"], vae_config)
    text = read_config(path / CONFIGS["text"], umt5_config)
    parts = {
        "dit": Part("transformer", DIT_FILE, DIT_NAMES, lambda: WanDiT(dit)),
        "vae": Part("vae", DIT_FILE, VAE_NAMES, lambda: WanVAE(vae)),
        "text": _text_part(path / "tokenizer", "text_encoder", "model.safetensors", UMT5_NAMES, text, dit),
    }
    schedule = read_config(path / CONFIGS["schedule"], schedule_from)
    files = ("model_index.json", *CONFIGS.values(), *_vocabulary(path, "tokenizer"))
    return _layout(path, parts, schedule, files, dit, vae)


def _original_layout(path: Path) -> Layout:
    dit, vae = read_config(path / "config.json", original_dit_config), VAE_ORIGINAL
    parts = {
        "dit": Part("", DIT_FILE, DIT_NAMES_ORIGINAL, lambda: WanDiT(dit)),
        "vae": Part("", VAE_PTH, VAE_NAMES_ORIGINAL, lambda: WanVAE(vae)),
        "text": _text_part(path / "google/umt5-xxl", "", UMT5_PTH, UMT5_NAMES_ORIGINAL, UMT5_XXL, dit),
    }
    files = ("config.json", *_vocabulary(path, "google/umt5-xxl"))
    return _layout(path, parts, FlowMatching(), files, dit, vae)


def _check_index(json: dict) -> None:
    if not json.get("expand_timesteps", False):
        raise ValueError(
            "expand_timesteps is not true: this Wan has one time for all tokens, so a reference cannot be "
            "clean while the video is noisy; supported: Wan 2.2 TI2V-5B"
        )


def _text_tokens(config: Path) -> int:
    """Tokens of a prompt: Wan's, or fewer if the tokenizer of a small model says so."""
    stated = read_json(config).get("model_max_length") if config.is_file() else None
    return min(stated or WanConfig.text_tokens, WanConfig.text_tokens)


def _text_part(tokenizer: Path, folder: str, file: str, names: Names, cfg: T5Config, dit: WanConfig) -> Part:
    model = tokenizer / "spiece.model"
    model = model if model.is_file() else tokenizer / "tokenizer.json"
    reader = Tokenizer(read_pieces(model, UNK), dit.text_tokens, EXTRA_IDS)
    build = lambda: UMT5TextEncoder(reader, T5Encoder(cfg))  # noqa: E731
    return Part(folder, file, names, build, root="encoder", note=CLEANING)


def _vocabulary(path: Path, folder: str) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in (path / folder).glob("*") if file.is_file())


def _layout(
    path: Path, parts: dict[str, Part], schedule: FlowMatching, files: tuple[str, ...], dit: WanConfig,
    vae: WanVAEConfig,
) -> Layout:  # fmt: skip
    if dit.channels != vae.latent_channels:
        raise ValueError(
            f"{path}: the transformer has {dit.channels} channels, the VAE {vae.latent_channels}: not of one "
            "model; supported: Wan 2.2 TI2V-5B, with 48"
        )
    return Layout(
        path=path,
        parts=parts,
        schedule=schedule,
        files=files,
        frames=121,
        height=704,
        width=1280,
        fps=24.0,
        guidance=5.0,
        negative=NEGATIVE,
        spatial_ratio=vae.spatial_ratio,
        temporal_ratio=vae.temporal_ratio,
        channels=dit.channels,
        patch=dit.patch,
        text_tokens=dit.text_tokens,
    )
