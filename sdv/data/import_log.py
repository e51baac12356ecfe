"""A long walk over candidates that may be killed: what became of each is a line of OUT/import.jsonl.

The next run goes on from the last whole line and ends with the folder of one never killed, whatever the
number of workers; metadata.jsonl comes last.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sdv.data.files import lock, parse_json, unwritable, write_text
from sdv.seeds import SUBSET, generator

CHUNK = 32  # candidates of one source that a worker gets at once
NAMED = 3  # candidates that the summary names under each reason


class Candidate(Protocol):
    origin: str  # "train-00000.parquet:17", for people and the log
    source: object  # candidates in a row that share it are worked on together
    state: str  # of its file: what became of it is remembered as long as this stays the same


UNREADABLE = "unreadable"  # the reason that is not remembered: the download may be finished by then


class Outcome(NamedTuple):
    """What became of a candidate: the rows it gives to metadata.jsonl, or why it gives none."""

    origin: str
    rows: Sequence[dict] = ()
    reason: str = ""  # one of few, to be counted
    detail: str = ""  # what is wrong with this one
    content: str = ""  # of two candidates with the same one the second is dropped
    state: str = ""  # the candidate's, when it was looked at

    @property
    def files(self) -> set[str]:
        return {name for row in self.rows for field, name in row.items() if field.endswith("file_name")}


def walk(
    out: Path,
    settings: dict,
    candidates: Sequence[Candidate],
    work: Callable[[Sequence[Candidate]], list[Outcome]],
    limit: int | None,
    seed: int,
    workers: int,
) -> list[Outcome]:
    """What became of the candidates, all of them or drawn by `seed` until `limit` are kept.

    `work` writes below `out`, under names that a candidate alone decides. Only as many candidates go out at
    once as are still missing, so that no run works on one that another run would never have come to.
    """
    total = len(candidates)
    order = list(range(total))
    if limit is not None:
        order = torch.randperm(total, generator=generator(seed, SUBSET)).tolist()
    wanted = total if limit is None else limit
    outcomes, first, kept = [], {}, 0
    with closing(ImportLog(out, settings)) as log, tqdm(total=0, unit="row") as bar:
        while kept < wanted and len(outcomes) < total:
            chosen = sorted(order[len(outcomes) : len(outcomes) + wanted - kept])  # row groups are read once
            batch = [candidates[index] for index in chosen]
            bar.total += len(batch)
            states = {one.origin: one.state for one in batch}
            recalled = ((name, log.known.get(name)) for name in states)
            known = {name: was for name, was in recalled if was and was.state == states[name]}
            new = _perform([one for one in batch if one.origin not in known], work, workers)
            for one in batch:
                outcome = known.get(one.origin) or next(new)._replace(state=states[one.origin])
                if outcome.rows and first.setdefault(outcome.content, outcome.origin) != outcome.origin:
                    reason, detail = "the same picture as another row", first[outcome.content]
                    outcome = outcome._replace(rows=(), reason=reason, detail=detail)
                log.add(outcome)
                outcomes.append(outcome)
                kept += bool(outcome.rows)
                bar.update()
    return outcomes


def _perform(todo: list[Candidate], work: Callable, workers: int) -> Iterator[Outcome]:
    """Outcomes in the order of the candidates. Only what is wrong with the new folder is raised."""
    if not todo:
        return
    jobs = _Jobs(todo, work)
    for outcomes in DataLoader(jobs, batch_size=None, num_workers=min(workers, len(jobs))):
        if isinstance(outcomes, OSError):
            raise outcomes
        yield from outcomes


class _Jobs(Dataset):
    """Candidates of one source, up to CHUNK of them -> their outcomes, or an error to raise outside."""

    def __init__(self, todo: list[Candidate], work: Callable):
        groups = (list(group) for _, group in groupby(todo, key=lambda one: one.source))
        self.chunks = [group[i : i + CHUNK] for group in groups for i in range(0, len(group), CHUNK)]
        self.work = work

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Outcome] | OSError:
        try:
            return self.work(self.chunks[index])
        except OSError as error:  # as data, for a DataLoader's own way buries it in a traceback
            return error


class ImportLog:
    """OUT/import.jsonl: the settings, then an outcome a line, appended. One process at a time.

    Whatever follows the last whole line is cut off. Outcomes whose files are gone are forgotten, and so is
    what could not be read. Of two lines about one candidate the later holds.
    """

    def __init__(self, out: Path, settings: dict):
        self.file, self.known, self.last = _locked(out), {}, {}
        lines = self._whole_lines()
        if not lines:
            self._append(settings)
            return
        if changed := [name for name in settings if settings[name] != lines[0].get(name)]:
            was = ", ".join(f"{name} {lines[0].get(name)}, now {settings[name]}" for name in changed)
            raise ValueError(f"{out}: was begun otherwise ({was}); repeat that, or give a new folder")
        for torn in out.rglob(".*.tmp"):
            torn.unlink(missing_ok=True)
        self.last = {line[0]: line for line in lines[1:]}
        outcomes = [Outcome(*line) for line in self.last.values()]
        there = [one for one in outcomes if all((out / name).is_file() for name in one.files)]
        self.known = {one.origin: one for one in there if one.reason != UNREADABLE}

    def _whole_lines(self) -> list:
        lines, end = [], 0
        self.file.seek(0)
        for line in self.file:
            try:
                value = parse_json(line if line.endswith(b"\n") else b"")
            except ValueError:
                break
            if not isinstance(value, list if lines else dict):
                break
            lines.append(value)
            end += len(line)
        self.file.truncate(end)
        return lines

    def _append(self, value: object) -> None:
        try:
            self.file.write(json.dumps(value).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise unwritable(Path(self.file.name), error) from error

    def add(self, outcome: Outcome) -> None:
        if json.dumps(self.last.get(outcome.origin)) != json.dumps(outcome):
            self._append(outcome)

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was told, and is written by the next run
            self.file.close()


def _locked(out: Path) -> BinaryIO:
    """The log of a new folder or of one that an import has begun, held until this process ends."""
    path = out / "import.jsonl"
    others = out.iterdir() if out.is_dir() and not path.exists() else ()
    if any(not other.name.startswith(".") for other in others):
        raise ValueError(f"{out}: holds files that no import wrote; give a new folder")
    return lock(path, "another import is writing there")


def finish(out: Path, total: int, outcomes: Sequence[Outcome], kind: str) -> int:
    """Write metadata.jsonl, and say what was kept and why the rest was not. ValueError if nothing was."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    dropped = [outcome for outcome in outcomes if outcome.reason]
    kept = len(outcomes) - len(dropped)
    print(f"{total} rows: {kept} kept, {len(dropped)} dropped, {total - len(outcomes)} not needed")
    for reason, count in Counter(outcome.reason for outcome in dropped).most_common():
        print(f"{count:8}  {reason}")
        named = [outcome for outcome in dropped if outcome.reason == reason and outcome.detail]
        for outcome in named[:NAMED]:
            print(f"{'':10}{outcome.origin}: {outcome.detail}")
    if not rows:
        raise ValueError(f"{out}: nothing was kept; see the reasons above")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(out / "metadata.jsonl", text)
    print(f"{len(rows)} {kind} in {out / 'metadata.jsonl'}")
    return 0
