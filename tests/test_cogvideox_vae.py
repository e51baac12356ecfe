"""The VAE beside diffusers' on a checkpoint that diffusers wrote: both ways, every cut of time, tiled too."""

import os
import subprocess
import sys

import pytest
import torch

from helpers import relative_error
from sdv.models import fast_conv
from sdv.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from weights.cogvideox import VAE_NAMES, vae_config
from weights.tensors import load_into, read_json, rename

TINY = {
    "block_out_channels": (16, 16, 32, 32), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "sample_height": 96, "sample_width": 160, "scaling_factor": 0.7,
}  # fmt: skip


def write_and_load(folder, **changes):
    """A random VAE of diffusers', and ours loaded from the files it wrote."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = len(changes.get("block_out_channels", TINY["block_out_channels"]))
    types = {"down_block_types": ("CogVideoXDownBlock3D",) * levels}
    types["up_block_types"] = ("CogVideoXUpBlock3D",) * levels
    stock = diffusers.AutoencoderKLCogVideoX(**TINY | types | changes).eval()
    for parameter in stock.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    stock.save_pretrained(folder)
    with torch.device("meta"):
        vae = CogVideoXVAE(vae_config(read_json(folder / "config.json")))
    load_into(vae, VAE_NAMES, folder, "cpu", torch.float32)
    return stock, vae.eval()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return write_and_load(tmp_path_factory.mktemp("vae"))


def random_clip(batch, frames, height, width):
    return torch.rand(batch, 3, frames, height, width) * 2 - 1


def both_ways(stock, vae, clip):
    """Relative errors of the latents and of the decoded clip, beside diffusers'."""
    posterior = stock.encode(clip).latent_dist
    latents = vae.encode(clip)
    # Of an even number of latents diffusers decodes a whole group for the first; its last frame is the clip.
    decoded = stock.decode(posterior.mean).sample[:, :, -clip.shape[2] :]
    scaling = stock.config.scaling_factor
    return relative_error(latents, scaling * posterior.mean), relative_error(vae.decode(latents), decoded)


# ── Beside diffusers ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
@torch.no_grad()
def test_both_ways_equal_diffusers_however_time_is_cut(both, frames, tiled, monkeypatch):
    stock, vae = both
    monkeypatch.setattr(vae, "tiling", tiled)
    stock.enable_tiling() if tiled else stock.disable_tiling()
    clip = random_clip(2, frames, 72, 112)  # two tiles by two, of 48 x 80
    encoded, decoded = both_ways(stock, vae, clip)
    stock.disable_tiling()
    assert encoded <= 1e-5
    assert decoded <= 1e-5


@torch.no_grad()
def test_tiles_of_other_sizes_equal_diffusers(both, monkeypatch):
    stock, vae = both
    tiles = 64, 32, 1 / 4, 1 / 2
    stock.enable_tiling(*tiles)
    vae.set_tiles(*tiles)
    monkeypatch.setattr(vae, "tiling", True)
    encoded, decoded = both_ways(stock, vae, random_clip(1, 5, 72, 56))  # the last tiles are slivers
    stock.disable_tiling()
    vae.set_tiles(48, 80, 1 / 6, 1 / 5)
    assert encoded <= 1e-5
    assert decoded <= 1e-5


@torch.no_grad()
def test_bands_of_rows_equal_diffusers_too(both, monkeypatch):
    monkeypatch.setattr(fast_conv, "BAND_BYTES", 1)  # bands of eight rows everywhere
    encoded, decoded = both_ways(*both, random_clip(1, 17, 72, 40))
    assert encoded <= 1e-5
    assert decoded <= 1e-5


@pytest.mark.parametrize("ratio", [1, 2, 4])
@torch.no_grad()
def test_other_shapes_of_network_equal_diffusers(ratio, tmp_path):
    stock, vae = write_and_load(
        tmp_path,
        block_out_channels=(8, 24, 16),
        layers_per_block=2,
        norm_num_groups=8,
        temporal_compression_ratio=ratio,
    )
    encoded, decoded = both_ways(stock, vae, random_clip(1, 4 * ratio + 1, 16, 24))
    assert encoded <= 1e-5
    assert decoded <= 1e-5


