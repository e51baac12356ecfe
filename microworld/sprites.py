"""Subjects of the micro-world: sprites built of a few large flat parts, drawn by signed distance functions.

A subject is a species, three colours, a pattern, a build and a trait: COUNT different ones. A prompt names
the species only; all else is known from a picture alone, so it measures what a reference carries over.
Parts lie in the subject's own coordinates: x right, y down, facing right, about one unit from centre to rim.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (214, 40, 48),
    "orange": (247, 134, 24),
    "yellow": (252, 208, 36),
    "green": (52, 158, 62),
    "teal": (18, 176, 168),
    "blue": (44, 92, 216),
    "purple": (128, 56, 184),
    "pink": (244, 104, 172),
    "brown": (124, 72, 40),
    "black": (36, 34, 42),
}
PATTERNS = ("plain", "stripes", "bands", "diagonals", "spots", "dipped", "checks")
INK, WHITE = (28, 26, 34), (252, 252, 252)  # pupils and eyes: the same for every subject
BODY, SECOND, ACCENT, EYE, PUPIL = range(5)  # what a part is painted with; the pattern lies on BODY parts


class Subject(NamedTuple):
    index: int
    species: str
    colours: tuple[str, str, str]  # body, second (pattern and large parts), accent
    pattern: str
    build: int  # 0 slim, 1 middling, 2 stout
    trait: int  # 0..2, a feature of the silhouette: the shape of ears, tail, shell, cap, ...


class Pose(NamedTuple):
    """Where a subject is: scalars or arrays over T frames; x, y, size as fractions of the frame's side."""

    x: np.ndarray  # centre of area
    y: np.ndarray
    size: np.ndarray  # diameter of the disc of equal area
    angle: np.ndarray  # radians, clockwise on the screen
    mirror: bool  # True: faces left


class Part(NamedTuple):
    form: str  # "ellipse", "capsule" or "polygon" (convex, rounded corners)
    paint: int | tuple[int, int, int]  # of the five below the palette, or RGB
    points: tuple[float, ...]
    cut: float | None = None  # keep only what lies above this y


def ellipse(paint, x, y, rx, ry, tilt=0.0, cut=None) -> Part:
    return Part("ellipse", paint, (x, y, rx, ry, math.radians(tilt)), cut)


def capsule(paint, ax, ay, bx, by, radius) -> Part:
    return Part("capsule", paint, (ax, ay, bx, by, radius))


def polygon(paint, *points) -> Part:
    return Part("polygon", paint, points)


def box(paint, x0, y0, x1, y1) -> Part:
    return polygon(paint, x0, y0, x1, y0, x1, y1, x0, y1)


def eyes(x, y, gap, r=0.15) -> list[Part]:
    """Two eyes that look right a little, or one (gap 0)."""
    centres = (x - gap, x + gap) if gap else (x,)
    whites = [ellipse(EYE, cx, y, r, r * 1.15) for cx in centres]
    return whites + [ellipse(PUPIL, cx + r * 0.25, y + r * 0.1, r * 0.58, r * 0.66) for cx in centres]


# The species. w: width of the main part, height of those that lie; trait: which ears, tail, shell, cap, ...


def fish(w: float, trait: int) -> list[Part]:
    tail = (
        [polygon(SECOND, -0.45, 0, -1.1, -0.5, -1.1, 0.5)],
        [ellipse(SECOND, -0.85, -0.3, 0.4, 0.22, 40), ellipse(SECOND, -0.85, 0.3, 0.4, 0.22, -40)],
        [ellipse(SECOND, -0.85, 0, 0.24, 0.52)],
    )[trait]
    fins = [
        polygon(ACCENT, -0.4, -0.3 * w, 0.3, -0.4 * w, -0.3, -0.95 * w),
        ellipse(ACCENT, -0.05, 0.58 * w, 0.3, 0.15, 30),
    ]
    return tail + fins + [ellipse(BODY, 0.05, 0, 0.78, 0.56 * w)] + eyes(0.46, -0.1, 0, 0.17)


def bird(w: float, trait: int) -> list[Part]:
    crest = (
        [],
        [polygon(ACCENT, -0.35, -0.4 * w, 0.4, -0.5 * w, -0.4, -0.68 * w - 0.45)],
        [ellipse(ACCENT, s * 0.2, -0.68 * w - 0.12, 0.17, 0.32, s * 25) for s in (-1, 1)],
    )[trait]
    tail = [polygon(SECOND, -0.5, 0.25, -1.2, -0.35, -1.1, 0.4)]
    beak = [polygon(ACCENT, 0.45, -0.45, 1.12, -0.1, 0.45, 0.2)]
    wing = [ellipse(SECOND, -0.3, 0.2, 0.42, 0.27, 25)]
    return tail + crest + beak + [ellipse(BODY, 0, 0, 0.78, 0.68 * w)] + wing + eyes(0.36, -0.2, 0, 0.19)


