"""Oracles shared by the parity tests: tiny random models that diffusers writes, and our own."""

import os

from helpers import TINY_DIT

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from weights.tiny import CONFIGS, CORPUS, create, train_vocabulary


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny random CogVideoX, with every part of the 5B model."""
    path = tmp_path_factory.mktemp("tiny")
    create(path, CONFIGS, train_vocabulary(CORPUS.strip().splitlines(), 256))
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
