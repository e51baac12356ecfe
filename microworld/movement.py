"""Measures of any clip, without a truth: speed, smoothness, flicker, duplicate frames, pasted references.

Clips are (3, T, H, W) in [-1, 1]. Lengths are fractions of the short side, shares lie in 0..1. Everything is
seen with the short side shrunk to 64 pixels, so that numbers of different resolutions can be compared.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
# How much better a block must match elsewhere to count as moved: noise of 0.05 wins that by chance.
REST = 0.012
DYNAMIC = 0.04  # sides per second: a clip whose speed is above this moves
SAME = 0.005  # root mean square difference below which two frames are one


def shrink(clip: Tensor) -> Tensor:
    """Frames (T, 3, H, W) in 0..1, the short side at most SIDE."""
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise ValueError(f"a clip is (3, T, H, W) in [-1, 1]; got {tuple(clip.shape)}")
    frames = clip.detach().float().cpu().transpose(0, 1).clamp(-1, 1) / 2 + 0.5
    scale = SIDE / min(frames.shape[-2:])
    return F.interpolate(frames, scale_factor=scale, mode="area") if scale < 1 else frames


def speed(clip: Tensor, fps: float = 8) -> float:
    """How fast the fastest twentieth of the picture moves, in sides per second.

    Block matching over half a second, four times a clip; along an axis it sees nothing faster than 0.31 sides
    per second.
    """
    frames = shrink(clip)
    gap = min(max(1, round(fps / 2)), len(frames) - 1)
    if gap == 0:
        return 0.0
    starts = torch.linspace(0, len(frames) - 1 - gap, min(4, len(frames) - gap)).long()
    reach = SIDE // 6
    before, after = frames[starts], _pad(frames[starts + gap], reach)
    best = _blocks((before - frames[starts + gap]).abs()) - REST
    length = torch.zeros_like(best)
    for dy, dx in _offsets(reach):
        cost = _blocks((before - _cut(after, reach, dy, dx)).abs())
        length = length.masked_fill(cost < best, (dy**2 + dx**2) ** 0.5)
        best = torch.minimum(best, cost)
    fastest = length.flatten(1).sort(descending=True).values
    fastest = fastest[:, : max(1, fastest.shape[1] // 20)]
    return float(fastest.mean()) / min(frames.shape[-2:]) / (gap / fps)


def smoothness(clip: Tensor) -> float:
    """1 - the mean error of a frame against its neighbours moved half-way to meet, eight times a clip."""
    frames = shrink(clip)
    if len(frames) < 3:
        return 1.0
    reach = SIDE // 16
    centres = torch.linspace(1, len(frames) - 2, min(8, len(frames) - 2)).round().long()
    before, middle, after = frames[centres - 1], frames[centres], frames[centres + 1]
    best, error = _blocks((before - after).abs()) - REST, _blocks(((before + after) / 2 - middle).abs())
    before, after = _pad(before, reach), _pad(after, reach)
    for dy, dx in _offsets(reach):
        a, b = _cut(before, reach, -dy, -dx), _cut(after, reach, dy, dx)
        cost = _blocks((a - b).abs())
        error = _blocks(((a + b) / 2 - middle).abs()).where(cost < best, error)
        best = torch.minimum(best, cost)
    return 1 - float(error.mean())


def _offsets(reach: int) -> list[tuple[int, int]]:
    """All (dy, dx) within reach but (0, 0), the shortest first."""
    steps = range(-reach, reach + 1)
    return sorted(product(steps, steps), key=lambda d: d[0] ** 2 + d[1] ** 2)[1:]


def _pad(frames: Tensor, reach: int) -> Tensor:
    return F.pad(frames, (reach,) * 4, mode="replicate")


def _cut(padded: Tensor, reach: int, dy: int, dx: int) -> Tensor:
    h, w = padded.shape[-2] - 2 * reach, padded.shape[-1] - 2 * reach
    return padded[..., reach + dy : reach + dy + h, reach + dx : reach + dx + w]


def _blocks(error: Tensor) -> Tensor:
    """Mean over overlapping blocks of 8 x 8 pixels: (N, 3, H, W) -> (N, h, w)."""
    return F.avg_pool2d(error, 8, 4).mean(1)


def flicker(clip: Tensor) -> float:
    """Median change of brightness between frames, 0..1: of what should rest, if the camera does."""
    change = shrink(clip).mean(1).diff(dim=0).abs()
    return float(change.flatten(1).median(1).values.mean()) if len(change) else 0.0


def duplicates(clip: Tensor) -> float:
    """Share of frames that repeat the one before."""
    change = shrink(clip).diff(dim=0).square().mean((1, 2, 3)).sqrt()
    return float((change < SAME).float().mean()) if len(change) else 0.0


def paste(clip: Tensor, ref: Tensor) -> float:
    """Highest correlation of any frame with the reference picture (3, H, W): 1 is a copy of all of it."""
    frames = F.avg_pool2d(shrink(torch.cat([ref[:, None], clip], 1)), 3, 1, 1).flatten(1)
    frames = F.normalize(frames - frames.mean(1, keepdim=True), dim=1)
    return float((frames[1:] @ frames[0]).max())
