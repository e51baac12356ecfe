"""What a clip shows of the micro-world: who, what motion, where, and how much is copied from the reference.

No learned judge. The background is the nearest of the world's; the subject is what differs from it; its path
tells the motion; its look, with place, size and rotation taken out, is compared with drawings of subjects.
Clips are (3, T, H, W) in [-1, 1]; lengths are fractions of the frame's side, angles radians, shares 0..1.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from microworld.movement import DYNAMIC, duplicates, flicker, paste, shrink, smoothness, speed
from microworld.sprites import COLOURS, WHITE, Pose, Subject, layer
from microworld.world import BACKGROUNDS, Scene, background, lookalikes

FPS = 8  # of every clip
RINGS, ANGLES = 14, 72  # the polar grid of a look
RIM = 1.75  # its outer radius, over the radius of the disc of equal area
RADIUS = ((torch.arange(RINGS) + 0.5) / RINGS)[:, None]  # also the area that a sample stands for
PALETTE = torch.tensor([*COLOURS.values(), WHITE]) / 255


def judge(clip: Tensor, truth: Scene, ref: Tensor) -> dict[str, float | str | None]:
    """One row of numbers for a clip that should show truth; ref (3, H, W) is the picture it was made from.

    The subject is sought among 99 others of its species, so that the caption alone gives 1 %.
    """
    seen = track(clip)
    who = identity(seen, truth.subject, lookalikes(truth.subject))
    moves, pace = motion_class(seen), speed(clip, FPS)
    return {
        "top1": float(who.rank == 1),
        "top5": float(who.rank <= 5),
        "margin": who.margin,
        "colour": who.colour,
        "shape": who.shape,
        "seen motion": moves,
        "motion": float(moves == truth.motion),
        "fit": motion_fit(seen)[truth.motion],
        "dynamic": float(pace > DYNAMIC),
        "speed": pace,
        "smoothness": smoothness(clip),
        "flicker": flicker(clip),
        "duplicates": duplicates(clip),
        "seen background": seen.place,
        "background": float(seen.place == truth.background),
    } | _copying(clip, seen, truth, ref)


def evaluate(clips: list[Tensor], truths: list[Scene], refs: list[Tensor]) -> dict:
    """{"mean": the mean of every number, "rows": a row of `judge` for each clip}."""
    rows = [judge(clip, truth, ref) for clip, truth, ref in zip(clips, truths, refs, strict=True)]
    names = [name for name in rows[0] if not name.startswith("seen")]
    return {"mean": {name: float(np.mean([row[name] for row in rows])) for name in names}, "rows": rows}


# Seeing


class Blob(NamedTuple):
    """A subject in each frame: where, how large, what look."""

    x: Tensor  # (T,) centre of area
    y: Tensor
    size: Tensor  # (T,) diameter of the disc of equal area
    look: Tensor  # (T, 4, RINGS, ANGLES) premultiplied RGB and mask around the centre, size taken out


class Track(NamedTuple):
    """What is seen of background and subject, without knowing the truth."""

    place: str | None  # the background's name, None if it is none of the world's
    ground: Tensor  # (3,) its mean colour behind the subject
    mask: Tensor  # (T, H, W) of the subject, 0..1
    blob: Blob
    angle: Tensor  # (T,) turned since the first frame
    seen: bool  # a subject of a possible size is there in most frames


def track(clip: Tensor) -> Track:
    """Find background and subject in a clip of the world, whatever made it."""
    nearest, frames, distance = find_place(shrink(clip))
    mask = _segment(distance)
    blob = _measure(frames, mask)
    cover = mask.mean((1, 2))
    seen = float(((cover > 0.01) & (cover < 0.5)).float().mean()) > 0.75
    known = float(distance.median()) < 0.15
    weight = mask.mean(0) / mask.mean(0).sum().clamp(min=1e-6)
    ground = (_places(mask.shape[-1])[nearest] * weight).sum((1, 2))
    return Track(list(BACKGROUNDS)[nearest] if known else None, ground, mask, blob, _turns(blob.look), seen)


@lru_cache(8)
def _places(side: int) -> Tensor:
    return torch.from_numpy(np.stack([background(name, side) for name in BACKGROUNDS])).movedim(-1, 1) / 255


def find_place(frames: Tensor) -> tuple[int, Tensor, Tensor]:
    """Index of the nearest background, the frames without their even tint, and their RGB distance to it."""
    if frames.shape[-2] != frames.shape[-1]:
        raise ValueError(f"the world's clips are square; got {frames.shape[-2]} x {frames.shape[-1]} pixels")
    backs = _places(frames.shape[-1])
    nearest = int((frames[::4, None] - backs).abs().mean(2).clamp(max=0.2).mean((0, 2, 3)).argmin())
    tint = (frames - backs[nearest]).flatten(2).median(2).values.clamp(-0.1, 0.1)[..., None, None]
    return nearest, frames - tint, _length(frames - tint - backs[nearest])


def _length(colour: Tensor) -> Tensor:
    """Euclidean length over the channels (N, 3, H, W) -> (N, H, W)."""
    return colour.square().sum(1).sqrt()


def _soft_mask(distance: Tensor) -> Tensor:
    """0 where the background is seen, 1 where it is not: subject and background differ by 0.32 at least."""
    return ((distance - 0.08) / 0.16).clamp(0, 1)


def _segment(distance: Tensor) -> Tensor:
    """Soft mask (T, H, W) of the one subject: what differs from the background, in one piece."""
    core = F.avg_pool2d((distance > 0.18).float(), 3, 1, 1, count_include_pad=False) > 0.5
    return _soft_mask(distance) * F.max_pool2d(_largest(core.float()), 3, 1, 1)


def _largest(mask: Tensor) -> Tensor:
    """The largest connected part of each mask (T, H, W) of 0 and 1: labels spread until nothing changes.

    At half the resolution, where parts a pixel apart are one: eight times less work.
    """
    coarse = F.max_pool2d(mask, 2, 2, ceil_mode=True)
    labels = torch.arange(1, coarse[0].numel() + 1.0).view(1, *coarse.shape[1:]) * coarse
    spread = F.max_pool2d(labels, 3, 1, 1) * coarse
    while not torch.equal(spread, labels):
        labels, spread = spread, F.max_pool2d(spread, 3, 1, 1) * coarse
    counts = [frame.bincount() for frame in labels.long().flatten(1)]
    winners = torch.tensor([int(count[1:].argmax()) + 1 if len(count) > 1 else -1 for count in counts])
    largest = (labels == winners[:, None, None]).float()
    return mask * F.interpolate(largest[:, None], mask.shape[1:])[:, 0]


def _measure(frames: Tensor, mask: Tensor) -> Blob:
    """Moments of masks (T, H, W), and the look of frames (T, 3, H, W) around their centres."""
    side = mask.shape[-1]
    area = mask.sum((1, 2)).clamp(min=1)
    axis = (torch.arange(side) + 0.5) / side
    x, y, size = mask.sum(1) @ axis / area, mask.sum(2) @ axis / area, 2 * (area / np.pi).sqrt() / side
    turn = torch.arange(ANGLES) * (2 * np.pi / ANGLES)
    ring = size[:, None, None] * RIM * RADIUS  # size is a diameter, and grid_sample's coordinates span 2
    ends = (2 * x - 1)[:, None, None] + ring * turn.cos(), (2 * y - 1)[:, None, None] + ring * turn.sin()
    layers = torch.cat([frames * mask[:, None], mask[:, None]], 1)
    return Blob(x, y, size, F.grid_sample(layers, torch.stack(ends, -1), align_corners=False))


# Motion


def _around(look: Tensor, other: Tensor) -> Tensor:
    """Correlation of looks (T, 4, R, A) for each rotation of the other, (T, A)."""
    spectrum = torch.fft.rfft(look) * torch.fft.rfft(other).conj()
    return torch.fft.irfft((spectrum * RADIUS).sum((1, 2)), n=ANGLES)


def _turns(look: Tensor) -> Tensor:
    """Angle turned since the first frame (T,): each frame against the last, at most 60 degrees a step."""
    limit = ANGLES // 6
    near = _around(look, look.roll(1, 0))[1:].roll(limit, 1)[:, : 2 * limit + 1]
    best = near.argmax(1).clamp(1, 2 * limit - 1)
    left, top, right = (near.gather(1, (best + k)[:, None])[:, 0] for k in (-1, 0, 1))
    beside = (0.5 * (left - right) / (left - 2 * top + right).clamp(max=-1e-9)).clamp(-1, 1)  # of a parabola
    steps = (best - limit + beside) * (2 * np.pi / ANGLES)
    return torch.cat([torch.zeros(1), steps.cumsum(0)])


TYPICAL = torch.tensor([0.3, 0.3, np.log(1.7), 1.2 * np.pi], dtype=torch.float64)[:, None]
STRAIGHT = {  # which of (x, y, log size, angle) grows evenly, and its sign (0: either)
    "left": (0, -1),
    "right": (0, 1),
    "up": (1, -1),
    "down": (1, 1),
    "grow": (2, 1),
    "shrink": (2, -1),
    "spin": (3, 0),
}


def motion_fit(seen: Track) -> dict[str, float]:
    """Share of the subject's movement that each motion explains; for still, how little movement there is.

    Place, log size and angle are measured in the world's typical motions; u runs from 0 to 1 over the clip.
    """
    blob = seen.blob
    state = torch.stack([blob.x, blob.y, blob.size.log(), seen.angle]).double() / TYPICAL
    state = state - state.mean(1, keepdim=True)
    u = torch.linspace(0, 1, len(blob.x), dtype=torch.float64)
    explained = {motion: _energy_along(state[row], u, sign) for motion, (row, sign) in STRAIGHT.items()}
    explained["bounce"] = _energy_along(state[1], -(2 * np.pi * u).sin().abs(), 1)
    path, turn = torch.complex(state[0], state[1]), torch.polar(torch.ones_like(u), 2 * np.pi * u)
    explained["circle"] = max(float((path @ way).abs() ** 2) / len(u) for way in (turn, turn.conj()))
    total = float(state.square().sum())
    shares = {motion: energy / max(total, 1e-9) for motion, energy in explained.items()}
    return shares | {"still": max(0.0, 1 - (total / len(u)) ** 0.5 / 0.2)}


def _energy_along(values: Tensor, basis: Tensor, sign: int) -> float:
    """Energy of values along basis, its mean removed; 0 if the coefficient has the wrong sign."""
    along = float(values @ F.normalize(basis - basis.mean(), dim=0))
    return along**2 if along * sign >= 0 else 0.0


def motion_class(seen: Track) -> str:
    """The motion that explains most of what is seen, or "unclear" if none explains half of it."""
    fit = motion_fit(seen)
    best = max(fit, key=fit.get)
    return best if seen.seen and fit[best] >= 0.5 else "unclear"


# Identity


class Identity(NamedTuple):
    rank: int  # 1: no other subject of the gallery is nearer
    margin: float  # (wrong - right) / (wrong + right), distances of the nearest wrong one and the right one
    colour: float  # share of the subject's area whose colours agree, wherever they are
    shape: float  # intersection over union of the silhouettes, aligned


def identity(seen: Track, who: Subject, gallery: list[Subject]) -> Identity:
    """Is it this subject? Its look against every subject's of the gallery, drawn before the same ground."""
    others = [other for other in gallery if other != who]
    if not seen.seen:
        return Identity(len(others) + 1, -1.0, 0.0, 0.0)
    looks, known = seen.blob.look[::2], subject_looks([who, *others], seen.ground)
    distance, best = look_distance(looks, known)
    right, wrong = float(distance[0]), float(distance[1:].min())
    drawn = torch.cat([known[0], _mirrored(known[0])])[best[0]]
    rank = 1 + int((distance[1:] <= distance[0]).sum())
    return Identity(rank, (wrong - right) / (wrong + right), _colour(looks, drawn), _shape(looks, drawn))


