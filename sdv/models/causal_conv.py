"""Causal 3x3x3 convolutions of a stream of chunks of frames, with two savings.

Memory: without gradients a convolution works on bands of rows small enough for the cache. Normed, activated
and padded copies of frames larger than a band never exist, and the result may be added to a tensor in place.
Arithmetic: on the CPU four frames cost six 2-D convolutions instead of twelve, unless they are small; a lone
picture costs one instead of three.

Activations are time first and channels last, (T, B, H, W, C): a run of frames is one block of memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BAND_BYTES = 2**21  # the rows of one frame in a band, in float32: what stays in a CPU's cache
SMALL = 2**15  # values of a bfloat16 frame whose filters take longer to transform than they save


@dataclass
class Stream:
    """What a chunk of frames remembers of the one before it: two input frames of every convolution."""

    lean: bool  # no gradients: work in bands, overwrite
    last: bool = False  # nothing follows, so nothing needs to be remembered
    past: dict[nn.Module, Tensor] = field(default_factory=dict)


class Activation(Protocol):
    """A norm and its nonlinearity, still to be applied: to some frames and the rows low..high of an input."""

    def activate(self, x: Tensor, frames: slice, low: int, high: int) -> Tensor: ...


def bands(x: Tensor, channels: int = 0) -> Iterator[tuple[int, int]]:
    """Cut the rows of (T, B, H, W, C) into bands that stay small with `channels` channels as well."""
    _, batch, rows, columns, own = x.shape
    size = BAND_BYTES if x.device.type == "cpu" else 16 * BAND_BYTES  # a GPU wants more work at once
    height = max(8, size // (4 * batch * columns * max(own, channels)))
    for top in range(0, rows, height):
        yield top, min(top + height, rows)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **how) -> Tensor:
    """2-D convolution of images (B, H, W, C)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **how).permute(0, 2, 3, 1)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """3-D convolution of frames (T + 2, B, H, W, C), valid in time."""
    y = F.conv3d(x.permute(1, 4, 0, 2, 3), weight, bias, padding=(0, *padding))
    return y.permute(2, 0, 3, 4, 1)  # (T, B, H', W', O)


def conv_still(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """Convolution of equal frames (3, B, H, W, C), a picture and its two copies, by the sum of the taps."""
    return conv2d(x[2], weight, bias, padding=padding)[None]  # (1, B, H', W', O)


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


# ---------------------------------------------------------------------------------------- the convolution
def activated(x: Tensor, act: Activation | None, runs: list[slice], low: int, high: int) -> Iterator[Tensor]:
    """Rows low..high of every run of frames of x (T, B, H, W, C), activated if there is something to do."""
    for run in runs:
        yield x[run, :, low:high] if act is None else act.activate(x, run, low, high)


class CausalConv(nn.Conv3d):
    """3x3x3 convolution of a frame and the two before it; before a clip lie copies of its first frame."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3)

    def forward(
        self, x: Tensor, stream: Stream, act: Activation | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Convolve x (T, B, H, W, C), activated if act is given, and add the residual (T, B, H, W, O).

        In a lean stream the sum may be written into the residual.
        """
        past = stream.past.pop(self, None)  # (2, B, H, W, C), activated
        sizes, functions = zip(*self.prepare(x, past), strict=True)
        cuts = list(bands(x, self.out_channels))
        if not stream.lean or len(cuts) == 1:
            (h,) = activated(x, act, [slice(None)], 0, x.shape[2])
            results, windows = zip(*self.slide(h.split(sizes), past, functions), strict=True)
            if not stream.last:
                stream.past[self] = windows[-1][-2:].clone()  # a view would keep the window
            return torch.cat(results) if residual is None else torch.cat(results) + residual

        out = x.new_empty(*x.shape[:-1], self.out_channels) if residual is None else residual
        future = None if stream.last else x.new_empty(2, *x.shape[1:])
        runs = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        for top, bottom in cuts:
            low, high = max(top - 1, 0), min(bottom + 1, x.shape[2])  # a halo of one row
            parts = activated(x, act, runs, low, high)
            before = None if past is None else past[:, :, low:high]
            edges = int(low == top), int(high == bottom)
            for run, (y, window) in zip(runs, self.slide(parts, before, functions, edges), strict=True):
                place = out[run, :, top:bottom]  # (T', B, R, W, O)
                place.copy_(y) if residual is None else place.add_(y)
                last = window[-2:, :, 1:-1]
            if future is not None:
                future[:, :, top:bottom] = last
        if future is not None:
            stream.past[self] = future
        return out  # (T, B, H, W, O)

    def prepare(self, x: Tensor, past: Tensor | None) -> list[tuple[int, Callable[..., Tensor]]]:
        """Cut T frames of x (T, B, H, W, C) into runs that are convolved together.

        Returns how many frames each has, and what makes (size, B, H', W', O) of (size + 2, B, H, W, C).
        Runs of four double the rounding error of bfloat16, runs of two do not: against float64 the whole VAE
        is then still closer than with plain convolutions and bfloat16 norms. GPUs do not wait for products.
        """
        dtype = self.weight.dtype
        if past is None and len(x) == 1:
            taps = self.weight.to(torch.promote_types(dtype, torch.float32)).unbind(2)
            return [(1, partial(conv_still, weight=sum(taps).to(dtype)))]  # .sum(2) is three times slower
        exact = dtype in (torch.float32, torch.float64)
        if x.device.type != "cpu" or (not exact and x[0, 0].numel() <= SMALL):
            return [(len(x), partial(conv3d, weight=self.weight))]
        sizes = []
        for size in (size for size in TILINGS if exact or size <= 2):
            sizes += [size] * ((len(x) - sum(sizes)) // size)
        filters = {size: TiledFilter(self.weight, size) for size in set(sizes)}
        return [(size, filters[size]) for size in sizes]

    def slide(
        self,
        parts: Iterable[Tensor],
        past: Tensor | None,
        functions: Iterable[Callable[..., Tensor]],
        edges: tuple[int, int] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Convolve runs of frames one after the other: each result, and the window of frames it comes from.

        edges: rows of zeros to put above and below a band that has a halo elsewhere; None for whole frames.
        """
        frames = [] if past is None else list(past)
        for part, function in zip(parts, functions, strict=True):
            frames = [*(frames or [part[0]] * 2)[-2:], *part]
            window = torch.stack(frames)  # (T' + 2, B, R + 2, W, C)
            if edges is not None and any(edges):
                window = F.pad(window, (0, 0, 0, 0, *edges))
            yield function(window, bias=self.bias, padding=(0 if edges else 1, 1)), window
