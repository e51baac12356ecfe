"""Plays a Gluon kernel for Hopper in torch on a CPU: Triton's interpreter cannot run Gluon.

The kernel's own file is run as it is, with actors in the place of Gluon's modules. A tensor in registers is a
torch tensor, shared memory one that starts as NaN, a group of warps a thread. One thread runs at a time; at
every barrier operation the first that can go on, in a fixed order, goes on: a run is the same every time.
What the chip does by itself is done as early or as late as the kernel allows:

    EAGER   loads land at once, products read their factors when they are waited for, the loader goes first,
            and one consumer runs away from the next: finds places that are overwritten too early
    LAZY    loads land when somebody waits for them, products read their factors at once, the loader goes
            last: finds tiles that are read before they are there

Programs run one after another, the last first. In both moods it finds deadlocks, wrong phases, wrong counts
of arrivals or bytes, products used or left in flight, stores by TMA that nobody fenced or waited for, and
wrong numbers. It does not see layouts, races or missing fences inside a group, registers, 32-bit offsets, or
where the chip itself differs from its manual.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor


class Fault(AssertionError):
    """What a kernel does wrong."""


class Stopped(Exception):
    """Another group has failed."""


def require(ok: bool, message: str):
    if not ok:
        raise Fault(message)


class Mood(NamedTuple):
    loads_at_once: bool
    products_at_once: bool
    order: tuple[int, ...]  # which group goes on if several can


EAGER = Mood(True, False, (0, 1, 2, 3))
LAZY = Mood(False, True, (3, 2, 1, 0))


class Group(threading.local):
    """What belongs to the group of warps, or thread, that runs."""

    def __init__(self):
        self.turns: Turns | None = None
        self.number = 0
        self.products: list[Product] = []  # in flight
        self.stores: list[Callable] = []


group = Group()
mood, program = EAGER, 0  # of the run
unfenced: set[tuple] = set()  # (group, what its threads wrote): TMA does not see that yet


def fence():
    unfenced.difference_update([entry for entry in unfenced if entry[0] == group.number])


def seen_by_tma(what) -> bool:
    return all(entry[1] != what for entry in unfenced)


# ---- whose turn it is ------------------------------------------------------------------------------------


class Turns:
    """Lets one thread of a program run at a time, and stops all when one fails."""

    def __init__(self, jobs: list[tuple[Callable, tuple]]):
        self.can_go: dict[int, Callable[[], bool]] = {i: lambda: True for i in range(len(jobs))}
        self.wake = [threading.Event() for _ in jobs]
        self.failure: BaseException | None = None
        threads = [threading.Thread(target=self.work, args=(i, *job)) for i, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        self.next()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure

    def work(self, number: int, job: Callable, args: tuple):
        group.turns, group.number, group.products, group.stores = self, number, [], []
        try:
            self.sleep(number)
            job(*args)
            require(not group.products, "a product was left in flight")
            require(not group.stores, "a store was not waited for")
        except BaseException as failure:
            self.failure = self.failure or failure
        del self.can_go[number]
        self.next()

    def sleep(self, number: int):
        self.wake[number].wait()
        self.wake[number].clear()
        if self.failure:
            raise Stopped

    def next(self):
        ready = [i for i in mood.order if i in self.can_go and (self.failure or self.can_go[i]())]
        if self.can_go and not ready:
            self.failure = Fault("deadlock")
        for i in ready[:1] or list(self.can_go):
            self.wake[i].set()

    def switch(self, can_go: Callable[[], bool]):
        """Lets others run; comes back once can_go()."""
        self.can_go[group.number] = can_go
        self.next()
        self.sleep(group.number)


def switch(can_go: Callable[[], bool] = lambda: True):
    if group.turns is None:  # before the groups part
        require(can_go(), "deadlock")
    else:
        group.turns.switch(can_go)


# ---- shared memory ---------------------------------------------------------------------------------------


class Tile:
    """A piece of shared memory."""

    def __init__(self, data: Tensor):
        self.data, self.dtype, self.shape = data, data.dtype, list(data.shape)

    def index(self, i: int) -> "Tile":
        require(0 <= i < self.shape[0], f"place {i} of {self.shape[0]}")
        return Tile(self.data[i])

    def reshape(self, shape: list[int]) -> "Tile":
        return Tile(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> "Tile":
        return Tile(self.data.permute(order))

    def store(self, value: Tensor):
        require(value.shape == self.data.shape and value.dtype == self.dtype, "stored what does not fit")
        self.data.copy_(value)
        unfenced.add((group.number, self.data.data_ptr()))


class Barrier:
    """A phase is over when `count` have arrived and all expected bytes are there. Then the next begins."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0
        self.loads: list[Callable] = []  # that land here, later

    def init(self, count: int):
        self.count = self.missing = count
        unfenced.add((group.number, self))

    def change(self, arrivals: int, expected: int):
        require(self.count > 0, "a barrier that was not initialized")
        self.missing -= arrivals
        self.bytes += expected
        require(self.missing >= 0, "more arrivals than the barrier counts")
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def wait(self, parity: int):
        """Until the phase of this parity is over; before the first, one of parity 1 counts as over."""

        def over() -> bool:
            while self.phase & 1 == parity and self.loads:
                self.loads.pop(0)()
            return self.phase & 1 != parity

        switch(over)

    def arrive(self, count: int):
        self.change(count, 0)
        switch()

    def expect(self, size: int):
        self.change(1, size)