def cat(w: float, trait: int) -> list[Part]:
    ear = (
        [polygon(ACCENT, 0.05, -0.35, 0.75 * w, -0.2, 0.62 * w, -1.0)],
        [polygon(ACCENT, 0.1, -0.5, 0.75 * w, 0.1, 1.15 * w, -0.8)],
        [ellipse(ACCENT, 0.52 * w, -0.58, 0.3, 0.3)],
    )[trait]
    tail = [
        capsule(SECOND, 0.5, 0.55, 1.05 * w, 0.45, 0.15),
        capsule(SECOND, 1.05 * w, 0.45, 1.12 * w, 0.05, 0.15),
    ]
    face = [
        ellipse(BODY, 0, 0, 0.82 * w, 0.74),
        ellipse(SECOND, 0, 0.42, 0.4, 0.28),
        ellipse(PUPIL, 0, 0.22, 0.12, 0.09),
    ]
    return tail + ear + [mirrored(part) for part in ear] + face + eyes(0, -0.16, 0.36, 0.19)


def rabbit(w: float, trait: int) -> list[Part]:
    ear = (
        [ellipse(SECOND, 0.3, -0.82, 0.21, 0.55, 8)],
        [ellipse(SECOND, 0.62, -0.7, 0.21, 0.55, 50)],
        [ellipse(SECOND, 0.76 * w, 0.0, 0.22, 0.55, -14)],
    )[trait]
    feet = [ellipse(ACCENT, s * 0.4 * w, 0.78, 0.34, 0.2) for s in (-1, 1)]
    face = [ellipse(BODY, 0, 0.1, 0.72 * w, 0.72), ellipse(ACCENT, 0, 0.3, 0.17, 0.12)]
    return feet + ear + [mirrored(part) for part in ear] + face + eyes(0, -0.06, 0.3, 0.18)


def turtle(w: float, trait: int) -> list[Part]:
    shell = (
        [ellipse(BODY, -0.15, 0.34, 0.86, 0.95 * w, 0, 0.36)],
        [polygon(BODY, -1.02, 0.36, -0.7, -0.5 * w, 0.4, -0.5 * w, 0.72, 0.36)],
        [polygon(BODY, -1.1, 0.36, -0.15, -1.05 * w, 0.8, 0.36)],
    )[trait]
    head = [ellipse(SECOND, 0.9, 0.0, 0.36, 0.34)]
    legs = [ellipse(SECOND, x, 0.6, 0.26, 0.22) for x in (-0.65, 0.42)]
    return legs + head + shell + [capsule(ACCENT, -0.92, 0.4, 0.66, 0.4, 0.14)] + eyes(0.98, -0.04, 0, 0.16)


def snail(w: float, trait: int) -> list[Part]:
    core = (
        [ellipse(ACCENT, -0.2, -0.16, 0.36, 0.36 * w)],
        [],
        [polygon(ACCENT, -0.2, -1.35 * w, -0.6, -0.6 * w, 0.2, -0.6 * w)],
    )[trait]
    foot = [capsule(SECOND, -0.9, 0.56, 0.75, 0.56, 0.2), capsule(SECOND, 0.76, 0.5, 0.84, -0.1, 0.24)]
    horns = [capsule(ACCENT, 0.7, -0.2, 0.52, -0.62, 0.1), capsule(ACCENT, 0.92, -0.2, 1.06, -0.62, 0.1)]
    return horns + foot + [ellipse(BODY, -0.2, -0.14, 0.74, 0.72 * w)] + core + eyes(0.9, -0.08, 0, 0.17)


def butterfly(w: float, trait: int) -> list[Part]:
    upper, lower = (
        (ellipse(BODY, 0.58, -0.3, 0.6 * w, 0.48, -30), ellipse(SECOND, 0.46, 0.46, 0.42 * w, 0.36, 30)),
        (
            polygon(BODY, 0.0, 0.0, 1.1 * w, -0.95, 1.0 * w, 0.1),
            polygon(SECOND, 0.0, 0.0, 0.9 * w, 0.15, 0.6 * w, 0.95),
        ),
        (ellipse(BODY, 0.52, -0.2, 0.54 * w, 0.6, 0), ellipse(SECOND, 0.36, 0.62, 0.27 * w, 0.5, -25)),
    )[trait]
    wings = [mirrored(lower), lower, mirrored(upper), upper]
    return (
        wings
        + [capsule(ACCENT, 0, -0.3, 0, 0.65, 0.19), ellipse(ACCENT, 0, -0.5, 0.32, 0.3)]
        + eyes(0, -0.52, 0.15, 0.13)
    )