# Of the drawings compared with, standard deviation in 64ths: generated clips are soft.
BLURS = (0.0, 0.8, 1.6)


@lru_cache(4096)
def _portrait(who: Subject) -> Tensor:
    """The subject alone and upright (BLURS, 4, 48, 48): premultiplied RGB and coverage, ever softer."""
    rgba = torch.from_numpy(layer(who, Pose(0.5, 0.5, 0.54, 0.0, False), 48))[:, 0]
    return torch.stack([_blur(rgba, sigma) for sigma in BLURS])


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (C, H, W), sigma in pixels up to 1.6."""
    kernel = torch.exp(-((torch.arange(-5.0, 6) / max(sigma, 0.05)) ** 2) / 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    return F.conv2d(F.conv2d(image[:, None], kernel, padding=(0, 5)), kernel.mT, padding=(5, 0))[:, 0]


def subject_looks(subjects: list[Subject], ground: Tensor) -> Tensor:
    """Looks (N, BLURS, 4, R, A) of subjects before a ground colour (3,), found as a clip's are."""
    rgba = torch.stack([_portrait(who) for who in subjects]).flatten(0, 1)
    ground = ground.view(3, 1, 1)
    frames = rgba[:, :3] + (1 - rgba[:, 3:]) * ground
    look = _measure(frames, _soft_mask(_length(frames - ground))).look
    return look.unflatten(0, (len(subjects), len(BLURS)))


