"""Folders of pairs and clips -> checked rows, and the pixels and prompts in them.

A pairs folder holds metadata.jsonl with rows {"reference_file_name", "target_file_name", "prompt"}; a clips
folder rows {"file_name", "prompt"}, or clip.mp4 beside clip.txt. Hidden files are skipped.
"""

import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from sdv.data import media
from sdv.data.captions import clean_caption, to_utf8
from sdv.data.files import digest, in_threads, parse_json
from sdv.data.pixels import from_uint8, resize
from sdv.seeds import generator

PAIR = ("reference_file_name", "target_file_name")
CLIP = ("file_name",)
KINDS = {"pairs": PAIR, "clips": CLIP}
CLS = "<cls> "  # before the prompt of a pair, unless train.py is told otherwise
# What clip.txt may stand beside.
ENDINGS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".3gp", ".mpg", ".mpeg"}
ENDINGS |= {".ts", ".mts", ".m2ts"}


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
        found = "is a file; name the folder that holds it" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {found}")
    wanted = f"{', '.join(fields)} and prompt"
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        lines = enumerate(read_lines(metadata), 1)
        readers = [partial(_row_of_line, folder, *line, fields) for line in lines if line[1].strip()]
    elif fields == CLIP:
        readers = [partial(_row_of_caption, path) for path in _visible(folder) if _is_clip(path)]
    else:
        raise FileNotFoundError(f"{folder}: no metadata.jsonl; write it, one object with {wanted} a line")
    if not readers:
        raise ValueError(f"{folder}: holds no rows; give it a metadata.jsonl with {wanted}")
    rows, problems = [], []
    for row, problem in in_threads(_attempt, readers):
        if row is None:
            problems.append(problem)
        else:
            rows.append(row)
    return rows, problems


def _attempt(read: Callable[[], Row]) -> tuple[Row | None, str]:
    try:
        return read(), ""
    except (ValueError, OSError) as error:
        return None, str(error)


def say_left_out(folder: Path, rows: list[Row]) -> str:
    """What to say of files in a folder of clips that are in no good row; nothing, if there are none.

    With a metadata.jsonl these are clips; else, all that is neither a clip, by its ending, nor its caption.
    """
    files = _visible(folder)
    if (folder / "metadata.jsonl").is_file():
        listed = {path for row in rows for path in row.files}
        others = [path for path in files if _is_clip(path) and path not in listed]
    else:
        known = {unicodedata.normalize("NFC", f"{path.stem}.txt") for path in files if _is_clip(path)}
        names = {path: unicodedata.normalize("NFC", path.name) for path in files if not _is_clip(path)}
        others = [path for path, name in names.items() if name not in known]
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    named = ", ".join(path.name for path in others[:5])
    return f"left out, in no good row: {named}{more}" if others else ""


def say_same_file(pair: Row) -> str:
    """What to say of a pair that is one picture; nothing, of another one."""
    same = pair.files[0].samefile(pair.files[1])
    return "reference and target are one file: it teaches to copy" if same else ""


def read_lines(path: Path) -> list[bytes]:
    """Lines of a text file in UTF-8, or in UTF-16 with its mark."""
    try:
        return to_utf8(path.read_bytes()).split(b"\n")
    except UnicodeError as error:
        raise ValueError(f"{path}: broken text ({error}); save it as UTF-8") from error


def find_file(folder: Path, name: str) -> Path | None:
    """The file of this name, or of one with the same letters: accents may be composed (NFC) or not (NFD)."""
    if (folder / name).is_file():
        return folder / name
    path = folder
    for part in Path(name).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        path = next((path / form for form in forms if (path / form).exists()), path / part)
    return path if path.is_file() else None


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _row_of_line(folder: Path, number: int, line: bytes, fields: tuple[str, ...]) -> Row:
    origin = f"metadata.jsonl:{number}"
    try:
        row = parse_json(line.decode())
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
            others = (kind for kind, names in KINDS.items() if names != fields and names[0] in row)
            hint = "".join(f" (this is a row of {kind}: another folder was meant?)" for kind in others)
            raise ValueError(f"{origin}: {field} is {found}; write a text there{hint}")
    files = tuple(_inside(folder, origin, field, row[field]) for field in fields)
    origin = f"{origin} {row[fields[0]]}"
    return Row(origin, files, clean_caption(row["prompt"], f"{origin}: prompt"))


def _inside(folder: Path, origin: str, field: str, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{origin}: {field} {name} leaves the folder; use a path inside {folder}")
    try:
        path, reason = find_file(folder, name), f"is not in {folder}"
    except OSError as error:  # the name is too long, say
        path, reason = None, f"cannot be looked for ({error.strerror})"
    if path is None:
        raise ValueError(f"{origin}: {field} {name:.100} {reason}; fix the name or remove the row")
    return path


def _row_of_caption(path: Path) -> Row:
    name = f"{path.stem}.txt"
    try:
        text = find_file(path.parent, name)
        prompt = to_utf8(text.read_bytes()).decode() if text else None
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path.name}: cannot read {name} ({error}); save it as UTF-8") from error
    if prompt is None:
        raise ValueError(f"{path.name}: no prompt; write one in {name}, in UTF-8")
    return Row(path.name, (path,), clean_caption(prompt, f"{path.name}: {name}"))


