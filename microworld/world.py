"""The micro-world: subjects that move as the prompt says, before the background that it names.

    python -m microworld.world --out out/world --base 2000 --pairs 2000 --clips 64 --heldout 32

Four splits that never share a subject, whatever the seeds, written as ordinary media beside a metadata.jsonl:
    base      captioned clips for pretraining; half of the captions also name the colour of the body
    pairs     two pictures of one subject in two scenes and poses; the prompt describes the second
    clips     a few clips of subjects that have no pairs
    heldout   references (on white and in a scene) and prompts.jsonl with the truth that metrics.py needs
All times are fractions of the clip: 9 frames show the same path as 17.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import Pool
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from microworld.sprites import (
    COUNT,
    SPECIES,
    Part,
    Pose,
    Subject,
    box,
    draw,
    ellipse,
    part_cover,
    polygon,
    reach,
    subject,
)
from sdv.data.media import from_uint8, write_image, write_video
from sdv.run.settings import Count, CountOrNone, Range, Rate, Seed, parse, run

MOTIONS = {  # the first phrase is the one used for evaluation
    "left": ("moves to the left", "goes left"),
    "right": ("moves to the right", "goes right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "sinks"),
    "circle": ("moves in a circle", "circles around"),
    "bounce": ("bounces up and down", "jumps up and down"),
    "grow": ("grows bigger", "comes closer"),
    "shrink": ("gets smaller", "moves away"),
    "spin": ("spins around", "turns around"),
    "still": ("stays still", "does not move"),
}


class Background(NamedTuple):
    phrase: str
    ground: tuple[int, int, int]
    parts: tuple[Part, ...] = ()  # painted in RGB, in coordinates -1..1


CREAM, SKY = (246, 238, 204), (210, 232, 245)
STARS = ((-0.75, -0.7), (-0.3, -0.4), (0.1, -0.85), (0.85, 0.05), (-0.85, 0.15), (-0.3, 0.7), (0.6, 0.75))
TREES = ((-0.72, -0.75, 0.34), (-0.05, -0.9, 0.3), (0.68, -0.65, 0.38))  # x, top, half the width
HOUSES = ((-1.2, -0.3, -0.55), (-0.5, -0.6, 0.05), (0.1, -0.15, 0.55), (0.6, -0.45, 1.2))  # left, top, right
BACKGROUNDS = {  # muted, so that any subject stands out
    "white": Background("on a white background", (250, 250, 250)),
    "grey": Background("on a grey background", (178, 180, 184)),
    "pink": Background("on a pink background", (246, 214, 218)),
    "mint": Background("on a mint background", (196, 232, 214)),
    "meadow": Background(
        "in a green meadow",
        SKY,
        (ellipse((186, 218, 160), 0.7, 1.3, 1.4, 1.15), ellipse((164, 204, 138), -0.5, 1.6, 1.6, 1.2)),
    ),
    "beach": Background(
        "on the beach",
        SKY,
        (box((136, 196, 222), -2, -0.25, 2, 2), ellipse((240, 222, 178), -0.2, 1.75, 2.4, 1.55)),
    ),
    "night": Background(
        "under the night sky",
        (64, 72, 114),
        (*(ellipse(CREAM, x, y, 0.07, 0.07) for x, y in STARS), ellipse(CREAM, 0.6, -0.6, 0.25, 0.25)),
    ),
    "snow": Background(
        "in the snow",
        (190, 208, 228),
        (ellipse((226, 234, 242), -0.7, 1.2, 1.3, 1.15), ellipse((246, 249, 252), 0.5, 1.6, 1.7, 1.25)),
    ),
    "desert": Background(
        "in the desert",
        (252, 232, 204),
        (
            ellipse((250, 246, 226), -0.6, -0.6, 0.26, 0.26),
            ellipse((232, 202, 156), 0.7, 1.4, 1.4, 1.2),
            ellipse((220, 186, 138), -0.6, 1.8, 1.5, 1.35),
        ),
    ),
    "sea": Background(
        "under the sea",
        (152, 206, 226),
        (ellipse((128, 188, 214), 0, 1.2, 3.0, 1.4), ellipse((206, 204, 176), 0.4, 1.75, 1.8, 1.1)),
    ),
    "forest": Background(
        "in the forest",
        (218, 232, 214),
        (
            *(polygon((146, 184, 150), x, top, x - half, 0.55, x + half, 0.55) for x, top, half in TREES),
            ellipse((176, 190, 150), 0, 1.8, 3.0, 1.35),
        ),
    ),
    "city": Background(
        "in the city",
        (234, 226, 234),
        (
            *(box((190, 178, 204), left, top, right, 0.7) for left, top, right in HOUSES),
            box((150, 148, 158), -2, 0.62, 2, 2),
        ),
    ),
}


class Scene(NamedTuple):
    """The truth about a clip or a picture: what metrics compare with."""

    subject: Subject
    motion: str | None  # None: a picture
    background: str
    pose: Pose  # arrays over T
    prompt: str


@lru_cache(256)
def background(name: str, size: int) -> np.ndarray:
    """The scene without a subject, (size, size, 3) float32 of whole levels 0..255; read-only."""
    chosen = BACKGROUNDS[name]
    grid = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    image = np.full((size, size, 3), chosen.ground, np.float32)
    for part in chosen.parts:
        cover = part_cover(part, grid[None, :], grid[:, None], size / 2)[..., None]
        image = image * (1 - cover) + np.float32(part.paint) * cover
    image = image.round()
    image.setflags(write=False)
    return image


def caption(who: Subject, motion: str | None, place: str, colour: bool = False, phrase: int = 0) -> str:
    """Such as "a fish moves to the left under the sea"; of a picture, "a fish under the sea"."""
    noun = f"{who.colours[0]} {who.species}" if colour else who.species
    words = ["an" if noun[0] in "aeiou" else "a", noun, *([MOTIONS[motion][phrase]] if motion else [])]
    return " ".join([*words, BACKGROUNDS[place].phrase])


def path(motion: str | None, frames: int, extent: float, rng: np.random.Generator) -> Pose:
    """A random path of one kind, or a random pose, that keeps a subject of this reach within the frame."""
    if motion is not None and motion not in MOTIONS:
        raise ValueError(f"motion {motion!r} is unknown: choose one of {', '.join(MOTIONS)}")
    u = np.linspace(0, 1, frames)
    size = np.full(frames, min(rng.uniform(0.36, 0.46), 0.66 / extent))
    if motion in ("grow", "shrink"):
        start, ratio = rng.uniform(0.25, 0.29), rng.uniform(1.6, 1.8)
        size = start * ratio ** (u if motion == "grow" else 1 - u)
    room = 0.94 - extent * size.max()  # what is left for the centre to move in, near the edge nothing
    travel, height, radius = rng.uniform(0.28, 0.4), rng.uniform(0.2, 0.28), rng.uniform(0.1, 0.14)
    phase, way = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    angle = np.full(frames, np.deg2rad(rng.uniform(-8, 8) if motion else rng.uniform(-20, 20)))
    x, y, wide, tall = np.zeros(frames), np.zeros(frames), 0.0, 0.0  # around 0, and how much room they take
    if motion in ("left", "right"):
        wide = min(travel, room)
        x = wide * (u - 0.5) * (1 if motion == "right" else -1)
    elif motion in ("up", "down"):
        tall = min(travel, room)
        y = tall * (u - 0.5) * (1 if motion == "down" else -1)
    elif motion == "circle":
        wide = tall = min(2 * radius, room)
        turn = 2 * np.pi * u * way + phase
        x, y = wide / 2 * np.cos(turn), tall / 2 * np.sin(turn)
    elif motion == "bounce":
        tall = min(height, room)
        y = tall * (0.5 - np.abs(np.sin(2 * np.pi * u)))
    elif motion == "spin":
        angle = angle + 2 * np.pi * rng.uniform(0.5, 0.75) * way * u
    centre = [0.5 + rng.uniform(-1, 1) * min(0.1, max(0.0, room - span) / 2) for span in (wide, tall)]
    mirror = motion == "left" or (motion != "right" and rng.random() < 0.5)
    return Pose(x + centre[0], y + centre[1], size, angle, bool(mirror))


# Each split owns a range of subject numbers, so they are disjoint for every seed, which shifts within it.
SPLITS = {
    "heldout": (0, 20_000),
    "clips": (20_000, 20_000),
    "pairs": (40_000, 200_000),
    "base": (240_000, COUNT - 240_000),
}
PROMPTS_PER_SUBJECT = 4


def split_subject(split: str, i: int, seed: int = 0) -> Subject:
    """The i-th subject of a split; after the split's last one they come again."""
    first, count = SPLITS[split]
    return subject(first + (i + seed * 7919) % count)


