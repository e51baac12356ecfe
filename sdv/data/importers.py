"""Public data sets -> the folders that sdv.data reads. A killed import goes on where it stopped.

python -m sdv.data import subjects200k data/*.parquet OUT    both directions of every pair, as PNG
python -m sdv.data import clips SOURCE OUT --limit 4000      videos with captions, linked, not re-encoded
"""

import argparse
import csv
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch

from sdv.data.captions import clean_caption, to_utf8
from sdv.data.files import digest, parse_json, write_whole
from sdv.data.import_log import UNREADABLE, Outcome, finish, walk
from sdv.data.media import check_length, decode_image, encode_png, inspect_clip, say_repeats
from sdv.data.rows import CLIP, find_file, say_left_out, scan_rows
from sdv.data.sizes import require_least

SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
CAPTIONS = ("description_0", "description_1")  # of the left and the right view
COLUMNS = {  # Subjects200K: what is read, and the types it may have
    "image.bytes": r"(large_)?binary",
    **{f"quality_assessment.{name}": r"u?int\d+|float|double" for name in SCORES},
    **{f"description.{name}": r"(large_)?string" for name in CAPTIONS},
    "description.description_valid": "bool",
}
FILTERED_BY = ["quality_assessment", "description"]
DIRECTIONS = {"both": ((0, 1), (1, 0)), "left": ((0, 1),), "right": ((1, 0),)}  # (reference, target)
LEAST = {"limit": 1, "seed": 0, "workers": 0, "margin": 0, "frames": 1, "fps": 0.01}


class Composite(NamedTuple):
    """A row of Subjects200K that passed the filters."""

    origin: str  # "train-00000.parquet:17", for people and the log
    source: tuple[Path, int]  # file and row group
    place: int  # in the row group
    captions: tuple[str, str]
    state: str = ""  # names and sizes of the files are among the settings


class Video(NamedTuple):
    origin: str
    source: Path
    prompt: str
    name: str  # in the new folder

    @property
    def state(self) -> str:
        """Another one as soon as the table names another file, or the file is another one."""
        try:
            found = self.source.stat()
        except OSError:
            return ""
        return digest(os.path.realpath(self.source), found.st_size, found.st_mtime_ns)


# Subjects200K


def import_subjects(args: argparse.Namespace) -> int:
    """Composites of two views -> a pairs folder. The filters need no picture, so they come first."""
    _check(args)
    out, files = Path(args.out), sorted(map(Path, args.parquet), key=lambda file: file.name)
    if twins := [name for name, count in Counter(file.name for file in files).items() if count > 1]:
        raise ValueError(f"{twins[0]} is given twice; import it once, or rename one of the files")
    for file in files:
        check_schema(file)
    directions = DIRECTIONS[args.directions]
    found, outcomes = read_composites(files, args.min_quality, directions)
    settings = {
        "import": "subjects200k",
        "files": digest([(file.name, file.stat().st_size) for file in files]),
        **_chosen(args, "min_quality", "directions", "margin", "limit", "seed"),
    }
    work = partial(cut_composites, out=out, margin=args.margin, directions=directions)
    total = len(found) + len(outcomes)
    outcomes += walk(out, settings, found, work, args.limit, args.seed, args.workers)
    return finish(out, total, outcomes, "pairs")


