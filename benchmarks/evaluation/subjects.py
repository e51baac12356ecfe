"""A folder of subjects: in it a folder for each, with a few photos; and the noun that prompts call it by.

DreamBooth's data set is one. Its nouns stand in prompts_and_classes.txt, those of others in nouns.csv: lines
"folder,noun". Without either, the folder's name is the noun: dog2 is a dog, bear_plushie a bear plushie.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdv.data.captions import to_utf8

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
NOUNS = ("nouns.csv", "prompts_and_classes.txt")


class Subject(NamedTuple):
    name: str
    noun: str
    pictures: tuple[Path, ...]


def read_subjects(folder: Path, nouns: Path | None = None) -> list[Subject]:
    """Every subject, in the order of their names; ValueError if there is none or one has no picture."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of subjects")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not names:
        raise ValueError(f"{folder}: holds no folders; make one for each subject and put its pictures there")
    known = next((folder / name for name in NOUNS if (folder / name).is_file()), None)
    called = read_nouns(nouns or known, names) if nouns or known else {name: _noun(name) for name in names}
    return [Subject(name, called[name], _pictures(folder / name)) for name in names]


def owners(subjects: Sequence[Subject]) -> dict[Path, Subject]:
    """Whose each picture is, by its resolved path."""
    return {picture.resolve(): subject for subject in subjects for picture in subject.pictures}


def read_nouns(file: Path, names: list[str]) -> dict[str, str]:
    """{folder: noun} for all names; other lines, as DreamBooth's file has them, are passed over."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; write a line FOLDER,NOUN for each subject")
    pairs = [line.split(",") for line in to_utf8(file.read_bytes()).decode().splitlines()]
    found = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    lacking = [name for name in names if not found.get(name)]
    if lacking:
        raise ValueError(f"{file}: has no noun for {', '.join(lacking[:5])}; write a line FOLDER,NOUN")
    return {name: found[name] for name in names}


def _noun(name: str) -> str:
    return re.sub(r"[\d_\s-]+", " ", name).strip() or name


def _pictures(folder: Path) -> tuple[Path, ...]:
    shown = (path for path in folder.iterdir() if path.name[0] != ".")  # macOS puts ._a.jpg beside a.jpg
    found = sorted(path for path in shown if path.suffix.lower() in ENDINGS)
    if not found:
        raise ValueError(f"{folder}: holds no pictures ({', '.join(ENDINGS)}); add some or remove the folder")
    return tuple(found)
