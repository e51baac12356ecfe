"""Rows that are never trained on: both tasks' losses on them, for validation and for the gradient probe."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import nn
from torch.utils.data import default_collate

from sdv.data.files import content_hash, in_threads
from sdv.data.rows import Rows
from sdv.objectives import TASKS, Draws, Losses, Pair, denoising_loss, draws_of
from sdv.run.log import summary
from sdv.run.parallel import gather, ranks
from sdv.schedule import Schedule
from sdv.seeds import PROBE, PROBE_PAIR


def two_halves(rows: Rows) -> tuple[list[int], list[int]]:
    """Numbers of rows in two halves without a common file, so that both directions of a pair lie in one.

    ValueError if a half would be empty.
    """
    half_of, split = {}, ([], [])
    for number, row in enumerate(rows.rows):
        known = {half_of[file] for file in row.files if file in half_of}
        if len(known) < 2:  # else it would tie the halves together
            half = known.pop() if known else int(len(split[0]) > len(split[1]))
            half_of |= dict.fromkeys(row.files, half)
            split[half].append(number)
    if not split[1]:
        raise ValueError(
            f"{rows.rows[0].files[0].parent}: too few rows for two halves without a common file; add "
            "rows with other files, or leave out --val-pairs and --val-clips"
        )
    return split


def halves(rows: Rows, batches: int, size: int) -> Iterator[dict]:
    """2 x batches collated micro-batches, the first `batches` from one half. A short half repeats."""
    for half in two_halves(rows):
        for first in range(0, batches * size, size):
            yield default_collate([rows[half[(first + i) % len(half)]] for i in range(size)])


def check_unseen(held_out: Iterable[Rows], trained: Iterable[Rows]) -> None:
    """ValueError if a file of the probe is also trained on, under whatever name: by links, or as a copy."""
    seen, hashed = defaultdict(set), cache(content_hash)
    files = list({file for rows in trained for row in rows.rows for file in row.files})
    for file, size in zip(files, in_threads(lambda file: file.stat().st_size, files), strict=True):
        seen[size].add(file)
    for file in {file for rows in held_out for row in rows.rows for file in row.files}:
        for other in seen.get(file.stat().st_size, ()):  # only files of one size are read
            if hashed(file) == hashed(other):
                raise ValueError(
                    f"{file}: is held out (--val-pairs, --val-clips) and trained on ({other}); remove it "
                    "from one of the two folders"
                )


def fixed_draws(stream: int, task: int, micro: int, size: int) -> Draws:
    """Not of the run's seed, so that runs can be compared."""
    key = 0, stream, task, micro
    return draws_of(key, [(*key, k) for k in range(size)])


def held_out_losses(
    held_out: Mapping[str, Rows],
    pair_of: Mapping[str, Callable[..., Pair]],
    enc: object,
    dit: nn.Module,
    schedule: Schedule,
    cfg: object,
) -> dict[str, list[Callable[[], Losses]]]:
    """Each task's losses on fixed micro-batches: what they look at, their times and noise never change.

    pair_of, enc, cfg: train.py's PAIR_OF, Encoders and Config.
    """
    losses = {}
    for task, rows in held_out.items():
        kind, size = TASKS.index(task), getattr(cfg, f"{task}_batch")
        losses[task] = []
        for i, batch in enumerate(halves(rows, cfg.val_batches, size)):
            # References are hidden in p_drop of the micro-batches by count: a coin for each of a few would
            # give the two halves of a task different objectives. Nothing else of them is dropped or moved.
            n, p = i % cfg.val_batches, cfg.p_drop
            p = int((n + 1) * p) - int(n * p) if cfg.dropout == "whole" else p
            recipe = dataclasses.replace(cfg, view_drop=0.0, text_drop=0.0, ref_shift=0.0, p_drop=p)
            pair = pair_of[task](batch, enc, recipe, fixed_draws(PROBE_PAIR, kind, i, size))
            again = partial(fixed_draws, PROBE, kind, i, size)
            losses[task].append(lambda pair=pair, again=again: denoising_loss(dit, schedule, pair, again()))
    return losses


def validate(held_out: Sequence[Callable[[], Losses]], train_steps: int) -> dict:
    """A loss_row of fixed micro-batches. Ranks share them; spare ranks keep step, and count for nothing."""
    rank, world = ranks()
    found = []
    with torch.no_grad():
        for first in range(0, len(held_out), world):
            mine = held_out[min(first + rank, len(held_out) - 1)]()
            each, t = (gather(x[None])[: len(held_out) - first].flatten() for x in mine[1:])
            if not each.isfinite().all():
                raise FloatingPointError("a held-out loss is not finite: the model diverged")
            found.append((each, t))
    return summary(*(torch.cat(column) for column in zip(*found, strict=True)), train_steps)
