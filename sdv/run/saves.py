"""The folder of a run: its settings, its metrics, and saves that are whole or are not used."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open

from sdv.data.files import lock, parse_json, write_text, write_whole
from sdv.run.log import read_log


def saves(out: Path) -> list[Path]:
    """Oldest first, by their numbers, which outgrow their six digits."""
    return sorted((save for save in out.glob("step-*") if save.name[5:].isdecimal()), key=step_of)


def step_of(save: Path) -> int:
    return int(save.name[5:])


def write_save(out: Path, step: int, write_adapter: Callable[[Path], None], state: dict, keep: int) -> Path:
    """A folder that appears whole or not at all; older ones go only when it stands on the disk.

    keep: how many stay, with this one; 0: all. If it cannot be written, nothing of it is left, and the error
    names the path.
    """
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.tmp"
    for left in out.glob(".step-*.tmp"):  # by a process that was killed, or was still read when it went
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_adapter(temporary / "adapter.safetensors")
        write_whole(temporary / "training.pt", partial(_write_state, state))
        if final.exists():
            _discard(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Not those after it, which are damaged: the run went back behind them.
    older = [save for save in saves(out) if step_of(save) <= step]
    for save in older[:-keep] if keep else ():
        _discard(save)
    return final


def _write_state(state: dict, path: Path) -> None:
    with open(path, "wb") as file:  # of a path, torch would not say why it cannot be written
        torch.save(state, file)


def _discard(save: Path) -> None:
    """Delete a folder so that no part of it is ever seen under its name.

    On a network disk a file that somebody reads stays under another name, and its folder until the next save.
    """
    gone = save.with_name(f".{save.name}.old.tmp")
    save.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def newest_whole(
    out: Path, log: Callable[[str], None], from_first: Callable[[str], str] = lambda name: name
) -> tuple[Path, dict]:
    """The newest save that can be read, and its training state; says which ones had to be passed over.

    from_first gives all ranks the first one's choice: OSError for a rank that sees another one.
    """
    for folder in reversed(saves(out)):
        try:
            with safe_open(folder / "adapter.safetensors", "pt"):
                state = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle fails in any way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log(f"{folder}: damaged ({reason}); going back to the save before it")
            continue
        if (first := from_first(folder.name)) != folder.name:
            raise OSError(f"{out}: one process reads {folder.name}, the first one {first}; start again")
        return folder, state
    raise FileNotFoundError(f"{out}: none of its saves can be read; give another --out")


def _settings(out: Path) -> dict:
    file = out / "config.json"
    try:
        return dict(parse_json(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); what the run was asked for is not known") from error


def begin(out: Path, settings: dict, provenance: dict, resume: bool) -> BinaryIO:
    """Make the folder of a new run, or note that one goes on. It is this process's while the result is open.

    FileExistsError if it holds a run, ValueError if another process has it.
    """
    if saves(out) and not resume:
        raise FileExistsError(f"{out}: holds a run, {saves(out)[-1].name}; give --resume or another --out")
    held = lock(out / ".lock", "another run is writing there")
    parts = _settings(out).get("parts", []) if resume else []
    if not resume:
        (out / "metrics.jsonl").write_text("")
        for name in ("probes", "validation"):
            (out / f"{name}.jsonl").unlink(missing_ok=True)
    text = json.dumps(settings | {"parts": [*parts, provenance]}, indent=2)
    write_text(out / "config.json", text)
    return held


def require_same(out: Path, settings: dict, defaults: dict, renamed: dict[str, str]) -> None:
    """ValueError if a run that is to be resumed had other settings. renamed: {old name: new name}.

    A setting that did not exist yet when the run began, or did not count, had its default.
    """
    stored = {name: value for name, value in _settings(out).items() if value is not None}
    before, now = json.loads(json.dumps(defaults)) | stored, json.loads(json.dumps(settings))
    before |= {new: before[old] for old, new in renamed.items() if old in before}
    changed = [f"{n} was {before.get(n)!r}, is {v!r}" for n, v in now.items() if before.get(n) != v]
    if changed:
        raise ValueError(
            f"{out}: a resumed run keeps its settings and rows; changed: {'; '.join(changed)}. A new run can "
            "begin from a save of this one: --adapter"
        )


def cut_back(path: Path, step: int) -> list[dict]:
    """Leave a JSONL file the rows of the steps before this one; a killed process may have torn the last."""
    if not path.exists():
        return []
    rows = [row for row in read_log(path) if row["step"] < step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(path, text)
    return rows
