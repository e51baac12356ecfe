"""Rotary embedding of interleaved pairs, alone and fused with the two families' query-key norms."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import require, wide


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
    R = cos.shape[0]
    text, visual = rows.split((rows.shape[1] - R, R), dim=1)  # (B, L - R, H, K), (B, R, H, K)
    cos, sin = cos.to(rows.dtype)[:, None], sin.to(rows.dtype)[:, None]  # (R, 1, K/2)
    a, b = visual.unflatten(-1, (-1, 2)).unbind(-1)  # (B, R, H, K/2) each
    visual = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((text, visual), 1) if text.shape[1] else visual


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (0,1), (2,3).. of the last R tokens of x (B, H, L, K) by cos, sin (R, K // 2) fp32.

    The first L - R tokens (text) pass unchanged. Fast for a (B, L, H, K) tensor seen transposed; so is the output.
    """
    _check("rope", x, cos, sin)
    return rope_reference(x, cos, sin)


def layernorm_rope(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    """CogVideoX's q and k: LayerNorm per head with weight, bias (K,), then `rope`. x (B, H, L, K)."""
    _check("layernorm_rope", x, cos, sin)
    fits = weight.shape == bias.shape == x.shape[3:]
    require(
        fits,
        f"layernorm_rope: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}: want ({x.shape[3]},) each",
    )
    return layernorm_rope_reference(x, weight, bias, cos, sin, eps)


def rmsnorm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Wan's q and k: RMSNorm across all heads with weight (H * K,), then `rope`; cos=None leaves the norm alone."""
    _check("rmsnorm_rope", x, cos, sin)
    width = x.shape[1] * x.shape[3]
    require(
        weight.shape == (width,), f"rmsnorm_rope: weight {tuple(weight.shape)}: want ({width},) = (H * K,)"
    )
    return rmsnorm_rope_reference(x, weight, cos, sin, eps)


def _check(name: str, x: Tensor, cos: Tensor | None, sin: Tensor | None):
    require(
        x.ndim == 4 and x.shape[3] % 2 == 0, f"{name}: want x (B, H, L, K) with even K, got {tuple(x.shape)}"
    )
    require((cos is None) == (sin is None), f"{name}: give both cos and sin, or neither")
    if cos is not None:
        tables = f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        fits = cos.ndim == 2 and cos.shape == sin.shape and cos.shape[1] * 2 == x.shape[3]
        require(fits, f"{name}: {tables}: want (R, {x.shape[3] // 2}) each")
        require(
            cos.shape[0] <= x.shape[2], f"{name}: {tables} rotate more tokens than x {tuple(x.shape)} has"
        )
