"""Which films are to be made, how each is called, and the list of those that are there."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sdv.data.captions import clean_caption
from sdv.data.files import content_hash, digest, parse_json, path_from, sampled_hash
from sdv.data.rows import find_file, read_lines


class Shot(NamedTuple):
    prompt: str
    ref: Path | None  # picture of the subject
    seed: int
    file: Path | None = None  # the film itself, where a list says it


def read_shots(manifest: str | Path) -> list[Shot]:
    """Lines {"prompt", "reference_file_name", "seed", "file_name"} of a JSONL file.

    All but the prompt may be missing. Paths are relative to the file. Other fields are ignored.
    ValueError that names the line of the first that cannot be used, or for a file without any.
    """
    manifest = Path(manifest)
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest}: no such file; write one object with a prompt a line")
    lines = enumerate(read_lines(manifest), 1)
    shots = [_shot(manifest, number, line) for number, line in lines if line.strip()]
    if not shots:
        raise ValueError(f"{manifest}: holds no lines; write one object with a prompt a line")
    return shots


def _shot(manifest: Path, number: int, line: bytes) -> Shot:
    try:
        row = parse_json(line.decode())
        prompt, seed = row["prompt"], 0 if row.get("seed") is None else row["seed"]
        ref, film = row.get("reference_file_name"), row.get("file_name")
        texts = isinstance(prompt, str) and isinstance(ref, str | None) and isinstance(film, str | None)
        if not texts or type(seed) is not int or seed < 0:
            raise TypeError("texts and a number that is not negative")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{manifest}:{number}: write an object with "prompt" and, if you like, "reference_file_name", '
            f'"seed" and "file_name" ({error!r:.80})'
        ) from error
    prompt = prompt and clean_caption(prompt, f"{manifest}:{number}: prompt")  # "" is unconditional
    ref = (find_file(manifest.parent, ref) or manifest.parent / ref) if ref else None
    return Shot(prompt, ref, seed, manifest.parent / film if film else None)


NOT_SEEN = ("prompt", "ref", "seed", "manifest", "out", "adapter", "backbone")  # or named by their content


def film_names(
    shots: list[Shot], settings: dict, backbone: Iterable[Path], adapter: Iterable[Path]
) -> list[str]:
    """A name for each: words, seed, and a digest of all that makes the film what it is.

    settings: sample.py's, by name; backbone, adapter: their files. Two films have one name only if they are
    the same film, and a film has the same name in any list.
    """
    made_by = {name: value for name, value in settings.items() if name not in NOT_SEEN}
    made_by["model"] = [*map(sampled_hash, backbone), *map(content_hash, adapter)]
    refs = {ref: content_hash(ref) for ref in {shot.ref for shot in shots} if ref}
    names = []
    for shot in shots:
        words = re.sub(r"[\W_]+", "-", shot.prompt.lower()).strip("-")[:40]
        words = words.encode(errors="ignore")[:120].decode(errors="ignore")  # a name holds 255 bytes
        mark = digest(made_by, shot.prompt, refs.get(shot.ref), shot.seed)[:8]
        names.append(f"{words or 'film'}-seed{shot.seed}-{mark}.mp4")
    return names


def list_film(out: Path, name: str, shot: Shot) -> None:
    """Add a film to out/films.jsonl, once: the list by which others know what it was to show."""
    table = out / "films.jsonl"
    known = table.read_bytes() if table.exists() else b""
    ref = path_from(out, shot.ref) if shot.ref else None
    row = {"file_name": name, "prompt": shot.prompt, "reference_file_name": ref, "seed": shot.seed}
    line = json.dumps(row).encode() + b"\n"
    if line not in known:
        with open(table, "ab") as file:
            if known and not known.endswith(b"\n"):  # of a line that a full disk has cut, nothing stays
                file.truncate(known.rfind(b"\n") + 1)
            file.write(line)
