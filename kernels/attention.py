"""Fused non-causal attention.   O = softmax(scale * Q K^T) V"""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import require


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The formula as torch runs it best."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v for q (B, H, L, K) and k, v (B, H, any, K); scale defaults to K ** -0.5.

    Returns (B, H, L, K) laid out as (B, L, H, K), so that `.transpose(1, 2).flatten(2)` is free.
    """
    _check(q, k, v, scale)
    return attention_reference(q, k, v, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None):
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    require(q.ndim == 4 and k.ndim == 4, f"attention: want (B, H, L, K), got {shapes}")
    require(k.shape == v.shape, f"attention: k and v differ: {shapes}")
    fits = q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and k.shape[2] > 0
    require(fits, f"attention: k, v do not fit q (same B, H, K and one key or more): {shapes}")
    require(q.dtype == k.dtype == v.dtype, f"attention: dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    require(scale is None or scale >= 0, f"attention: scale {scale} is negative: negate q instead")