def octopus(w: float, trait: int) -> list[Part]:
    arms = (
        [capsule(SECOND, x, 0.3, x * 1.35, 0.85, 0.2) for x in (-0.62, -0.2, 0.2, 0.62)],
        [capsule(SECOND, x * w, 0.2, x * w, 0.9, 0.26) for x in (-0.5, 0.5)],
        [capsule(SECOND, s * 0.4, 0.3, s * 1.05, y, 0.18) for s in (-1, 1) for y in (0.2, 0.8)],
    )[trait]
    return (
        arms
        + [ellipse(BODY, 0, -0.2, 0.8 * w, 0.76), ellipse(ACCENT, 0, 0.24, 0.3, 0.2)]
        + eyes(0, -0.2, 0.32, 0.2)
    )


def mushroom(w: float, trait: int) -> list[Part]:
    cap = (
        [ellipse(BODY, 0, 0.1, 0.98 * w, 1.05, 0, 0.12)],
        [polygon(BODY, 0, -1.2, -0.95 * w, 0.14, 0.95 * w, 0.14)],
        [ellipse(BODY, 0, -0.2, 1.0 * w, 0.4), ellipse(BODY, 0, -0.5, 0.55 * w, 0.5)],
    )[trait]
    stem = [polygon(SECOND, -0.4, -0.05, 0.4, -0.05, 0.52, 0.9, -0.52, 0.9)]
    return stem + cap + [capsule(ACCENT, -0.5 * w, 0.12, 0.5 * w, 0.12, 0.14)] + eyes(0, 0.5, 0.21, 0.16)


def rocket(w: float, trait: int) -> list[Part]:
    fin = (
        [polygon(SECOND, 0.1, -0.1, 1.05, 0.85, 0.1, 0.75)],
        [ellipse(SECOND, 0.56 * w, 0.5, 0.28, 0.48, -15)],
        [box(SECOND, 0.2, 0.05, 0.95, 0.6)],
    )[trait]
    hull = [
        ellipse(BODY, 0, -0.05, 0.58 * w, 1.05, 0, 0.72),
        ellipse(ACCENT, 0, -0.05, 0.58 * w, 1.05, 0, -0.5),
    ]
    flame = [polygon(ACCENT, -0.34, 0.65, 0.34, 0.65, 0, 1.25)]
    return flame + fin + [mirrored(part) for part in fin] + hull + eyes(0, -0.12, 0, 0.25)


def car(w: float, trait: int) -> list[Part]:
    cabin = (
        [ellipse(SECOND, -0.05, 0.04, 0.72, 0.78 * w, 0, 0.04)],
        [box(SECOND, -1.0, -0.78 * w, 0.35, 0.05)],
        [polygon(SECOND, -0.05, -0.75 * w, 0.5, -0.75 * w, 0.85, 0.05, -0.1, 0.05)],
    )[trait]
    hull = [polygon(BODY, -1.12, -0.06, 0.88, -0.06, 1.12, 0.16, 1.12, 0.58, -1.12, 0.58)]
    wheels = [
        ellipse(paint, x, 0.58, r, r) for x in (-0.6, 0.6) for paint, r in ((PUPIL, 0.36), (ACCENT, 0.22))
    ]
    return cabin + hull + wheels + eyes(0.14, -0.26 * w, 0, 0.2)


def robot(w: float, trait: int) -> list[Part]:
    top = (
        [capsule(ACCENT, 0, -0.7, 0, -1.0, 0.1), ellipse(ACCENT, 0, -1.08, 0.24, 0.24)],
        [capsule(ACCENT, s * 0.3, -0.7, s * 0.62, -1.15, 0.15) for s in (-1, 1)],
        [box(ACCENT, -0.42, -1.12, 0.42, -0.7)],
    )[trait]
    arms = [capsule(ACCENT, s * 0.45 * w, 0.15, s * 0.82 * w, 0.5, 0.17) for s in (-1, 1)]
    body = [box(SECOND, -0.52 * w, -0.05, 0.52 * w, 0.9)]
    return arms + top + body + [box(BODY, -0.72 * w, -0.8, 0.72 * w, 0.12)] + eyes(0, -0.36, 0.32, 0.21)