class Barriers(list):
    index = list.__getitem__


def allocate(dtype, shape: list[int], layout) -> Tile | Barriers:
    if dtype == torch.int64:
        return Barriers(Barrier() for _ in range(shape[0]))
    return Tile(torch.full(shape, float("nan"), dtype=dtype))


# ---- what the chip does by itself: loads, stores, products -----------------------------------------------


class Descriptor:
    """A tensor as TMA walks it: from base, by strides, zeros and nothing else outside of shape."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout):
        self.view = base.as_strided(shape, strides, base.storage_offset())
        self.dtype, self.layout = base.dtype, layout
        size = torch.Size(block).numel() * base.element_size()
        self.block_type = SimpleNamespace(shape=list(block), nbytes=size)

    def inside(self, corner: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """(the part of a block at corner that exists, where in the block it lies)"""
        here, there = [], []
        for at, length, block in zip(corner, self.view.shape, self.block_type.shape, strict=True):
            first, end = min(max(at, 0), length), max(min(at + block, length), 0)
            here.append(slice(first, max(first, end)))
            there.append(slice(first - at, max(first, end) - at))
        return self.view[tuple(here)], tuple(there)


def load_tile(x: Descriptor, corner: list[int], barrier: Barrier, tile: Tile):
    require(tile.shape == x.block_type.shape, "a load that does not fit its tile")
    require(seen_by_tma(barrier), "a load to a barrier that was not fenced")

    def land():
        part, where = x.inside(corner)
        tile.data.zero_()[where] = part
        barrier.change(0, -x.block_type.nbytes)

    barrier.loads.append(land)
    if mood.loads_at_once:
        barrier.loads.pop()()


def store_tile(x: Descriptor, corner: list[int], tile: Tile):
    require(seen_by_tma(tile.data.data_ptr()), "a store of what was not fenced")
    part, where = x.inside(corner)
    group.stores.append(lambda: part.copy_(tile.data[where]))


def finish_stores(pendings: int):
    while len(group.stores) > pendings:
        group.stores.pop(0)()


class Product:
    """left @ right + acc, on its way: no tensor until it was waited for."""

    def __init__(self, left: Tile | Tensor, right: Tile, acc: Tensor | None):
        self.factors, self.acc, self.value = (left, right), acc, None

    def take_place(self):
        left, right = (x.data if isinstance(x, Tile) else x for x in self.factors)
        out = left.float() @ right.float()
        self.value = out if self.acc is None else self.acc + out


def multiply(left, right, acc, use_acc: bool = True, is_async: bool = False) -> Product:
    require(is_async and isinstance(acc, Tensor), "a product waits, or adds to one in flight")
    product = Product(left, right, acc if use_acc else None)
    if mood.products_at_once:
        product.take_place()
    group.products.append(product)
    return product


def finish(pendings: int, deps: tuple):
    while len(group.products) > pendings:
        product = group.products.pop(0)
        if product.value is None:
            product.take_place()
    require(not any(x in group.products for x in deps if isinstance(x, Product)), "a product used in flight")
    out = tuple(x.value if isinstance(x, Product) else x for x in deps)
    return out[0] if len(out) == 1 else out


# ---- the rest of Gluon -----------------------------------------------------------------------------------


class Pointer:
    """Into a dense tensor; adding moves it, a tensor of offsets makes it many."""

    def __init__(self, data: Tensor, at: int | Tensor = 0):
        self.data, self.at = data, at

    def __add__(self, more: int | Tensor) -> "Pointer":
        return Pointer(self.data, self.at + more)


def store(pointer: Pointer, value: Tensor, mask: Tensor):
    at = pointer.at[mask]
    require(bool((at >= 0).all() and (at < pointer.data.numel()).all()), "a store outside of its tensor")
    pointer.data.view(-1)[at] = value[mask]


class Constant(int):
    value = property(int)


def part(jobs: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]):
    require(len(jobs) == len(warps) + 1 == len(registers) + 1, "a group without warps or registers")
    used = sum(128 * r for r in registers) + 128 * 24  # 24: the least that the first group can do with
    require(all(w == 4 for w in warps) and used <= 65536, "more registers than there are")
    Turns(jobs)


def any_layout(*args, **fields):
    return None


gl = SimpleNamespace(
    constexpr=Constant, float32=torch.float32, int64=torch.int64, static_range=range, cast=lambda x, _: x,
    NVMMASharedLayout=any_layout, NVMMADistributedLayout=any_layout, SliceLayout=any_layout,
    DotOperandLayout=any_layout, allocate_shared_memory=allocate, warp_specialize=part, store=store,
    program_id=lambda _: program, arange=lambda start, end, layout: torch.arange(start, end),
    zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
    expand_dims=torch.unsqueeze, convert_layout=lambda x, _: x, where=torch.where, maximum=torch.maximum,
    max=torch.amax, sum=torch.sum, exp2=torch.exp2, log2=torch.log2, fma=lambda a, b, c: a * b + c,
)  # fmt: skip
mbarrier = SimpleNamespace(
    MBarrierLayout=any_layout, init=Barrier.init, wait=Barrier.wait, expect=Barrier.expect,
    arrive=Barrier.arrive,
)  # fmt: skip
tma = SimpleNamespace(async_load=load_tile, async_store=store_tile, store_wait=finish_stores)
gluon = SimpleNamespace(jit=lambda f=None, do_not_specialize=(): f or (lambda g: g))
MODULES = {
    "triton.experimental": SimpleNamespace(gluon=gluon),
    "triton.experimental.gluon": SimpleNamespace(language=gl),
    "triton.experimental.gluon.language.nvidia.hopper": SimpleNamespace(
        mbarrier=mbarrier,
        tma=tma,
        fence_async_shared=fence,
        warpgroup_mma=multiply,
        warpgroup_mma_wait=finish,
    ),  # fmt: skip
    "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=Descriptor),
}


def launch(kernel: Callable, grid: tuple[int], *args, num_warps: int):
    """All programs of kernel[grid](*args)."""
    global program
    args = [Pointer(x) if isinstance(x, Tensor) else x for x in args]
    for program in reversed(range(*grid)):  # noqa: B007
        unfenced.clear()
        kernel(*args)


def acted(path: Path, *bugs: tuple[str, str]) -> ModuleType:
    """The module at path, played by the above; bugs are pairs of its text and what to put there instead."""
    text = path.read_text()
    for right, wrong in bugs:
        if text.count(right) != 1:
            raise ValueError(f"{path} has {right!r} {text.count(right)} times, not once")
        text = text.replace(right, wrong)
    module = ModuleType(path.stem)
    module.__package__ = path.parent.name
    with mock.patch.dict(sys.modules, MODULES):
        exec(compile(text, str(path), "exec"), module.__dict__)
    module.launch = launch
    return module