def _rng(split: str, i: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, list(SPLITS).index(split), i])


def scene(i: int, frames: int = 17, split: str = "base", seed: int = 0) -> Scene:
    """The i-th clip of base or clips: everything drawn from (seed, split, i). One frame is a picture."""
    rng, who = _rng(split, i, seed), split_subject(split, i, seed)
    motion = str(rng.choice(list(MOTIONS))) if frames > 1 else None
    place = str(rng.choice(list(BACKGROUNDS)))
    named = split == "base" and rng.random() < 0.5
    prompt = caption(who, motion, place, named, int(rng.integers(2)))
    return Scene(who, motion, place, path(motion, frames, reach(who), rng), prompt)


def pair(i: int, seed: int = 0) -> tuple[Scene, Scene]:
    """The i-th (reference, target) of one subject in two scenes; every fourth reference is on white."""
    rng, who = _rng("pairs", i, seed), split_subject("pairs", i, seed)
    first, second = (str(name) for name in rng.choice(list(BACKGROUNDS), 2, replace=False))
    first = "white" if rng.random() < 0.25 and second != "white" else first
    pictures = [(place, path(None, 1, reach(who), rng)) for place in (first, second)]
    return tuple(Scene(who, None, place, pose, caption(who, None, place)) for place, pose in pictures)


