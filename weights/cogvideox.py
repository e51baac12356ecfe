"""CogVideoX checkpoints in the diffusers layout: what their configs mean, what their tensors are called."""

from pathlib import Path

from sdv.models.cogvideox_dit import CogVideoXConfig, CogVideoXDiT
from sdv.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from sdv.models.text import T5Config, T5Encoder, TextEncoder, Tokenizer
from sdv.schedule import VPrediction
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
from weights.tensors import Names
from weights.vocabulary import read_pieces

# ---------------------------------------------------------------------------------------- transformer
DIT_NAMES: Names = {
    "patch_embed.proj": "patch_in",
    "patch_embed.text_proj": "text_in",
    "time_embedding.linear_{}": "time_in.linear_{}",
    "transformer_blocks.{}.norm{}.linear": "blocks.{}.mod{}",
    "transformer_blocks.{}.norm{}.norm": "blocks.{}.norm{}",
    "transformer_blocks.{}.attn1.norm_q": "blocks.{}.attn.norm_q",
    "transformer_blocks.{}.attn1.norm_k": "blocks.{}.attn.norm_k",
    "transformer_blocks.{}.attn1.to_q": "blocks.{}.attn.q",
    "transformer_blocks.{}.attn1.to_k": "blocks.{}.attn.k",
    "transformer_blocks.{}.attn1.to_v": "blocks.{}.attn.v",
    "transformer_blocks.{}.attn1.to_out.0": "blocks.{}.attn.out",
    "transformer_blocks.{}.ff.net.0.proj": "blocks.{}.ff.up",
    "transformer_blocks.{}.ff.net.2": "blocks.{}.ff.down",
    "norm_final": "norm_final",
    "norm_out.linear": "mod_out",
    "norm_out.norm": "norm_out",
    "proj_out": "proj_out",
}

# CogVideoX-2B and -1.5 and the image-to-video models are told by what they have that 5B has not.
DIT_FIELDS: Fields = {
    "_class_name": fixed("CogVideoXTransformer3DModel", "supported: CogVideoX-5B and Wan 2.2 TI2V-5B"),
    "patch_size_t": fixed(None, "CogVideoX 1.5 patches time as well, and lays out its positions another way"),
    "use_rotary_positional_embeddings": fixed(
        True, "CogVideoX-2B has sine-cosine positions; supported: CogVideoX-5B text-to-video", default=False
    ),
    "use_learned_positional_embeddings": fixed(False, "the image-to-video model has learned positions"),
    "ofs_embed_dim": fixed(None, "the 1.5 image-to-video model has an extra time embedding"),
    "activation_fn": fixed("gelu-approximate"),
    "timestep_activation_fn": fixed("silu"),
    "attention_bias": fixed(True),
    "patch_bias": fixed(True),
    "norm_elementwise_affine": fixed(True),
    "flip_sin_to_cos": fixed(True),
    "freq_shift": fixed(0),
    "temporal_interpolation_scale": fixed(1.0),
    "num_layers": Row(LAYERS, 30, "layers"),
    "num_attention_heads": Row(HEADS, 30, "heads"),
    "attention_head_dim": Row(Whole(16, 512, step=16), 64, "head_dim"),
    "in_channels": Row(WIDTH, 16, "channels"),
    "out_channels": Row(WIDTH, 16, "out_channels"),
    "patch_size": Row(Whole(1, 16), 2, "patch"),
    "time_embed_dim": Row(WIDTH, 512, "time_dim"),
    "text_embed_dim": Row(WIDTH, 4096, "text_dim"),
    "max_text_seq_length": Row(TOKENS, 226, "text_tokens"),
    "norm_eps": Row(EPS, 1e-5, "norm_eps"),
    "sample_height": Row(Whole(1, 4096), 60, "base_height"),
    "sample_width": Row(Whole(1, 4096), 90, "base_width"),
    "sample_frames": Row(Whole(1, 4097), 49, "base_frames"),
}


