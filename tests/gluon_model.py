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
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor


class Fault(AssertionError):
    """What a kernel does wrong."""


def require(ok: bool, message: str):
    if not ok:
        raise Fault(message)


class Mood(NamedTuple):
    loads_at_once: bool
    products_at_once: bool
    order: tuple[int, ...]  # which group goes on if several can


EAGER = Mood(True, False, (0, 1, 2, 3))
LAZY = Mood(False, True, (3, 2, 1, 0))

group = threading.local()  # of warps: its turns, number, products in flight, stores not waited for
mood, program = EAGER, 0  # of the run
unfenced = defaultdict(set)  # by group, what its threads wrote: TMA does not see that yet


def seen_by_tma(what) -> bool:
    return not any(what in written for written in unfenced.values())


class Turns:
    """A thread for each job, one of which runs at a time; all stop when one fails."""

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
            self.sleep()
            job(*args)
            require(not group.products, "a product was left in flight")
            require(not group.stores, "a store was not waited for")
        except BaseException as failure:
            self.failure = self.failure or failure
        del self.can_go[number]
        self.next()

    def sleep(self):
        self.wake[group.number].wait()
        self.wake[group.number].clear()
        if self.failure:
            raise self.failure

    def next(self):
        try:
            ready = [i for i in mood.order if i in self.can_go and self.can_go[i]()]
            require(bool(ready) or not self.can_go, "deadlock")
        except BaseException as failure:
            self.failure = self.failure or failure
        for i in list(self.can_go)[:1] if self.failure else ready[:1]:
            self.wake[i].set()


def switch(can_go: Callable[[], bool] = lambda: True):
    """Lets other groups run; comes back once can_go()."""
    turns: Turns = group.turns
    turns.can_go[group.number] = can_go
    turns.next()
    turns.sleep()


