"""CogVideoX checkpoints in the diffusers layout: what their configs mean, what their tensors are called."""

from sdv.cogvideox_dit import CogVideoXConfig
from weights.tensors import Names

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


# ------------------------------------------------------------------------------------- text encoder


# ------------------------------------------------------------------------------------------ schedule
