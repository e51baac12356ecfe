"""Fused non-causal attention, O = softmax(scale Q K^T) V, forward and backward, without the L x L matrix.

One program owns a tile of queries and walks over the keys. `m` is the largest score of each row so far, `z`
the sum of exp(score - m), `acc` the same sum weighted by V. A new block of keys may raise m: old sums then
shrink by exp(m_old - m). In the end O = acc / z. (Milakov & Gimelshein 2018; Dao et al. 2022.)

                     keys ->  block 0    block 1     ..     tail (masked)
                            +----------+----------+------+--------+
             K^T  (K rows)  |          |          |      |        |
                            +----------+----------+------+--------+
    +-----------+           +----------+----------+------+--------+
    | Q tile    | s = Q K^T |   s, p   |   s, p   |      |  s, p  |   p = exp(scale s - m)
    | BM x K    |           +----------+----------+------+--------+
    +-----------+                |   z   <- z   exp(m_old - m) + sum(p)
                                 v   acc <- acc exp(m_old - m) + p V
                            a (BM, K) tile of O, and lse = m + log(z) of each row

Backward rebuilds p = exp(scale s - lse) instead of storing it. With dO the gradient of O:

    dV = P^T dO     dP = dO V^T     dS = P (dP - delta)     dQ = scale dS K     dK = scale dS^T Q
                                    delta = rowsum(dO O)

Two kernels: `_dq` owns query tiles and walks over keys (and leaves delta behind), `_dkdv` owns key tiles and
walks over queries. No program adds to another's tile, so there are no atomics and the bits are the same
every time. The price: S and dP are computed twice, 7 matrix products instead of 5.

Exponentials have base 2, as the chip computes them: scale includes log2(e), and scale s - m is one FMA.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, hopper
from .dispatch import INTERPRET, TensorDescriptor, arch, require, tl, token_major, triton

WIDTHS = (16, 32, 64, 128)
EXACT = tl.constexpr("ieee")  # fp32 inputs are multiplied as fp32, not rounded to TF32
LN2 = tl.constexpr(math.log(2))
LOG2E = math.log2(math.e)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The formula, in torch's own fused form: which one, torch decides. On an H100 it takes cuDNN's."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


# ---- tiles -----------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int  # depth of the load pipeline


class Tiles(NamedTuple):
    forward: Tile
    dq: Tile
    dkdv: Tile


# By (architecture, K). Backward on 90: by timings on an H100, 2026-11-26, benchmarks/nvidia-h100-80gb-hbm3.
# Forward on 90: for when hopper.py's does not fit. This and all other chips: chosen 2026-11 by the compiler's
# registers, spills and shared memory, not timed.
TILES = {
    (80, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 2)),
    (80, 128): Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
    (89, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 2)),
    (89, 128): Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
    (90, 64): Tiles(Tile(128, 64, 8, 4), Tile(128, 64, 8, 3), Tile(32, 128, 4, 3)),
    (90, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    (100, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    (100, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (120, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3)),
    (120, 128): Tiles(Tile(128, 32, 8, 3), Tile(128, 16, 8, 2), Tile(64, 64, 8, 2)),
}
FP32 = Tiles(*[Tile(16, 16, 8, 1)] * 3)  # no tensor cores: exact and slow, for checking


def _tiles(q: Tensor) -> Tiles:
    """The interpreter takes the large tiles for fp32 too: fewer steps of Python."""
    return FP32 if q.dtype == torch.float32 and not INTERPRET else TILES[arch(q), max(q.shape[3], 64)]


# ---- kernels ---------------------------------------------------------------------------------------------
# q, k, v are TMA descriptors where the chip has TMA (sm_90 on), else pointers with (B, H, L) strides qS, kS
# BM queries and BN keys make a tile. b, h: this program's batch and head. n: the first row of a block.


@triton.jit
def _place(L, ROWS: tl.constexpr, H):
    """(b * H + h, b, h, first row). Tiles of a head are neighbours: its K and V stay in the L2 cache."""
    tiles = tl.cdiv(L, ROWS)
    head = tl.program_id(0) // tiles
    return tl.cast(head, tl.int64), head // H, head % H, tl.program_id(0) % tiles * ROWS


@triton.jit
def _start(x, strides, b, h, row):
    b, h, row = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(row, tl.int64)
    return x + b * strides[0] + h * strides[1] + row * strides[2]


@triton.jit
def _load(x, xS, b, h, row, L, ROWS: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr):
    """(ROWS, K) of one head from row on. Rows past L are zeros; without TAIL there are none, and no mask."""
    if TMA:
        tile = x.load([b, h, row, 0]).reshape(ROWS, K)
    else:
        i = tl.arange(0, ROWS)[:, None]
        at = _start(x, xS, b, h, row) + tl.cast(i, tl.int64) * xS[2] + tl.arange(0, K)[None, :]
        tile = tl.load(at, mask=row + i < L, other=0.0) if TAIL else tl.load(at)
    return tile


@triton.jit
def _store(x, xS, b, h, row, L, tile, ROWS: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        x.store([b, h, row, 0], tile.to(x.dtype).reshape(1, 1, ROWS, K))
    else:
        i = tl.arange(0, ROWS)[:, None]
        at = _start(x, xS, b, h, row) + i * xS[2] + tl.arange(0, K)[None, :]
        tl.store(at, tile.to(x.dtype.element_ty), mask=row + i < L)


@triton.jit
def _attend(q, k, kS, v, vS, b, h, n, L, scale, m, z, acc,
            BN: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """One step of the picture: keys n .. n + BN enter the running m, z and acc."""
    s = tl.dot(q, _load(k, kS, b, h, n, L, BN, K, TMA, TAIL).T, input_precision=EXACT)
    if TAIL:
        s = tl.where((n + tl.arange(0, BN) < L)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(tl.fma(s, scale, -m_new[:, None]))
    shrink = tl.exp2(m - m_new)
    v_block = _load(v, vS, b, h, n, L, BN, K, TMA, TAIL)
    acc = tl.dot(p.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision=EXACT)
    return m_new, z * shrink + tl.sum(p, 1), acc


@triton.jit
def _forward_kernel(q, qS, o, oS, k, kS, v, vS, lse, scale, H, Lq, Lk,
                    BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    head, b, h, row = _place(Lq, BM, H)
    q_tile = _load(q, qS, b, h, row, Lq, BM, K, TMA, True)
    m = tl.full([BM], float("-inf"), tl.float32)
    z = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, K], tl.float32)

    full = Lk // BN * BN  # the blocks that need no mask, then the one that does
    for n in tl.range(0, full, BN):
        m, z, acc = _attend(q_tile, k, kS, v, vS, b, h, n, Lk, scale, m, z, acc, BN, K, TMA, False)
    if full < Lk:
        m, z, acc = _attend(q_tile, k, kS, v, vS, b, h, full, Lk, scale, m, z, acc, BN, K, TMA, True)

    _store(o, oS, b, h, row, Lq, acc / z[:, None], BM, K, TMA)
    i = row + tl.arange(0, BM)
    tl.store(lse + head * Lq + i, m + tl.log2(z), mask=i < Lq)


@triton.jit
def _add_dq(q, do, lse, delta, k, kS, v, vS, b, h, n, L, scale, dq,
            BN: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """dq + dS K of the keys n .. n + BN."""
    k_block = _load(k, kS, b, h, n, L, BN, K, TMA, TAIL)
    p = tl.exp2(tl.fma(tl.dot(q, k_block.T, input_precision=EXACT), scale, -lse[:, None]))
    if TAIL:
        p = tl.where((n + tl.arange(0, BN) < L)[None, :], p, 0.0)
    dp = tl.dot(do, _load(v, vS, b, h, n, L, BN, K, TMA, TAIL).T, input_precision=EXACT)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision=EXACT)


@triton.jit
def _dq_kernel(q, qS, o, oS, do, doS, dq, dqS, k, kS, v, vS, lse, delta, scale, H, Lq, Lk,
               BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    head, b, h, row = _place(Lq, BM, H)
    q_tile = _load(q, qS, b, h, row, Lq, BM, K, TMA, True)
    o_tile = _load(o, oS, b, h, row, Lq, BM, K, TMA, True)
    do_tile = _load(do, doS, b, h, row, Lq, BM, K, TMA, True)
    i = row + tl.arange(0, BM)
    d = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + head * Lq + i, d, mask=i < Lq)
    e = tl.load(lse + head * Lq + i, mask=i < Lq, other=float("inf"))
    acc = tl.zeros([BM, K], tl.float32)

    full = Lk // BN * BN
    for n in tl.range(0, full, BN):
        acc = _add_dq(q_tile, do_tile, e, d, k, kS, v, vS, b, h, n, Lk, scale, acc, BN, K, TMA, False)
    if full < Lk:
        acc = _add_dq(q_tile, do_tile, e, d, k, kS, v, vS, b, h, full, Lk, scale, acc, BN, K, TMA, True)
    _store(dq, dqS, b, h, row, Lq, acc * (scale * LN2), BM, K, TMA)  # takes log2(e) out of scale again


@triton.jit
def _dkdv_kernel(q, qS, do, doS, k, kS, v, vS, dk, dkS, dv, dvS, lse, delta, scale, H, Lq, Lk,
                 BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Works on S^T, keys x queries, so that P^T and dS^T are left factors and never leave the registers."""
    head, b, h, row = _place(Lk, BN, H)
    k_tile = _load(k, kS, b, h, row, Lk, BN, K, TMA, True)
    v_tile = _load(v, vS, b, h, row, Lk, BN, K, TMA, True)
    dk_acc = tl.zeros([BN, K], tl.float32)
    dv_acc = tl.zeros([BN, K], tl.float32)

    for n in tl.range(0, Lq, BM):
        # Queries past Lq: an lse of infinity makes their p zero. Keys past Lk: their rows are not stored.
        i = n + tl.arange(0, BM)
        e = tl.load(lse + head * Lq + i, mask=i < Lq, other=float("inf"))
        d = tl.load(delta + head * Lq + i, mask=i < Lq, other=0.0)
        q_block = _load(q, qS, b, h, n, Lq, BM, K, TMA, True)
        p = tl.exp2(tl.fma(tl.dot(k_tile, q_block.T, input_precision=EXACT), scale, -e[None, :]))
        do_block = _load(do, doS, b, h, n, Lq, BM, K, TMA, True)
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc, input_precision=EXACT)
        ds = p * (tl.dot(v_tile, do_block.T, input_precision=EXACT) - d[None, :])
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision=EXACT)

    _store(dv, dvS, b, h, row, Lk, dv_acc, BN, K, TMA)
    _store(dk, dkS, b, h, row, Lk, dk_acc * (scale * LN2), BN, K, TMA)