class Tile:
    """A piece of shared memory."""

    def __init__(self, data: Tensor):
        self.data, self.dtype, self.shape = data, data.dtype, list(data.shape)

    def index(self, i: int) -> "Tile":
        return Tile(self.data[i])

    def reshape(self, shape: list[int]) -> "Tile":
        return Tile(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> "Tile":
        return Tile(self.data.permute(order))

    def store(self, value: Tensor):
        require(value.shape == self.data.shape and value.dtype == self.dtype, "stored what does not fit")
        self.data.copy_(value)
        unfenced[group.number].add(self.data.data_ptr())


class Barrier:
    """A phase is over when `count` have arrived and all expected bytes are there. Then the next begins."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0
        self.loads: list[Callable] = []  # that land here, later

    def init(self, count: int):
        self.count = self.missing = count
        unfenced[group.number].add(self)

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


def allocate(dtype, shape: list[int], layout):
    if dtype == torch.int64:
        return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
    return Tile(torch.full(shape, float("nan"), dtype=dtype))


class Descriptor:
    """A tensor as TMA walks it: from base, by strides, zeros and nothing else outside of shape."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout):
        self.base, self.shape, self.strides, self.dtype = base, shape, strides, base.dtype
        size = torch.Size(block).numel() * base.element_size()
        self.layout, self.block_type = layout, SimpleNamespace(shape=list(block), nbytes=size)

    def inside(self, corner: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """(the part of a block at corner that exists, where in the block it lies)"""
        view = self.base.as_strided(self.shape, self.strides, self.base.storage_offset())
        sizes = zip(corner, self.shape, self.block_type.shape, strict=True)
        n = [max(0, min(block, length - at)) for at, length, block in sizes]
        here = tuple(slice(at, at + k) for at, k in zip(corner, n, strict=True))
        return view[here], tuple(slice(0, k) for k in n)


def load_tile(x: Descriptor, corner: list[int], barrier: Barrier, tile: Tile):
    require(tile.shape == x.block_type.shape, "a load that does not fit its tile")
    require(seen_by_tma(barrier), "a load to a barrier that was not fenced")

    def land():
        there, where = x.inside(corner)
        tile.data.zero_()[where] = there
        barrier.change(0, -x.block_type.nbytes)

    land() if mood.loads_at_once else barrier.loads.append(land)


def store_tile(x: Descriptor, corner: list[int], tile: Tile):
    require(seen_by_tma(tile.data.data_ptr()), "a store of what was not fenced")
    there, where = x.inside(corner)
    group.stores.append(lambda: there.copy_(tile.data[where]))


class Product:
    """left @ right + acc, on its way: no tensor until it was waited for."""

    def __init__(self, left: Tile | Tensor, right: Tile, acc: Tensor | float):
        self.factors, self.acc, self.value = (left, right), acc, None

    def take_place(self):
        if self.value is None:
            left, right = (x.data if isinstance(x, Tile) else x for x in self.factors)
            self.value = self.acc + left.float() @ right.float()


def multiply(left, right, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
    require(is_async, "a product that makes its group wait")
    product = Product(left, right, acc if use_acc else 0.0)
    if mood.products_at_once:
        product.take_place()
    group.products.append(product)
    return product


def finish(pendings: int, deps: tuple):
    while len(group.products) > pendings:
        group.products.pop(0).take_place()
    require(not any(x in group.products for x in deps if isinstance(x, Product)), "a product used in flight")
    out = tuple(x.value if isinstance(x, Product) else x for x in deps)
    return out[0] if len(out) == 1 else out


class Pointer:
    """Into a dense tensor; adding moves it, a tensor of offsets makes it many."""

    def __init__(self, data: Tensor, at: int | Tensor = 0):
        self.data, self.at = data, at

    def __add__(self, more: int | Tensor) -> "Pointer":
        return Pointer(self.data, self.at + more)


def store(pointer: Pointer, value: Tensor, mask: Tensor):
    at = pointer.at[mask]
    require(bool(((at >= 0) & (at < pointer.data.numel())).all()), "a store outside of its tensor")
    pointer.data.view(-1)[at] = value[mask]


def part(jobs: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]):
    used = sum(128 * r for r in registers) + 128 * 24  # 24: the least that the first group can do with
    require(warps == [4] * (len(jobs) - 1) and used <= 65536, "more registers than there are")
    Turns(jobs)


any_layout = mock.Mock()
gl = SimpleNamespace(
    constexpr=type("Constant", (int,), {"value": property(int)}), float32=torch.float32, int64=torch.int64,
    NVMMASharedLayout=any_layout, NVMMADistributedLayout=any_layout, SliceLayout=any_layout,
    DotOperandLayout=any_layout, allocate_shared_memory=allocate, warp_specialize=part, store=store,
    static_range=range, cast=lambda x, _: x, program_id=lambda _: program,
    arange=lambda start, end, layout: torch.arange(start, end),
    zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
    expand_dims=torch.unsqueeze, convert_layout=lambda x, _: x, where=torch.where, maximum=torch.maximum,
    max=torch.amax, sum=torch.sum, exp2=torch.exp2, log2=torch.log2, fma=lambda a, b, c: a * b + c,
)  # fmt: skip
mbarrier = SimpleNamespace(MBarrierLayout=any_layout, init=Barrier.init, wait=Barrier.wait)
mbarrier.arrive, mbarrier.expect = Barrier.arrive, lambda barrier, size: barrier.change(1, size)
tma = SimpleNamespace(async_load=load_tile, async_store=store_tile)
tma.store_wait = lambda pendings: [group.stores.pop(0)() for _ in group.stores[pendings:]]
gluon = SimpleNamespace(jit=lambda f=None, do_not_specialize=(): f or (lambda g: g), language=gl)
chip = SimpleNamespace(fence_async_shared=lambda: unfenced[group.number].clear(), mbarrier=mbarrier, tma=tma)
chip.warpgroup_mma, chip.warpgroup_mma_wait, chip.TensorDescriptor = multiply, finish, Descriptor
GLUON = "triton.experimental.gluon"
MODULES = {"triton.experimental": SimpleNamespace(gluon=gluon), GLUON: gluon}
MODULES |= {f"{GLUON}.nvidia.hopper": chip, f"{GLUON}.language.nvidia.hopper": chip}


def launch(kernel: Callable, grid: tuple[int], *args, num_warps: int):
    """All programs of kernel[grid](*args)."""
    global program
    args = [Pointer(x) if isinstance(x, Tensor) else x for x in args]
    for program in reversed(range(*grid)):  # noqa: B007
        group.number = -1  # before the groups part
        unfenced.clear()
        kernel(*args)


def acted(path: Path, text: str) -> ModuleType:
    """The module at path, which reads text, played by the above."""
    module = ModuleType(path.stem)
    module.__package__ = path.parent.name
    with mock.patch.dict(sys.modules, MODULES):
        exec(compile(text, str(path), "exec"), module.__dict__)
    module.dispatch = SimpleNamespace(**vars(module.dispatch) | {"launch": launch})
    return module
