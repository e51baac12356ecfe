"""The micro-world's models: their configs as a checkpoint folder has them, in either backbone's classes."""

from weights import tiny

SIZE, FRAMES = 64, 17

# Why these sizes. 64x64 pixels are 8x8 latents, 16 tokens a frame. The temporal ratio is 1, not 4: motion is
# then exact without one step on clips, a reference is the same kind of thing as a frame of the video, and a
# clip is 272 tokens, which two cores can afford. All else is the 5B model's: classes, files, schedule.
CONFIGS = {
    **tiny.CONFIGS,
    "vae/config.json": tiny.VAE
    | {
        "block_out_channels": [16, 32, 48, 64],
        "latent_channels": 16,
        "temporal_compression_ratio": 1,
        "scaling_factor": 1.0,  # until the latents have been seen
        "sample_height": SIZE,
        "sample_width": SIZE,
    },
    "transformer/config.json": tiny.TRANSFORMER
    | {
        "num_attention_heads": 6,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 32,
        "text_embed_dim": 96,
        "num_layers": 6,
        "sample_width": SIZE // 8,
        "sample_height": SIZE // 8,
        "sample_frames": FRAMES,
        "max_text_seq_length": 32,
    },
    "text_encoder/config.json": tiny.TEXT_ENCODER | {"d_model": 96, "d_kv": 24, "d_ff": 192},
}
# The same sizes in Wan's classes. Half of the VAE's way down is its patch.
WAN_CONFIGS = {
    **tiny.WAN_CONFIGS,
    "vae/config.json": tiny.WAN_CONFIGS["vae/config.json"]
    | {
        "base_dim": 32,
        "decoder_base_dim": 32,
        "z_dim": 16,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, False],
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 1,
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
    "transformer/config.json": tiny.WAN_CONFIGS["transformer/config.json"]
    | {
        "num_attention_heads": 4,
        "ffn_dim": 1024,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 6,
        "text_dim": 96,
    },
    "text_encoder/config.json": tiny.WAN_CONFIGS["text_encoder/config.json"]
    | {"d_model": 96, "d_kv": 24, "d_ff": 192},
    "tokenizer/tokenizer_config.json": tiny.WAN_CONFIGS["tokenizer/tokenizer_config.json"]
    | {"model_max_length": 32},
}
FAMILIES = {"cogvideox": CONFIGS, "wan": WAN_CONFIGS}
