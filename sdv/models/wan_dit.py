"""The Wan 2.2 TI2V-5B transformer: self-attention over reference and video, cross-attention to the text.

Every token has its own time: the reference is clean, at t = 0, the video noisy, at t. All tokens of a kind
share theirs, so there are two sets of modulations, not one for each token. Where the reference sits in the
rotary grid is a setting. A rotation only sees differences of positions, so a video from frame 0 and one from
frame 1 are the same; what counts is the gap between reference and video.

    leading   ref 0 | 0 1 2 ..        one frame before the video: where Wan's own first frame stands
    shared    ref 0 and 0 1 2 ..      the place of the video's first frame
    far       ref 0 |  gap  | 0 1 ..  FAR frames before the video, farther than any frame is from the next
    beside    [video 0][ref]          the first frame's time, to the right of the video's last column
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from sdv.models.layers import FeedForward, run_blocks, sinusoid, unpatchify, visible_tokens
from sdv.models.positions import rope_table

FAR = 32  # latent frames; the longest clip has 31


@dataclass(frozen=True)
class WanConfig:
    """Defaults are Wan 2.2 TI2V-5B."""

    layers: int = 30
    heads: int = 24
    head_dim: int = 128
    hidden: int = 14336
    channels: int = 48
    patch: int = 2
    freq_dim: int = 256
    text_dim: int = 4096
    text_tokens: int = 512
    norm_eps: float = 1e-6
    ref_position: str = "far"  # of the reference; the lowest losses of the four: benchmarks/placement.md

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Channels of a head that carry the frame, the row and the column."""
        spatial = self.head_dim // 6 * 2
        return self.head_dim - 2 * spatial, spatial, spatial


