"""Oracles shared by the parity tests: tiny random models that diffusers writes, and our own."""

import os
from pathlib import Path

from helpers import TINY_DIT

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from weights.tiny import CONFIGS, CORPUS, WAN_CONFIGS, create, train_vocabulary


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny random CogVideoX, with every part of the 5B model."""
    path = tmp_path_factory.mktemp("tiny")
    create(path, CONFIGS, train_vocabulary(CORPUS.strip().splitlines(), 256))
    return path


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """The folder of a tiny random Wan, with every part of the 5B model."""
    path = tmp_path_factory.mktemp("tiny-wan")
    create(path, WAN_CONFIGS, train_vocabulary(CORPUS.strip().splitlines(), 256, umt5=True))
    return path


@pytest.fixture
def stock_dit(tmp_path):
    """diffusers' transformer, every weight random, and the folder it was saved to."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    stock = diffusers.CogVideoXTransformer3DModel(**TINY_DIT)
    for parameter in stock.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    stock.eval().save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    return stock, tmp_path / "transformer"


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SEES = SMALL | {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> dict[str, Path]:
    """Folders of a CLIP, a DINO and a DINOv2, every weight random, written by transformers."""
    from tokenizers import pre_tokenizers

    transformers = pytest.importorskip("transformers")
    out, small = tmp_path_factory.mktemp("networks"), {"height": 32, "width": 32}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, end = {word: i for i, word in enumerate(words)}, len(words) - 1
    tokens = {"vocab_size": len(words), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = transformers.CLIPConfig(text_config=SMALL | tokens, vision_config=SEES, projection_dim=16)
    torch.manual_seed(0)
    made = {
        "clip": transformers.CLIPModel(config),
        "dino": transformers.ViTModel(transformers.ViTConfig(**SEES), add_pooling_layer=False),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**SEES)),
    }
    for name, model in made.items():
        for parameter in model.parameters():  # as they start, all pictures look alike
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(out / name)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(out / "clip")
    short = {"size": {"shortest_edge": 32}, "crop_size": small}
    transformers.CLIPImageProcessorPil(**short).save_pretrained(out / "clip")
    transformers.ViTImageProcessorPil(size=small).save_pretrained(out / "dino")
    transformers.BitImageProcessorPil(**short).save_pretrained(out / "dinov2")
    return {name: out / name for name in made}
