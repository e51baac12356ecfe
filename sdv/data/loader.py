"""Rows -> seeded batches that resume from one integer."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from functools import lru_cache
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from sdv.data.rows import Rows, to_float
from sdv.seeds import ORDER, VIEW, generator

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a scheduler's, Ctrl-C, a terminal that was closed


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
    atexit.register(_end_workers)
    slices = (
        range((b * world + rank) * batch_size, (b * world + rank + 1) * batch_size) for b in count(start)
    )
    loader = DataLoader(
        _Samples(dataset, seed),
        batch_sampler=slices,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else torch's own generator moves on, and a resume would not be exact
    )
    collated = iter(loader)  # its processes begin to decode now
    # Torch's handler would raise in the middle of anything if one of them ends; `next` finds that as well.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return _ready_batches(collated, device)


def _ignore_signals(worker: int) -> None:
    """What ends all processes of a run is for the trainer: it needs its workers until it has saved."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At exit, also after an error, multiprocessing would send them a SIGTERM and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()


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


def _ready_batches(collated: Iterator[dict | str], device: torch.device | str) -> Iterator[dict]:
    while True:
        try:
            batch = next(collated)
        except (EOFError, OSError) as error:  # its pipe is found broken before torch has seen it end
            raise OSError(f"DataLoader worker (pid unknown): {error!r}") from error  # in torch's own words
        if isinstance(batch, str):
            raise ValueError(batch)
        yield to_float({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
