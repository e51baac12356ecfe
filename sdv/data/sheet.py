"""A contact sheet: what the trainer will see of a folder, as one page that needs no network."""

import base64
import html
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sdv.data import media
from sdv.data.files import write_text
from sdv.data.rows import Row

SHOWN = 200  # rows on a page
HIGH = 120  # pixels of a picture there
FRAMES = 8  # of a clip, evenly over the frames that are trained on
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; }}
  figure {{ margin: 0 0 1.2rem; overflow-x: auto; white-space: nowrap; }}
  figcaption {{ white-space: normal; }} small {{ opacity: .7; }} .bad {{ color: #c0392b; }}
  img {{ height: {high}px; margin-right: 3px; }}
  @media (prefers-color-scheme: dark) {{ body {{ background: #0d1117; color: #e6edf3; }} }}
</style>
<h1>{title}</h1>
<p>{about}</p>
{rows}
</html>
"""


def write_sheet(
    out: Path,
    rows: list[Row],
    problems: list[str],
    size: tuple[int, int],
    frames: int,
    fps: float,
    tokens: tuple[Callable[[str], int], int] | None,
) -> None:
    """The first rows of a folder as crops at the trained size, and of clips frames at the trained rate.

    tokens: how many a caption has and how many are read; None: not counted. Of bad rows the reason is shown.
    """
    shown = rows[:SHOWN]
    about = (
        f"{len(rows):,} good rows, {len(problems):,} bad ones; the first {len(shown):,} are shown. Crops are "
    )
    about += f"{size[1]} x {size[0]}, clips {frames} frames at {fps:g} a second, of which {FRAMES} are shown."
    parts = [f'<p class="bad">{html.escape(problem)}</p>' for problem in problems[:SHOWN]]
    for row in shown:
        try:
            pictures = "".join(_picture(image) for image in _pictures(row, size, frames, fps))
        except (ValueError, OSError) as error:
            pictures = f'<span class="bad">{html.escape(str(error))}</span>'
        caption = (
            f"<b>{html.escape(row.prompt)}</b> <small>{html.escape(row.origin)}{_count(row, tokens)}</small>"
        )
        parts.append(f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>")
    page = PAGE.format(title="What the trainer sees", about=about, rows="\n".join(parts), high=HIGH)
    write_text(out, page, durable=False)


def _pictures(row: Row, size: tuple[int, int], frames: int, fps: float) -> Iterator[Tensor]:
    """uint8 (3, H, W): both pictures of a pair, or frames of a clip."""
    if len(row.files) == 2:
        yield from (media.resize(media.read_image(path), *size) for path in row.files)
        return
    clip = media.read_clip(row.files[0], frames, fps, *size)
    for i in torch.linspace(0, frames - 1, min(FRAMES, frames)).round().long().tolist():
        yield clip[:, i]


def _picture(image: Tensor) -> str:
    scale = HIGH / image.shape[-2]
    small = F.interpolate(image[None].float(), scale_factor=min(1.0, scale), mode="area")[0]
    data = base64.b64encode(media.encode_png(small.round().to(torch.uint8))).decode()
    return f'<img src="data:image/png;base64,{data}" alt="">'


def _count(row: Row, tokens: tuple[Callable[[str], int], int] | None) -> str:
    if tokens is None:
        return ""
    length, limit = tokens
    found = length(row.prompt)
    cut = f', <span class="bad">cut to {limit}</span>' if found > limit else ""
    return f", {found} of {limit} tokens{cut}"