def dit_config(json: dict) -> CogVideoXConfig:
    """transformer/config.json -> CogVideoXConfig. ValueError, with the reason, if it is not supported."""
    found = read_fields(json, DIT_FIELDS)
    same_channels("in_channels", found["channels"], "out_channels", found.pop("out_channels"))
    for field in ("base_height", "base_width"):
        if found[field] % found["patch"]:
            theirs = field.replace("base", "sample")
            raise ValueError(f"{theirs} = {found[field]} is not a multiple of patch_size = {found['patch']}")
    return CogVideoXConfig(**found)


# ------------------------------------------------------------------------------------------------ VAE
VAE_NAMES: Names = {
    "encoder.conv_in.conv": "encoder.conv_in",
    "encoder.down_blocks.{}.resnets.{}.norm{}": "encoder.levels.{}.blocks.{}.norm{}",
    "encoder.down_blocks.{}.resnets.{}.conv{}.conv": "encoder.levels.{}.blocks.{}.conv{}",
    "encoder.down_blocks.{}.resnets.{}.conv_shortcut": "encoder.levels.{}.blocks.{}.shortcut",
    "encoder.down_blocks.{}.downsamplers.0.conv": "encoder.levels.{}.resize",
    "encoder.mid_block.resnets.{}.norm{}": "encoder.middle.blocks.{}.norm{}",
    "encoder.mid_block.resnets.{}.conv{}.conv": "encoder.middle.blocks.{}.conv{}",
    "encoder.norm_out": "encoder.norm_out",
    "encoder.conv_out.conv": "encoder.conv_out",
    "decoder.conv_in.conv": "decoder.conv_in",
    "decoder.mid_block.resnets.{}.norm{}.norm_layer": "decoder.middle.blocks.{}.norm{}.norm",
    "decoder.mid_block.resnets.{}.norm{}.conv_y.conv": "decoder.middle.blocks.{}.norm{}.scale",
    "decoder.mid_block.resnets.{}.norm{}.conv_b.conv": "decoder.middle.blocks.{}.norm{}.shift",
    "decoder.mid_block.resnets.{}.conv{}.conv": "decoder.middle.blocks.{}.conv{}",
    "decoder.up_blocks.{}.resnets.{}.norm{}.norm_layer": "decoder.levels.{}.blocks.{}.norm{}.norm",
    "decoder.up_blocks.{}.resnets.{}.norm{}.conv_y.conv": "decoder.levels.{}.blocks.{}.norm{}.scale",
    "decoder.up_blocks.{}.resnets.{}.norm{}.conv_b.conv": "decoder.levels.{}.blocks.{}.norm{}.shift",
    "decoder.up_blocks.{}.resnets.{}.conv{}.conv": "decoder.levels.{}.blocks.{}.conv{}",
    "decoder.up_blocks.{}.resnets.{}.conv_shortcut": "decoder.levels.{}.blocks.{}.shortcut",
    "decoder.up_blocks.{}.upsamplers.0.conv": "decoder.levels.{}.resize",
    "decoder.norm_out.norm_layer": "decoder.norm_out.norm",
    "decoder.norm_out.conv_y.conv": "decoder.norm_out.scale",
    "decoder.norm_out.conv_b.conv": "decoder.norm_out.shift",
    "decoder.conv_out.conv": "decoder.conv_out",
}