def heldout(i: int, frames: int = 17, seed: int = 0) -> tuple[Scene, list[Scene]]:
    """The i-th held-out subject: the scene of its reference, and those of its prompts, motions in turn."""
    rng, who = _rng("heldout", i, seed), split_subject("heldout", i, seed)
    places = [str(name) for name in rng.permutation(list(BACKGROUNDS))]
    reference = Scene(who, None, places[0], path(None, 1, reach(who), rng), caption(who, None, places[0]))
    wanted = []
    for k in range(PROMPTS_PER_SUBJECT):
        motion = list(MOTIONS)[(i * PROMPTS_PER_SUBJECT + k) % len(MOTIONS)]
        prompt = caption(who, motion, places[1 + k])
        wanted.append(Scene(who, motion, places[1 + k], path(motion, frames, reach(who), rng), prompt))
    return reference, wanted


def render(truth: Scene, size: int = 64, place: str | None = None) -> np.ndarray:
    """Frames (T, size, size, 3) uint8 of a scene, or of the same poses at another place."""
    ground = background(place or truth.background, size)
    first = Pose(*(np.asarray(v)[:1] for v in truth.pose[:4]), truth.pose.mirror)
    if all(np.ptp(v) == 0 for v in truth.pose[:4]):
        return np.repeat(draw(truth.subject, first, ground), len(truth.pose.x), axis=0)
    return draw(truth.subject, truth.pose, ground)


def to_clip(frames: np.ndarray) -> torch.Tensor:
    """uint8 frames (T, H, W, 3) -> a clip (3, T, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(frames).permute(3, 0, 1, 2))


def lookalikes(who: Subject) -> list[Subject]:
    """99 other held-out subjects of the same species: among them the prompt's noun gives nothing away."""
    return [other for other in _heldout_of(who.species) if other != who][:99]


