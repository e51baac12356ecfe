"""What both backbones share: what stays float32, time, feed-forward, patches, the walk through the blocks."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

import kernels  # noqa: F401  its operators have names below

# What torch sees of an attention: the kernel here, or one of its own.
ATTENTION_OPS = {
    torch.ops.sdv.attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


def stays_float32(module: nn.Module, path: str) -> bool:
    """Whether the parameter at this path is of those that the module's `in_float32` names."""
    return not set(getattr(module, "in_float32", ())).isdisjoint(path.split("."))


def is_finite(tensor: Tensor) -> bool:
    """Whether it has neither NaN nor infinity as float32, found in one pass."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.numel() == 0 or all(end.isfinite().item() for end in tensor.aminmax())


def sinusoid(t: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Diffusion time (...,) -> (..., dim): cosines, then sines, of frequencies 1 .. 1/10000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10_000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angles = t.to(dtype)[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid of t, then a two-layer MLP: (...,) -> (..., out_dim)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoid(t, self.dim).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear on the last dimension."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def patchify(conv: nn.Module, video: Tensor) -> Tensor:
    """Apply a strided 2-D convolution to every frame: (B, C, T, H, W) -> tokens (B, T * h * w, D)."""
    frames = video.transpose(1, 2)  # (B, T, C, H, W)
    tokens = conv(frames.flatten(0, 1)).flatten(2).transpose(1, 2)  # (B * T, h * w, D)
    return tokens.unflatten(0, frames.shape[:2]).flatten(1, 2)  # (B, T * h * w, D)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """Tokens (B, T * h * w, C * patch * patch) of a grid (T, h, w) -> (B, C, T, H, W)."""
    x = tokens.unflatten(-1, (-1, patch, patch)).unflatten(1, grid)  # (B, T, h, w, C, p, p)
    x = x.permute(0, 4, 1, 2, 5, 3, 6)  # (B, C, T, h, p, w, p)
    return x.reshape(*x.shape[:3], grid[1] * patch, grid[2] * patch)  # (B, C, T, H, W)


def visible_tokens(
    x: Tensor, rope: tuple[Tensor, Tensor], ref_tokens: int, keep: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Image-token dropout: tokens x (B, L, D), reference first, and their rotary rows, without those dropped.

    keep (n,): which of the reference's tokens remain, all if None. They are gathered, not masked: what is
    dropped costs nothing, and all others keep their positions.
    """
    if keep is None:
        return x, rope
    kept = torch.cat([keep.to(x.device), torch.arange(ref_tokens, x.shape[1], device=x.device)])
    return x[:, kept], (rope[0][kept], rope[1][kept])


def self_attention_stays(_context, op, *args, **_options) -> CheckpointPolicy:
    """What a recomputed block keeps: self-attention's output. Attention to a text is cheap to repeat."""
    stays = op in ATTENTION_OPS and args[0].shape == args[1].shape
    return CheckpointPolicy.MUST_SAVE if stays else CheckpointPolicy.PREFER_RECOMPUTE


def run_blocks(
    blocks: nn.ModuleList, recompute: float, keep_attention: bool, x: Tensor, *conditions
) -> Tensor:
    """x through block(x, *conditions) of each; that share of them recomputes its activations in backward.

    These are the first: when one of them runs again, the activations of the others are gone already.
    keep_attention: they keep what self-attention returned, and recompute the rest.
    """
    again = round(recompute * len(blocks)) if torch.is_grad_enabled() else 0
    kept = partial(create_selective_checkpoint_contexts, self_attention_stays)
    around = kept if keep_attention else noop_context_fn
    for i, block in enumerate(blocks):
        if i < again:
            x = checkpoint(block, x, *conditions, use_reentrant=False, context_fn=around)
        else:
            x = block(x, *conditions)
    return x