SPECIES = {
    f.__name__: f
    for f in (fish, bird, cat, rabbit, turtle, snail, butterfly, octopus, mushroom, rocket, car, robot)
}
BUILDS = (0.8, 1.0, 1.25)
RADIX = (len(SPECIES), len(COLOURS), len(COLOURS) - 1, len(COLOURS) - 2, len(PATTERNS), len(BUILDS), 3)
COUNT = int(np.prod(RADIX))


def mirrored(part: Part) -> Part:
    points = list(part.points)
    if part.form == "ellipse":
        points[0], points[4] = -points[0], -points[4]
    else:
        ends = slice(0, 4 if part.form == "capsule" else None, 2)
        points[ends] = [-x for x in points[ends]]
    return part._replace(points=tuple(points))


@lru_cache(1)
def _shuffle() -> np.ndarray:
    return np.random.RandomState(0).permutation(COUNT)  # RandomState: its stream is frozen for ever


def subject(index: int) -> Subject:
    """Subject number index, 0 <= index < COUNT. Different numbers are different subjects, in mixed order."""
    if not 0 <= index < COUNT:
        raise ValueError(f"subject {index} does not exist: choose 0 to {COUNT - 1}")
    kind, body, second, accent, pattern, build, trait = np.unravel_index(_shuffle()[index], RADIX)
    left = list(COLOURS)
    colours = tuple(left.pop(int(i)) for i in (body, second, accent))
    return Subject(index, list(SPECIES)[kind], colours, PATTERNS[pattern], int(build), int(trait))


