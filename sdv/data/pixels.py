"""Pixels as tensors: bytes and floats, and the sizes that a network wants."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

WHOLE_PIXELS = 2**25  # that a picture may be enlarged to before it is cut: 100 MB


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 [-1, 1]: x / 127.5 - 1, any shape."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place: 2.7 times as fast


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float [-1, 1] -> uint8 0..255, clamped and rounded: the inverse of `from_uint8`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def say_crop(height: int, width: int, to_height: int, to_width: int) -> str:
    """What to say of a picture that `resize` cuts much of; nothing, of another one."""
    down, right = to_height / height, to_width / width
    used = min(down, right) / max(down, right)
    return f"{used:.0%} of {width}x{height} is used" if used < 0.6 else ""


def say_enlarged(height: int, width: int, to_height: int, to_width: int) -> str:
    """What to say of a picture that `resize` makes more than twice as large; nothing, of another one."""
    scale = max(to_height / height, to_width / width)
    return f"{width}x{height} is enlarged {scale:.1f} times" if scale > 2 else ""


def resize(
    images: torch.Tensor,
    height: int,
    width: int,
    mode: str = "crop",
    zoom: float = 1.0,
    at: tuple[float, float] = (0.5, 0.5),
) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> (..., 3, height, width) of uint8, antialiased bicubic, keeping the aspect.

    "crop": cover the target (`zoom` times over), then cut; `at` says where in what sticks out (0.5: centre).
    "pad": fit inside the target, centred on a white canvas. Memory is bounded whatever the shape.
    """
    crop = mode == "crop"
    bound = max if crop else min
    h, w = images.shape[-2:]
    scale = bound(height / h, width / w) * (zoom if crop else 1)
    size = bound(height, max(1, round(h * scale))), bound(width, max(1, round(w * scale)))
    lead = images.shape[:-2]
    top, left = (round(abs(a - b) * part) for a, b, part in zip(size, (height, width), at, strict=True))
    if crop and math.prod(size) > WHOLE_PIXELS:
        rows, columns = _taps(h, size[0], top, height), _taps(w, size[1], left, width)
        return _cut_and_enlarge(images, rows, columns)
    if size != (h, w):
        images = F.interpolate(images.reshape(-1, 3, h, w), size=size, mode="bicubic", antialias=True)
        images = images.reshape(*lead, *size)
    if crop:
        return images[..., top : top + height, left : left + width]
    canvas = images.new_full((*lead, height, width), 255)
    canvas[..., top : top + size[0], left : left + size[1]] = images
    return canvas


class Taps(NamedTuple):
    """Which pixels of a line make up a part of the resized line, and by how much."""

    source: slice
    weights: torch.Tensor  # (count, pixels of the source)


def _taps(length: int, resized: int, start: int, count: int) -> Taps:
    """Of pixels start to start + count of a line of `length` pixels resized to `resized`."""
    step = length / resized
    reach = 2 * max(step, 1)
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * step
    low, high = max(0, int(centres[0] - reach)), min(length, math.ceil(centres[-1] + reach))
    x = (torch.arange(low, high) + 0.5 - centres[:, None]).abs() / max(step, 1)  # (count, pixels)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2  # Keys' cubic, a = -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return Taps(slice(low, high), (weights / weights.sum(1, keepdim=True)).float())


def _cut_and_enlarge(images: torch.Tensor, rows: Taps, columns: Taps) -> torch.Tensor:
    """A part of a resized picture, made without the rest of it; two levels of 255 beside torch's at most.

    One, where a sum lies between two levels; two, where the first pass differed and its weight is above 1.
    """
    part = images[..., rows.source, columns.source].float()
    part = (part @ columns.weights.T).round_().clamp_(0, 255)  # torch keeps bytes between the two, too
    return (rows.weights @ part).round_().clamp_(0, 255).to(torch.uint8)
