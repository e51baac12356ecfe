"""Adaptive LayerNorm and the gated residual of a transformer block, one modulation per segment of tokens.

    h   = x + gate * y                          the branch y returns to the residual stream
    out = LN(h) * (1 + scale) + shift           and the next linear reads this
    LN(h) = (h - mean) / sqrt(var + eps) * weight + bias

A token uses the gate, scale and shift of its segment. Text and video have their own; so may a clean
reference frame, or even every token. All segments run in one launch, and either line can run alone.

    tokens      | text    | ref     | video                          |
    programs    | 0  | 1  | 2  | 3  | 4  | 5  | 6  | 7  | 8  | ..     |   each walks down rows of ONE segment,
    modulation  | row 0   | row 1   | row 2                          |   its modulation held in registers

Because a program stays inside a segment, backward is simple too. The gradient of a scale is a sum over rows
of its segment. Each program sums its rows in fp32 registers and writes one partial sum; partial sums are
added in the order of the programs. No atomics: the same bits every time. n = (h - mean) / std, g = d(out)

    A = sum g n,  C = sum g       d(scale) = weight A + bias C    d(weight) = (1 + scale) A    d(shift) = C
    w = g (1 + scale) weight      d(h) = incoming + (w - mean(w) - n mean(w n)) / std
    d(x) = d(h)                   d(y) = gate d(h)                d(gate) = sum d(h) y
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .dispatch import dense, require, tl, triton, wide

Segments = tuple[int, ...] | None
WIDEST = 16384  # a row lives in the registers of one program


class Tile(NamedTuple):
    per_thread: int  # numbers of a row
    stages: int  # rows in flight
    programs: int  # per multiprocessor


# By (architecture, pass, function): timed on an H100, 2026-11-26, benchmarks/nvidia-h100-80gb-hbm3/tune.csv.
TILES = {
    (90, "forward", "adaln"): Tile(16, 3, 16),
    (90, "forward", "gated_residual"): Tile(8, 4, 16),
    (90, "forward", "gated_residual_adaln"): Tile(8, 4, 16),
    (90, "backward", "adaln"): Tile(16, 3, 2),
    (90, "backward", "gated_residual"): Tile(8, 4, 1),
    (90, "backward", "gated_residual_adaln"): Tile(16, 3, 1),
}
# Other chips: chosen 2026-11 by the compiler's registers and spills, not timed.
UNTIMED = {"forward": Tile(16, 3, 8), "backward": Tile(8, 4, 2)}


def adaln_reference(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, segments: Segments = None,
) -> Tensor:  # fmt: skip
    """LN(x) * (1 + scale) + shift in fp32."""
    dtype = wide(x.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    modulation = (1 + scale.to(dtype), shift.to(dtype))
    return _by_segment(lambda n, a, b: torch.addcmul(b, n, a), segments, (normed,), modulation).to(x.dtype)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor, segments: Segments = None) -> Tensor:
    """x + gate * y in fp32."""
    dtype = wide(x.dtype)
    rows, modulation = (x.to(dtype), y.to(dtype)), (gate.to(dtype),)
    return _by_segment(torch.addcmul, segments, rows, modulation).to(x.dtype)


def _by_segment(f, segments: Segments, rows: tuple[Tensor, ...], modulation: tuple[Tensor, ...]) -> Tensor:
    """f(*rows, *modulation), each segment of the rows with its own row of the modulation."""
    if segments is None:
        return f(*rows, *modulation)
    parts = zip(*(r.split(segments, 1) for r in rows), *(m.split(1, 1) for m in modulation), strict=True)
    return torch.cat([f(*part) for part in parts], 1)


def gated_residual_adaln_reference(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, segments: Segments = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual stream after the gate, and its adaptive LayerNorm."""
    out = gated_residual_reference(x, y, gate, segments)
    return out, adaln_reference(out, scale, shift, weight, bias, eps, segments)


# ---- kernels ---------------------------------------------------------------------------------------------
# An argument that is None drops out of the compiled kernel. xS: the strides of x in (batch, token).