@lru_cache(len(SPECIES))
def _heldout_of(species: str) -> list[Subject]:
    first, count = SPLITS["heldout"]
    return [who for who in map(subject, range(first, first + count)) if who.species == species]


# Files. All is drawn at SCALE times the training size and shrunk by the loader, as real footage is: yuv420p
# halves the resolution of colour, which at 64x64 leaves 30 dB of a sprite; drawn at 256x256, 39 dB.
SCALE = 4


def _write_picture(path: Path, truth: Scene, size: int, place: str | None = None) -> str:
    write_image(path, torch.from_numpy(render(truth, size * SCALE, place)[0]).permute(2, 0, 1))
    return path.name


def _write_clip(
    folder: Path, i: int, split: str, size: int, frames: int, fps: float, seed: int
) -> list[dict]:
    truth = scene(i, frames, split, seed)
    name = f"{i:06d}.mp4"
    write_video(folder / name, torch.from_numpy(render(truth, size * SCALE)).permute(3, 0, 1, 2), fps)
    return [{"file_name": name, "prompt": truth.prompt}]


def _write_pair(folder: Path, i: int, size: int, seed: int) -> list[dict]:
    ref, target = pair(i, seed)
    names = [
        _write_picture(folder / f"{i:06d}_{kind}.png", truth, size)
        for kind, truth in (("ref", ref), ("target", target))
    ]
    return [{"reference_file_name": names[0], "target_file_name": names[1], "prompt": target.prompt}]


def _write_heldout(folder: Path, i: int, size: int, seed: int) -> list[dict]:
    ref, wanted = heldout(i, seed=seed)
    row = {
        "reference_file_name": _write_picture(folder / f"{i:04d}_scene.png", ref, size),
        "white_reference_file_name": _write_picture(folder / f"{i:04d}_white.png", ref, size, "white"),
        "subject": ref.subject.index,
    }
    return [
        row | {"prompt": want.prompt, "motion": want.motion, "background": want.background} for want in wanted
    ]


def write_split(folder: Path, write, count: int, jobs: int) -> None:
    """Call write(folder, i) for every i < count in parallel; its rows, in order, become the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "prompts.jsonl" if folder.name == "heldout" else "metadata.jsonl"
    with Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = tqdm(
            pool.imap(partial(write, folder), range(count), chunksize=4), folder.name, count, unit="row"
        )
        lines = [json.dumps(row) for rows in done for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Config:
    """the world"""

    out: str = "out/world"  # a folder for each split
    size: Annotated[int, Range(16, 1024)] = 64  # side of the training frames, pixels
    frames: Count = 17  # of a clip
    fps: Rate = 8.0  # of a clip
    seed: Seed = 0  # draws other scenes, and other subjects of each split's own
    base: CountOrNone = 2000  # captioned clips
    pairs: CountOrNone = 2000  # picture pairs
    clips: CountOrNone = 64  # clips without pairs
    heldout: CountOrNone = 32  # held-out subjects, four prompts each
    jobs: Count = os.cpu_count() or 1  # processes; the files do not depend on it


def main() -> None:
    cfg = parse(Config, __doc__)
    video = {"size": cfg.size, "frames": cfg.frames, "fps": cfg.fps, "seed": cfg.seed}
    for split, write, count in (
        ("base", partial(_write_clip, split="base", **video), cfg.base),
        ("pairs", partial(_write_pair, size=cfg.size, seed=cfg.seed), cfg.pairs),
        ("clips", partial(_write_clip, split="clips", **video), cfg.clips),
        ("heldout", partial(_write_heldout, size=cfg.size, seed=cfg.seed), cfg.heldout),
    ):
        if count:
            write_split(Path(cfg.out) / split, write, count, cfg.jobs)


if __name__ == "__main__":
    run(main)