# ---- from torch to the kernels and back ------------------------------------------------------------------
# What follows from shapes alone is worked out once for each and kept: a call only adds its tensors.


@lru_cache(maxsize=1024)
def _walk(shape: tuple, strides: tuple, size: int) -> tuple[int, ...] | None:
    """Strides of B, H and L; None where neither TMA nor 16-byte loads could follow them."""
    walk = tuple(s if n > 1 else shape[3] for s, n in zip(strides[:3], shape, strict=False))
    return walk if strides[3] == 1 and all(s > 0 and s * size % 16 == 0 for s in walk) else None


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of what cannot be walked: stride-0 gradients, odd slices."""
    ok = x.data_ptr() % 16 == 0 and _walk(x.shape, x.stride(), x.element_size())
    return x if ok else token_major(x).copy_(x)


@lru_cache(maxsize=1024)
def _form(shape: tuple, strides: tuple, dtype: torch.dtype, rows: int, tma: bool) -> tuple:
    """A tensor as a kernel takes it: (descriptor of no tensor yet, or None; strides of B, H and L)."""
    walk, nothing = _walk(shape, strides, dtype.itemsize), torch.empty(0, dtype=dtype)
    block = [1, 1, rows, shape[3]]
    return TensorDescriptor(nothing, list(shape), [*walk, 1], block) if tma else None, walk


@lru_cache(maxsize=1024)
def _grid(kernel, tile: Tile, shape: tuple[int, ...], Lk: int, tma: bool) -> tuple[tuple[int], dict]:
    """One program for each query tile; for dK and dV, for each key tile. (grid, constants)"""
    B, H, Lq, K = shape
    tiles = triton.cdiv(Lk, tile.keys) if kernel is _dkdv_kernel else triton.cdiv(Lq, tile.queries)
    meta = {"BM": tile.queries, "BN": tile.keys, "K": K, "TMA": tma}
    return (tiles * B * H,), meta | {"num_warps": tile.warps, "num_stages": tile.stages}


def _launch(kernel, tile: Tile, by_query: tuple, by_key: tuple, rows: tuple, scale: float):
    q, k = by_query[0], by_key[0]
    tma, args = arch(q) >= 90, []
    for tensors, block in ((by_query, tile.queries), (by_key, tile.keys)):
        for x in tensors:
            blank, strides = _form(x.shape, x.stride(), x.dtype, block, tma)
            args += (dispatch.described(x, blank) if tma else x, strides)
    grid, meta = _grid(kernel, tile, q.shape, k.shape[2], tma)
    dispatch.launch(kernel, grid, *args, *rows, scale * LOG2E, q.shape[1], q.shape[2], k.shape[2], **meta)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o, log2 of each row's sum of exponentials)"""
    q, k, v = map(_aligned, (q, k, v))
    return (hopper.forward if hopper.fits(q) else _portable_forward)(q, k, v, scale)


