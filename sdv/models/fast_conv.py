"""The convolution of causal_conv.py in less memory and, on CPUs, with fewer products.

Taken when no gradients are wanted (Stream.lean); the device decides how large bands are, and which products.
Memory: a convolution works on bands of rows. Normed, activated and padded copies of frames larger than a band
never exist, and the result may be added to a residual in place.
Arithmetic: on the CPU four frames cost six 2-D convolutions instead of twelve, unless they are small.

Activations are time first and channels last, (T, B, H, W, C): a run of frames is one block of memory.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of a band: all its frames, in float32. A CPU wants what stays in its cache, a GPU much work at once:
# up to 240 x 360 CogVideoX's layers go whole, at 480 x 720 in two or three bands. Decoding 49 such frames on
# an H100 took 2.94 s and 7.2 GB with a quarter of it (2026-11-26). Predicted, not measured: 2.6 s, 8 to 9 GB.
BAND_BYTES = 2**22
GPU_BAND_BYTES = 2**30
SMALL = 2**15  # values of a bfloat16 frame whose filters take longer to transform than they save


class Activation(Protocol):
    """A norm and its nonlinearity, still to be applied."""

    def activate(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Those rows of x (T, B, H, W, C), or all, activated: in the type of x or a wider one."""


def bands(x: Tensor, channels: int = 0) -> Iterator[tuple[int, int]]:
    """Cut the rows of (T, B, H, W, C) into bands that stay small with `channels` channels as well."""
    frames, batch, rows, columns, own = x.shape
    size = BAND_BYTES if x.device.type == "cpu" else GPU_BAND_BYTES
    height = max(8, size // (4 * frames * batch * columns * max(own, channels)))
    for top in range(0, rows, height):
        yield top, min(top + height, rows)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **how) -> Tensor:
    """2-D convolution of images (B, H, W, C)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **how).permute(0, 2, 3, 1)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """3-D convolution of frames (T + taps - 1, B, H, W, C), valid in time: (T, B, H', W', O)."""
    if len(x) == weight.shape[2] == 1:
        return conv2d(x[0], weight.squeeze(2), bias, padding=padding)[None]
    y = F.conv3d(x.permute(1, 4, 0, 2, 3), weight, bias, padding=(0, *padding))
    return y.permute(2, 0, 3, 4, 1)


# ---------------------------------------------------------------------------------------- the convolution
def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None,
    act: Activation | None,
    residual: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """What CausalConv computes, for a filter of one or three taps; with overwrite, in the residual's memory.

    past: the activated frames (taps - 1, B, H, W, C) before x; None for copies of its first.
    Returns (T, B, H, W, O), and the last two frames (or all) of the activated input, to be remembered.
    """
    taps, frames = weight.shape[2], len(x)
    out = residual if overwrite else x.new_empty(*x.shape[:-1], len(weight))
    ends = x.new_empty(min(2, frames + taps - 1), *x.shape[1:])
    runs, cuts = prepare(weight, x), list(bands(x, len(weight)))
    window = x.new_empty(frames + taps - 1, x.shape[1], cuts[0][1] + 2, *x.shape[3:])  # for all bands
    for top, bottom in cuts:
        low, high = max(top - 1, 0), min(bottom + 1, x.shape[2])  # a halo of one row
        if bottom - top + 2 < window.shape[2]:
            window = x.new_empty(*window.shape[:2], bottom - top + 2, *x.shape[3:])
        window[:, :, 0 : low - top + 1] = 0  # above the frame
        window[:, :, high - top + 1 :] = 0  # below it
        inside = window[:, :, low - top + 1 : high - top + 1]
        inside[taps - 1 :] = x[:, :, low:high] if act is None else act.activate(x, slice(low, high))
        inside[: taps - 1] = inside[taps - 1] if past is None else past[:, :, low:high]
        start = 0
        for size, product in runs:
            y = product(window[start : start + size + taps - 1], bias=bias, padding=(0, 1))
            where = slice(start, start + size), slice(None), slice(top, bottom)
            if residual is None:
                out[where] = y
            else:
                torch.add(residual[where], y, out=out[where])
            start += size
        ends[:, :, top:bottom] = window[-2:, :, 1:-1]
    return out, ends


def prepare(weight: Tensor, x: Tensor) -> list[tuple[int, Callable[..., Tensor]]]:
    """Cut the T frames of x (T, B, H, W, C) into runs that are convolved together.

    Returns how many frames each has, and what makes (size, B, H', W', O) of (size + taps - 1, B, H, W, C).
    Runs of four double the rounding error of bfloat16, runs of two do not: against float64 the whole VAE
    is then still closer than with plain convolutions and bfloat16 norms. GPUs do not wait for products.
    """
    exact = weight.dtype in (torch.float32, torch.float64)
    if weight.shape[2] == 1 or x.device.type != "cpu" or (not exact and x[0, 0].numel() <= SMALL):
        return [(len(x), partial(conv3d, weight=weight))]
    sizes = []
    for size in (size for size in TILINGS if exact or size <= 2):
        sizes += [size] * ((len(x) - sum(sizes)) // size)
    filters = {size: TiledFilter(weight, size) for size in set(sizes)}
    return [(size, filters[size]) for size in sizes]


# ---------------------------------------------------------------------------------------- fewer products
def toom_cook(outputs: int, points: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices for `outputs` values of a three-tap filter g: y = after @ ((taps @ g) * (before @ d)).

    The transpose of multiplying polynomials by their values at `points` and infinity (Toom, Cook; Winograd):
    outputs + 2 products where the direct way takes 3 * outputs.
    """

    def values(degree: int) -> Tensor:
        rows = [[p**k for k in range(degree)] for p in points]
        return torch.tensor([*rows, [0.0] * (degree - 1) + [1.0]], dtype=torch.float64)

    return torch.linalg.inv(values(outputs + 2)).T, values(3), values(outputs).T


# Points chosen for small rounding errors. 1 comes first: its product has weight 1 in all outputs, as a bias.
TILINGS = {
    4: toom_cook(4, (1.0, -1.0, 0.0, 0.5, -2.0)),
    2: toom_cook(2, (1.0, -1.0, 0.0)),
    1: (torch.eye(3), torch.eye(3), torch.ones(1, 3)),
}


class TiledFilter:
    """A 3x3x3 filter made ready for runs of `size` frames."""

    def __init__(self, weight: Tensor, size: int):
        self.before, taps, self.after = (matrix.to(weight) for matrix in TILINGS[size])
        filters = torch.einsum("st,oithw->sohwi", taps, weight).contiguous()
        self.filters = filters.permute(0, 1, 4, 2, 3)  # (size + 2, O, C, 3, 3)

    def __call__(self, x: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
        """Frames (size + 2, B, H, W, C) -> (size, B, H', W', O)."""
        mixed = (self.before @ x.flatten(1)).view(x.shape)
        biases = [bias] + [None] * (len(mixed) - 1)
        products = [
            conv2d(frame, weight, bias, padding=padding)
            for frame, weight, bias in zip(mixed, self.filters, biases, strict=True)
        ]
        products = torch.stack(products)  # (size + 2, B, H', W', O)
        return (self.after @ products.flatten(1)).unflatten(1, products.shape[1:])