VAE_FIELDS: Fields = {
    "_class_name": fixed("AutoencoderKLCogVideoX"),
    "in_channels": fixed(3),
    "out_channels": fixed(3),
    "act_fn": fixed("silu"),
    "norm_eps": fixed(1e-6),
    "shift_factor": fixed(None),
    "latents_mean": fixed(None),
    "latents_std": fixed(None),
    "use_quant_conv": fixed(False),
    "use_post_quant_conv": fixed(False),
    "invert_scale_latents": fixed(False),
    "block_out_channels": Row(Many(WIDTH, 1, 8), (128, 256, 256, 512), "widths"),
    "layers_per_block": Row(Whole(1, 32), 3, "layers"),
    "norm_num_groups": Row(WIDTH, 32, "groups"),
    "latent_channels": Row(WIDTH, 16, "latent_channels"),
    "temporal_compression_ratio": Row(Whole(1, 64), 4, "temporal_ratio"),
    "scaling_factor": Row(Real(1e-3, 1e3), 1.15258426, "scaling"),
    "sample_height": Row(Whole(1, 2**15), 480, "height"),
    "sample_width": Row(Whole(1, 2**15), 720, "width"),
}


def vae_config(json: dict) -> CogVideoXVAEConfig:
    """vae/config.json -> CogVideoXVAEConfig. ValueError for another autoencoder."""
    cfg = CogVideoXVAEConfig(**read_fields(json, VAE_FIELDS))
    if any(width % cfg.groups for width in cfg.widths):
        raise ValueError(
            f"block_out_channels = {list(cfg.widths)}; supported: multiples of norm_num_groups = {cfg.groups}"
        )
    ratios = [2**n for n in range(min(len(cfg.widths), 4))]  # 8 frames are encoded together
    if cfg.temporal_ratio not in ratios:
        raise ValueError(
            f"temporal_compression_ratio = {cfg.temporal_ratio}; supported: {', '.join(map(str, ratios))}, "
            f"one halving at most after each of {len(cfg.widths) - 1} levels"
        )
    return cfg


# ------------------------------------------------------------------------------------- text encoder
T5_NAMES: Names = {
    "shared": "embed",
    "encoder.embed_tokens": None,  # the same table again
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "bias.table",
    "encoder.block.{}.layer.0.layer_norm": "blocks.{}.norm1",
    "encoder.block.{}.layer.0.SelfAttention.q": "blocks.{}.attn.q",
    "encoder.block.{}.layer.0.SelfAttention.k": "blocks.{}.attn.k",
    "encoder.block.{}.layer.0.SelfAttention.v": "blocks.{}.attn.v",
    "encoder.block.{}.layer.0.SelfAttention.o": "blocks.{}.attn.out",
    "encoder.block.{}.layer.1.layer_norm": "blocks.{}.norm2",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0": "blocks.{}.ff.gate",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1": "blocks.{}.ff.up",
    "encoder.block.{}.layer.1.DenseReluDense.wo": "blocks.{}.ff.down",
    "encoder.final_layer_norm": "norm",
}


T5_FIELDS: Fields = {
    "model_type": fixed("t5", "CogVideoX reads text with 't5'"),
    "feed_forward_proj": fixed(
        "gated-gelu",
        "the first T5, without a gate; supported: 'gated-gelu', which is T5 v1.1",
        default="relu",
    ),
    "vocab_size": Row(Whole(1, 2**22), 32128, "vocab"),
    "d_model": Row(WIDTH, 512, "dim"),
    "num_layers": Row(LAYERS, 6, "layers"),
    "num_heads": Row(HEADS, 8, "heads"),
    "d_kv": Row(Whole(1, 4096), 64, "head_dim"),
    "d_ff": Row(WIDTH, 2048, "hidden"),
    "relative_attention_num_buckets": Row(Whole(4, 4096), 32, "buckets"),
    "relative_attention_max_distance": Row(Whole(2, 2**20), 128, "max_distance"),
    "layer_norm_epsilon": Row(EPS, 1e-6, "eps"),
}


def t5_config(json: dict, fields: Fields = T5_FIELDS) -> T5Config:
    """text_encoder/config.json -> T5Config. ValueError for any text encoder but T5 v1.1."""
    cfg = T5Config(**read_fields(json, fields))
    if cfg.max_distance <= cfg.buckets // 4:
        raise ValueError(
            f"relative_attention_max_distance = {cfg.max_distance}; supported: more than a quarter of "
            f"relative_attention_num_buckets = {cfg.buckets}, each of which has a distance of its own"
        )
    return cfg


