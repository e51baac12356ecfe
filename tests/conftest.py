"""Oracles shared by the parity tests: tiny random models that diffusers writes, and our own."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import weights.cogvideox
from sdv.cogvideox_dit import CogVideoXDiT
from weights.tensors import load_into, read_json
from weights.tiny import CONFIGS, CORPUS, create, train_vocabulary

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


def load_dit(folder) -> CogVideoXDiT:
    with torch.device("meta"):
        dit = CogVideoXDiT(weights.cogvideox.dit_config(read_json(folder / "config.json")))
    load_into(dit, weights.cogvideox.DIT_NAMES, folder, "cpu", torch.float32)
    return dit.eval()


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
