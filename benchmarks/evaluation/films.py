"""Which films are judged: each with its reference picture, prompt and seed; and the frames in them.

A folder of films has films.jsonl, as sample.py writes it: lines {"file_name", "prompt",
"reference_file_name", "seed"}, paths relative to the file that names them; the last two may be missing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sdv.data.media import from_uint8, inspect_clip, read_clip, read_image, resize
from sdv.run.films import Shot, read_shots

FEWEST = 3  # frames of which smoothness speaks


def asks(film: Shot) -> tuple[str, str, int]:
    """What was asked for: reference, prompt, seed."""
    return str(film.ref and film.ref.resolve()), film.prompt, film.seed


def refuse_twins(films: list[Shot], wanted: list[Shot], listed: Path) -> None:
    """ValueError if two films answer one of the wanted requests: made by other settings, they are no mean."""
    asked, made = {asks(film) for film in wanted}, {}
    for film in (film for film in films if asks(film) in asked):
        other = made.setdefault(asks(film), film.file)
        if other != film.file:
            raise ValueError(
                f"{listed}: {other.name} and {film.file.name} have one prompt, reference and seed, and other "
                "settings: give each setting a folder of its own, or a manifest whose lines have a file_name"
            )


def read_films(folder: Path, manifest: Path | None = None) -> list[Shot]:
    """The films of a folder: all that its films.jsonl names, or what a manifest asks for.

    Lines of a manifest that have no file_name, as sample.py takes them, are looked up in films.jsonl.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of films")
    wanted = read_shots(manifest or folder / "films.jsonl")
    if not all(film.file for film in wanted):
        films = read_shots(folder / "films.jsonl")
        refuse_twins(films, [film for film in wanted if not film.file], folder / "films.jsonl")
        made = {asks(film): film.file for film in films}
        wanted = [film._replace(file=film.file or made.get(asks(film))) for film in wanted]
    elif manifest is None:
        refuse_twins(wanted, wanted, folder / "films.jsonl")
    lacking = [film for film in wanted if film.file is None or not film.file.is_file()]
    if lacking:
        first = lacking[0].file or f"of {lacking[0].prompt!r}, seed {lacking[0].seed}"
        raise ValueError(
            f"{manifest or folder / 'films.jsonl'}: {len(lacking)} of {len(wanted)} films are not there, "
            f"the first {first}; let sample.py go on, or remove the lines"
        )
    return list({film.file: film for film in wanted}.values())  # the last line of a film counts


def check(films: Sequence[Shot], frames: int) -> None:
    """Decode every film and reference once; one ValueError lists the first five that cannot be judged."""
    problems, least = [], max(frames, FEWEST)
    for film in tqdm(films, "check", unit="film", leave=False):
        try:
            if film.ref is not None:
                read_image(film.ref)
            found = inspect_clip(film.file).frames
            if found < least:
                raise ValueError(
                    f"{film.file}: has {found} frames, {least} are needed; give a lower --frames"
                )
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        shown = "\n  ".join(problems[:5] + ["..."] * (len(problems) > 5))
        raise ValueError(f"{len(problems)} of {len(films)} films cannot be judged:\n  {shown}")


def read_frames(path: Path) -> tuple[Tensor, float]:
    """Every frame of a film, uint8 (3, T, H, W), and the rate, frames per second."""
    info = inspect_clip(path)
    fps = info.frames / info.seconds
    return read_clip(path, info.frames, fps, info.height, info.width), fps


def spread(frames: Tensor, count: int) -> Tensor:
    """`count` frames from the first to the last, evenly: (3, T, H, W) -> (count, 3, H, W)."""
    chosen = torch.linspace(0, frames.shape[1] - 1, count, dtype=torch.float64).round().long()
    return frames[:, chosen].transpose(0, 1)


def canvas(picture: Path, height: int, width: int) -> Tensor:
    """The paper's reference, uint8 (3, H, W): all of the picture on a white canvas of the film's size."""
    return resize(read_image(picture), height, width, "pad")


def as_given(picture: Path, height: int, width: int) -> Tensor:
    """The two ways in which sample.py gives a reference, cut and on a canvas: (2, 3, H, W) in [-1, 1]."""
    image = read_image(picture)
    return from_uint8(torch.stack([resize(image, height, width, mode) for mode in ("crop", "pad")]))
