"""Adaptive LayerNorm and the gated residual, per segment of tokens (text | ref | video) or per token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import require, wide

Segments = tuple[int, ...] | None


def adaln_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    segments: Segments = None,
) -> Tensor:
    """LN(x) * (1 + scale) + shift in fp32."""
    dtype = wide(x.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    modulation = (1 + scale.to(dtype), shift.to(dtype))
    return _by_segment(_modulate, segments, (normed,), modulation).to(x.dtype)


def _modulate(normed: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, normed, factor)


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
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    segments: Segments = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream after the gate, and its adaptive LayerNorm."""
    out = gated_residual_reference(x, y, gate, segments)
    return out, adaln_reference(out, scale, shift, weight, bias, eps, segments)


def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    segments: Segments = None,
) -> Tensor:
    """LN(x) * (1 + scale) + shift. x (B, L, D); scale, shift (B, S, D); weight, bias (D,) affine the LN.

    segments: S lengths that sum to L, one modulation each; None needs S = 1 (whole) or S = L (one per token).
    """
    _check("adaln", x, segments, {"scale": scale, "shift": shift}, {"weight": weight, "bias": bias})
    return adaln_reference(x, scale, shift, weight, bias, eps, segments)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, segments: Segments = None) -> Tensor:
    """x + gate * y. x, y (B, L, D); gate (B, S, D), segments as in `adaln`."""
    require(x.shape == y.shape, f"gated_residual: x {tuple(x.shape)} and y {tuple(y.shape)} differ")
    _check("gated_residual", x, segments, {"gate": gate}, {})
    return gated_residual_reference(x, y, gate, segments)


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    segments: Segments = None,
) -> tuple[Tensor, Tensor]:
    """h = x + gate * y, and adaln(h): the residual stream, and what feeds the next linear. One pass over memory."""
    require(x.shape == y.shape, f"gated_residual_adaln: x {tuple(x.shape)} and y {tuple(y.shape)} differ")
    modulation = {"gate": gate, "scale": scale, "shift": shift}
    _check("gated_residual_adaln", x, segments, modulation, {"weight": weight, "bias": bias})
    return gated_residual_adaln_reference(x, y, gate, scale, shift, weight, bias, eps, segments)


def _check(
    name: str, x: Tensor, segments: Segments, modulation: dict[str, Tensor], affine: dict[str, Tensor | None]
):
    require(x.ndim == 3, f"{name}: want x (B, L, D), got {tuple(x.shape)}")
    B, L, D = x.shape
    S = next(iter(modulation.values())).shape[1] if segments is None else len(segments)
    if segments is None:
        require(
            S in (1, L), f"{name}: {S} modulations for {L} tokens: say with segments which tokens each has"
        )
    else:
        ok = sum(segments) == L and min(segments) >= 0
        require(ok, f"{name}: segments {tuple(segments)} do not sum to the {L} tokens of x")
    for key, m in modulation.items():
        require(m.shape == (B, S, D), f"{name}: {key} {tuple(m.shape)}: want (B, S, D) = {(B, S, D)}")
    for key, p in affine.items():
        require(p is None or p.shape == (D,), f"{name}: {key} is not of shape ({D},)")
