"""Wan 2.2 TI2V-5B checkpoints in the diffusers layout and in the original one, read into the same modules."""

import dataclasses
from pathlib import Path

from sdv.models.text import CLEANING, T5Config, T5Encoder, Tokenizer, UMT5TextEncoder
from sdv.models.wan_dit import WanConfig, WanDiT
from sdv.models.wan_vae import WanVAE, WanVAEConfig
from sdv.schedule import FlowMatching
from weights.cogvideox import T5_FIELDS, T5_NAMES, t5_config
from weights.fields import (
    EPS,
    HEADS,
    LAYERS,
    SHIFT,
    STEPS,
    TOKENS,
    WIDTH,
    Choice,
    Fields,
    Flag,
    Many,
    Maybe,
    Real,
    Row,
    Whole,
    fixed,
    read_fields,
)
from weights.layout import (
    Layout,
    Part,
    files_in,
    read_config,
    require_rows,
    same_channels,
    same_model,
)
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

# Ours, in a merged model's config: where the adapter had the reference. Other readers warn and go on.
REF_POSITION: Fields = {
    "ref_position": Row(Choice({place: place for place in WanDiT.ref_positions}), "far", "ref_position")
}
WITH_IMAGE = "models with an image encoder take their picture another way"
DIT_FIELDS: Fields = REF_POSITION | {
    "_class_name": fixed(
        "WanTransformer3DModel", "supported: 'WanTransformer3DModel', as Wan 2.2 TI2V-5B has"
    ),
    "cross_attn_norm": fixed(True),
    "qk_norm": fixed("rms_norm_across_heads"),
    "image_dim": fixed(None, WITH_IMAGE),
    "added_kv_proj_dim": fixed(None, WITH_IMAGE),
    "pos_embed_seq_len": fixed(None, WITH_IMAGE),
    "patch_size": Row(Many(Whole(1, 16), 3, 3), (1, 2, 2), "patch"),
    "num_layers": Row(LAYERS, 40, "layers"),
    "num_attention_heads": Row(HEADS, 40, "heads"),
    "attention_head_dim": Row(Whole(2, 512, step=2), 128, "head_dim"),
    "ffn_dim": Row(WIDTH, 13824, "hidden"),
    "in_channels": Row(WIDTH, 16, "channels"),
    "out_channels": Row(WIDTH, 16, "out_channels"),
    "freq_dim": Row(Whole(2, 2**17, step=2), 256, "freq_dim"),
    "text_dim": Row(WIDTH, 4096, "text_dim"),
    "eps": Row(EPS, 1e-6, "norm_eps"),
}
ORIGINAL_DIT_FIELDS: Fields = REF_POSITION | {
    "model_type": fixed("ti2v", "supported: 'ti2v', Wan 2.2 TI2V-5B", default=None),
    "num_layers": Row(LAYERS, 32, "layers"),
    "num_heads": Row(HEADS, 16, "heads"),
    "dim": Row(WIDTH, 2048, "head_dim"),
    "ffn_dim": Row(WIDTH, 8192, "hidden"),
    "in_dim": Row(WIDTH, 16, "channels"),
    "out_dim": Row(WIDTH, 16, "out_channels"),
    "freq_dim": Row(Whole(2, 2**17, step=2), 256, "freq_dim"),
    "text_len": Row(TOKENS, 512, "text_tokens"),
    "eps": Row(EPS, 1e-6, "norm_eps"),
}


def dit_config(json: dict) -> WanConfig:
    """transformer/config.json of the diffusers layout -> WanConfig. ValueError for what is not supported."""
    found = read_fields(json, DIT_FIELDS)
    frames, height, width = found["patch"]
    if frames != 1 or height != width:
        raise ValueError(f"patch_size = {list(found['patch'])}; supported: one frame of a square, [1, 2, 2]")
    same_channels("in_channels", found["channels"], "out_channels", found.pop("out_channels"))
    return WanConfig(**found | {"patch": height})


