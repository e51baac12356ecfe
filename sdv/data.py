"""Folders of pairs and clips -> checked rows -> seeded batches that resume from one integer.

A pairs folder holds metadata.jsonl with rows {"reference_file_name", "target_file_name", "prompt"}; a clips
folder rows {"file_name", "prompt"}, or clip.mp4 beside clip.txt.

    python -m sdv.data check DIR    decodes every file once and says what is wrong with which row
    python -m sdv.data import ...   makes such a folder of a public data set, see sdv.importers
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from sdv import media
from sdv.seeds import generator

PAIR = ("reference_file_name", "target_file_name")
CLIP = ("file_name",)
ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi")  # what clip.txt may stand beside
ORDER, VIEW = 2, 3  # what is drawn: second number of a key of sdv.seeds (0 and 1 are train.py's)


# Sizes


class Tokens(NamedTuple):
    """Sequence lengths of one sample."""

    text: int
    ref: int
    video: int

    @property
    def total(self) -> int:
        return sum(self)


def check_size(
    height: int, width: int, frames: int = 1, spatial_ratio: int = 8, temporal_ratio: int = 4, patch: int = 2
) -> None:
    """Raise ValueError unless the VAE and the patches divide the size, and frames = temporal_ratio k + 1."""
    step = spatial_ratio * patch
    for name, value in (("height", height), ("width", width)):
        if value < step or value % step:
            below = max(1, value // step) * step
            raise ValueError(
                f"{name} {value} is not a multiple of {step} (VAE {spatial_ratio} x patch {patch}): "
                f"use {below} or {below + step}"
            )
    if frames < 1 or (frames - 1) % temporal_ratio:
        below = max(0, (frames - 1) // temporal_ratio) * temporal_ratio + 1
        above = below + temporal_ratio
        raise ValueError(f"{frames} frames are not {temporal_ratio}k + 1: use {below} or {above}")


def count_tokens(
    height: int,
    width: int,
    frames: int = 1,
    text: int = 226,
    spatial_ratio: int = 8,
    temporal_ratio: int = 4,
    patch: int = 2,
) -> Tokens:
    """Tokens of one sample: text, one reference frame, and the latent frames of the video."""
    check_size(height, width, frames, spatial_ratio, temporal_ratio, patch)
    frame = (height // (spatial_ratio * patch)) * (width // (spatial_ratio * patch))
    return Tokens(text, frame, frame * (1 + (frames - 1) // temporal_ratio))


# Rows


class Row(NamedTuple):
    origin: str  # "metadata.jsonl:3 clip.mp4", for people
    files: tuple[Path, ...]
    prompt: str


def read_rows(folder: str | Path, fields: tuple[str, ...]) -> list[Row]:
    """Every row of the folder, or one ValueError that counts the bad ones and lists the first five."""
    rows, problems = scan_rows(folder, fields)
    if problems:
        shown = "\n  ".join(problems[:5] + ["..."] * (len(problems) > 5))
        raise ValueError(f"{folder}: {len(problems)} of {len(rows) + len(problems)} rows are bad:\n  {shown}")
    return rows


def scan_rows(folder: str | Path, fields: tuple[str, ...]) -> tuple[list[Row], list[str]]:
    """(good rows, what is wrong with the others), in the order of the folder. An empty folder is an error."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    wanted = f"{', '.join(fields)} and prompt"
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        lines = enumerate(metadata.read_bytes().split(b"\n"), 1)
        readers = [partial(_row_of_line, folder, *line, fields) for line in lines if line[1].strip()]
    elif fields == CLIP:
        videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
        readers = [partial(_row_of_caption, path) for path in videos]
    else:
        raise FileNotFoundError(f"{folder}: no metadata.jsonl; write it, one object with {wanted} a line")
    if not readers:
        raise ValueError(f"{folder}: holds no rows; give it a metadata.jsonl with {wanted}")
    rows, problems = [], []
    for read in readers:
        try:
            rows.append(read())
        except ValueError as error:
            problems.append(str(error))
    return rows, problems


def _row_of_line(folder: Path, number: int, line: bytes, fields: tuple[str, ...]) -> Row:
    origin = f"metadata.jsonl:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{origin}: broken JSON ({error}); write one object a line, in UTF-8") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{origin}: is a {type(row).__name__}; write an object with {', '.join(fields)}, prompt"
        )
    for field in (*fields, "prompt"):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            found = "missing" if field not in row else f"{value!r:.40}"
            raise ValueError(f"{origin}: {field} is {found}; write a text there")
    files = tuple(_inside(folder, origin, field, row[field]) for field in fields)
    return Row(f"{origin} {row[fields[0]]}", files, row["prompt"].strip())