class Attention(nn.Module):
    """Attention of x to itself, or to a text; q and k get an RMSNorm across all heads."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.heads, self.eps = cfg.heads, cfg.norm_eps
        self.q = nn.Linear(cfg.dim, cfg.dim)
        self.k = nn.Linear(cfg.dim, cfg.dim)
        self.v = nn.Linear(cfg.dim, cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.norm_q = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.norm_k = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)

    def forward(
        self, x: Tensor, source: Tensor, rope: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    ) -> Tensor:
        q, k, v = (
            project(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, L, K)
            for project, of in ((self.q, x), (self.k, source), (self.v, source))
        )
        q = kernels.rmsnorm_rope(q, self.norm_q.weight, *rope, self.eps)
        k = kernels.rmsnorm_rope(k, self.norm_k.weight, *rope, self.eps)
        x = kernels.attention(q, k, v)  # (B, N, L, K)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, L, D)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; time modulates the first and the last."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.eps = cfg.norm_eps
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)
        self.attn = Attention(cfg)
        self.norm_cross = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.cross = Attention(cfg)
        self.ff = FeedForward(cfg.dim, cfg.hidden)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, rope: tuple[Tensor, Tensor], segments: tuple[int, ...]
    ) -> Tensor:
        """x (B, L, D), text (B, L', D), time (B, S, 6, D): modulations for each of S segments of x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None] + time).unbind(2)
        zero, one = torch.zeros_like(gate1), torch.ones_like(gate1)  # (B, S, D)
        norm = self.norm_cross
        h = kernels.adaln(x, scale1, shift1, eps=self.eps, segments=segments)
        h = self.attn(h, h, rope)  # (B, L, D)
        x, h = kernels.gated_residual_adaln(
            x, h, gate1, zero, zero, norm.weight, norm.bias, norm.eps, segments
        )
        h = self.cross(h, text)  # (B, L, D)
        x, h = kernels.gated_residual_adaln(x, h, one, scale2, shift2, eps=self.eps, segments=segments)
        return kernels.gated_residual(x, self.ff(h), gate2, segments)  # (B, L, D)


class WanDiT(nn.Module):
    """Predicts the flow, noise - x, of a noisy latent video from a text and, if given, one clean frame."""

    visual_targets = ("attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.out", "ff.up", "ff.down")
    lora_targets = (*visual_targets, "cross.k", "cross.v")
    ref_positions = ("leading", "shared", "far", "beside")
    ref_position = WanConfig.ref_position  # if a checkpoint does not say another one
    # What stays in float32 when the rest is loaded as bf16: the path of the time, and all norms.
    in_float32 = ("time_in", "time_out", "modulation", "norm_q", "norm_k", "norm_cross")

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_in = nn.Conv3d(cfg.channels, cfg.dim, (1, cfg.patch, cfg.patch), (1, cfg.patch, cfg.patch))
        self.text_in = nn.Sequential(
            nn.Linear(cfg.text_dim, cfg.dim), nn.GELU("tanh"), nn.Linear(cfg.dim, cfg.dim)
        )
        self.time_in = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        self.time_out = nn.Linear(cfg.dim, 6 * cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)
        self.proj_out = nn.Linear(cfg.dim, cfg.channels * cfg.patch**2)
        self.recompute = 0.0  # share of the blocks that recompute their activations in backward
        self.keep_attention = False  # what self-attention returned stays in recomputed blocks
        self.ref_position = cfg.ref_position
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
        """Flow (B, C, T, H, W) of video (B, C, T, H, W) at time t (B,) under text (B, L, D).

        ref (B, C, 1, H, W): clean latent frame put before the video. keep (n,): indices of its tokens that
        remain, all if None; the others are absent, and nobody moves.
        """
        visual = video if ref is None else torch.cat([ref, video], dim=2)  # (B, C, T', H, W)
        grid = (video.shape[2], *(side // self.cfg.patch for side in video.shape[3:]))
        x = self.patch_in(visual).flatten(2).transpose(1, 2)  # (B, T' h w, D): ref | video
        rope = self.rope(*grid, ref is not None, video.device)  # (T' h w, K / 2)
        if ref is not None:
            x, rope = visible_tokens(x, rope, self.token_count(ref), keep)
        tokens = self.token_count(video)
        self.ref_tokens = slice(0, x.shape[1] - tokens)
        segments = (tokens,) if ref is None else (x.shape[1] - tokens, tokens)
        times = t[:, None] if ref is None else torch.stack([torch.zeros_like(t), t], dim=1)  # (B, S)
        time, modulation = self.embed_time(times)  # (B, S, D), (B, S, 6, D)
        conditions = self.text_in(text), modulation, rope, segments

        x = run_blocks(self.blocks, self.recompute, self.keep_attention, x.contiguous(), *conditions)
        return self.output(x[:, -tokens:], time[:, -1:], grid)  # (B, C, T, H, W): video only

    def embed_time(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B, S) -> their embedding (B, S, D) and modulations (B, S, 6, D), all in float32."""
        waves = sinusoid(times, self.cfg.freq_dim, torch.float64).float()
        time = self.time_in(waves)
        return time, self.time_out(nn.functional.silu(time)).unflatten(-1, (6, -1))

    def output(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Video tokens (B, T h w, D) -> (B, C, T, H, W)."""
        shift, scale = (self.modulation + time).chunk(2, dim=1)  # (B, 1, D)
        x = self.proj_out(kernels.adaln(x, scale, shift, eps=self.cfg.norm_eps))
        # Wan stores a patch as (p, p, C), unpatchify takes (C, p, p).
        x = x.unflatten(-1, (-1, self.cfg.channels)).transpose(-1, -2).flatten(-2)
        return unpatchify(x, grid, self.cfg.patch)

    def rope(
        self, frames: int, rows: int, columns: int, with_ref: bool, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos, sin (T' * h * w, K // 2): the reference where `ref_position` says, then the video."""
        count = torch.arange(max(frames, rows, columns), device=device)
        tables = [rope_table(count[:frames], count[:rows], count[:columns], self.cfg.rope_split)]
        if with_ref:
            frame = {"leading": -1, "shared": 0, "far": -FAR, "beside": 0}[self.ref_position]
            right = columns if self.ref_position == "beside" else 0
            place = count[:1] + frame, count[:rows], count[:columns] + right
            tables.insert(0, rope_table(*place, self.cfg.rope_split))
        cos, sin = zip(*tables, strict=True)
        return torch.cat(cos), torch.cat(sin)
