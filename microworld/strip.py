"""The moving picture on the front page: six subjects never seen, by base, adapter and a perfect model.

    make films                # or: python -m microworld.strip --out docs/films.gif

From left to right: the reference; the base, which does not see it; the shipped adapter, guided by the
reference; a real render of what was asked for. Two minutes on two quiet CPU cores.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from microworld.studio import BASE_GUIDANCE, ROOT, SHIPPED, Case, Studio, cases, renders
from sdv.data.files import write_whole
from sdv.data.media import to_uint8
from sdv.run.settings import Count, parse, run

SIDE, GAP = 96, 6  # pixels of a film on the page, and between films
COLUMNS = 2


@dataclass(frozen=True)
class Config:
    """the strip"""

    out: str = str(ROOT / "docs/films.gif")  # where it goes
    subjects: tuple[int, ...] = (50, 51, 52, 53, 54, 55)  # held-out subjects; on these nothing was chosen
    steps: Count = 25  # denoising steps


def sheet(of: list[Case], films: list[list[Tensor]]) -> Tensor:
    """(3, T, H, W) in [-1, 1]: of each case its reference and one film of each kind, side by side."""
    length = films[0][0].shape[1]
    tiles = []
    for i, case in enumerate(of):
        row = [case.ref[:, None].expand(-1, length, -1, -1), *(kind[i] for kind in films)]
        row = [
            F.interpolate(film.transpose(0, 1), (SIDE, SIDE), mode="bicubic").transpose(0, 1) for film in row
        ]
        tiles.append(torch.cat([F.pad(film, (0, GAP // 2, 0, 0), value=1) for film in row], dim=-1))
    rows = []
    for first in range(0, len(tiles), COLUMNS):
        padded = [F.pad(tile, (0, 2 * GAP, 0, GAP), value=1) for tile in tiles[first : first + COLUMNS]]
        rows.append(torch.cat(padded, dim=-1))
    return torch.cat(rows, dim=-2).clamp(-1, 1)


def write_gif(path: Path, clip: Tensor, fps: float) -> None:
    """A clip (3, T, H, W) in [-1, 1] as a GIF that repeats, with one palette chosen for all of it."""
    from PIL import Image  # matplotlib brings it

    frames = to_uint8(clip).permute(1, 2, 3, 0).contiguous()  # (T, H, W, 3)
    palette = Image.fromarray(frames.flatten(0, 1).numpy()).quantize(128, kmeans=1)
    first, *others = (
        Image.fromarray(frame.numpy()).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames
    )
    ends = [10 * round(100 * n / fps) for n in range(len(frames) + 1)]  # ms; a GIF counts hundredths
    times = [end - start for start, end in pairwise(ends)]
    first.save(path, "gif", save_all=True, append_images=others, duration=times, loop=0, optimize=True)


def main() -> None:
    cfg = parse(Config, __doc__)
    every = cases(4 * (max(cfg.subjects) + 1))
    of = [every[4 * subject + number % 4] for number, subject in enumerate(cfg.subjects)]
    studio = Studio(steps=cfg.steps)
    base = studio.film(of, guidance=BASE_GUIDANCE)
    studio.put_on(SHIPPED)
    clip = sheet(of, [base, studio.film(of), renders(of)])
    write_whole(Path(cfg.out), lambda to: write_gif(to, clip, studio.cfg.fps))
    print(f"{cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
