"""CogVideoX checkpoints in the diffusers layout: what their configs mean, what their tensors are called."""

from pathlib import Path

from sdv.models.cogvideox_dit import CogVideoXConfig, CogVideoXDiT
from sdv.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from sdv.models.text import T5Config, T5Encoder, TextEncoder, Tokenizer
from sdv.schedule import VPrediction
from weights.layout import Layout, Part, read_config
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

# What the family members that are not supported look like in transformer/config.json, and why they are not.
DIT_REFUSED = (
    ("patch_size_t", None, "CogVideoX 1.5 patches time as well, and lays out its positions another way"),
    ("use_rotary_positional_embeddings", True, "CogVideoX-2B has sine-cosine positions, not rotary ones"),
    ("use_learned_positional_embeddings", False, "the image-to-video model has learned positions"),
    ("ofs_embed_dim", None, "the 1.5 image-to-video model has an extra time embedding"),
)

# Fields with one supported value; absent means the library's default, which is that value.
DIT_FIXED = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "attention_bias": True,
    "patch_bias": True,
    "norm_elementwise_affine": True,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "temporal_interpolation_scale": 1.0,
}


def dit_config(json: dict) -> CogVideoXConfig:
    """transformer/config.json -> CogVideoXConfig. ValueError, with the reason, if it is not supported."""
    for field, wanted, reason in DIT_REFUSED:
        found = json.get(field, False if field == "use_rotary_positional_embeddings" else wanted)
        if found != wanted:
            raise ValueError(f"{field} = {found!r}: {reason}; supported: CogVideoX-5B text-to-video")
    for field, wanted in DIT_FIXED.items():
        if json.get(field, wanted) != wanted:
            raise ValueError(f"{field} = {json[field]!r}; supported: {wanted!r}, as in CogVideoX-5B")
    if json.get("in_channels", 16) != json.get("out_channels", 16):
        raise ValueError(
            f"in_channels = {json['in_channels']}, out_channels = {json['out_channels']}: the image-to-video "
            "model takes an image beside the noise; the method starts from the text-to-video model"
        )
    return CogVideoXConfig(
        layers=json.get("num_layers", 30),
        heads=json.get("num_attention_heads", 30),
        head_dim=json.get("attention_head_dim", 64),
        channels=json.get("in_channels", 16),
        patch=json.get("patch_size", 2),
        time_dim=json.get("time_embed_dim", 512),
        text_dim=json.get("text_embed_dim", 4096),
        text_tokens=json.get("max_text_seq_length", 226),
        norm_eps=json.get("norm_eps", 1e-5),
        base_height=json.get("sample_height", 60),
        base_width=json.get("sample_width", 90),
        base_frames=json.get("sample_frames", 49),
    )


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

# Fields with one supported value; absent means the library's default, which is that value.
VAE_FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "invert_scale_latents": False,
}


def vae_config(json: dict) -> CogVideoXVAEConfig:
    """vae/config.json -> CogVideoXVAEConfig. ValueError for another autoencoder."""
    name = json.get("_class_name", "AutoencoderKLCogVideoX")
    if name != "AutoencoderKLCogVideoX":
        raise ValueError(f"_class_name = {name!r}; CogVideoX's is 'AutoencoderKLCogVideoX'")
    for field, wanted in VAE_FIXED.items():
        if json.get(field, wanted) != wanted:
            raise ValueError(f"{field} = {json[field]!r}; supported: {wanted!r}, as in CogVideoX-5B")
    return CogVideoXVAEConfig(
        widths=tuple(json.get("block_out_channels", (128, 256, 256, 512))),
        layers=json.get("layers_per_block", 3),
        groups=json.get("norm_num_groups", 32),
        latent_channels=json.get("latent_channels", 16),
        temporal_ratio=int(json.get("temporal_compression_ratio", 4)),
        scaling=json.get("scaling_factor", 1.15258426),
        height=json.get("sample_height", 480),
        width=json.get("sample_width", 720),
    )


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


def t5_config(json: dict) -> T5Config:
    """text_encoder/config.json -> T5Config. ValueError for any text encoder but T5 v1.1."""
    if json.get("model_type", "t5") != "t5":
        raise ValueError(f"model_type = {json['model_type']!r}; CogVideoX reads text with 't5'")
    if json.get("feed_forward_proj", "relu") != "gated-gelu":
        raise ValueError(
            f"feed_forward_proj = {json.get('feed_forward_proj', 'relu')!r}: the first T5, without a gate; "
            "supported: 'gated-gelu', which is T5 v1.1"
        )
    return T5Config(
        vocab=json.get("vocab_size", 32128),
        dim=json.get("d_model", 512),
        layers=json.get("num_layers", 6),
        heads=json.get("num_heads", 8),
        head_dim=json.get("d_kv", 64),
        hidden=json.get("d_ff", 2048),
        buckets=json.get("relative_attention_num_buckets", 32),
        max_distance=json.get("relative_attention_max_distance", 128),
        eps=json.get("layer_norm_epsilon", 1e-6),
    )


# ------------------------------------------------------------------------------------------ schedule
SAMPLER_OF = {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}

# (field, the library's default, the supported value, what another value means)
SCHEDULE_FIXED = (
    ("prediction_type", "epsilon", "v_prediction", "the network would predict something else than velocity"),
    ("timestep_spacing", "leading", "trailing", "sampling would not start from pure noise"),
    ("beta_schedule", "scaled_linear", "scaled_linear", "another noise schedule"),
    ("trained_betas", None, None, "a noise schedule of its own"),
    ("set_alpha_to_one", True, True, "sampling would stop before the last noise is gone"),
)


def schedule_from(json: dict) -> VPrediction:
    """scheduler/scheduler_config.json -> the noise process. ValueError, with the reason, for another one."""
    name = json.get("_class_name")
    if name not in SAMPLER_OF:
        raise ValueError(f"_class_name = {name!r}: not CogVideoX's; supported: {', '.join(SAMPLER_OF)}")
    for field, default, wanted, reason in SCHEDULE_FIXED:
        if json.get(field, default) != wanted:
            raise ValueError(f"{field} = {json.get(field, default)!r}: {reason}; supported: {wanted!r}")
    return VPrediction(
        train_steps=json.get("num_train_timesteps", 1000),
        beta_start=json.get("beta_start", 0.00085),
        beta_end=json.get("beta_end", 0.012),
        zero_snr=json.get("rescale_betas_zero_snr", False),
        snr_shift_scale=json.get("snr_shift_scale", 3.0),
        default_sampler=SAMPLER_OF[name],
    )


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
    tokenizer = Tokenizer(read_pieces(path / TOKENIZER), dit.text_tokens)
    vocabulary = sorted(str(file.relative_to(path)) for file in path.glob("tokenizer/*"))
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
        files=("model_index.json", *CONFIGS.values(), *vocabulary),
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