# ------------------------------------------------------------------------------------------ schedule
SCHEDULE_FIELDS: Fields = {
    "_class_name": Row(
        Choice({"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}), None, "default_sampler"
    ),
    "prediction_type": fixed(
        "v_prediction", "the network would predict something else than velocity", default="epsilon"
    ),
    "timestep_spacing": fixed("trailing", "sampling would not start from pure noise", default="leading"),
    "beta_schedule": fixed("scaled_linear"),
    "trained_betas": fixed(None, "a noise schedule of its own"),
    "set_alpha_to_one": fixed(True, "sampling would stop before the last noise is gone"),
    "num_train_timesteps": Row(STEPS, 1000, "train_steps"),
    "beta_start": Row(Real(1e-6, 0.5), 0.00085, "beta_start"),
    "beta_end": Row(Real(1e-6, 0.5), 0.012, "beta_end"),
    "rescale_betas_zero_snr": Row(Flag(), False, "zero_snr"),
    "snr_shift_scale": Row(SHIFT, 3.0, "snr_shift_scale"),
}


def schedule_from(json: dict) -> VPrediction:
    """scheduler/scheduler_config.json -> the noise process. ValueError, with the reason, for another one."""
    schedule = VPrediction(**read_fields(json, SCHEDULE_FIELDS))
    if schedule.beta_end < schedule.beta_start:
        raise ValueError(
            f"beta_end = {schedule.beta_end}; supported: beta_start = {schedule.beta_start} or more"
        )
    return schedule


# ------------------------------------------------------------------------------------------- the folder
TOKENIZER = "tokenizer/spiece.model"
CONFIGS = {
    "dit": "transformer/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "schedule": "scheduler/scheduler_config.json",
}


def read_layout(path: Path) -> Layout:
    """What the configs of a folder say. ValueError, with file and reason, for what is not supported."""
    dit = read_config(path / CONFIGS["dit"], dit_config)
    vae = read_config(path / CONFIGS["vae"], vae_config)
    text = read_config(path / CONFIGS["text"], t5_config)
    same_model(path, dit, vae, text)
    if (dit.base_frames - 1) % vae.temporal_ratio:
        raise ValueError(
            f"{path / CONFIGS['dit']}: sample_frames = {dit.base_frames}; supported: a multiple of the VAE's "
            f"temporal_compression_ratio = {vae.temporal_ratio}, and one more"
        )
    tokenizer = Tokenizer(read_pieces(path / TOKENIZER), dit.text_tokens)
    require_rows(path / CONFIGS["text"], tokenizer, text)
    vocabulary = files_in(path, "tokenizer")
    index = ["model_index.json"] if (path / "model_index.json").is_file() else []
    weights_file = "diffusion_pytorch_model.safetensors"
    return Layout(
        path=path,
        parts={
            "dit": Part("transformer", weights_file, DIT_NAMES, lambda: CogVideoXDiT(dit)),
            "vae": Part("vae", weights_file, VAE_NAMES, lambda: CogVideoXVAE(vae)),
            "text": Part(
                "text_encoder",
                "model.safetensors",
                T5_NAMES,
                lambda: TextEncoder(tokenizer, T5Encoder(text)),
                root="encoder",
            ),
        },
        schedule=read_config(path / CONFIGS["schedule"], schedule_from),
        files=(*index, *CONFIGS.values(), *vocabulary),
        frames=dit.base_frames,
        height=dit.base_height * vae.spatial_ratio,
        width=dit.base_width * vae.spatial_ratio,
        fps=8.0,
        guidance=6.0,
        negative="",
        spatial_ratio=vae.spatial_ratio,
        temporal_ratio=vae.temporal_ratio,
        channels=dit.channels,
        patch=dit.patch,
        text_tokens=dit.text_tokens,
    )