# Data sets


class Rows(Dataset):
    """Checked rows of a folder. `load` gives uint8 pixels; indexing, the same item as floats in [-1, 1]."""

    folder: Path
    rows: list[Row]
    read: Callable[[Row, torch.Generator], dict]  # each data set's own way from a row to an item

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, row: Row) -> str:
        """What the text encoder is given."""
        return row.prompt

    def oddity(self, row: Row) -> str:
        """What of a good row is likely to be a mistake, or nothing."""
        return ""

    def summary(self) -> str:
        """How many, and a name made of their prompts and their files' paths in the folder."""
        paths = ([str(file.relative_to(self.folder)) for file in row.files] for row in self.rows)
        named = [[files, row.prompt] for files, row in zip(paths, self.rows, strict=True)]
        return f"{len(named)} rows, {digest(named)[:8]}"

    def __getitem__(self, index: int) -> dict:
        return to_float(self.load(index, generator(index)))

    def load(self, index: int, rng: torch.Generator) -> dict:
        """The item at `index`, random choices drawn from `rng`; a ValueError starts with the row's origin."""
        row = self.rows[index]
        try:
            return {**self.read(row, rng), "row": row.origin}
        except (ValueError, OSError) as error:
            raise ValueError(f"{row.origin}: {error}") from error

    def verify(self, limit: int) -> str:
        """Decode up to `limit` rows, spread over the folder; says how many of them are odd, and why.

        One ValueError lists the bad ones among them.
        """
        rows = range(0, len(self), -(-len(self) // limit)) if limit else ()
        with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
            looks = list(pool.map(self._look, rows))
        if problems := [problem for problem, _ in looks if problem]:
            raise ValueError("files that cannot be used:\n  " + "\n  ".join(problems))
        odd = [oddity for _, oddity in looks if oddity]
        return f"odd are {len(odd)} of {len(looks)} rows looked at; {odd[0]}" if odd else ""

    def _look(self, index: int) -> tuple[str, str]:
        """(what is wrong with a row, what is odd)."""
        row = self.rows[index]
        try:
            self.load(index, generator(index))
            oddity = self.oddity(row)
        except (ValueError, OSError) as error:
            return str(error), ""
        return "", oddity and f"{row.origin}: {oddity}"


class Pairs(Rows):
    """Two views of one subject: {"ref" (3, H, W), "target" (3, H, W), "prompt", "row"}.

    `jitter` (paper: crop jitter of each view, range unknown) enlarges each view by a factor drawn from
    [1, 1 + jitter] and cuts it at a random place; 0 is the centre crop.
    """

    def __init__(
        self, folder: str | Path, height: int, width: int, cls_token: str = CLS, jitter: float = 0.0
    ):
        self.folder, self.rows = Path(folder), read_rows(folder, PAIR)
        self.size, self.cls_token, self.jitter = (height, width), cls_token, jitter

    def read(self, row: Row, rng: torch.Generator) -> dict:
        ref, target = (self._view(path, rng) for path in row.files)
        return {"ref": ref, "target": target, "prompt": self.prompt(row)}

    def prompt(self, row: Row) -> str:
        return self.cls_token + row.prompt

    def oddity(self, row: Row) -> str:
        return say_same_file(row)

    def _view(self, path: Path, rng: torch.Generator) -> torch.Tensor:
        image = media.read_image(path)
        if not self.jitter:
            return resize(image, *self.size)
        zoom, down, right = torch.rand(3, generator=rng).tolist()
        return resize(image, *self.size, zoom=1 + self.jitter * zoom, at=(down, right))


class Clips(Rows):
    """A video and its caption: {"clip" (3, T, H, W), "prompt", "row"}; the "first" or a "random" window."""

    def __init__(
        self, folder: str | Path, frames: int, fps: float, height: int, width: int, window: str = "first"
    ):
        self.folder, self.rows = Path(folder), read_rows(folder, CLIP)
        self.frames, self.fps, self.size, self.random = frames, fps, (height, width), window == "random"

    def read(self, row: Row, rng: torch.Generator) -> dict:
        window = torch.rand((), generator=rng).item() if self.random else 0.0
        clip = media.read_clip(row.files[0], self.frames, self.fps, *self.size, window=window)
        return {"clip": clip, "prompt": self.prompt(row)}

    def oddity(self, row: Row) -> str:
        repeats = media.say_repeats(row.files[0], self.frames, self.fps)
        return "; ".join(filter(None, [repeats, media.say_interlaced(row.files[0])]))


def to_float(item: dict) -> dict:
    """Pixels travel between processes and devices as bytes, a quarter of the floats they become here."""

    def convert(value: object) -> object:
        pixels = isinstance(value, torch.Tensor) and value.dtype == torch.uint8
        return from_uint8(value) if pixels else value

    return {name: convert(value) for name, value in item.items()}
