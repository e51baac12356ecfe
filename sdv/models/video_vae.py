"""What both VAEs do around their networks: sizes, a sample of the posterior, chunks of frames, tiles."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sdv.models.causal_conv import Stream


class VAEConfig(Protocol):
    """What is asked of either architecture."""

    latent_channels: int
    spatial_ratio: int  # pixels per latent
    temporal_ratio: int  # frames per latent, after the first


class Tiles(NamedTuple):
    """Tiles of a frame and how far they overlap, in latents."""

    height: int
    width: int
    overlap_height: int
    overlap_width: int


class VideoVAE(nn.Module, ABC):
    """Encodes clips to latents and decodes them, a few frames at a time.

    When parameters or input need gradients all activations are kept; else memory does not grow with time.
    """

    def __init__(self, cfg: VAEConfig, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, encoder, decoder
        self.tiling = False

    @property
    def spatial_ratio(self) -> int:
        return self.cfg.spatial_ratio

    @property
    def temporal_ratio(self) -> int:
        return self.cfg.temporal_ratio

    @property
    def latent_channels(self) -> int:
        return self.cfg.latent_channels

    @abstractmethod
    def posterior(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, C, T', h, w), of the unscaled latents of a clip (B, 3, T, H, W)."""

    @abstractmethod
    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as the network makes them -> as the transformer sees them."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, k + 1, h, w) -> clip (B, 3, temporal_ratio * k + 1, H, W), about [-1, 1]."""

    def encode(self, clip: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Clip (B, 3, T, H, W) in [-1, 1] -> scaled latents (B, C, T', h, w): posterior mean, or a sample.

        T is temporal_ratio * k + 1, T' is k + 1. ValueError for other frames, or sides that do not divide.
        """
        frames, height, width = clip.shape[2:]
        ratio, space = self.temporal_ratio, self.spatial_ratio
        if (frames - 1) % ratio:
            raise ValueError(f"a clip of {frames} frames: the VAE takes {ratio} k + 1, as {4 * ratio + 1}")
        if height % space or width % space:
            raise ValueError(f"a clip of {width} x {height} pixels: the VAE takes multiples of {space}")
        mean, logvar = self.posterior(clip)
        if rng is not None:
            noise = torch.randn(mean.shape, generator=rng, device=rng.device, dtype=mean.dtype)
            mean = mean + torch.exp(logvar / 2) * noise.to(mean.device)
        return self.scaled(mean)

    def chunks_through(
        self, network: nn.Module, x: Tensor, cuts: Sequence[tuple[int, int]]
    ) -> Iterator[Tensor]:
        """Send frames start..end of x (B, C, T, H, W) through a network, one cut after the other."""
        gradients = x.requires_grad or any(p.requires_grad for p in network.parameters())
        stream = Stream(lean=not (torch.is_grad_enabled() and gradients))
        for start, end in cuts:
            stream.last = end == x.shape[2]
            chunk = x[:, :, start:end].permute(2, 0, 3, 4, 1).contiguous()  # (T, B, H, W, C)
            yield network(chunk, stream).permute(1, 4, 0, 2, 3)

    def set_tiles(
        self, height: int, width: int, overlap_height: float = 1 / 6, overlap_width: float = 1 / 5
    ) -> None:
        """Size of the tiles in pixels, rounded down to whole latents, and the parts blended into the next.

        Used while `tiling` is true. A tile has its own statistics, so results differ a little from the whole.
        """
        rows, columns = max(height // self.spatial_ratio, 1), max(width // self.spatial_ratio, 1)
        self.tiles = Tiles(rows, columns, int(rows * overlap_height), int(columns * overlap_width))

    def in_tiles(self, function: Callable[[Tensor], Tensor], x: Tensor, of: int, to: int) -> Tensor:
        """Apply a function to tiles of x (B, C, T, H, W); a latent is `of` wide in x, `to` in the result."""
        tiles, (height, width) = self.tiles, x.shape[3:]
        if not self.tiling or (height <= tiles.height * of and width <= tiles.width * of):
            return function(x)
        step_y, step_x = tiles.height - tiles.overlap_height, tiles.width - tiles.overlap_width
        blend_y, blend_x = tiles.overlap_height * to, tiles.overlap_width * to
        above, out = {}, None
        for top in range(0, height // of, step_y):
            beside = None
            for left in range(0, width // of, step_x):
                rows = slice(top * of, (top + tiles.height) * of)
                columns = slice(left * of, (left + tiles.width) * of)
                y = function(x[..., rows, columns])
                if top:
                    blend(above[left], y, dim=3)
                if left:
                    blend(beside, y, dim=4)
                above[left], beside = tail(y, blend_y, dim=3), tail(y, blend_x, dim=4)
                if out is None:
                    out = y.new_empty(*y.shape[:3], height // of * to, width // of * to)
                y = y[..., : step_y * to, : step_x * to]
                out[..., top * to : top * to + y.shape[3], left * to : left * to + y.shape[4]] = y
        return out


def tail(x: Tensor, n: int, dim: int) -> Tensor:
    """A copy of the last n places of a dimension, or of all if it is shorter."""
    n = min(n, x.shape[dim])
    return x.narrow(dim, x.shape[dim] - n, n).clone()


def blend(before: Tensor, x: Tensor, dim: int) -> None:
    """Fade from the end of `before` to the start of x, in place, over as much as both have."""
    n = min(before.shape[dim], x.shape[dim])
    fade = torch.arange(n, device=x.device, dtype=x.dtype) / max(n, 1)
    fade = fade.unflatten(0, (-1, *[1] * (4 - dim)))
    start = x.narrow(dim, 0, n)
    start.copy_(tail(before, n, dim) * (1 - fade) + start * fade)
