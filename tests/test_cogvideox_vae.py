"""The VAE beside diffusers' on a checkpoint that diffusers wrote: both ways, every cut of time, tiled too."""

import subprocess
import sys

import pytest
import torch
from conftest import relative_error

from sdv.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from weights.cogvideox import VAE_NAMES, vae_config
from weights.tensors import load_into, read_json, rename

TINY = {
    "block_out_channels": (16, 16, 32, 32), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "sample_height": 96, "sample_width": 160, "scaling_factor": 0.7,
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    stock = diffusers.AutoencoderKLCogVideoX(**TINY).eval()
    for parameter in stock.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    stock.save_pretrained(folder)
    with torch.device("meta"):
        vae = CogVideoXVAE(vae_config(read_json(folder / "config.json")))
    load_into(vae, VAE_NAMES, folder, "cpu", torch.float32)
    return stock, vae.eval()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
@torch.no_grad()
def test_both_ways_equal_diffusers_however_time_is_cut(both, frames, tiled):
    stock, vae = both
    vae.tiling = tiled
    stock.enable_tiling() if tiled else stock.disable_tiling()
    clip = torch.rand(2, 3, frames, 72, 112) * 2 - 1  # two tiles by two, of 48 x 80
    posterior = stock.encode(clip).latent_dist
    latents = vae.encode(clip)
    assert relative_error(latents, 0.7 * posterior.mean) <= 1e-5
    # Of an even number of latents diffusers decodes a whole group for the first; its last frame is the clip.
    decoded = stock.decode(posterior.mean).sample[:, :, -frames:]
    assert relative_error(vae.decode(latents), decoded) <= 1e-5


@torch.no_grad()
def test_a_sample_equals_diffusers_with_the_same_noise(both):
    stock, vae = both
    vae.tiling = False
    stock.disable_tiling()
    clip = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    ours = vae.encode(clip, rng=torch.Generator().manual_seed(3))
    theirs = stock.encode(clip).latent_dist.sample(torch.Generator().manual_seed(3))
    assert relative_error(ours, 0.7 * theirs) <= 1e-5


def test_with_gradients_the_numbers_are_the_same_and_equal_diffusers_gradients(both):
    stock, vae = both
    vae.tiling = False
    stock.disable_tiling()
    clip = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    mean = vae.requires_grad_(True).posterior(clip)[0]
    vae.decode(mean * 0.7).square().mean().backward()
    found = {name: p.grad for name, p in vae.named_parameters()}
    stock.decode(stock.encode(clip).latent_dist.mean).sample.square().mean().backward()
    vae.requires_grad_(False)
    with torch.no_grad():
        assert relative_error(vae.posterior(clip)[0], mean.detach()) <= 1e-5
    for theirs, parameter in stock.named_parameters():
        assert relative_error(found[rename(theirs, VAE_NAMES)], parameter.grad) <= 1e-3, theirs


@pytest.mark.parametrize("ratio", [1, 2])
def test_other_temporal_ratios(ratio):
    vae = CogVideoXVAE(CogVideoXVAEConfig((8, 16, 16), 1, 4, 4, ratio))
    clip = torch.rand(1, 3, 4 * ratio + 1, 16, 24)
    with torch.no_grad():
        latents = vae.encode(clip)
        assert latents.shape == (1, 4, 5, 4, 6)
        assert vae.decode(latents).shape == clip.shape


def test_the_5b_vae_has_its_published_size():
    with torch.device("meta"):
        parameters = list(CogVideoXVAE(CogVideoXVAEConfig()).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (436, 215_583_907)


def test_clips_that_do_not_fit_are_refused(both):
    for shape, match in (((1, 3, 4, 64, 64), "4 frames"), ((1, 3, 5, 64, 60), "60 x 64")):
        with pytest.raises(ValueError, match=match):
            both[1].encode(torch.zeros(shape))


MEASURE = """
import resource, sys, torch
from sdv.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
torch.set_num_threads(1)
vae = CogVideoXVAE(CogVideoXVAEConfig((32, 32, 32, 32), 1, 8, 4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    vae.decode(torch.randn(1, 4, int(sys.argv[1]), 32, 32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_decoding_memory_does_not_grow_with_the_length_of_a_clip():
    """49 frames beside 17: what the process adds while decoding, the result itself included."""
    peak = [int(subprocess.check_output([sys.executable, "-c", MEASURE, str(n)])) for n in (5, 13)]
    assert peak[1] <= 1.15 * peak[0], peak
