"""Rotary embedding of queries and keys, alone or fused with the norm before it.

Each pair (a, b) = (x[2i], x[2i + 1]) of a head is a point; its token and pair give the angle that turns it:

    a' = a cos - b sin        the gradient turns back:     da =  da' cos + db' sin
    b' = a sin + b cos                                     db = -da' sin + db' cos

so backward is the same kernel with sin negated. The norm before it is xhat * weight (+ bias):

    CogVideoX   LayerNorm over the K numbers of a head     xhat = (x - mean) / sqrt(var + eps)
    Wan         RMSNorm over all H * K numbers of a token  xhat = x / sqrt(mean(x^2) + eps)

With g the gradient turned back, w = g * weight, and means over what was normed (RMS: without mean(w)):

    d(x) = (w - mean(w) - xhat mean(w xhat)) / std       d(weight) = sum g xhat       d(bias) = sum g

xhat is rebuilt from x, not stored. Sums over tokens stay in fp32 registers, one partial sum a program, and
are added in the order of the programs.

    tile        (TOKENS, HEADS, K) of x. x is stored (B, L, H, K), the heads of a token side by side, so that
                a tile is one piece of memory; `.transpose(1, 2)` makes it the (B, H, L, K) that callers hold
    cos, sin    (TOKENS, K / 2), shared by the heads; the L - R text tokens in front get cos 1, sin 0
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .dispatch import dense, require, tl, token_major, triton, wide

WIDTHS = (16, 32, 64, 128, 256)


class Tile(NamedTuple):
    numbers: int  # in a tile
    per_thread: int
    stages: int  # tiles in flight
    programs: int  # per multiprocessor


# By (architecture, pass, norm): timed on an H100, 2026-11-26, benchmarks/nvidia-h100-80gb-hbm3/tune.csv.
TILES = {
    (90, "forward", "none"): Tile(2048, 16, 3, 4),
    (90, "forward", "layer"): Tile(2048, 16, 3, 4),
    (90, "forward", "rms"): Tile(2048, 16, 3, 16),
    (90, "backward", "layer"): Tile(4096, 16, 3, 2),
    (90, "backward", "rms"): Tile(2048, 8, 3, 2),
}
# Other chips: chosen 2026-11 by the compiler's registers and spills, not timed.
UNTIMED = {"forward": Tile(4096, 16, 3, 8), "backward": Tile(4096, 16, 3, 4)}


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) for each pair of the last R tokens, in fp32."""
    return _rotate(x.transpose(1, 2).to(wide(x.dtype)), cos, sin).to(x.dtype).transpose(1, 2)


