"""One process, or the many that torchrun started: which one this is, and what all of them know together."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")
# How long a rank waits for the others: one hashes all of the data for the cache, or has more to film.
PATIENCE = timedelta(hours=6)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def start(device: str) -> tuple[int, int, str]:
    """(rank, world, device): join the group that torchrun describes in the environment, if it does."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    return *ranks(), device


def ranks() -> tuple[int, int]:
    """This process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until all ranks are here."""
    if ranks()[1] > 1:
        dist.barrier()


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks. A sharded model's gradients are that already."""
    world = ranks()[1]
    tensors = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if world > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        for tensor in tensors:
            tensor /= world


def gather(x: Tensor) -> Tensor:
    """All ranks' tensors of one shape, after each other."""
    world = ranks()[1]
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class Stopped(Exception):
    """A signal has come, or a rank cannot go on (its __cause__): what is not finished is to be left."""


@contextmanager
def signals_noted(numbers: Iterable[int], device: str) -> Iterator[Callable[..., None]]:
    """In it these signals end nothing: the function that it gives raises Stopped once any rank has got one.

    It does so as well if any rank gives it a problem, an exception. All ranks have to call it equally often.
    Ctrl-C is raised at the end, so that a shell's loop ends; a second one at once, if the process is alone
    (torchrun sends one of its own after the first).
    """
    got = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in got and ranks()[1] == 1:
            raise KeyboardInterrupt
        got.append(number)

    def stop_if_asked(problem: Exception | None = None) -> None:
        stop = bool(got or problem)
        if gather(torch.tensor([stop], device=device)).any() if ranks()[1] > 1 else stop:
            raise Stopped from problem

    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # not under nohup
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield stop_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in got:
        raise KeyboardInterrupt


def from_first(value: T) -> T:
    """The first rank's value, on every rank."""
    box = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]


def shard(dit: nn.Module) -> None:
    """Spread the weights of a transformer, frozen and trained, over all ranks (FSDP2), block by block."""
    for block in dit.blocks:
        fully_shard(block)
    # Also what is in no block: left gathered after a film, it would not be what the optimizer knows.
    fully_shard(dit, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; all ranks have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_state(dit: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """By parameter name, on the CPU, the same for any number of ranks."""
    return get_optimizer_state_dict(dit, optimizer, options=WHOLE)


def load_optimizer(dit: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    set_optimizer_state_dict(dit, optimizer, state, options=WHOLE)
