"""Wan's VAE beside diffusers', whole and in pieces."""

import pytest
import torch

from helpers import relative_error
from sdv.models import fast_conv
from sdv.models.wan_vae import WanVAE, WanVAEConfig
from weights import wan
from weights.tensors import load_into, save_module

diffusers = pytest.importorskip("diffusers")

TINY = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [0.1, 0.2, -0.3, 0.4, 0.0, 0.6],
    "latents_std": [1.0, 2.0, 0.5, 1.5, 0.7, 1.1],
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """diffusers' VAE, every weight random, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("wan") / "vae"
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(**TINY).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, folder


def load(folder, names=wan.VAE_NAMES) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(wan.vae_config(TINY))
    load_into(vae, names, folder, "cpu", torch.float32)
    return vae.eval()


def clip_of(frames: int, height=64, width=96) -> torch.Tensor:
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(TINY[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
    return mean, std


@pytest.mark.parametrize("frames", [1, 5, 9])
@torch.no_grad()
def test_both_ways_equal_diffusers_for_pictures_and_clips(stock, frames):
    model, folder = stock
    vae, clip, (mean, std) = load(folder), clip_of(frames), statistics()
    posterior = model.encode(clip).latent_dist
    latents = vae.encode(clip)
    assert latents.shape == (2, 6, (frames - 1) // 4 + 1, 4, 6)
    assert relative_error(latents, (posterior.mean - mean) / std) <= 1e-5
    assert relative_error(vae.posterior(clip)[1], posterior.logvar) <= 1e-5
    video = vae.decode(latents)
    assert video.shape == clip.shape
    assert relative_error(video, model.decode(latents * std + mean).sample) <= 1e-5


@torch.no_grad()
def test_a_latent_does_not_know_what_comes_after_it(stock):
    """Streaming, the theorem: the beginning of a long clip is coded as if it were all."""
    vae, clip = load(stock[1]), clip_of(13)
    latents = vae.encode(clip)
    video = vae.decode(latents)
    for kept in (1, 2, 3):
        assert relative_error(latents[:, :, :kept], vae.encode(clip[:, :, : 4 * kept - 3])) <= 1e-6
        assert relative_error(video[:, :, : 4 * kept - 3], vae.decode(latents[:, :, :kept])) <= 1e-6


@torch.no_grad()
def test_bands_of_rows_change_nothing(stock, monkeypatch):
    vae, clip = load(stock[1]), clip_of(9, 128, 64)
    latents = vae.encode(clip)
    video = vae.decode(latents)
    monkeypatch.setattr(fast_conv, "BAND_BYTES", 1)
    assert relative_error(vae.encode(clip), latents) <= 1e-6
    assert relative_error(vae.decode(latents), video) <= 1e-6


def test_with_gradients_the_values_are_the_same_and_the_gradients_diffusers(stock):
    model, folder = stock
    vae, (mean, std) = load(folder), statistics()
    ours, theirs = clip_of(5).requires_grad_(), clip_of(5).requires_grad_()
    latents = vae.encode(ours)
    with torch.no_grad():
        assert relative_error(vae.encode(ours.detach()), latents) <= 1e-6
    vae.decode(latents).square().sum().backward()
    z = (model.encode(theirs).latent_dist.mean - mean) / std
    model.decode(z * std + mean).sample.square().sum().backward()
    assert relative_error(ours.grad, theirs.grad) <= 1e-4


@torch.no_grad()
def test_tiles_equal_diffusers_and_without_overlap_they_are_clips_of_their_own(stock):
    model, folder = stock
    vae, (mean, std) = load(folder), statistics()
    latents = torch.randn(1, 6, 2, 9, 7, generator=torch.Generator().manual_seed(4))
    whole = vae.decode(latents)
    vae.tiling = True
    vae.set_tiles(64, 64, 1 / 4, 1 / 4)
    model.enable_tiling(64, 64, 48, 48)
    try:
        want = model.decode(latents * std + mean).sample
    finally:
        model.use_tiling = False
    found = vae.decode(latents)
    assert found.shape == whole.shape
    assert relative_error(found, want) <= 1e-5
    assert relative_error(found, whole) > 0
    vae.set_tiles(64, 64, 0, 0)
    clip = clip_of(5, 128, 64)
    apart = torch.cat([vae.encode(clip[:, :, :, :64]), vae.encode(clip[:, :, :, 64:])], dim=3)
    assert torch.equal(vae.encode(clip), apart)


def test_the_original_layout_is_the_same_model(stock, tmp_path):
    ours = load(stock[1])
    save_module(ours, wan.VAE_NAMES_ORIGINAL, tmp_path / "model.safetensors", torch.float32)
    again = load(tmp_path, wan.VAE_NAMES_ORIGINAL).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_the_published_model_is_the_default_and_other_sizes_of_a_clip_are_refused():
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig())
    parameters = list(vae.parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (196, 704_688_668)
    real = TINY | {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48}
    real |= {"latents_mean": list(WanVAEConfig().mean), "latents_std": list(WanVAEConfig().std)}
    assert wan.vae_config(real) == WanVAEConfig()
    with pytest.raises(ValueError, match="8 frames"):
        vae.encode(torch.empty(1, 3, 8, 32, 32, device="meta"))
    with pytest.raises(ValueError, match="multiples of 16"):
        vae.encode(torch.empty(1, 3, 1, 40, 32, device="meta"))