def look_distance(looks: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N,) of looks (T, 4, R, A) to subjects' (N, BLURS, 4, R, A): 0 is equal, about 1 unrelated.

    The least over rotation (of each frame), softness and mirroring; also which of these six drawings, (N,).
    """
    known = torch.cat([known, _mirrored(known)], 1).flatten(0, 1) * RADIUS.sqrt()
    looks = looks * RADIUS.sqrt()
    match = torch.einsum("tcra,ncra->tna", torch.fft.rfft(looks), torch.fft.rfft(known).conj())
    overlap = torch.fft.irfft(match, n=ANGLES).amax(-1)
    energy = looks.square().sum((1, 2, 3))[:, None], known.square().sum((1, 2, 3))
    distance = ((energy[0] + energy[1] - 2 * overlap) / energy[1]).mean(0)
    return distance.view(-1, 2 * len(BLURS)).min(1)


def _mirrored(look: Tensor) -> Tensor:
    """Left and right exchanged: the angle a becomes half a turn - a."""
    return look.flip(-1).roll(ANGLES // 2 + 1, -1)


def _shape(looks: Tensor, drawn: Tensor) -> float:
    """Intersection over union of silhouettes (T, 4, R, A) and (4, R, A), each frame at its best rotation."""
    ious = []
    for look, turn in zip(looks, _around(looks, drawn[None]).argmax(1).tolist(), strict=True):
        a, b = look[3] * RADIUS, drawn[3].roll(turn, -1) * RADIUS
        ious.append(float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum()))
    return float(np.mean(ious))


def _colour(looks: Tensor, drawn: Tensor) -> float:
    return float(torch.minimum(_palette_shares(looks), _palette_shares(drawn[None])).sum())


def _palette_shares(looks: Tensor) -> Tensor:
    """Share of the subject's area in each of the world's colours, (11,)."""
    colour = looks[:, :3] / looks[:, 3:].clamp(min=1e-6)
    nearest = (colour[:, None] - PALETTE[:, :, None, None]).square().sum(2).argmin(1)
    area = (looks[:, 3] > 0.9) * RADIUS
    return torch.stack([area[nearest == k].sum() for k in range(len(PALETTE))]) / area.sum().clamp(min=1e-6)


# Copy-paste


def _copying(clip: Tensor, seen: Track, truth: Scene, ref: Tensor) -> dict[str, float]:
    """How much of the reference's layout comes back, and whether that is a copy.

    Real renders overlap the reference's place by chance: compare "layout" with theirs, not with 0.
    """
    source = track(ref[:, None])
    place, whole = layout(seen, source), paste(clip, ref)
    background_kept = seen.place == source.place != truth.background
    return {"layout": place, "paste": whole, "copied": float(background_kept or place > 0.85 or whole > 0.95)}


def layout(seen: Track, source: Track) -> float:
    """Highest intersection over union of the subject's mask in any frame with the reference's, unmoved."""
    both = torch.minimum(seen.mask, source.mask).sum((1, 2))
    return float((both / torch.maximum(seen.mask, source.mask).sum((1, 2)).clamp(min=1e-6)).max())
