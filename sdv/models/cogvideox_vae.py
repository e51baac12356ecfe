"""CogVideoX's causal 3-D VAE: 4 x 8 x 8 pixels to one latent, as a stream of short chunks of frames.

Inside, activations are time first and channels last, (T, B, H, W, C). Norms span the frames of a chunk, so
the cut into chunks is part of what the network computes. A norm only finds scale and shift; the convolution
after it applies them, to a band of rows at a time where it can (fast_conv.py).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdv.models.causal_conv import CausalConv, Stream
from sdv.models.fast_conv import bands
from sdv.models.video_vae import Downsample, Pointwise, Upsample, VideoVAE, cut, in_tiles, latent_frames

# Frames that are encoded together and share the statistics of their norms, and latent frames that are decoded
# together. What remains of a clip joins its first chunk.
ENCODE_FRAMES, DECODE_FRAMES = 8, 2


@dataclass(frozen=True)
class CogVideoXVAEConfig:
    """Defaults are CogVideoX-5B. widths: channels at each resolution, full size first."""

    widths: tuple[int, ...] = (128, 256, 256, 512)
    layers: int = 3
    groups: int = 32
    latent_channels: int = 16
    temporal_ratio: int = 4
    scaling: float = 0.7
    height: int = 480
    width: int = 720

    @property
    def spatial_ratio(self) -> int:
        return 2 ** (len(self.widths) - 1)

    def halves_time(self, level: int) -> bool:
        return 2**level < self.temporal_ratio


# ----------------------------------------------------------------------------------------------- norms
class Affine(NamedTuple):
    """What a norm has found: scale and shift in float32, each (T, B, h, w, C), for h x w cells of a frame."""

    scale: Tensor
    shift: Tensor

    def activate(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """silu(scale * x + shift), in float32, for those rows of x (T, B, H, W, C)."""
        cells, columns = self.scale.shape[2:4]
        cell = torch.arange(x.shape[2], device=x.device)[rows] // (x.shape[2] // cells)
        scale, shift = (each[:, :, cell, :, None] for each in self)  # (T, B, R, w, 1, C)
        band = x[:, :, rows].unflatten(3, (columns, -1))  # (T, B, R, w, W / w, C)
        return F.silu(torch.addcmul(shift, band, scale)).flatten(3, 4)  # (T, B, R, W, C)


class Moments(torch.autograd.Function):
    """Mean and variance (B, G), in float32, of groups of channels of x (T, B, H, W, C), read twice.

    The gradient is linear in x: one pass, where autograd would keep and read several copies of x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        def per_group(channels: Tensor) -> Tensor:
            return channels.unflatten(-1, (groups, -1)).mean(-1)  # (B, G)

        places, batch, width = x[:, 0, :, :, 0].numel(), *x.shape[1::3]
        mean = per_group(x.mean((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)))
        centre = mean.repeat_interleave(width // groups, 1).view(batch, 1, 1, width)
        squares = sum((x[:, :, top:bottom] - centre).square_().sum((0, 2, 3)) for top, bottom in bands(x))
        ctx.save_for_backward(x, mean)
        return mean, per_group(squares / places)

    @staticmethod
    def backward(ctx, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        count = x.numel() / mean.numel()
        slope = 2 * dvar / count
        offset = dmean / count - slope * mean
        size = x.shape[-1] // mean.shape[1]
        slope, offset = (g.repeat_interleave(size, 1)[:, None, None] for g in (slope, offset))
        return torch.addcmul(offset, x.to(mean.dtype), slope).to(x.dtype), None


class Norm(nn.GroupNorm):
    """Group norm over all the frames of a chunk, as an Affine that is still to be applied."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Affine:
        size = self.num_channels // self.num_groups
        mean, var = (m.repeat_interleave(size, 1)[:, None, None] for m in Moments.apply(x, self.num_groups))
        scale = self.weight * torch.rsqrt(var + self.eps)  # (B, 1, 1, C)
        shift = self.bias - mean * scale
        return Affine(*(each.expand(len(x), -1, -1, -1, -1) for each in (scale, shift)))


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift depend on the latent z at each place (MoVQ, arXiv 2209.09002).

    Both are computed at the size of z: a pointwise layer commutes with nearest-neighbour enlargement.
    """

    def __init__(self, groups: int, channels: int, latent_channels: int):
        super().__init__()
        self.norm = Norm(groups, channels)
        self.scale = Pointwise(latent_channels, channels)
        self.shift = Pointwise(latent_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Affine:
        norm = self.norm(x)
        scale = self.scale(z).to(norm.scale.dtype)  # (T', B, h, w, C)
        shift = norm.shift[0] * scale + self.shift(z)
        frames = stretched(len(z), len(x)).to(x.device)
        return Affine((norm.scale[0] * scale)[frames], shift[frames])  # (T, B, h, w, C)


def halved(x: Tensor) -> Tensor:
    """Half the frames (T, B, H, W, C): means of pairs. Of an odd number the first stands alone."""
    single = len(x) % 2
    pairs = torch.lerp(x[single::2], x[single + 1 :: 2], 0.5)
    return torch.cat([x[:single], pairs])


def stretched(frames: int, to: int) -> Tensor:
    """For each of `to` frames, which of `frames` it repeats. With an odd number the first stands alone."""
    if to > 1 and to % 2:
        return torch.cat(
            [torch.zeros(1, dtype=torch.long), 1 + torch.arange(to - 1) * (frames - 1) // (to - 1)]
        )
    return torch.arange(to) * frames // to


# --------------------------------------------------------------------------------------------- the network
class Block(nn.Module):
    """Residual block; its norms follow z where there is one."""

    def __init__(self, cfg: CogVideoXVAEConfig, in_channels: int, out_channels: int, spatial: bool):
        super().__init__()
        self.norm1 = make_norm(cfg, in_channels, spatial)
        self.conv1 = CausalConv(in_channels, out_channels)
        self.norm2 = make_norm(cfg, out_channels, spatial)
        self.conv2 = CausalConv(out_channels, out_channels)
        self.shortcut = Pointwise(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None, stream: Stream, overwrite: bool) -> Tensor:
        """(T, B, H, W, C) -> (T, B, H, W, O). overwrite: x is not needed any more."""
        h = self.conv1(x, stream, self.norm1(x, z))
        residual = self.shortcut(x)
        return self.conv2(h, stream, self.norm2(h, z), residual, overwrite or residual is not x)


def make_norm(cfg: CogVideoXVAEConfig, channels: int, spatial: bool) -> Norm | SpatialNorm:
    return SpatialNorm(cfg.groups, channels, cfg.latent_channels) if spatial else Norm(cfg.groups, channels)


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next: in space, and perhaps in time."""

    def __init__(self, blocks: list[Block], resize: nn.Module | None = None, retime: bool = False):
        super().__init__()
        self.blocks, self.resize, self.retime = nn.ModuleList(blocks), resize, retime


def make_blocks(cfg: CogVideoXVAEConfig, before: int, width: int, layers: int, spatial: bool) -> list[Block]:
    return [Block(cfg, width if i else before, width, spatial) for i in range(layers)]


class Encoder(nn.Module):
    """One chunk of frames (T, B, H, W, 3) -> (T', B, h, w, 2 C): means, then log-variances."""

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__()
        widths = cfg.widths
        self.conv_in = CausalConv(3, widths[0])
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            resize = Downsample(width) if i + 1 < len(widths) else None
            blocks = make_blocks(cfg, before, width, cfg.layers, spatial=False)
            self.levels.append(Level(blocks, resize, retime=cfg.halves_time(i)))
        self.middle = Level(make_blocks(cfg, widths[-1], widths[-1], 2, spatial=False))
        self.norm_out = Norm(cfg.groups, widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * cfg.latent_channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)  # (T, B, H, W, C)
        for level in (*self.levels, self.middle):
            for block in level.blocks:
                x = block(x, None, stream, overwrite=True)
            if level.retime:
                x = halved(x)  # (T', B, H, W, C)
            if level.resize is not None:
                x = level.resize(x, stream)  # (T', B, H / 2, W / 2, C)
        return self.conv_out(x, stream, self.norm_out(x))


class Decoder(nn.Module):
    """One chunk of latent frames (T', B, h, w, C) -> (T, B, H, W, 3)."""

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__()
        widths = cfg.widths[::-1]
        self.conv_in = CausalConv(cfg.latent_channels, widths[0])
        self.middle = Level(make_blocks(cfg, widths[0], widths[0], 2, spatial=True))
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            resize = Upsample(width) if i + 1 < len(widths) else None
            blocks = make_blocks(cfg, before, width, cfg.layers + 1, spatial=True)
            self.levels.append(Level(blocks, resize, retime=cfg.halves_time(i)))
        self.norm_out = make_norm(cfg, widths[-1], spatial=True)
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(z, stream)  # (T', B, h, w, C)
        for level in (self.middle, *self.levels):
            for block in level.blocks:
                x = block(x, z, stream, overwrite=True)
            if level.resize is not None:
                x = level.resize(x, stream)  # (T', B, 2 H, 2 W, C)
            if level.retime:  # last, since equal frames have equal convolutions
                x = x[stretched(len(x), 2 * len(x) - len(x) % 2).to(x.device)]  # (T, B, 2 H, 2 W, C)
        return self.conv_out(x, stream, self.norm_out(x, z))  # (T, B, H, W, 3)


# ------------------------------------------------------------------------------------------------- the VAE
class CogVideoXVAE(VideoVAE):
    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__(cfg, Encoder(cfg), Decoder(cfg))
        self.set_tiles(cfg.height // 2, cfg.width // 2, 1 / 6, 1 / 5)

    def posterior(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, C, T', h, w), of the unscaled latents of a clip (B, 3, T, H, W)."""
        space, count, few = self.cfg.spatial_ratio, clip.shape[2], ENCODE_FRAMES
        frames = latent_frames(clip, self.cfg.temporal_ratio, space)
        cuts, tiles = cut(count, count % few + few, few), self.tiles if self.tiling else None
        both = in_tiles(self.encoder, clip, cuts, frames, tiles, of=space, to=1)
        mean, logvar = both.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as the network makes them -> as the transformer sees them."""
        return latents * self.cfg.scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, k + 1, h, w) -> clip (B, 3, temporal_ratio * k + 1, H, W), about [-1, 1].

        For odd k the network makes temporal_ratio frames of the first latent; all but the last are cut.
        """
        count, ratio, few = latents.shape[2], self.cfg.temporal_ratio, DECODE_FRAMES
        extra = 0 if count % 2 else ratio - 1
        cuts, tiles = cut(count, count % few + few, few), self.tiles if self.tiling else None
        frames, z = extra + 1 + ratio * (count - 1), latents / self.cfg.scaling
        clip = in_tiles(self.decoder, z, cuts, frames, tiles, of=1, to=self.cfg.spatial_ratio)
        return clip[:, :, extra:]
