"""The fused operations of a video diffusion transformer, each a formula in torch beside its Triton kernel.

    attention              softmax(scale * q k^T) v
    rope                   rotate the pairs of the visual tokens
    layernorm_rope         CogVideoX's q, k: LayerNorm per head, then rope
    rmsnorm_rope           Wan's q, k: RMSNorm across heads, then rope
    adaln                  LN(x) * (1 + scale) + shift, per segment of tokens
    gated_residual         x + gate * y
    gated_residual_adaln   both of the last in one pass

Nothing here knows diffusion. dispatch.py decides whether Triton or torch runs.
"""

from .adaln import adaln, gated_residual, gated_residual_adaln
from .attention import attention
from .rope import layernorm_rope, rmsnorm_rope, rope

__all__ = [
    "adaln",
    "attention",
    "gated_residual",
    "gated_residual_adaln",
    "layernorm_rope",
    "rmsnorm_rope",
    "rope",
]