@triton.jit
def _row(x, strides, b, i, d, D):
    """Row (b, i) of x (B, any, D) in fp32."""
    start = x + tl.cast(b, tl.int64) * strides[0] + tl.cast(i, tl.int64) * strides[1]
    return tl.load(start + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _put(x, i, d, D, row):
    tl.store(x + i * D + d, row.to(x.dtype.element_ty), mask=d < D)


@triton.jit
def _factor(scale, scaleS, weight, b, i, d, D):
    """(1 + scale) weight"""
    factor = 1.0 + _row(scale, scaleS, b, i, d, D)
    if weight is not None:
        factor *= _row(weight, (0, 0), b, 0, d, D)
    return factor


@triton.jit
def _offset(scale, scaleS, shift, shiftS, bias, b, i, d, D):
    """(1 + scale) bias + shift"""
    offset = _row(shift, shiftS, b, i, d, D)
    if bias is not None:
        offset += (1.0 + _row(scale, scaleS, b, i, d, D)) * _row(bias, (0, 0), b, 0, d, D)
    return offset


@triton.jit
def _forward_kernel(x, xS, y, yS, gate, gateS, scale, scaleS, shift, shiftS, weight, bias, h, out, stats, eps,
                    plan, L, D, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    p, b, d = tl.program_id(0) * 3, tl.program_id(1), tl.arange(0, BLOCK)
    segment, first, end = tl.load(plan + p), tl.load(plan + p + 1), tl.load(plan + p + 2)
    if gate is not None:
        gate_row = _row(gate, gateS, b, segment, d, D)
    if scale is not None:
        factor = _factor(scale, scaleS, weight, b, segment, d, D)
        offset = _offset(scale, scaleS, shift, shiftS, bias, b, segment, d, D)

    for i in tl.range(first, end, num_stages=STAGES):
        token = tl.cast(b, tl.int64) * L + i
        row = _row(x, xS, b, i, d, D)
        if gate is not None:
            row += gate_row * _row(y, yS, b, i, d, D)
            _put(h, token, d, D, row)
            row = row.to(h.dtype.element_ty).to(tl.float32)  # the norm reads what was stored
        if scale is not None:
            mean = tl.sum(row) / D
            row = tl.where(d < D, row - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(row * row) / D + eps)
            _put(out, token, d, D, row * rstd * factor + offset)
            tl.store(stats + token * 2, mean)
            tl.store(stats + token * 2 + 1, rstd)


@triton.jit
def _backward_kernel(dh, dhS, dout, doutS, h, hS, y, yS, gate, gateS, scale, scaleS, weight, stats, dx, dy,
                     sums, plan, L, D, SUMS: tl.constexpr, BLOCK: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """sums (B, programs, SUMS, D) take partial sums: of A and C, of d(gate), of all three, or of none."""
    p, b, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    segment, first, end = tl.load(plan + p * 3), tl.load(plan + p * 3 + 1), tl.load(plan + p * 3 + 2)
    a_sum = tl.zeros([BLOCK], tl.float32)
    c_sum = tl.zeros([BLOCK], tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    if gate is not None:
        gate_row = _row(gate, gateS, b, segment, d, D)
    if dout is not None:
        factor = _factor(scale, scaleS, weight, b, segment, d, D)

    for i in tl.range(first, end, num_stages=STAGES):
        token = tl.cast(b, tl.int64) * L + i
        total = tl.zeros([BLOCK], tl.float32)
        if dh is not None:
            total = _row(dh, dhS, b, i, d, D)
        if dout is not None:
            grad = _row(dout, doutS, b, i, d, D)
            mean, rstd = tl.load(stats + token * 2), tl.load(stats + token * 2 + 1)
            n = tl.where(d < D, (_row(h, hS, b, i, d, D) - mean) * rstd, 0.0)
            w = grad * factor
            w_sum, wn_sum = tl.split(tl.sum(tl.join(w, w * n), 0))  # one exchange between warps, not two
            total += (w - w_sum / D - n * (wn_sum / D)) * rstd
            _put(dx, token, d, D, total)
            if SUMS >= 2:
                a_sum += grad * n
                c_sum += grad
        if gate is not None:
            _put(dy, token, d, D, gate_row * total)
            if SUMS % 2 == 1:
                gate_sum += total * _row(y, yS, b, i, d, D)

    slot = (tl.cast(b, tl.int64) * tl.num_programs(0) + p) * SUMS
    if SUMS >= 2:
        _put(sums, slot, d, D, a_sum)
        _put(sums, slot + 1, d, D, c_sum)
    if SUMS % 2 == 1:
        _put(sums, slot + SUMS - 1, d, D, gate_sum)


# ---- from torch to the kernels and back ------------------------------------------------------------------


class Plan(NamedTuple):
    programs: Tensor  # (segment, first row, end) of each
    counts: tuple[int, ...]  # programs of each segment
    meta: dict  # the constants of the launch


@cache  # for ever: a captured CUDA graph reads a plan where it lies
def _plan(
    shape: tuple, S: int, segments: Segments, tile: Tile, processors: int, device: torch.device
) -> Plan:
    """About tile.programs for each multiprocessor, and at least one for each segment and sample."""
    B, L, D = shape
    rows = triton.cdiv(L, max(1, tile.programs * processors // B - S + 1))
    programs, counts, start = [], [], 0
    for s, n in enumerate(segments or [L // S] * S):
        cuts = range(start, start + max(n, 1), rows)  # an empty segment has a program too: its sums are zero
        programs += [(s, cut, min(cut + rows, start + n)) for cut in cuts]
        counts, start = [*counts, len(cuts)], start + n
    block = triton.next_power_of_2(D)
    warps = min(max(block // (32 * tile.per_thread), 1), 16)
    meta = {"BLOCK": block, "STAGES": tile.stages, "num_warps": warps, "num_stages": 2}
    return Plan(torch.tensor(programs, dtype=torch.int32, device=device), tuple(counts), meta)


def _planned(
    x: Tensor, gate: Tensor | None, scale: Tensor | None, segments: Sequence[int] | None, step: str
) -> Plan:
    function = "adaln" if gate is None else "gated_residual" if scale is None else "gated_residual_adaln"
    tile = TILES.get((dispatch.arch(x), step, function), UNTIMED[step])
    S, segments = (scale if gate is None else gate).shape[1], None if segments is None else tuple(segments)
    return _plan(x.shape, S, segments, tile, dispatch.processors(x), x.device)


def _strided(*tensors: Tensor | None) -> Iterator:
    """(B, any, D) tensors as a kernel takes them: pointer, strides of the first two, and the next."""
    for x in tensors:
        if x is not None and x.stride(2) != 1:  # a stride-0 gradient, for one
            x = x.contiguous()
        yield x
        yield (0, 0) if x is None else x.stride()[:2]


def _launch(kernel, x: Tensor, plan: Plan, *arguments, **meta):
    B, L, D = x.shape
    dispatch.launch(kernel, (len(plan.programs), B), *arguments, plan.programs, L, D, **meta, **plan.meta)


def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, segments: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(h, out, mean and 1 / std of every row); without a gate h is empty, without a scale the other two."""
    outputs = _outputs(x, y, gate, scale)
    plan = _planned(x, gate, scale, segments, "forward")
    tensors = *_strided(x, y, gate, scale, shift), dense(weight), dense(bias)
    _launch(_forward_kernel, x, plan, *tensors, *outputs, eps)
    return outputs


def _outputs(x: Tensor, y, gate, scale, *rest) -> tuple[Tensor, Tensor, Tensor]:
    h, out = (x.new_empty(0 if modulation is None else x.shape) for modulation in (gate, scale))
    return h, out, x.new_empty(0 if scale is None else (*x.shape[:2], 2), dtype=torch.float32)


def _backward(
    dh: Tensor | None, dout: Tensor | None, h: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, stats: Tensor, segments: Sequence[int] | None, learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d(h) with a dout, d(y) with a gate, A and C if the norm learns and d(gate) with a y); else empty."""
    g = dh if dout is None else dout
    plan = _planned(g, gate, scale, segments, "backward")
    n = 2 * learns + (y is not None)
    dx, dy, sums = _gradients(g, len(plan.programs if n else plan.counts), dout, gate, learns, y)
    tensors = *_strided(dh, dout, h, y, gate, scale), dense(weight), stats, dx, dy
    _launch(_backward_kernel, g, plan, *tensors, sums if n else None, SUMS=n)
    if n and max(plan.counts) > 1:  # in the order of the programs
        sums = torch.stack([part.sum(1) for part in sums.split(plan.counts, 1)], 1)
    return dx, dy, sums


def _gradients(g: Tensor, n: int, dout, gate, learns: bool, y) -> tuple[Tensor, Tensor, Tensor]:
    """What backward returns, yet to be filled, for n segments or programs."""
    B, _, D = g.shape
    dx, dy = (g.new_empty(0 if cause is None else g.shape) for cause in (dout, gate))
    return dx, dy, g.new_empty((B, n, 2 * learns + (y is not None), D), dtype=torch.float32)


def _fake_backward(dh, dout, h, y, gate, scale, weight, stats, segments, learns):
    segments = (scale if gate is None else gate).shape[1]
    return _gradients(dh if dout is None else dout, segments, dout, gate, learns, y)


def _save(ctx, inputs, output):
    """Keeps y only if the gate learns: where modulation is frozen, as in Wan, its memory is free."""
    x, y, gate, scale, _, weight, bias, _, ctx.segments = inputs
    h, _, stats = output
    h = None if scale is None else x if gate is None else h
    y = y if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(h, y, gate, scale, weight, bias, stats)
    ctx.set_materialize_grads(False)


def _grads(ctx, dh, dout, _dstats):
    """Gradients may be wider than their inputs: autograd rounds them to the input's dtype."""
    h, y, gate, scale, weight, bias, stats = ctx.saved_tensors
    dh = None if gate is None else dh
    if dout is None or scale is None:  # only the residual stream was made, or used
        dout = h = scale = weight = bias = None
    if dh is None and dout is None:
        return (None,) * 9
    learns = dout is not None and any(ctx.needs_input_grad[3:7])
    dx, dy, sums = _adaln_backward(dh, dout, h, y, gate, scale, weight, stats, ctx.segments, learns)
    dx, dy, sums = dh if dout is None else dx, None if gate is None else dy, sums.unbind(2)
    dgate = None if y is None else sums[-1]
    if not learns:
        return dx, dy, dgate, *(None,) * 6
    a, c = sums[:2]
    dscale = a if weight is None else weight * a
    dscale = dscale if bias is None else dscale + bias * c
    factor = 1 + scale.float()
    dweight, dbias = (None if p is None else (factor * s).sum((0, 1)) for p, s in ((weight, a), (bias, c)))
    return dx, dy, dgate, dscale, c, dweight, dbias, None, None


_adaln = dispatch.operator("adaln", _forward, _outputs, _save, _grads)
_adaln_backward = dispatch.operator("adaln_backward", _backward, _fake_backward)


# ---- the contract ----------------------------------------------------------------------------------------


def adaln(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, segments: Segments = None,
) -> Tensor:  # fmt: skip
    """LN(x) * (1 + scale) + shift. x (B, L, D); scale, shift (B, S, D); weight, bias (D,) belong to the LN.

    segments: S lengths that sum to L, each with its scale and shift; None takes S = 1 or S = L (one a token).
    """
    _check("adaln", x, None, segments, {"scale": scale, "shift": shift}, {"weight": weight, "bias": bias})
    if not dispatch.use_triton(x):
        return adaln_reference(x, scale, shift, weight, bias, eps, segments)
    return _adaln(x, None, None, scale, shift, weight, bias, eps, segments)[1]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, segments: Segments = None) -> Tensor:
    """x + gate * y. x, y (B, L, D); gate (B, S, D); segments as in `adaln`."""
    _check("gated_residual", x, y, segments, {"gate": gate}, {})
    if not dispatch.use_triton(x):
        return gated_residual_reference(x, y, gate, segments)
    return _adaln(x, y, gate, None, None, None, None, 0.0, segments)[0]


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, segments: Segments = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h, adaln(h)) of h = x + gate * y: the residual stream and what the next linear reads, in one pass."""
    modulation = {"gate": gate, "scale": scale, "shift": shift}
    _check("gated_residual_adaln", x, y, segments, modulation, {"weight": weight, "bias": bias})
    if not dispatch.use_triton(x):
        return gated_residual_adaln_reference(x, y, gate, scale, shift, weight, bias, eps, segments)
    return _adaln(x, y, gate, scale, shift, weight, bias, eps, segments)[:2]


def _check(
    name: str, x: Tensor, y: Tensor | None, segments: Segments, modulation: dict[str, Tensor],
    affine: dict[str, Tensor | None],
):  # fmt: skip
    got = tuple(x.shape)
    require(len(got) == 3 and got[1] > 0, lambda: f"{name}: want x (B, L, D), L of 1 or more, got {got}")
    B, L, D = got
    require(D <= WIDEST, lambda: f"{name}: D = {D} is wider than {WIDEST}")
    dispatch.want(name, got, x.device, {"y": y})
    require(y is None or y.dtype == x.dtype, lambda: f"{name}: x {x.dtype} and y {y.dtype} differ")
    if segments is None:
        first = next(iter(modulation.values())).shape
        require(len(first) == 3, lambda: f"{name}: want modulations (B, S, D), got {tuple(first)}")
        S = first[1]
        require(
            S in (1, L), lambda: f"{name}: {S} modulations for {L} tokens: say whose they are with segments"
        )
    else:
        S, ok = len(segments), sum(segments) == L and min(segments) >= 0
        require(ok, lambda: f"{name}: segments {tuple(segments)} do not sum to the {L} tokens of x")
    dispatch.want(name, (B, S, D), x.device, modulation)
    dispatch.want(name, (D,), x.device, affine)
