"""The CogVideoX-5B transformer: text, reference and video in one sequence, full attention among them all."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from sdv.models.layers import FeedForward, TimeEmbedding, patchify, run_blocks, unpatchify, visible_tokens
from sdv.models.positions import centred_grid, rope_table, spread


@dataclass(frozen=True)
class CogVideoXConfig:
    """Defaults are CogVideoX-5B. base_*: latent size and clip length it was trained at."""

    layers: int = 42
    heads: int = 48
    head_dim: int = 64
    channels: int = 16
    patch: int = 2
    time_dim: int = 512
    text_dim: int = 4096
    text_tokens: int = 226
    norm_eps: float = 1e-5
    base_height: int = 60
    base_width: int = 90
    base_frames: int = 49

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


class Attention(nn.Module):
    """Joint self-attention; q and k get a LayerNorm per head, then visual tokens turn by their position."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.heads = cfg.heads
        self.q = nn.Linear(cfg.dim, cfg.dim)
        self.k = nn.Linear(cfg.dim, cfg.dim)
        self.v = nn.Linear(cfg.dim, cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.norm_q = nn.LayerNorm(cfg.head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(cfg.head_dim, eps=1e-6)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, L, K)
            for project in (self.q, self.k, self.v)
        )
        q = kernels.layernorm_rope(q, self.norm_q.weight, self.norm_q.bias, *rope, self.norm_q.eps)
        k = kernels.layernorm_rope(k, self.norm_k.weight, self.norm_k.bias, *rope, self.norm_k.eps)
        x = kernels.attention(q, k, v)  # (B, N, L, K)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, L, D)


class Block(nn.Module):
    """Attention and feed-forward, modulated by t with one set of numbers for text and one for pictures."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.mod1 = nn.Linear(cfg.time_dim, 6 * cfg.dim)
        self.norm1 = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mod2 = nn.Linear(cfg.time_dim, 6 * cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.ff = FeedForward(cfg.dim, 4 * cfg.dim)

    @staticmethod
    def modulation(linear: nn.Module, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale, gate, each (B, 2, D): text, then pictures. Stored the other way round."""
        return linear(time).unflatten(-1, (2, 3, -1)).flip(1).unbind(2)

    def forward(
        self, x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor], segments: tuple[int, int]
    ) -> Tensor:
        shift1, scale1, gate1 = self.modulation(self.mod1, time)  # (B, 2, D)
        shift2, scale2, gate2 = self.modulation(self.mod2, time)  # (B, 2, D)
        norm1, norm2 = self.norm1, self.norm2
        h = kernels.adaln(x, scale1, shift1, norm1.weight, norm1.bias, norm1.eps, segments)
        h = self.attn(h, rope)  # (B, L, D)
        x, h = kernels.gated_residual_adaln(
            x, h, gate1, scale2, shift2, norm2.weight, norm2.bias, norm2.eps, segments
        )
        return kernels.gated_residual(x, self.ff(h), gate2, segments)  # (B, L, D)


class CogVideoXDiT(nn.Module):
    """Predicts the velocity of a noisy latent video from a text and, if given, one clean reference frame."""

    # Where the paper's LoRA goes: 8 places in a block, and both input projections.
    visual_targets = ("attn.q", "attn.k", "attn.v", "attn.out", "ff.up", "ff.down")  # a token at a time
    lora_targets = ("patch_in", "text_in", "mod1", "mod2", *visual_targets)
    ref_positions = ("leading",)  # one frame before the video
    ref_position = "leading"

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_in = nn.Conv2d(cfg.channels, cfg.dim, cfg.patch, stride=cfg.patch)
        self.text_in = nn.Linear(cfg.text_dim, cfg.dim)
        self.time_in = TimeEmbedding(cfg.dim, cfg.time_dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm_final = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.mod_out = nn.Linear(cfg.time_dim, 2 * cfg.dim)
        self.norm_out = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.proj_out = nn.Linear(cfg.dim, cfg.channels * cfg.patch**2)
        self.recompute = 0.0  # share of the blocks that recompute their activations in backward
        self.keep_attention = False  # what self-attention returned stays in recomputed blocks
        self.ref_tokens = slice(0, 0)  # where the reference lies in the sequence of the latest call

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def token_count(self, video: Tensor) -> int:
        """Tokens that a latent video or reference (B, C, T, H, W) becomes."""
        return video[0, 0].numel() // self.cfg.patch**2

    def forward(
        self, video: Tensor, t: Tensor, text: Tensor, ref: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, T, H, W) of video (B, C, T, H, W) at time t (B,) under text (B, L, D).

        ref (B, C, 1, H, W): clean latent frame put before the video. keep (n,): indices of its tokens that
        remain, all if None; with none the step is text-to-video with the video still at frames 1..T.
        """
        visual = video if ref is None else torch.cat([ref, video], dim=2)  # (B, C, T', H, W)
        rows, columns = (side // self.cfg.patch for side in video.shape[3:])  # h, w
        x = patchify(self.patch_in, visual)  # (B, T' h w, D)
        rope = self.rope(visual.shape[2], rows, columns, video.device)  # (T' h w, K / 2)
        if ref is not None:
            x, rope = visible_tokens(x, rope, self.token_count(ref), keep)
        segments = (text.shape[1], x.shape[1])  # lengths of text and pictures, each with its own modulation
        x = torch.cat([self.text_in(text), x], dim=1)  # (B, L, D): text | ref | video
        self.ref_tokens = slice(text.shape[1], x.shape[1] - self.token_count(video))
        time = nn.functional.silu(self.time_in(t))  # (B, time_dim)

        x = run_blocks(self.blocks, self.recompute, self.keep_attention, x, time, rope, segments)
        x = x[:, -self.token_count(video) :]  # (B, T h w, D): video only
        return self.output(x, time, (video.shape[2], rows, columns))  # (B, C, T, H, W)

    def output(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Video tokens (B, T h w, D) -> (B, C, T, H, W)."""
        shift, scale = self.mod_out(time)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        norm = self.norm_out
        x = kernels.adaln(self.norm_final(x), scale, shift, norm.weight, norm.bias, norm.eps)
        return unpatchify(self.proj_out(x), grid, self.cfg.patch)

    def rope(self, frames: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin (T * h * w, K // 2): a frame's index in time, its grid stretched over the trained one."""
        cfg = self.cfg
        base = cfg.base_height // cfg.patch, cfg.base_width // cfg.patch
        vertical, horizontal = centred_grid((rows, columns), base)
        spatial = cfg.head_dim // 8 * 3
        return rope_table(
            torch.arange(frames, device=device),
            spread(*vertical, rows, device),
            spread(*horizontal, columns, device),
            (cfg.head_dim // 4, spatial, spatial),
        )