def original_dit_config(json: dict) -> WanConfig:
    """config.json of the original layout -> WanConfig. ValueError for what is not supported."""
    found = read_fields(json, ORIGINAL_DIT_FIELDS)
    dim, heads = found["head_dim"], found["heads"]
    if dim % (2 * heads):
        raise ValueError(f"dim = {dim}; supported: an even number for each of num_heads = {heads}")
    same_channels("in_dim", found["channels"], "out_dim", found.pop("out_channels"))
    return WanConfig(**found | {"head_dim": dim // heads, "text_dim": UMT5_XXL.dim})


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


UMT5_FIELDS: Fields = T5_FIELDS | {
    "model_type": fixed("umt5", "Wan reads text with 'umt5'"),
    "feed_forward_proj": fixed("gated-gelu"),
    "vocab_size": T5_FIELDS["vocab_size"]._replace(default=250112),
    "num_layers": T5_FIELDS["num_layers"]._replace(default=8),
    "num_heads": T5_FIELDS["num_heads"]._replace(default=6),
    "d_ff": T5_FIELDS["d_ff"]._replace(default=1024),
}


def umt5_config(json: dict) -> T5Config:
    """text_encoder/config.json -> T5Config. ValueError for any text encoder but UMT5."""
    return dataclasses.replace(t5_config(json, UMT5_FIELDS), bias_in_every_block=True)


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

# Wan 2.1's, for one, has no shortcuts.
VAE_FIELDS: Fields = {
    "is_residual": fixed(True, default=False),
    "patch_size": fixed(2, default=None),
    "in_channels": fixed(12, default=3),
    "out_channels": fixed(12, default=3),
    "attn_scales": fixed([]),
    "base_dim": Row(WIDTH, 96, "encoder_width"),
    "decoder_base_dim": Row(Maybe(WIDTH), None, "decoder_width"),
    "dim_mult": Row(Many(Whole(1, 64), 2, 8), (1, 2, 4, 4), "multipliers"),
    "num_res_blocks": Row(Whole(1, 32), 2, "layers"),
    "temperal_downsample": Row(Many(Flag(), 1, 7), (False, True, True), "halve_time"),
    "z_dim": Row(WIDTH, 16, "latent_channels"),
    "latents_mean": Row(Many(Real(-1e3, 1e3), 1, 2**17), (), "mean"),
    "latents_std": Row(Many(Real(1e-3, 1e3), 1, 2**17), (), "std"),
}


def vae_config(json: dict) -> WanVAEConfig:
    """vae/config.json of the diffusers layout -> WanVAEConfig. ValueError for another autoencoder."""
    found = read_fields(json, VAE_FIELDS)
    channels, multipliers, halve = (found[name] for name in ("latent_channels", "multipliers", "halve_time"))
    for field, ours in (("latents_mean", "mean"), ("latents_std", "std")):
        if len(found[ours]) != channels:
            raise ValueError(f"{field} has {len(found[ours])} numbers, z_dim is {channels}")
    if len(multipliers) != len(halve) + 1:
        raise ValueError(
            f"dim_mult has {len(multipliers)} numbers; supported: temperal_downsample's {len(halve)} + 1"
        )
    # A shortcut averages the channels of 2 x 2 pixels, of one at the last level, in whole groups.
    for before, after, cell in zip((1, *multipliers), multipliers, [4] * len(halve) + [1], strict=False):
        if before * cell % after:
            raise ValueError(f"dim_mult = {list(multipliers)}; {after} does not divide {cell} times {before}")
    return WanVAEConfig(**found | {"decoder_width": found["decoder_width"] or found["encoder_width"]})


# ------------------------------------------------------------------------------------------ schedule
SAMPLER = Row(
    Choice({"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}),
    None,
    "default_sampler",
)
FLOW_FIELDS: Fields = {
    "_class_name": SAMPLER,
    "use_dynamic_shifting": fixed(False),
    "use_karras_sigmas": fixed(False),
    "use_exponential_sigmas": fixed(False),
    "use_beta_sigmas": fixed(False),
    "shift_terminal": fixed(None),
    "num_train_timesteps": Row(STEPS, 1000, "train_steps"),
}
EULER_FIELDS: Fields = FLOW_FIELDS | {
    "invert_sigmas": fixed(False),
    "stochastic_sampling": fixed(False),
    "shift": Row(SHIFT, 1.0, "shift"),
}
UNIPC_FIELDS: Fields = FLOW_FIELDS | {
    "prediction_type": fixed("flow_prediction", default="epsilon"),
    "use_flow_sigmas": fixed(True, default=False),
    "solver_order": fixed(2),
    "solver_type": fixed("bh2"),
    "predict_x0": fixed(True),
    "lower_order_final": fixed(True),
    "final_sigmas_type": fixed("zero"),
    "thresholding": fixed(False),
    "disable_corrector": fixed([]),
    "flow_shift": Row(SHIFT, 1.0, "shift"),
}


def schedule_from(json: dict) -> FlowMatching:
    """scheduler/scheduler_config.json -> the noise process. ValueError for another one."""
    euler = json.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
    return FlowMatching(**read_fields(json, EULER_FIELDS if euler else UNIPC_FIELDS))


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


INDEX_FIELDS: Fields = {
    "expand_timesteps": fixed(
        True,
        "this Wan has one time for all tokens, so a reference cannot be clean while the video is noisy; "
        "supported: Wan 2.2 TI2V-5B",
        default=False,
    )
}
# What a tokenizer without a limit says is a number of 31 digits.
TOKENIZER_FIELDS: Fields = {"model_max_length": Row(Maybe(Whole(1, 10**31)), None, "tokens")}


def is_wan(path: Path) -> bool:
    """Whether the folder of a checkpoint holds a Wan, in either layout."""
    configs = (path / file for file in (CONFIGS["dit"], "config.json"))
    found = next((file for file in configs if file.is_file()), None)
    return found is not None and str(read_json(found).get("_class_name")).startswith("Wan")


def read_layout(path: Path) -> Layout:
    """What the configs of a folder say. ValueError, with file and reason, for what is not supported."""
    return _diffusers_layout(path) if (path / CONFIGS["dit"]).is_file() else _original_layout(path)


def _diffusers_layout(path: Path) -> Layout:
    read_config(path / "model_index.json", lambda json: read_fields(json, INDEX_FIELDS))
    dit = read_config(path / CONFIGS["dit"], dit_config)
    dit = dataclasses.replace(dit, text_tokens=_text_tokens(path / "tokenizer/tokenizer_config.json"))
    vae = read_config(path / CONFIGS["vae"], vae_config)
    text = read_config(path / CONFIGS["text"], umt5_config)
    parts = {
        "dit": Part("transformer", DIT_FILE, DIT_NAMES, lambda: WanDiT(dit)),
        "vae": Part("vae", DIT_FILE, VAE_NAMES, lambda: WanVAE(vae)),
        "text": _text_part(path, "tokenizer", "text_encoder", "model.safetensors", UMT5_NAMES, text, dit),
    }
    schedule = read_config(path / CONFIGS["schedule"], schedule_from)
    files = ("model_index.json", *CONFIGS.values(), *files_in(path, "tokenizer"))
    return _layout(path, parts, schedule, files, dit, vae, text)


def _original_layout(path: Path) -> Layout:
    dit, vae = read_config(path / "config.json", original_dit_config), VAE_ORIGINAL
    parts = {
        "dit": Part("", DIT_FILE, DIT_NAMES_ORIGINAL, lambda: WanDiT(dit)),
        "vae": Part("", VAE_PTH, VAE_NAMES_ORIGINAL, lambda: WanVAE(vae)),
        "text": _text_part(path, "google/umt5-xxl", "", UMT5_PTH, UMT5_NAMES_ORIGINAL, UMT5_XXL, dit),
    }
    files = ("config.json", *files_in(path, "google/umt5-xxl"))
    return _layout(path, parts, FlowMatching(), files, dit, vae, UMT5_XXL)


def _text_tokens(config: Path) -> int:
    """Tokens of a prompt: Wan's, or fewer if the tokenizer of a small model says so."""
    if not config.is_file():
        return WanConfig.text_tokens
    stated = read_config(config, lambda json: read_fields(json, TOKENIZER_FIELDS)["tokens"])
    return min(stated or WanConfig.text_tokens, WanConfig.text_tokens)


def _text_part(
    path: Path, tokenizer: str, folder: str, file: str, names: Names, cfg: T5Config, dit: WanConfig
) -> Part:
    model = path / tokenizer / "spiece.model"
    model = model if model.is_file() else model.with_name("tokenizer.json")
    reader = Tokenizer(read_pieces(model, UNK), dit.text_tokens, EXTRA_IDS)
    require_rows(path / folder / "config.json", reader, cfg)
    build = lambda: UMT5TextEncoder(reader, T5Encoder(cfg))  # noqa: E731
    return Part(folder, file, names, build, root="encoder", note=CLEANING)


def _layout(
    path: Path, parts: dict[str, Part], schedule: FlowMatching, files: tuple[str, ...], dit: WanConfig,
    vae: WanVAEConfig, text: T5Config,
) -> Layout:  # fmt: skip
    same_model(path, dit, vae, text)
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
