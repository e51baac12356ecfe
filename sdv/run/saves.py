"""The folder of a run: its settings, its metrics, and saves that are whole or are not used."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sdv.data.files import write_whole


def saves(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted(out.glob("step-*"))


def write_save(out: Path, step: int, write_adapter: Callable[[Path], None], state: dict, keep: int) -> Path:
    """A folder that appears whole or not at all; older ones go only when it stands on the disk."""
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_adapter(temporary / "adapter.safetensors")
    write_whole(temporary / "training.pt", lambda to: torch.save(state, to))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in saves(out)[:-keep]:
        shutil.rmtree(old)
    return final


def newest_whole(out: Path, log: Callable[[str], None]) -> tuple[Path, dict]:
    """The newest save that can be read, and its training state; says which ones had to be passed over."""
    for folder in reversed(saves(out)):
        try:
            with safe_open(folder / "adapter.safetensors", "pt"):
                state = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
            return folder, state
        except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            log(f"{folder}: damaged ({str(error).splitlines()[0]}); going back to the save before it")
    raise FileNotFoundError(f"{out}: no save to resume from; leave out --resume")


def begin(out: Path, settings: dict, provenance: dict, resume: bool) -> None:
    """Make the folder of a new run, or note that one goes on. FileExistsError if it holds a run."""
    if saves(out) and not resume:
        raise FileExistsError(f"{out}: holds a run, {saves(out)[-1].name}; give --resume or another --out")
    out.mkdir(parents=True, exist_ok=True)
    parts = json.loads((out / "config.json").read_text()).get("parts", []) if resume else []
    if not resume:
        (out / "metrics.jsonl").write_text("")
        for name in ("probes", "validation"):
            (out / f"{name}.jsonl").unlink(missing_ok=True)
    text = json.dumps(settings | {"parts": [*parts, provenance]}, indent=2)
    write_whole(out / "config.json", lambda path: path.write_text(text))


def require_same(out: Path, settings: dict, renamed: dict[str, str]) -> None:
    """ValueError if a run that is to be resumed had other settings. renamed: {old name: new name}."""
    if not saves(out):
        raise FileNotFoundError(f"{out}: no save to resume from; leave out --resume")
    before, now = json.loads((out / "config.json").read_text()), json.loads(json.dumps(settings))
    before |= {new: before[old] for old, new in renamed.items() if old in before}
    changed = [f"{n} was {before.get(n)!r}, is {v!r}" for n, v in now.items() if before.get(n) != v]
    if changed:
        raise ValueError(f"{out}: a resumed run keeps its settings; changed: {'; '.join(changed)}")


def cut_back(path: Path, step: int) -> list[dict]:
    """Leave a JSONL file the rows of the steps before this one; a killed process may have torn the last."""
    if not path.exists():
        return []
    rows = [row for row in map(json.loads, path.read_text().split("\n")[:-1]) if row["step"] < step]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
