"""A tiny random model in the diffusers layout: every class, config and file of the 5B one, in seconds.

    python -m weights.tiny out/tiny
    python -m weights.tiny out/tiny-wan --backbone wan

Its videos are noise; it proves that files, shapes, training and sampling fit together.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch

from sdv.data.files import require_empty
from sdv.run.settings import Parser, run
from weights import open_backbone
from weights.tensors import save_module

CORPUS = """
a dog lies on the grass in the sun
a white dog stands beside a chair and looks into the camera
two dogs run across a field while the camera follows them
a cat sleeps on a red sofa
a bird flies over the sea in the early morning
a man rides a bike down a busy street past parked cars
people walk along the road in front of a house
a woman talks on the telephone in a moving car
a large rabbit wakes up, stretches and looks at a butterfly
a small boat on a quiet lake with green hills behind it
close up of a face, soft light, blurred background
black and white stripes, yellow flowers, blue sky, dark wood
the subject turns left, turns right, moves up and down, jumps and stops
"""

TRANSFORMER = {
    "_class_name": "CogVideoXTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 8,
    "out_channels": 8,
    "time_embed_dim": 64,
    "text_embed_dim": 64,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 32,
    "use_rotary_positional_embeddings": True,
}
VAE = {
    "_class_name": "AutoencoderKLCogVideoX",
    "block_out_channels": [16, 32, 32, 32],
    "latent_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.7,
    "temporal_compression_ratio": 4,
}
TEXT_ENCODER = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 512,
}
SCHEDULER = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
INDEX = {
    "_class_name": "CogVideoXPipeline",
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def train_vocabulary(sentences: Iterable[str], size: int, umt5: bool = False) -> bytes:
    """A SentencePiece unigram model of about `size` pieces with T5's ids: pad 0, eos 1, unk 2.

    UMT5's has <s> 2, unk 3, and no normalization rules.
    """
    model = io.BytesIO()
    rules = "identity" if umt5 else "nmt_nfkc"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=size,
        hard_vocab_limit=False, character_coverage=1.0, num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=3 if umt5 else 2, bos_id=2 if umt5 else -1, normalization_rule_name=rules,
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", bos_piece="<s>",
    )  # fmt: skip
    return model.getvalue()


def write_configs(path: str | Path, configs: dict[str, dict], vocabulary: bytes) -> None:
    """Write a checkpoint without weights; configs are keyed by file, e.g. "vae/config.json"."""
    path = Path(path)
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
    for file, content in {"tokenizer/tokenizer_config.json": tokenizer, **configs}.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(json.dumps(content, indent=2) + "\n")
    (path / "tokenizer/spiece.model").write_bytes(vocabulary)


def create(path: str | Path, configs: dict[str, dict], vocabulary: bytes, seed: int = 0) -> None:
    """Write a randomly initialised checkpoint, as write_configs, with weights."""
    path = Path(path)
    write_configs(path, configs, vocabulary)
    torch.manual_seed(seed)
    for part in open_backbone(path).parts.values():
        module = part.build().get_submodule(part.root)
        save_module(module, part.names, path / part.folder / part.file, torch.float32)


CONFIGS = {
    "model_index.json": INDEX,
    "scheduler/scheduler_config.json": SCHEDULER,
    "text_encoder/config.json": TEXT_ENCODER,
    "transformer/config.json": TRANSFORMER,
    "vae/config.json": VAE,
}
WAN_CONFIGS = {
    "model_index.json": {
        "_class_name": "WanPipeline",
        "expand_timesteps": True,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": 5.0,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    },
    "text_encoder/config.json": TEXT_ENCODER
    | {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": 704},
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": 300},
    "transformer/config.json": {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "ffn_dim": 256,
        "freq_dim": 64,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "patch_size": [1, 2, 2],
        "text_dim": 64,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 8,
        "decoder_base_dim": 8,
        "z_dim": 8,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "latents_mean": [0.0] * 8,
        "latents_std": [1.0] * 8,
    },
}
FAMILIES = {"cogvideox": CONFIGS, "wan": WAN_CONFIGS}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("path", help="folder to write")
    parser.add_argument("--backbone", choices=FAMILIES, default="cogvideox", help="of which family")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    require_empty(Path(options.path))
    vocabulary = train_vocabulary(CORPUS.strip().splitlines(), 256, umt5=options.backbone == "wan")
    create(options.path, FAMILIES[options.backbone], vocabulary, options.seed)
    print(f"{options.path}: a tiny random {options.backbone}")


if __name__ == "__main__":
    run(main)