def layernorm_rope_reference(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    """Affine LayerNorm of every head's K numbers, then RoPE, in fp32."""
    dtype = wide(x.dtype)
    rows = x.transpose(1, 2).to(dtype)
    rows = F.layer_norm(rows, rows.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return _rotate(rows, cos, sin).to(x.dtype).transpose(1, 2)


def rmsnorm_rope_reference(
    x: Tensor, weight: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """RMSNorm across all H * K numbers of a token, then RoPE (none if cos is None), in fp32."""
    dtype = wide(x.dtype)
    rows = x.transpose(1, 2).flatten(2).to(dtype)
    rows = F.rms_norm(rows, rows.shape[-1:], weight.to(dtype), eps).unflatten(-1, (x.shape[1], -1))
    rows = rows if cos is None else _rotate(rows, cos, sin)
    return rows.to(x.dtype).transpose(1, 2)


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula on (B, L, H, K). As complex numbers, the same product takes a CPU a tenth of the time."""
    text = (0, 0, rows.shape[1] - cos.shape[0], 0)  # rows of angle 0 in front
    cos = F.pad(cos, text, value=1.0).to(rows.dtype)[:, None]  # (L, 1, K/2)
    sin = F.pad(sin, text).to(rows.dtype)[:, None]
    pairs = rows.contiguous().unflatten(-1, (-1, 2))  # (B, L, H, K/2, 2)
    if not torch.compiler.is_compiling():  # which fuses real numbers, but not complex ones
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


# ---- kernels ---------------------------------------------------------------------------------------------


@triton.jit
def _tile(x, xS, b, t, h, end, H, K: tl.constexpr):
    """(TOKENS, HEADS, K) in fp32, zeros past the last token or head. xS: strides of batch, head, token."""
    b, h, t = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(t, tl.int64)
    inside = (t < end)[:, None, None] & (h < H)[None, :, None]
    start = x + b * xS[0] + t[:, None, None] * xS[2]
    at = start + h[None, :, None] * xS[1] + tl.arange(0, K)[None, None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(x, b, t, h, L, end, H, K: tl.constexpr, tile):
    """Into x (B, L, H, K)."""
    start = x + (tl.cast(b, tl.int64) * L + t)[:, None, None] * (H * K)
    inside = (t < end)[:, None, None] & (h < H)[None, :, None]
    tl.store(
        start + h[None, :, None] * K + tl.arange(0, K)[None, None, :],
        tile.to(x.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _turn(tile, cos, sin, t, L, R, sign, K: tl.constexpr):
    """Turns each pair forward (sign 1) or back (sign -1); the first L - R tokens stay."""
    row = t - (L - R)
    at = row[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
    turns = ((row >= 0) & (row < R))[:, None]
    c = tl.load(cos + at, mask=turns, other=1.0)[:, None, :]
    s = tl.load(sin + at, mask=turns, other=0.0)[:, None, :] * sign
    a, b = tl.split(tile.reshape(tile.shape[0], tile.shape[1], K // 2, 2))
    return tl.join(a * c - b * s, a * s + b * c).reshape(tile.shape)


@triton.jit
def _mean(tile, NORM: tl.constexpr, H, K: tl.constexpr):
    """Over what was normed: a head (layer) or a token (rms)."""
    if NORM == "layer":
        mean = tl.sum(tile, 2, keep_dims=True) / K
    else:
        mean = tl.sum(tl.sum(tile, 2, keep_dims=True), 1, keep_dims=True) / (H * K)
    return mean


@triton.jit
def _xhat(x, eps, NORM: tl.constexpr, H, K: tl.constexpr):
    """(normed x, 1 / std)"""
    if NORM == "layer":
        x -= _mean(x, NORM, H, K)
    rstd = tl.rsqrt(_mean(x * x, NORM, H, K) + eps)
    return x * rstd, rstd


@triton.jit
def _parameter(p, h, H, NORM: tl.constexpr, K: tl.constexpr):
    """A norm's weight or bias against a tile: (K,) shared by the heads (layer), or (H, K) (rms)."""
    k = tl.arange(0, K)[None, None, :]
    if NORM == "layer":
        row = tl.load(p + k)
    else:
        row = tl.load(p + h[None, :, None] * K + k, mask=(h < H)[None, :, None], other=0.0)
    return row.to(tl.float32)


@triton.jit
def _forward_kernel(x, xS, weight, bias, cos, sin, out, eps, sign, H, L, R, rows,
                    NORM: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    h, b = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.program_id(2)
    first = tl.program_id(0) * rows
    end = tl.minimum(first + rows, L)
    if weight is not None:
        w = _parameter(weight, h, H, NORM, K)
    if bias is not None:
        shift = _parameter(bias, h, H, NORM, K)

    for i in tl.range(first, end, TOKENS, num_stages=STAGES):
        t = i + tl.arange(0, TOKENS)
        tile = _tile(x, xS, b, t, h, end, H, K)
        if weight is not None:
            tile = _xhat(tile, eps, NORM, H, K)[0] * w
        if bias is not None:
            tile += shift
        if cos is not None:
            tile = _turn(tile, cos, sin, t, L, R, sign, K)
        _put(out, b, t, h, L, end, H, K, tile)


@triton.jit
def _backward_kernel(dout, doutS, x, xS, weight, cos, sin, dx, dweight, dbias, eps, H, L, R, rows,
                     NORM: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """dweight, dbias (programs, .., H, K) take what this program's tokens add."""
    h, b = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.program_id(2)
    first = tl.program_id(0) * rows
    end = tl.minimum(first + rows, L)
    w = _parameter(weight, h, H, NORM, K)
    weight_sum = tl.zeros([TOKENS, HEADS, K], tl.float32)
    bias_sum = tl.zeros([TOKENS, HEADS, K], tl.float32)

    for i in tl.range(first, end, TOKENS, num_stages=STAGES):
        t = i + tl.arange(0, TOKENS)
        g = _tile(dout, doutS, b, t, h, end, H, K)
        if cos is not None:
            g = _turn(g, cos, sin, t, L, R, -1.0, K)
        xhat, rstd = _xhat(_tile(x, xS, b, t, h, end, H, K), eps, NORM, H, K)
        if dweight is not None:
            weight_sum += g * xhat
        if dbias is not None:
            bias_sum += g
        g *= w
        grad = g - xhat * _mean(g * xhat, NORM, H, K)
        if NORM == "layer":
            grad -= _mean(g, NORM, H, K)
        _put(dx, b, t, h, L, end, H, K, grad * rstd)

    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    at = (program * H + h)[:, None] * K + tl.arange(0, K)[None, :]
    if dweight is not None:
        tl.store(dweight + at, tl.sum(weight_sum, 0), mask=(h < H)[:, None])
    if dbias is not None:
        tl.store(dbias + at, tl.sum(bias_sum, 0), mask=(h < H)[:, None])


# ---- from torch to the kernels and back ------------------------------------------------------------------


def _strided(x: Tensor) -> tuple:
    """x as a kernel takes it: (pointer, strides of batch, head and token)."""
    x = x if x.stride(3) == 1 else token_major(x).copy_(x)  # a stride-0 gradient, for one
    return x, x.stride()[:3]


@lru_cache(maxsize=256)
def _grid(shape: tuple, tile: Tile, norm: str, processors: int) -> tuple[tuple[int, int, int], int, dict]:
    """(grid, tokens of a program, the constants of the launch)"""
    B, H, L, K = shape
    heads = triton.next_power_of_2(H)
    heads = heads if norm == "rms" else min(heads, 16)  # rms sums over all heads
    tokens = max(1, tile.numbers // (heads * K))
    programs = tile.programs * processors / (B * triton.cdiv(H, heads))
    rows = math.ceil(L / programs / tokens) * tokens
    warps = min(max(tokens * heads * K // (32 * tile.per_thread), 1), 16)
    meta = {"NORM": norm, "K": K, "TOKENS": tokens, "HEADS": heads, "STAGES": tile.stages, "num_warps": warps}
    return (triton.cdiv(L, rows), triton.cdiv(H, heads), B), rows, meta | {"num_stages": 2}


def _planned(x: Tensor, norm: str, step: str) -> tuple[tuple[int, int, int], int, dict]:
    tile = TILES.get((dispatch.arch(x), step, norm), UNTIMED[step])
    return _grid(x.shape, tile, norm, dispatch.processors(x))


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    eps: float, norm: str, sign: float,
) -> Tensor:  # fmt: skip
    """norm: none, layer or rms; sign -1 turns backwards."""
    (_, H, L, _), out = x.shape, token_major(x)
    grid, rows, meta = _planned(x, norm, "forward")
    sizes = (eps, sign, H, L, 0 if cos is None else len(cos), rows)
    dispatch.launch(
        _forward_kernel, grid, *_strided(x), dense(weight), dense(bias), cos, sin, out, *sizes, **meta
    )
    return out


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, norm: str,
    learns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(d(x), fp32 (1, n) of d(weight) or, of a layer, (2, n) of it and d(bias); (0, n) unless they learn)"""
    grid, rows, meta = _planned(x, norm, "backward")
    (B, H, L, K), dx, layer = x.shape, token_major(x), norm == "layer"
    sums = x.new_empty((1 + layer, grid[0] * B, H, K) if learns else (0, len(weight)), dtype=torch.float32)
    wanted = (sums[0], sums[1] if layer else None) if learns else (None, None)
    tensors = *_strided(dout), *_strided(x), dense(weight), cos, sin, dx, *wanted
    sizes = (eps, H, L, 0 if cos is None else len(cos), rows)
    dispatch.launch(_backward_kernel, grid, *tensors, *sizes, **meta)
    return dx, sums.sum((1, 2) if layer else 1).flatten(1) if learns else sums


def _fake_backward(dout, x, weight, cos, sin, eps, norm, learns):
    n = 1 + (norm == "layer") if learns else 0
    return token_major(x), weight.new_empty((n, len(weight)), dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, _, cos, sin, ctx.eps, ctx.norm, ctx.sign = inputs
    ctx.save_for_backward(None if weight is None else x, weight, cos, sin)  # a rotation alone needs no x


def _grads(ctx, dout):
    x, weight, cos, sin = ctx.saved_tensors
    if weight is None:
        return _rope(dout, None, None, cos, sin, 0.0, "none", -ctx.sign), *(None,) * 7
    learns = any(ctx.needs_input_grad[1:3])
    dx, sums = _rope_backward(dout, x, weight, cos, sin, ctx.eps, ctx.norm, learns)
    return dx, *((*sums, None)[:2] if learns else (None, None)), *(None,) * 5


_rope = dispatch.operator("rope", _forward, lambda x, *rest: token_major(x), _save, _grads)
_rope_backward = dispatch.operator("rope_backward", _backward, _fake_backward)


# ---- the contract ----------------------------------------------------------------------------------------


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (0, 1), (2, 3).. of the last R tokens of x (B, H, L, K) by cos, sin (R, K // 2) fp32.

    The first L - R tokens (text) stay. Best for a (B, L, H, K) tensor seen transposed, as the output is.
    """
    _check("rope", x, {}, (), cos, sin)
    if not dispatch.use_triton(x):
        return rope_reference(x, cos, sin)
    return _rope(x, None, None, *_tables(x, cos, sin), 0.0, "none", 1.0)


def layernorm_rope(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    """CogVideoX's q and k: LayerNorm of each head with weight, bias (K,), then `rope`. x (B, H, L, K)."""
    _check("layernorm_rope", x, {"weight": weight, "bias": bias}, x.shape[3:], cos, sin)
    if not dispatch.use_triton(x):
        return layernorm_rope_reference(x, weight, bias, cos, sin, eps)
    return _rope(x, weight, bias, *_tables(x, cos, sin), eps, "layer", 1.0)


def rmsnorm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Wan's q and k: RMSNorm across all heads with weight (H * K,), then `rope`; without cos, the norm."""
    _check("rmsnorm_rope", x, {"weight": weight}, (math.prod(x.shape[1::2]),), cos, sin)
    if not dispatch.use_triton(x):
        return rmsnorm_rope_reference(x, weight, cos, sin, eps)
    return _rope(x, weight, None, *_tables(x, cos, sin), eps, "rms", 1.0)


def _tables(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    K = x.shape[3]
    require(K in WIDTHS, lambda: f"rope: Triton has tiles for K in {WIDTHS}, not {K}: {dispatch.TO_TORCH}")
    return tuple(None if t is None else t.float().contiguous() for t in (cos, sin))


def _check(
    name: str, x: Tensor, parameters: dict[str, Tensor], shape: tuple, cos: Tensor | None, sin: Tensor | None
):
    got = tuple(x.shape)
    ok = len(got) == 4 and got[3] % 2 == 0 and got[2] > 0
    require(ok, lambda: f"{name}: want x (B, H, L, K), K even, L of 1 or more, got {got}")
    dispatch.want(name, shape, x.device, parameters)
    require((cos is None) == (sin is None), lambda: f"{name}: give both cos and sin, or neither")
    if cos is not None:
        table = (*cos.shape[:1], got[3] // 2)
        dispatch.want(name, table, x.device, {"cos": cos, "sin": sin})
        require(table[0] <= got[2], lambda: f"{name}: cos and sin {table} turn more tokens than x {got} has")
        learns = cos.requires_grad or sin.requires_grad
        require(not learns, lambda: f"{name}: cos and sin get no gradient: detach them")
