"""What both VAEs are built from: their common interface, chunks and tiles, layers that change the size."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdv.models.causal_conv import Stream
from sdv.models.fast_conv import conv2d

Cuts = Sequence[tuple[int, int]]  # first frame and end of each chunk
Tiles = tuple[tuple[int, int], tuple[int, int]]  # height and width, each with its overlap, in latents


# ------------------------------------------------------------------------------------------------- latents
def latent_frames(clip: Tensor, ratio: int, space: int) -> int:
    """How many latent frames a clip (B, 3, T, H, W) has. ValueError for sizes that a VAE does not take."""
    frames, height, width = clip.shape[2:]
    if (frames - 1) % ratio:
        raise ValueError(f"a clip of {frames} frames: the VAE takes {ratio} k + 1, as {4 * ratio + 1}")
    if height % space or width % space:
        raise ValueError(f"a clip of {width} x {height} pixels: the VAE takes multiples of {space}")
    return (frames - 1) // ratio + 1


class VideoVAE(nn.Module):
    """Encodes clips to latents and decodes them, in the tiles of set_tiles if `tiling`.

    A model adds posterior(clip), scaled(latents) and decode(latents).
    """

    def __init__(self, cfg: object, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, encoder, decoder
        self.tiling = False

    def set_tiles(self, height: int, width: int, overlap_height: float, overlap_width: float) -> None:
        """Size of the tiles in pixels, and the parts of them that are blended into the next."""
        space = self.cfg.spatial_ratio
        self.tiles = tile(height, overlap_height, space), tile(width, overlap_width, space)

    def encode(self, clip: Tensor) -> Tensor:
        """Clip (B, 3, T, H, W) in [-1, 1] -> scaled latents (B, C, T', h, w): the posterior's mean.

        T is temporal_ratio * k + 1, T' is k + 1. ValueError for other frames, or sides that do not divide.
        """
        return self.scaled(self.posterior(clip)[0])


# -------------------------------------------------------------------------------------- chunks and tiles
def tile(pixels: int, overlap: float, space: int) -> tuple[int, int]:
    """A side of a tile in whole latents of `space` pixels, and how many it shares with the next tile."""
    latents = max(pixels // space, 1)
    return latents, int(latents * overlap)


def cut(frames: int, first: int, size: int) -> list[tuple[int, int]]:
    """Cut frames into a first chunk and others of `size`."""
    return list(pairwise([0, *range(first, frames, size), frames]))


def in_chunks(network: nn.Module, x: Tensor, cuts: Cuts, frames: int) -> Tensor:
    """Send x (B, C, T, H, W) through a network, a chunk of its frames at a time: (B, C', frames, H', W').

    When parameters or x need gradients all activations are kept; else memory does not grow with time.
    """
    gradients = x.requires_grad or any(p.requires_grad for p in network.parameters())
    stream = Stream(lean=not (torch.is_grad_enabled() and gradients))
    out, done = None, 0
    for start, end in cuts:
        stream.last = end == x.shape[2]
        chunk = x[:, :, start:end].permute(2, 0, 3, 4, 1).contiguous()  # (T', B, H, W, C)
        y = network(chunk, stream).permute(1, 4, 0, 2, 3)
        out = y.new_empty(*y.shape[:2], frames, *y.shape[3:]) if out is None else out
        out[:, :, done : done + y.shape[2]] = y
        done += y.shape[2]
    return out


def in_tiles(
    network: nn.Module, x: Tensor, cuts: Cuts, frames: int, tiles: Tiles | None, of: int, to: int
) -> Tensor:
    """As in_chunks, in tiles that are blended; a latent is `of` wide in x, `to` in the result.

    A tile has its own statistics, so results differ a little from the whole's.
    """
    (tall, shared_y), (wide, shared_x) = tiles or ((x.shape[3], 0), (x.shape[4], 0))
    height, width = x.shape[3] // of, x.shape[4] // of  # in latents, as all else
    if height <= tall and width <= wide:
        return in_chunks(network, x, cuts, frames)
    step_y, step_x = tall - shared_y, wide - shared_x
    above, out = {}, None
    for top in range(0, height, step_y):
        beside = None
        for left in range(0, width, step_x):
            rows = slice(top * of, (top + tall) * of)
            columns = slice(left * of, (left + wide) * of)
            y = in_chunks(network, x[..., rows, columns], cuts, frames)
            if top:
                blend(above[left], y, dim=3)
            if left:
                blend(beside, y, dim=4)
            above[left], beside = tail(y, shared_y * to, dim=3), tail(y, shared_x * to, dim=4)
            if out is None:
                out = y.new_empty(*y.shape[:3], height * to, width * to)
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


# ------------------------------------------------------------------------------------------------- layers
class Pointwise(nn.Conv3d):
    """1x1x1 convolution of (..., C)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


def each_frame(function: Callable[[Tensor], Tensor], x: Tensor, stream: Stream) -> Tensor:
    """Apply a function of images (B, H, W, C) to the frames of (T, B, H, W, C), one by one if lean."""
    if not stream.lean:
        return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    out = None
    for t, frame in enumerate(x):
        y = function(frame)
        out = y.new_empty(len(x), *y.shape) if out is None else out
        out[t] = y
    return out


class Downsample(nn.Conv2d):
    """Halve rows and columns with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return each_frame(self.shrink, x, stream)  # (T, B, H / 2, W / 2, C)

    def shrink(self, images: Tensor) -> Tensor:
        images = F.pad(images, (0, 0, 0, 1, 0, 1))
        return conv2d(images, self.weight, self.bias, stride=2)


# A row of the enlarged image sees two rows of the small one: which of the three taps fall on each of them.
FOLD = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (even or odd row, small row, tap)


class Upsample(nn.Conv2d):
    """Double rows and columns by nearest neighbour, then a 3x3 convolution, in one step.

    Each of four outputs of a pixel is a 2x2 convolution of the small image: 16 products instead of 36.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return each_frame(self.enlarge, x, stream)  # (T, B, 2 H, 2 W, C)

    def enlarge(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:3]
        fold = FOLD.to(self.weight)
        weights = torch.einsum("pir,qjs,ocrs->pqocij", fold, fold, self.weight)
        rows = []
        for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
            y = conv2d(images, weights[p, q], self.bias, padding=1)  # (B, H + 1, W + 1, C)
            rows.append(y[:, p : p + height, q : q + width])
        y = torch.stack(rows, dim=-2).unflatten(-2, (2, 2))  # (B, H, W, 2, 2, C)
        return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, 2 H, 2 W, C)