def _portable_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = _outputs(q)
    _launch(_forward_kernel, _tiles(q).forward, (q, o), (k, v), (lse,), scale)
    return o, lse


def _outputs(q: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """What forward returns, yet to be filled."""
    return token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (dq, dk, dv), delta = map(token_major, (q, k, v)), torch.empty_like(lse)
    do, q, k, v, o = map(_aligned, (do, q, k, v, o))
    _launch(_dq_kernel, _tiles(q).dq, (q, o, do, dq), (k, v), (lse, delta), scale)
    _launch(_dkdv_kernel, _tiles(q).dkdv, (q, do), (k, v, dk, dv), (lse, delta), scale)
    return dq, dk, dv


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # nobody differentiates lse


def _grads(ctx, do, _dlse):
    return (None,) * 4 if do is None else (*_attention_backward(do, *ctx.saved_tensors, ctx.scale), None)


_attention = dispatch.operator("attention", _forward, _outputs, _save, _grads)
_attention_backward = dispatch.operator(
    "attention_backward", _backward, lambda do, q, k, v, *rest: tuple(map(token_major, (q, k, v)))
)


# ---- the contract ----------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v for q (B, H, L, K) and k, v (B, H, any, K); scale defaults to K ** -0.5.

    Returns (B, H, L, K) laid out as (B, L, H, K), so that `.transpose(1, 2).flatten(2)` is free.
    """
    _check(q, k, v, scale)
    if not dispatch.use_triton(q):
        return attention_reference(q, k, v, scale)
    K = q.shape[3]
    require(
        K in WIDTHS, lambda: f"attention: Triton has tiles for K in {WIDTHS}, not {K}: {dispatch.TO_TORCH}"
    )
    return _attention(q, k, v, K**-0.5 if scale is None else scale)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None):
    def shapes() -> str:
        return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"

    require(q.ndim == 4 and k.ndim == 4, lambda: f"attention: want (B, H, L, K), got {shapes()}")
    require(k.shape == v.shape, lambda: f"attention: k and v differ: {shapes()}")
    fits = q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and min(q.shape[2], k.shape[2]) > 0
    require(fits, lambda: f"attention: want the same B, H, K, and L of 1 or more: {shapes()}")
    alike = q.dtype == k.dtype == v.dtype
    require(alike, lambda: f"attention: dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    alike = q.device == k.device == v.device
    require(alike, lambda: f"attention: devices differ: {q.device}, {k.device}, {v.device}")
    require(scale is None or scale > 0, lambda: f"attention: scale {scale} is not positive: negate q instead")