def _distance(part: Part, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the part's edge in local units, negative inside (first order for ellipses)."""
    if part.form == "ellipse":
        cx, cy, rx, ry, tilt = part.points
        cos, sin = math.cos(tilt), math.sin(tilt)
        u, v = (cos * (x - cx) + sin * (y - cy)) / rx, (cos * (y - cy) - sin * (x - cx)) / ry
        norm = np.sqrt(u * u + v * v) + 1e-6
        d = (norm - 1) * norm / (np.sqrt((u / rx) ** 2 + (v / ry) ** 2) + 1e-6)
    elif part.form == "capsule":
        ax, ay, bx, by, radius = part.points
        s = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
        d = np.sqrt((x - ax - s * (bx - ax)) ** 2 + (y - ay - s * (by - ay)) ** 2) - radius
    else:
        d = _polygon_distance(np.reshape(part.points, (-1, 2)), x, y)
    return d if part.cut is None else np.maximum(d, y - part.cut)


def _polygon_distance(corners: np.ndarray, x: np.ndarray, y: np.ndarray, rounding=0.1) -> np.ndarray:
    """Convex polygon as an intersection of half-planes; adding overshoots in squares rounds its corners."""
    edges = np.roll(corners, -1, axis=0) - corners
    turn = np.sign(edges[0, 0] * edges[1, 1] - edges[0, 1] * edges[1, 0])
    normals = turn * edges[:, ::-1] * (1, -1) / np.linalg.norm(edges, axis=1, keepdims=True)
    offsets = rounding - (normals * corners).sum(1)
    inside, outside = -np.inf, 0.0
    for (nx, ny), offset in zip(normals.tolist(), offsets.tolist(), strict=True):
        d = nx * x + ny * y + offset
        inside = np.maximum(inside, d)
        outside = outside + np.maximum(d, 0) ** 2
    return np.minimum(inside, 0) + np.sqrt(outside) - rounding


def _pattern_distance(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Signed distance to the second colour's edge within the body, negative where it shows."""
    if pattern == "plain":
        return None
    if pattern == "dipped":
        return -y
    if pattern == "spots":
        row = np.floor(y / 0.5 + 0.5)
        return np.hypot((x + 0.3 * (row % 2) + 0.3) % 0.6 - 0.3, y - row * 0.5) - 0.18
    if pattern == "checks":
        across, down = _bars(x), _bars(y)
        return np.where(across * down > 0, -1, 1) * np.minimum(np.abs(across), np.abs(down))
    return _bars({"stripes": x, "bands": y, "diagonals": (x + y) * 0.5**0.5}[pattern])


def _bars(z: np.ndarray, pitch: float = 0.42) -> np.ndarray:
    return (0.5 - np.abs(z / pitch % 2 - 1)) * pitch


def part_cover(part: Part, x: np.ndarray, y: np.ndarray, pixels) -> np.ndarray:
    """How much of each pixel the part covers, 0..1, with an edge one pixel wide; pixels per local unit."""
    return np.clip(0.5 - _distance(part, x, y) * pixels, 0, 1)


class Anatomy(NamedTuple):
    parts: list[Part]
    x: float  # centre of area
    y: float
    radius: float  # of the disc of equal area
    reach: float  # the furthest point's distance from the centre, over that radius
    coat_x: float  # centre of the body's visible part, where patterns start
    coat_y: float


@lru_cache(len(SPECIES) * 9)
def anatomy(species: str, build: int, trait: int) -> Anatomy:
    """Measure a silhouette on a fine grid, so that poses can speak of its centre of area and true size."""
    parts = SPECIES[species](BUILDS[build], trait)
    grid = np.linspace(-1.6, 1.6, 256, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    top = np.full(x.shape, -1)  # the paint that is seen
    for part in parts:
        top[_distance(part, x, y) < 0] = part.paint
    inside, coat = top >= 0, top == BODY
    cx, cy = float(x[inside].mean()), float(y[inside].mean())
    radius = float(np.sqrt(inside.sum() / np.pi) * (grid[1] - grid[0]))
    furthest = float(np.hypot(x[inside] - cx, y[inside] - cy).max())
    middle = [float(z[coat].min() + z[coat].max()) / 2 for z in (x, y)]
    return Anatomy(parts, cx, cy, radius, furthest / radius, *middle)


def reach(who: Subject) -> float:
    """How far the subject extends from its centre, over the radius of the disc of equal area."""
    return anatomy(who.species, who.build, who.trait).reach


def layer(who: Subject, pose: Pose, size: int, x0=0, y0=0, width: int | None = None) -> np.ndarray:
    """The subject alone on a frame of size x size: premultiplied RGB and coverage (4, T, width, width), 0..1.

    x0, y0 (T,) and width cut a window out of the frame, in pixels.
    """
    body = anatomy(who.species, who.build, who.trait)
    px, py, diameter, angle = (np.atleast_1d(np.float32(v))[:, None, None] for v in pose[:4])
    grid = np.arange(width or size, dtype=np.float32) + 0.5
    dx = np.atleast_1d(np.float32(x0))[:, None, None] + grid - px * size
    dy = np.atleast_1d(np.float32(y0))[:, None, None] + grid[:, None] - py * size
    pixels = diameter * size / 2 / body.radius  # per local unit
    cos, sin = np.cos(angle) / pixels, np.sin(angle) / pixels
    u, y = cos * dx + sin * dy, cos * dy - sin * dx + body.y
    x = (-u if pose.mirror else u) + body.x
    paints = np.float32([COLOURS[c] for c in who.colours] + [WHITE, INK]) / 255
    out = np.zeros((4, *x.shape), np.float32)
    pattern = _pattern_distance(who.pattern, x - body.coat_x, y - body.coat_y)
    mix = None if pattern is None else np.clip(0.5 - pattern * pixels, 0, 1)
    for part in body.parts:
        cover = part_cover(part, x, y, pixels)
        out *= 1 - cover
        out[3] += cover
        if part.paint == BODY and mix is not None:
            shown = cover * mix
            cover = cover - shown
            out[:3] += shown * paints[SECOND][:, None, None, None]
        out[:3] += cover * paints[part.paint][:, None, None, None]
    return out


def draw(who: Subject, pose: Pose, background: np.ndarray) -> np.ndarray:
    """Frames (T, H, W, 3) uint8: the subject at T poses before a background (H, H, 3) of whole levels."""
    size = len(background)
    x, y, diameter = (np.atleast_1d(np.float32(v)) * size for v in pose[:3])
    width = min(size, int(np.ceil(reach(who) * diameter.max())) + 3)
    x0 = np.clip(np.round(x - width / 2), 0, size - width).astype(int)
    y0 = np.clip(np.round(y - width / 2), 0, size - width).astype(int)
    sprite = layer(who, pose, size, x0, y0, width)
    frames = np.repeat(np.uint8(background)[None], len(x), axis=0)
    for t, (top, left) in enumerate(zip(y0, x0, strict=True)):
        window = np.s_[top : top + width, left : left + width]
        rgb, cover = sprite[:3, t].transpose(1, 2, 0), sprite[3, t, ..., None]
        frames[t][window] = background[window] * (1 - cover) + 255 * rgb + 0.5  # cut off to whole levels
    return frames
