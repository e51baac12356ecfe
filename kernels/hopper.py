"""Attention's forward on Hopper (sm_90) in Gluon: attention.py's formula, split among groups of warps.

Hopper's tensor cores multiply by themselves, and one program can keep them busy: while one group of warps
takes exponentials, the products of the others run. A program owns 192 queries of one head. Three groups of
four warps own 64 of them each, as many rows as one instruction has; a fourth group only loads.

    the loader               shared memory              each of the three consumers
                       +-----------------------+
      for each group   | q of group 0 | 1 | 2  |  --->  q stays in shared memory
                       +-----------------------+        for each block of 128 keys
      for each block   |  k   |  v   | stage 0 |  --->      s = q K^T                       tensor cores
      of 128 keys      |  k   |  v   | stage 1 |  <---      m, z, p = softmax(s)            registers
                       +-----------------------+  free      acc = acc exp(m_old - m) + p V  tensor cores
                                                        acc / z -> q's place -> o,  m + log2(z) -> lse

The k and v of all blocks go through one ring of four places: tile t lies in place t % 4. A place has two
barriers. `full` completes when all bytes of a tile have arrived, `free` when all three groups are done with
it. Completing ends a phase of the barrier, and a wait names, by its parity, the phase that has to be over:
t // 4, how often the ring has gone around.

Inside a group nothing overlaps. On an H100 (2026-11-26) delaying p V into the next softmax was 1.4 % faster
in one prototype at K = 64 and 7 % slower in another; at K = 128 it needs more registers than there are. Two
groups with more registers were slower at both, with or without taking turns by barriers. Registers set the
sizes: 3 x 128 threads of 160 and the loader's 128 of 32 are all 65,536 there are.

TMA walks (B, H, L, K) by strides. What lies past the end of a sample arrives as zeros and is never written:
keys there need a mask on their scores, queries nothing. The backward is attention.py's: same o, same lse. One
split like this forward is not here yet; prototypes were faster on that GPU: benchmarks/kernels/README.md.
"""

import math
import re
import warnings
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import dispatch
from .dispatch import INTERPRET, Absent, arch, token_major, triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
    from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as multiply
    from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as finish
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if hasattr(tma, "async_load"):
        load, store = tma.async_load, tma.async_store
    else:  # before Triton 3.8
        load, store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    COMPLETE = True
except (ImportError, AttributeError):  # no Triton, or one without these names: the kernel is only defined
    gluon = gl = Absent()
    COMPLETE = False

# Gluon is experimental: the versions for which `make test-triton` has read this file's machine code.
VERSIONS = ("3.6", "3.7", "3.8", "3.9")
WIDTHS = (64, 128)

GROUPS = gl.constexpr(3)
QUERIES = gl.constexpr(64)  # of a group
KEYS = gl.constexpr(128)  # of a block
STAGES = gl.constexpr(2)  # blocks in shared memory
REGISTERS = gl.constexpr(160)  # of a consumer's thread


# ---- rings: (tiles, full, free) --------------------------------------------------------------------------


@gluon.jit
def _ring(x, SIZE: gl.constexpr, READERS: gl.constexpr):
    """Places for SIZE blocks of x, each of which READERS groups will read."""
    tiles = gl.allocate_shared_memory(x.dtype, [SIZE] + x.block_type.shape, x.layout)
    full = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return tiles, full, free


@gluon.jit
def _fill(ring, t, x, b, h, row):
    """Starts to load tile t, rows row .. of x[b, h], as soon as its place is free."""
    tiles, full, free = ring
    place, lap = t % tiles.shape[0], t // tiles.shape[0]
    mbarrier.wait(free.index(place), (lap + 1) & 1)  # the phase before: in the first lap it counts as over
    mbarrier.expect(full.index(place), x.block_type.nbytes)
    load(x, [b, h, row, 0], full.index(place), tiles.index(place))


@gluon.jit
def _filled(ring, t):
    """Tile t as (rows, K), as soon as it is there."""
    tiles, full, free = ring
    place, lap = t % tiles.shape[0], t // tiles.shape[0]
    mbarrier.wait(full.index(place), lap & 1)
    return tiles.index(place).reshape([tiles.shape[3], tiles.shape[4]])


@gluon.jit
def _release(ring, t):
    """This group has read tile t."""
    tiles, full, free = ring
    mbarrier.arrive(free.index(t % tiles.shape[0]), count=1)


# ---- the two jobs ----------------------------------------------------------------------------------------


@gluon.jit
def _place(H, Lq):
    """(b * H + h, b, h, first row) of this program. Programs of a head are neighbours: it stays in the L2."""
    tiles = (Lq + GROUPS * QUERIES - 1) // (GROUPS * QUERIES)
    head = gl.program_id(0) // tiles
    return gl.cast(head, gl.int64), head // H, head % H, gl.program_id(0) % tiles * (GROUPS * QUERIES)


