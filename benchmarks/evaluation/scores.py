"""The measures of a film, by their formulas. All are shares, shown as percentages like the paper's.

CLIP-I, DINO-I    mean over the frames of cos(frame, reference), by CLIP or by DINO
CLIP-T            mean over the frames of cos(frame, prompt), by CLIP
smoothness, dynamic, speed, duplicates, paste    ours: microworld/movement.py, on every frame
VBench smoothness, VBench dynamic                by VBench's definitions, with networks that are given
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evaluation.films import spread
from benchmarks.evaluation.judges import ClipJudge, DinoJudge
from microworld import movement
from sdv.data.media import from_uint8

MEASURES = (
    "VBench smoothness", "VBench dynamic", "CLIP-T", "CLIP-I", "DINO-I",
    "smoothness", "dynamic", "speed", "duplicates", "paste",
)  # fmt: skip

# Two frames (1, 3, H, W), RGB in 0..255 -> the flow (1, 2, H, W) in pixels, or in 0..1 -> the frame half-way
Between = Callable[[Tensor, Tensor], Tensor]


class Judges(NamedTuple):
    """Whoever is there; a measure whose network is missing is left out."""

    clip: ClipJudge | None = None
    dino: DinoJudge | None = None
    flow: Between | None = None  # RAFT, in VBench
    interpolate: Between | None = None  # AMT-S, in VBench
    frames: int = 16  # of a film that CLIP and DINO see


def film_scores(
    frames: Tensor, fps: float, prompt: str, canvas: Tensor, given: Tensor, judges: Judges
) -> dict[str, float]:
    """Every measure of a film, frames uint8 (3, T, H, W).

    canvas: the reference that is compared with, uint8 (3, H, W); given: the pictures of it that the model may
    have seen, (N, 3, H, W) in [-1, 1].
    """
    chosen, scores = spread(frames, judges.frames), {}
    if judges.clip is not None:
        seen = judges.clip.images(chosen)
        scores["CLIP-I"] = mean_cosine(seen, judges.clip.images(canvas[None]))
        scores["CLIP-T"] = mean_cosine(seen, judges.clip.texts([prompt]))
    if judges.dino is not None:
        scores["DINO-I"] = mean_cosine(judges.dino.images(chosen), judges.dino.images(canvas[None]))
    scores |= movement_scores(frames, fps, given)
    if judges.interpolate is not None:
        scores["VBench smoothness"] = vbench_smoothness(frames, judges.interpolate)
    if judges.flow is not None:
        scores["VBench dynamic"] = float(vbench_dynamic(frames, fps, judges.flow))
    return scores


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean over all pairs of vectors of length 1, (N, D) and (M, D), in float64."""
    return float((a.double() @ b.double().T).mean())


def movement_scores(frames: Tensor, fps: float, given: Tensor) -> dict[str, float]:
    """Our measures of every frame, uint8 (3, T, H, W), and of the pictures (N, 3, H, W) that it may copy."""
    clip = _shrunk(from_uint8(frames))
    speed = movement.speed(clip, fps)
    return {
        "smoothness": movement.smoothness(clip),
        "dynamic": float(speed > movement.DYNAMIC),
        "speed": speed,
        "duplicates": movement.duplicates(clip),
        "paste": max(movement.paste(clip, picture) for picture in _shrunk(given.transpose(0, 1)).unbind(1)),
    }


def _shrunk(clip: Tensor) -> Tensor:
    """What every measure would do again for itself."""
    return movement.shrink(clip).transpose(0, 1) * 2 - 1


# VBench


@torch.inference_mode()
def vbench_smoothness(frames: Tensor, interpolate: Between) -> float:
    """1 - the mean absolute error of every second frame against the one interpolated from its neighbours."""
    images = frames.transpose(0, 1).float()
    if len(images) < 3:
        raise ValueError(f"VBench's smoothness needs 3 frames, there are {len(images)}")
    errors = []
    for first in range(0, len(images) - 2, 2):
        ends, cut = _padded(images[[first, first + 2]] / 255, 16)
        guess = cut(_like(ends[:1], interpolate(ends[:1], ends[1:]), 3))
        levels = (guess[0] * 255).clamp(0, 255).byte()  # cut off, not rounded, as VBench does
        errors.append((levels.float() - images[first + 1]).abs().mean())
    return 1 - float(torch.stack(errors).double().mean()) / 255


@torch.inference_mode()
def vbench_dynamic(frames: Tensor, fps: float, flow: Between) -> bool:
    """Whether the fastest twentieth of the pixels moves by 6 of 256 pixels in a quarter of the frames.

    Frames are about an eighth of a second apart.
    """
    images = frames.transpose(0, 1)[:: max(1, round(fps / 8))].float()
    least = max(1.0, 8 / fps) * 6 * min(images.shape[-2:]) / 256
    fast = 0
    for before, after in zip(images[:-1], images[1:], strict=True):
        pair, _ = _padded(torch.stack([before, after]), 8)
        length = _like(pair[:1], flow(pair[:1], pair[1:]), 2)[0].norm(dim=0).flatten()
        fast += float(length.sort(descending=True).values[: int(0.05 * len(length))].mean()) > least
    return fast >= round(4 * len(images) / 16)


def _like(frame: Tensor, found: Tensor, channels: int) -> Tensor:
    """What a network of --vbench returned, on the CPU; ValueError unless it is as large as the frame."""
    wanted = (1, channels, *frame.shape[-2:])
    if not isinstance(found, Tensor) or found.shape != wanted:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"--vbench: a function returned {what} for {wanted}; return that one tensor")
    return found.cpu()


def _padded(images: Tensor, multiple: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Frames enlarged to a multiple of pixels by repeating their edges, and the way back."""
    h, w = images.shape[-2:]
    rows, columns = -h % multiple, -w % multiple
    top, left = rows // 2, columns // 2
    padded = F.pad(images, (left, columns - left, top, rows - top), mode="replicate")
    return padded, lambda other: other[..., top : top + h, left : left + w]