def check_schema(file: Path) -> None:
    """ValueError unless `file` is a parquet file with the columns of Subjects200K."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import read_schema
    except ImportError as error:
        raise ValueError("parquet files need pyarrow: pip install -e '.[importers]'") from error
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the parquet files of Subjects200K")
    try:
        schema = read_schema(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: is no parquet file, or torn ({error}); download it again") from error
    structs = [field for field in schema if pa.types.is_struct(field.type)]
    types = {f"{field.name}.{part.name}": str(part.type) for field in structs for part in field.type}
    for name, kind in COLUMNS.items():
        if not re.fullmatch(kind, types.get(name, "")):
            has = ", ".join(f"{field.name} {field.type}" for field in schema)
            problem = f"is {types[name]}" if name in types else "is missing"
            raise ValueError(f"{file}: {name} {problem}; give Subjects200K's own files (this one has {has})")


def read_composites(
    files: Sequence[Path], min_quality: int, directions: Sequence[tuple[int, int]]
) -> tuple[list[Composite], list[Outcome]]:
    """Rows that pass the filters, and what is wrong with the others, in the order of the files."""
    found, dropped = [], []
    for source, start, rows in _row_groups(files):
        for place, row in enumerate(rows):
            origin = f"{source[0].name}:{start + place}"
            texts = [((row["description"] or {}).get(name) or "").strip() for name in CAPTIONS]
            if reason := _flaw(row, texts, min_quality, directions):
                dropped.append(Outcome(origin, (), reason))
                continue
            try:
                captions = tuple(text and clean_caption(text, "its description") for text in texts)
            except ValueError as error:
                dropped.append(Outcome(origin, (), UNREADABLE, str(error)))
            else:
                found.append(Composite(origin, source, place, captions))
    return found, dropped


def _row_groups(files: Sequence[Path]) -> Iterator[tuple[tuple[Path, int], int, list[dict]]]:
    """((file, row group), number of its first row in the file, its rows without the pictures)."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    for file in files:
        start = 0
        with ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                try:
                    table = parquet.read_row_group(group, FILTERED_BY, use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    problem = f"{file}: row group {group} is damaged ({error}); download the file again"
                    raise ValueError(problem) from error
                yield (file, group), start, table.to_pylist()
                start += table.num_rows


def _flaw(row: dict, captions: list[str], min_quality: int, directions: Sequence[tuple[int, int]]) -> str:
    """Why the row is not used, or nothing."""
    scores = [(row["quality_assessment"] or {}).get(name) for name in SCORES]
    if None in scores:
        return "no quality scores"
    if min(scores) < min_quality:
        return f"a quality score below {min_quality}"
    if not all(captions[target] for _, target in directions):
        return "no description of a target"
    if row["description"]["description_valid"] is False:
        return "description_valid is false"
    return ""


def cut_composites(
    chunk: Sequence[Composite], out: Path, margin: int, directions: Sequence[tuple[int, int]]
) -> list[Outcome]:
    """Composites of one row group -> PNG views below `out`, named by the composite's bytes."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    file, group = chunk[0].source
    try:
        with ParquetFile(file) as parquet:
            column = parquet.read_row_group(group, ["image.bytes"], use_threads=False)["image"]
        pictures = column.take([one.place for one in chunk]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        return [Outcome(one.origin, (), UNREADABLE, str(error)) for one in chunk]
    return [
        _cut_composite(one, (picture or {}).get("bytes") or b"", out, margin, directions)
        for one, picture in zip(chunk, pictures, strict=True)
    ]


def _cut_composite(
    one: Composite,
    data: bytes,
    out: Path,
    margin: int,
    directions: Sequence[tuple[int, int]],
) -> Outcome:
    content = sha256(data).hexdigest()[:32]
    names = [f"views/{content[:2]}/{content}-{side}.png" for side in ("left", "right")]
    if not all((out / name).is_file() for name in names):
        try:
            views = split(decode_image(data, one.origin), margin)
        except ValueError as error:
            return Outcome(one.origin, (), UNREADABLE, str(error).removeprefix(f"{one.origin}: "))
        for name, view in zip(names, views, strict=True):
            write_whole(out / name, partial(Path.write_bytes, data=encode_png(view)))
    rows = [
        {"reference_file_name": names[ref], "target_file_name": names[target], "prompt": one.captions[target]}
        for ref, target in directions
    ]
    return Outcome(one.origin, rows, content=content)


def split(composite: torch.Tensor, margin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, 2H) -> the left and the right half without `margin` pixels at each edge; else ValueError.

    1056x528, margin 8: columns 8..519 and 536..1047. OminiControl's code cuts the right view 8 pixels further
    to the left, so that it begins on the seam, where the generated halves may run into each other.
    """
    height, width = composite.shape[-2:]
    if width != 2 * height or height <= 2 * margin:
        raise ValueError(f"is {width}x{height}, not two square views side by side with a margin of {margin}")
    left, right = composite[..., margin : height - margin, :].split(height, dim=-1)
    return left[..., margin : height - margin], right[..., margin : height - margin]


# Clips


def import_clips(args: argparse.Namespace) -> int:
    """Videos with captions -> a clips folder of links."""
    _check(args)
    out, source = Path(args.out), Path(args.source)
    found, outcomes = list_videos(source, args.path_column, args.caption_column, args.root)
    bounds = _chosen(args, "min_aspect", "min_frames", "frames", "fps", "copy")
    settings = {
        "import": "clips",
        "videos": digest([(one.origin, one.prompt) for one in found]),
        **bounds,
        **_chosen(args, "limit", "seed"),
    }
    work = partial(take_videos, out=out, **bounds)
    total = len(found) + len(outcomes)
    outcomes += walk(out, settings, found, work, args.limit, args.seed, args.workers)
    return finish(out, total, outcomes, "clips")


def list_videos(
    source: Path, path_column: str, caption_column: str, root: str | None
) -> tuple[list[Video], list[Outcome]]:
    """What a folder or a table lists, each file once, and what is wrong with the other rows."""
    if source.is_dir():
        rows, problems = scan_rows(source, CLIP)
        listed = [(row.origin, row.files[0], row.prompt) for row in rows]
        parts = (problem.partition(": ") for problem in problems)
        dropped = [Outcome(origin, (), "no usable row", detail) for origin, _, detail in parts]
        if said := say_left_out(source, rows):
            print(said)
    else:
        listed, dropped = read_table(source, path_column, caption_column, Path(root or source.parent))
    found, seen = [], {}
    for number, (origin, path, prompt) in enumerate(listed):
        if (twin := seen.setdefault(os.path.realpath(path), origin)) != origin:
            dropped.append(Outcome(origin, (), "the same file as another row", twin))
        else:
            found.append(Video(origin, path, prompt, f"{number:06d}{path.suffix.lower()}"))
    return found, dropped


def read_table(
    table: Path, path_column: str, caption_column: str, root: Path
) -> tuple[list[tuple[str, Path, str]], list[Outcome]]:
    """(origin, path, prompt) of every row of a CSV or JSONL file, and the rows that have no such cells."""
    lines = _lines(table)
    columns = next((list(row) for _, row in lines if row), [])
    for name in (path_column, caption_column):
        if name not in columns:
            has = ", ".join(map(str, columns)) or "no row"
            flags = "--path-column and --caption-column"
            raise ValueError(f"{table}: no column {name!r}, it has {has}; name the right ones with {flags}")
    listed, dropped = [], []
    for number, row in lines:
        origin = f"{table.name}:{number}"
        path, text = [row.get(name) for name in (path_column, caption_column)] if row else (None, None)
        try:
            if not all(isinstance(cell, str) and cell.strip() for cell in (path, text)) or "\0" in path:
                raise ValueError("no path or no caption")
            caption = clean_caption(text, caption_column)
            listed.append((origin, find_file(root, path.strip()) or root / path.strip(), caption))
        except (ValueError, OSError) as error:  # OSError: the path is too long, say
            dropped.append(Outcome(origin, (), "no usable row", str(error)[:200]))
    return listed, dropped


def _lines(table: Path) -> list[tuple[int, dict | None]]:
    """(line number, row); None stands for a line that is no row."""
    if table.suffix.lower() not in (".csv", ".jsonl") or not table.is_file():
        raise ValueError(f"{table}: no such table; give a folder of videos, a .csv or a .jsonl file")
    try:
        text = to_utf8(table.read_bytes()).decode()
        if table.suffix.lower() == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""))
            return [(reader.line_num, row) for row in reader]
        return [(number, _object(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: cannot be read ({error}); save it as UTF-8") from error


def _object(line: str) -> dict | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def take_videos(
    chunk: Sequence[Video],
    out: Path,
    min_aspect: float,
    min_frames: int,
    frames: int,
    fps: float,
    copy: bool,
) -> list[Outcome]:
    """Decode each video once; those that pass get a link (or a copy) below `out`."""
    outcomes = []
    for video in chunk:
        reason, detail = _fault(video.source, min_aspect, min_frames, frames, fps)
        if not reason:
            write_whole(out / video.name, partial(_place, video.source.resolve(), copy=copy))
        else:  # of an earlier run, when the row was another one
            (out / video.name).unlink(missing_ok=True)
        row = {"file_name": video.name, "prompt": video.prompt}
        outcomes.append(Outcome(video.origin, () if reason else (row,), reason, detail, video.name))
    return outcomes


def _fault(path: Path, min_aspect: float, min_frames: int, frames: int, fps: float) -> tuple[str, str]:
    """(why the video is not used, the details), or nothing."""
    try:
        clip = inspect_clip(path)
    except (ValueError, OSError) as error:
        return UNREADABLE, str(error)
    if clip.width < min_aspect * clip.height:
        return f"width / height below {min_aspect:g}", ""
    if clip.frames < min_frames:
        return f"fewer than {min_frames} frames", ""
    try:
        check_length(path, clip.seconds, frames, fps)
    except ValueError:
        return f"too short for {frames} frames at {fps:g} fps", ""
    if repeats := say_repeats(path, frames, fps):
        return f"too few frames for {fps:g} fps", repeats
    return "", ""


def _place(source: Path, path: Path, copy: bool) -> None:
    if copy:
        shutil.copyfile(source, path)
        return
    try:
        os.link(source, path)
    except OSError:  # another file system, or one without hard links
        path.symlink_to(source)


# Command line


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The sources of `python -m sdv.data import`."""
    kinds = parser.add_subparsers(required=True)
    pairs = kinds.add_parser("subjects200k", help="parquet files of Subjects200K -> a pairs folder")
    pairs.add_argument("parquet", nargs="+")
    pairs.add_argument("--min-quality", type=int, default=5, help="all three scores, of 5 (the paper's: 5)")
    pairs.add_argument("--directions", choices=DIRECTIONS, default="both", help="the reference's side")
    pairs.add_argument("--margin", type=int, default=8, help="pixels cut from every edge of a view")
    pairs.set_defaults(run=import_subjects)
    clips = kinds.add_parser("clips", help="videos with captions -> a clips folder")
    clips.add_argument("source", help="folder with clip.txt beside clip.mp4, or a .csv or .jsonl file")
    clips.add_argument("--path-column", default="path")
    clips.add_argument("--caption-column", default="caption")
    clips.add_argument("--root", help="where the table's paths start (default: beside the table)")
    clips.add_argument("--min-aspect", type=float, default=1.5, help="width / height (the paper's: 1.5)")
    clips.add_argument("--min-frames", type=int, default=51, help="in the file (the paper's: more than 50)")
    clips.add_argument("--frames", type=int, default=49, help="of a sample, which has to fit in")
    clips.add_argument("--fps", type=float, default=8, help="of a sample")
    clips.add_argument("--copy", action="store_true", help="copy instead of hard or symbolic links")
    clips.set_defaults(run=import_clips)
    for kind in (pairs, clips):
        kind.add_argument("out", help="the new folder; the same command goes on with it after a kill")
        kind.add_argument("--limit", type=int, help="keep this many, drawn by the seed (default: all)")
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")


def _check(args: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        if getattr(args, name, None) is not None:
            require_least(name, getattr(args, name), least)


def _chosen(args: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}