@torch.no_grad()
def test_mean_and_variance_of_the_posterior_equal_diffusers(both):
    stock, vae = both
    clip = random_clip(1, 5, 64, 64)
    ours, theirs = vae.posterior(clip), stock.encode(clip).latent_dist
    assert relative_error(ours[0], theirs.mean) <= 1e-5
    assert relative_error(ours[1], theirs.logvar) <= 1e-5


def test_with_gradients_the_numbers_are_the_same_and_equal_diffusers_gradients(both):
    stock, vae = both
    clip = random_clip(1, 17, 24, 32)
    mean, logvar = vae.requires_grad_(True).posterior(clip)
    (vae.decode(mean * 0.7).square().mean() + logvar.square().mean()).backward()
    found = {name: p.grad for name, p in vae.named_parameters()}
    posterior = stock.encode(clip).latent_dist
    (stock.decode(posterior.mean).sample.square().mean() + posterior.logvar.square().mean()).backward()
    vae.requires_grad_(False)
    with torch.no_grad():
        assert relative_error(vae.posterior(clip)[0], mean.detach()) <= 1e-5
    for theirs, parameter in stock.named_parameters():
        assert relative_error(found[rename(theirs, VAE_NAMES)], parameter.grad) <= 1e-3, theirs


@torch.no_grad()
def test_bfloat16_is_as_close_to_float64_as_diffusers(both):
    """Summed over clips: for one clip either side may be a tenth closer."""
    stock, vae = both
    errors = torch.zeros(2, 2)  # encoding and decoding, ours and diffusers'
    for _ in range(4):
        clip = random_clip(1, 17, 64, 64).bfloat16()
        stock.bfloat16(), vae.bfloat16()
        latents = vae.encode(clip)
        decoded = vae.decode(latents), stock.decode(latents / 0.7).sample
        encoded = latents, stock.encode(clip).latent_dist.mean * 0.7
        vae.double()
        truth, exact = vae.encode(clip.double()), vae.decode(latents.double())
        errors[0] += torch.tensor([relative_error(each, truth) for each in encoded])
        errors[1] += torch.tensor([relative_error(each, exact) for each in decoded])
    stock.float(), vae.float()
    assert (errors[:, 0] <= 1.1 * errors[:, 1]).all(), errors


# ── Ours alone ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_5b_vae_has_its_published_size():
    with torch.device("meta"):
        parameters = list(CogVideoXVAE(CogVideoXVAEConfig()).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (436, 215_583_907)


def test_clips_that_do_not_fit_are_refused(both):
    for shape, match in (((1, 3, 4, 64, 64), "4 frames"), ((1, 3, 5, 64, 60), "60 x 64")):
        with pytest.raises(ValueError, match=match):
            both[1].encode(torch.zeros(shape))


MEASURE = """
import sys, torch
from pathlib import Path
from sdv.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
def peak():  # of this program alone, where getrusage knows the peak of the one that started it as well
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
vae = CogVideoXVAE(CogVideoXVAEConfig((32, 32, 32, 32), 1, 8, 4))
before = peak()
with torch.inference_mode():
    vae.decode(torch.randn(1, 4, int(sys.argv[1]), 32, 32))
print(peak() - before)
"""


def test_decoding_memory_does_not_grow_with_the_length_of_a_clip():
    """49 frames beside 25: what the process adds while decoding, the result itself included.

    Not beside 17, whose two chunks have none between them: only there two frames of every convolution are
    both remembered and waiting.
    """
    # The C library keeps holes of what is free, more or fewer by chance; below this size it does not.
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", MEASURE]
    peak = [int(subprocess.check_output([*command, str(n)], env=exact)) for n in (7, 13)]
    assert peak[1] <= 1.15 * peak[0], peak
