"""A log of measurements on one machine: guarded, within a time, as JSON lines and as a table."""

import datetime
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from benchmarks.models import two_blocks
from sdv.run.provenance import commit, version

T = TypeVar("T")
LIBRARIES = ("torch", "triton", "diffusers", "peft")
SLOW = 400e12  # FLOP/s, to guess whether something still fits


class Book:
    """Where rows are written, and the time that is left. repeats 0: all is compiled, nothing timed."""

    def __init__(self, file: Path, seconds: float, device: str, repeats: int):
        self.file, self.end, self.device, self.repeats = file, time.time() + seconds, device, repeats
        self.stamp = stamp(device)

    def row(self, part: str, what: str, who: str, flops: float, work: Callable[[], dict]) -> None:
        """Write what work returns; or why not, if it fails or would not be done in time."""
        found, left = {"part": part, "what": what, "who": who}, self.end - time.time()
        needs = 3 + 3 * flops / SLOW if self.device == "cuda" else 0
        try:
            if needs > left:
                raise TimeoutError(f"needs {needs:.0f} s, {max(left, 0):.0f} are left")
            found |= work()
        except Exception as error:  # of any library: other measurements still count
            found["not run"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        self.write(found)
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def write(self, found: dict) -> None:
        print("  ".join(cells(found, None)), flush=True)
        if self.repeats:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps(found | self.stamp) + "\n")
            rows = [json.loads(line) for line in self.file.read_text().splitlines()]
            self.file.with_suffix(".md").write_text(table(rows))

    def clock(
        self, work: Callable[[], T], dit: nn.Module | None = None, beside: bool = False
    ) -> tuple[dict, T]:
        """Seconds of each repeat, most memory, beside what was there if asked, and what work returned.

        There is a first time that does not count, with two blocks only if there are blocks.
        """
        gpu = self.device == "cuda"
        with two_blocks(dit) if dit else nullcontext():
            out = work()
        wait, seconds = torch.cuda.synchronize if gpu else lambda: None, []
        held = torch.cuda.memory_allocated() - getattr(out, "nbytes", 0) if gpu and beside else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(self.repeats):
            del out
            wait()
            start = time.perf_counter()
            out = work()
            wait()
            seconds.append(round(time.perf_counter() - start, 4))
        most = torch.cuda.max_memory_allocated() - held if gpu else 0
        return {"seconds": seconds, "gigabytes": round(most / 1e9, 2)}, out


def folder_of(device: str) -> Path:
    """Of this GPU's results."""
    chip = torch.cuda.get_device_name() if device == "cuda" else "dry run"
    return Path(__file__).parent / chip.replace(" ", "-").lower()


def stamp(device: str) -> dict:
    """Of which day, code, machine and libraries a result is."""
    there = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    return {
        "date": str(datetime.date.today()),
        "commit": commit() or "unknown",
        "machine": torch.cuda.get_device_name() if device == "cuda" else "dry run",
        "versions": {name: version(name) for name in there},
    }


LEGEND = """s: the median. GB: most memory at once, of a VAE beside its weights. differs by: relative error,
from sdv, of numerics from sdv in float32."""
HEAD = """| what | who | s | GB | --plan: s | GB | sdv / this | differs by |
|---|---|---:|---:|---:|---:|---:|---:|"""


def cells(row: dict, ours: float | None) -> list[str]:
    """What a row of the table says; ours: seconds of the same by sdv."""
    start = [f"{row['part']}: {row['what']}", row["who"]]
    if "not run" in row:
        return [*start, f"not run: {row['not run']}"]
    seconds = statistics.median(row["seconds"]) if row["seconds"] else None
    said, numbers = row.get("plan", {}), []
    for value, form in (
        (seconds, ".3f"), (row.get("gigabytes"), ".2f"), (said.get("seconds"), ".2f"),
        (said.get("gigabytes"), ".2f"), (ours and seconds and ours / seconds, ".2f"),
        (row.get("differs"), ".1e"),
    ):  # fmt: skip
        numbers.append("" if value is None else format(value, form))
    return start + numbers


def title(row: dict) -> str:
    """Of the table that a row belongs to: only rows of one day, machine, commit and versions compare."""
    versions = (f"{name} {version}" for name, version in row["versions"].items())
    return ", ".join([row["date"], row["machine"], f"commit {row['commit']}", *versions])


def table(rows: list[dict]) -> str:
    """Markdown of all rows, a table for each title. Peers may have been measured before ours."""
    lines, ours = [LEGEND], {}
    for row in rows:
        if row["who"] == "sdv" and row.get("seconds"):
            ours[title(row), row["part"], row["what"]] = statistics.median(row["seconds"])
    for head in dict.fromkeys(map(title, rows)):
        lines += ["", head, "", HEAD]
        for row in (row for row in rows if title(row) == head):
            own = None if row["who"] == "sdv" else ours.get((head, row["part"], row["what"]))
            lines.append(f"| {' | '.join(cells(row, own))} |")
    return "\n".join(lines).strip() + "\n"