@gluon.jit
def _load_all(q, k, v, q_ring, kv_ring, H, Lq, blocks):
    head, b, h, row = _place(H, Lq)
    for group in gl.static_range(GROUPS):
        _fill(q_ring, group, q, b, h, row + group * QUERIES)
    for j in range(blocks):
        _fill(kv_ring, 2 * j, k, b, h, j * KEYS)
        _fill(kv_ring, 2 * j + 1, v, b, h, j * KEYS)


@gluon.jit
def _attend(rest, GROUP: gl.constexpr):
    q_ring, kv_ring, o, lse, scale, H, Lq, Lk, blocks = rest
    K: gl.constexpr = q_ring[0].shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])  # four warps, 16 rows each
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # the same rows a warp
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)  # of p as a left factor: what s's threads hold anyway
    q = _filled(q_ring, GROUP)
    m = gl.full([QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    z = gl.zeros([QUERIES], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([QUERIES, K], gl.float32, ACC)

    for j in range(blocks):
        k = _filled(kv_ring, 2 * j).permute((1, 0))
        s = multiply(q, k, gl.zeros([QUERIES, KEYS], gl.float32, S), use_acc=False, is_async=True)
        s = finish(0, deps=(s,))
        _release(kv_ring, 2 * j)

        if j * KEYS + KEYS > Lk:
            key = j * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
            s = gl.where(gl.expand_dims(key < Lk, 0), s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(gl.fma(s, scale, -gl.expand_dims(m_new, 1)))
        shrink = gl.exp2(m - m_new)
        m, z = m_new, z * shrink + gl.sum(p, 1)

        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, ACC)), 1)
        p = gl.convert_layout(p.to(q.dtype), P)
        acc = multiply(p, _filled(kv_ring, 2 * j + 1), acc, is_async=True)
        acc = finish(0, deps=(acc,))
        _release(kv_ring, 2 * j + 1)

    head, b, h, row = _place(H, Lq)
    i = row + GROUP * QUERIES + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, S))
    gl.store(lse + head * Lq + i, m + gl.log2(z), mask=i < Lq)
    acc = acc / gl.expand_dims(gl.convert_layout(z, gl.SliceLayout(1, ACC)), 1)
    q.store(acc.to(q.dtype))  # nobody reads q any more
    fence_async_shared()  # TMA has to see what took its place
    store(o, [b, h, row + GROUP * QUERIES, 0], q_ring[0].index(GROUP))
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["H", "Lq", "Lk"])  # one compilation for all lengths
def _forward_kernel(q, o, k, v, lse, scale, H, Lq, Lk):
    blocks = (Lk + KEYS - 1) // KEYS
    q_ring, kv_ring = _ring(q, GROUPS, 1), _ring(k, 2 * STAGES, GROUPS)
    fence_async_shared()  # TMA has to see the barriers
    rest = (q_ring, kv_ring, o, lse, scale, H, Lq, Lk, blocks)
    gl.warp_specialize([
        (_load_all, (q, k, v, q_ring, kv_ring, H, Lq, blocks)),
        (_attend, (rest, 0)),
        (_attend, (rest, 1)),
        (_attend, (rest, 2)),
    ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip


# ---- from torch to the kernel ----------------------------------------------------------------------------


@cache
def _proved() -> bool:
    """Whether this Triton's Gluon is one of those above. If not, says so, once."""
    known = COMPLETE and re.match(r"\d+\.\d+", triton.__version__)[0] in VERSIONS
    if not known:
        warnings.warn(
            f"Triton {triton.__version__} is not one of {', '.join(VERSIONS)}, for whose Gluon the Hopper "
            "attention is written: the portable kernel runs, right but slower",
            stacklevel=2,
        )
    return known


def fits(q: Tensor) -> bool:
    """Whether this kernel takes q (B, H, L, K), and keys like it; else the portable one runs."""
    halves = q.dtype in (torch.bfloat16, torch.float16)
    return arch(q) == 90 and halves and q.shape[3] in WIDTHS and not INTERPRET and _proved()


@lru_cache(maxsize=1024)
def _form(shape: tuple, strides: tuple, dtype: torch.dtype, rows: int):
    """The descriptor of a (B, H, L, K) tensor, yet to be had, in tiles of one head and so many rows."""
    K = shape[3]
    walk = [s if n > 1 else K for s, n in zip(strides[:3], shape, strict=False)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)  # what HGMMA reads
    return TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), [*walk, 1], [1, 1, rows, K], layout)


def _described(x: Tensor, rows: int):
    return dispatch.described(x, _form(x.shape, x.stride(), x.dtype, rows))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse base 2) of q, k, v that `fits` and that lie as TMA can walk them: multiples of 16 bytes."""
    (B, H, Lq, _), Lk = q.shape, k.shape[2]
    o, lse = token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = [_described(x, QUERIES.value) for x in (q, o)] + [_described(x, KEYS.value) for x in (k, v)]
    programs = B * H * triton.cdiv(Lq, GROUPS.value * QUERIES.value)
    dispatch.launch(
        _forward_kernel, (programs,), *tensors, lse, scale * math.log2(math.e), H, Lq, Lk, num_warps=4
    )
    return o, lse
