"""The shipped base: what its files are, and that stock diffusers computes the same from them."""

import pytest
import torch

from helpers import relative_error, stock_predict
from microworld import world
from microworld.pretrain import psnr
from microworld.sizes import CONFIGS, FRAMES, SIZE
from microworld.studio import TOY
from weights import load_backbone
from weights.tensors import read_json


@pytest.fixture(scope="module")
def base():
    return load_backbone(TOY, dtype=torch.float32, log=lambda line: None)


@torch.no_grad()
def test_diffusers_predicts_the_same_velocity(base):
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.CogVideoXTransformer3DModel.from_pretrained(TOY / "transformer").float().eval()
    rng = torch.Generator().manual_seed(0)
    video, ref = (torch.randn(2, 16, frames, 8, 8, generator=rng) for frames in (3, 1))
    text, t = base.text(["a fish moves to the left on a pink background", ""]), torch.tensor([3, 900])
    assert relative_error(base.dit(video, t, text, ref), stock_predict(stock, video, t, text, ref)) <= 1e-5


@torch.no_grad()
def test_diffusers_codes_a_clip_alike_and_what_is_coded_comes_back(base):
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.AutoencoderKLCogVideoX.from_pretrained(TOY / "vae").float().eval()
    clip = world.to_clip(world.render(world.scene(0, FRAMES, "heldout"), SIZE))[None]
    latents = stock.encode(clip).latent_dist.mode()
    ours = base.vae.encode(clip)
    assert relative_error(ours, latents * stock.config.scaling_factor) <= 1e-5
    coded = base.vae.decode(ours)
    assert relative_error(coded, stock.decode(latents).sample) <= 1e-5
    assert psnr(coded, clip) > 30  # dB; 8 if it were all grey


def test_the_files_are_what_make_base_writes_and_small():
    for name, config in CONFIGS.items():
        found = read_json(TOY / name)
        measured = {"scaling_factor": found["scaling_factor"]} if "vae" in name else {}
        assert found == config | measured, name
    # The base, of 14.3M parameters; the adapter lies beside its folders.
    assert sum(file.stat().st_size for file in TOY.glob("*/*.*") if file.suffix != ".pyc") <= 30e6