def _inside(folder: Path, origin: str, field: str, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{origin}: {field} {name} leaves the folder; use a path inside {folder}")
    if not (folder / name).is_file():
        raise ValueError(f"{origin}: {field} {name} is not in {folder}; fix the name or remove the row")
    return folder / name


def _row_of_caption(path: Path) -> Row:
    text = path.with_suffix(".txt")
    try:
        prompt = text.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: no prompt; write one in {text.name}, in UTF-8") from error
    if not prompt:
        raise ValueError(f"{text.name}: is empty; write the prompt of {path.name} there")
    return Row(path.name, (path,), prompt)


# Data sets


class Rows(Dataset):
    """Checked rows of a folder. `load` gives uint8 pixels; indexing, the same item as floats in [-1, 1]."""

    rows: list[Row]
    read: Callable[[Row, torch.Generator], dict]  # each data set's own way from a row to an item

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, row: Row) -> str:
        """What the text encoder is given."""
        return row.prompt

    def __getitem__(self, index: int) -> dict:
        return _to_float(self.load(index, generator(index)))

    def load(self, index: int, rng: torch.Generator) -> dict:
        """The item at `index`, random choices drawn from `rng`; a ValueError starts with the row's origin."""
        row = self.rows[index]
        try:
            return {**self.read(row, rng), "row": row.origin}
        except (ValueError, OSError) as error:
            raise ValueError(f"{row.origin}: {error}") from error

    def verify(self, limit: int) -> None:
        """Decode up to `limit` rows, spread over the folder; one ValueError lists the bad ones among them."""
        rows = range(0, len(self), -(-len(self) // limit)) if limit else ()
        with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
            problems = [text for text in pool.map(self._problem, rows) if text]
        if problems:
            raise ValueError("files that cannot be used:\n  " + "\n  ".join(problems))

    def _problem(self, index: int) -> str | None:
        try:
            self.load(index, generator(index))
        except ValueError as error:
            return str(error)
        return None


class Pairs(Rows):
    """Two views of one subject: {"ref" (3, H, W), "target" (3, H, W), "prompt", "row"}.

    `jitter` (paper: crop jitter of each view, range unknown) enlarges each view by a factor drawn from
    [1, 1 + jitter] and cuts it at a random place; 0 is the centre crop.
    """

    def __init__(
        self, folder: str | Path, height: int, width: int, cls_token: str = "<cls> ", jitter: float = 0.0
    ):
        if jitter < 0:
            raise ValueError(f"jitter {jitter}: use 0 or more")
        self.rows = read_rows(folder, PAIR)
        self.size, self.cls_token, self.jitter = (height, width), cls_token, jitter

    def read(self, row: Row, rng: torch.Generator) -> dict:
        ref, target = (self._view(path, rng) for path in row.files)
        return {"ref": ref, "target": target, "prompt": self.prompt(row)}

    def prompt(self, row: Row) -> str:
        return self.cls_token + row.prompt

    def _view(self, path: Path, rng: torch.Generator) -> torch.Tensor:
        image = media.read_image(path)
        if not self.jitter:
            return media.resize(image, *self.size)
        zoom, down, right = torch.rand(3, generator=rng).tolist()
        return media.resize(image, *self.size, zoom=1 + self.jitter * zoom, at=(down, right))


class Clips(Rows):
    """A video and its caption: {"clip" (3, T, H, W), "prompt", "row"}; its first window or a random one."""

    def __init__(
        self, folder: str | Path, frames: int, fps: float, height: int, width: int, window: str = "first"
    ):
        if window not in ("first", "random"):
            raise ValueError(f"window {window!r}: use 'first' or 'random'")
        self.rows = read_rows(folder, CLIP)
        self.frames, self.fps, self.size, self.random = frames, fps, (height, width), window == "random"

    def read(self, row: Row, rng: torch.Generator) -> dict:
        window = torch.rand((), generator=rng).item() if self.random else 0.0
        clip = media.read_clip(row.files[0], self.frames, self.fps, *self.size, window=window)
        return {"clip": clip, "prompt": self.prompt(row)}


# Batches


def batches(
    dataset: Rows,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[dict]:
    """Endless collated batches from the `start`-th on: the same for any number of workers and after a resume.

    Sample k of the run is row `locate(seed, k, n)`, its random choices come from (seed, k), and batch b of a
    rank holds samples (b * world + rank) * batch_size + 0, 1, ...: ranks share an epoch without overlap.
    """
    if batch_size < 1 or min(seed, start, rank, world - 1 - rank) < 0:
        raise ValueError(f"{batch_size=}, {seed=}, {start=}, {rank=}, {world=}: out of range")
    slices = (
        range((b * world + rank) * batch_size, (b * world + rank + 1) * batch_size) for b in count(start)
    )
    loader = DataLoader(
        _Samples(dataset, seed),
        batch_sampler=slices,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else torch's own generator moves on, and a resume would not be exact
    )
    return (_ready(batch, device) for batch in loader)


def locate(seed: int, k: int, n: int) -> tuple[int, int]:
    """(epoch, index) of sample k in an endless run over n rows, reshuffled for every epoch."""
    epoch, place = divmod(k, n)
    return epoch, _permutation(seed, epoch, n)[place]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> list[int]:
    return torch.randperm(n, generator=generator(seed, ORDER, epoch)).tolist()


class _Samples(Dataset):
    """Sample number -> item, or a text that says what is wrong with the file, raised outside the workers."""

    def __init__(self, dataset: Rows, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, k: int) -> dict | str:
        _, index = locate(self.seed, k, len(self.dataset))
        try:
            return self.dataset.load(index, generator(self.seed, VIEW, k))
        except ValueError as error:
            return str(error)


def _collate(items: list[dict | str]) -> dict | str:
    return next((item for item in items if isinstance(item, str)), None) or default_collate(items)


def _ready(batch: dict | str, device: torch.device | str) -> dict:
    if isinstance(batch, str):
        raise ValueError(batch)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return _to_float(moved)


def _to_float(item: dict) -> dict:
    """Pixels travel between processes and devices as bytes, a quarter of the floats they become here."""

    def convert(value: object) -> object:
        pixels = isinstance(value, torch.Tensor) and value.dtype == torch.uint8
        return media.from_uint8(value) if pixels else value

    return {name: convert(value) for name, value in item.items()}


# Command line


# What a model was trained at, and pixels, frames and latents that become one latent or token.
SIZES = ("height", "width", "frames", "fps", "text", "spatial_ratio", "temporal_ratio", "patch")
MODELS = {
    "CogVideoX-5b": dict(zip(SIZES, (480, 720, 49, 8, 226, 8, 4, 2), strict=True)),
    "Wan2.2-TI2V-5B": dict(zip(SIZES, (704, 1280, 121, 24, 512, 16, 4, 2), strict=True)),
}


def check(args: argparse.Namespace) -> int:
    """Decode every file once; print a verdict a row and the tokens of a sample. 1 if a row is bad, else 0."""
    for name, value in MODELS[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    grid = args.text, args.spatial_ratio, args.temporal_ratio, args.patch
    lengths = {"identity": 1, "motion": args.frames}
    plan = {task: count_tokens(args.height, args.width, n, *grid) for task, n in lengths.items()}
    fields = _kind(Path(args.folder))
    rows, problems = scan_rows(args.folder, fields)
    for problem in problems:
        print(f"BAD  {problem}")
    bad = len(problems)
    with ThreadPoolExecutor(args.workers) as pool:  # decoding leaves Python's lock
        for good, verdict in pool.map(partial(_verdict, args=args), rows):
            print(f"{'ok ' if good else 'BAD'}  {verdict}", flush=True)
            bad += not good
    total = len(rows) + len(problems)
    print(f"{total} {'pairs' if fields == PAIR else 'clips'}: {total - bad} ok, {bad} bad")
    for task, tokens in plan.items():
        size = f"{lengths[task]} x {args.height} x {args.width}"
        parts = f"text {tokens.text:,} + ref {tokens.ref:,} + video {tokens.video:,}"
        print(f"{task} sample, {size}: {tokens.total:,} tokens = {parts}")
    return int(bad > 0)


def _kind(folder: Path) -> tuple[str, ...]:
    """PAIR if a readable row names a reference, else CLIP."""
    metadata = folder / "metadata.jsonl"
    return PAIR if metadata.is_file() and b'"reference_file_name"' in metadata.read_bytes() else CLIP


def _verdict(row: Row, args: argparse.Namespace) -> tuple[bool, str]:
    try:
        found = _pair_verdict(row) if len(row.files) == 2 else _clip_verdict(row, args)
    except (ValueError, OSError) as error:
        return False, f"{row.origin}: {error}"
    return True, f"{row.origin}: {found}"


def _pair_verdict(row: Row) -> str:
    shapes = (media.read_image(path).shape for path in row.files)
    return ", ".join(f"{path.name} {w}x{h}" for path, (_, h, w) in zip(row.files, shapes, strict=True))


def _clip_verdict(row: Row, args: argparse.Namespace) -> str:
    clip = media.inspect_clip(row.files[0])
    media.check_length(row.files[0], clip.seconds, args.frames, args.fps)
    rate = "steady" if clip.steady else "variable rate"
    return f"{clip.width}x{clip.height}, {clip.frames} frames in {clip.seconds:.2f} s, {rate}"


def main(argv: list[str] | None = None) -> int:
    """Exit status: what the command returns, or 1 after one line about bad input."""
    from sdv import importers  # which reads folders with this module

    parser = argparse.ArgumentParser(prog="python -m sdv.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("check", help="decode every file of a folder once, with a verdict a row")
    one.add_argument("folder")
    one.add_argument("--model", choices=MODELS, default="CogVideoX-5b", help="whose sizes to take")
    for name in MODELS[one.get_default("model")]:
        one.add_argument("--" + name.replace("_", "-"), type=float if name == "fps" else int, help="instead")
    one.add_argument("--workers", type=int, default=os.cpu_count(), help="files decoded at once")
    one.set_defaults(run=check)
    importers.add_commands(commands.add_parser("import", help="make a folder of pairs or clips"))
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
