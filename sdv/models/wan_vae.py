"""Wan 2.2's causal 3-D VAE: 4 x 16 x 16 pixels to one latent of 48 channels, a few frames at a time.

The first frame stands alone: before it are zeros, and its latent is of it only. After it every latent is four
frames. Norms look at one pixel, so where time is cut changes nothing. Every level has a shortcut around it
without weights: averages on the way down, copies on the way up.

Activations are time first and channels last, (T, B, H, W, C), and work in bands of rows as in cogvideox_vae.
"""

from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdv.models.causal_conv import CausalConv, Stream
from sdv.models.fast_conv import conv2d
from sdv.models.video_vae import Downsample, Pointwise, Upsample, VideoVAE, cut, in_tiles, latent_frames

# Mean and deviation of each channel over the latents of Wan's training videos.
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class WanVAEConfig:
    """Defaults are Wan 2.2. multipliers: widths of the levels, full size first; halve_time: after which."""

    encoder_width: int = 160
    decoder_width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    layers: int = 2
    halve_time: tuple[bool, ...] = (False, True, True)
    latent_channels: int = 48
    patch: int = 2
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def spatial_ratio(self) -> int:
        return self.patch * 2 ** len(self.halve_time)

    @property
    def temporal_ratio(self) -> int:
        return 2 ** sum(self.halve_time)


class Norm(nn.Module):
    """RMS norm of the channels of a pixel; gamma is stored as (C, 1, 1, 1), or (C, 1, 1) for images."""

    def __init__(self, channels: int, images: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * (2 if images else 3)))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gamma.flatten(), eps=1e-24)

    def activate(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """silu of those rows of x (T, B, H, W, C), normed."""
        return F.silu(self(x[:, :, rows]))


class ZeroStartConv(CausalConv):
    """A causal convolution with zeros before the first frame of a clip."""

    zero_start = True


# -------------------------------------------------------------------------------------------- steps in time
def taps(weight: Tensor, *frames: Tensor) -> Tensor:
    """Three frames (T, B, H, W, C) each, and a filter (O, C, 3, 1, 1) -> (T, B, H, W, O), without bias."""
    return sum(F.linear(x, w) for x, w in zip(frames, weight[..., 0, 0].unbind(2), strict=True))


class HalveTime(nn.Conv3d):
    """Two frames to one, from them and the frame before. The first frame of a clip passes as it is."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        before = stream.past.pop(self, None)  # (1, B, H, W, C)
        if not stream.last:
            stream.past[self] = x[-1:].clone()
        if before is None:
            return x
        x = torch.cat([before, x])
        return taps(self.weight, x[0:-2:2], x[1:-1:2], x[2::2]) + self.bias


class DoubleTime(nn.Conv3d):
    """One frame to two, from it and the two before. The first frame of a clip passes and is not looked at."""

    def __init__(self, channels: int):
        super().__init__(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        before = stream.past.pop(self, None)  # (2, B, H, W, C)
        window = x if before is None else torch.cat([before, x])
        if not stream.last:
            stream.past[self] = x.new_zeros(2, *x.shape[1:]) if before is None else window[-2:].clone()
        if before is None:
            return x
        y = taps(self.weight, window[:-2], window[1:-1], window[2:]) + self.bias
        return y.unflatten(-1, (2, -1)).movedim(-2, 1).flatten(0, 1)  # (2 T, B, H, W, C)


# --------------------------------------------------------------------------------------------- shortcuts
def average_down(x: Tensor, out_channels: int, time: int, space: int) -> Tensor:
    """Cells of time x space x space pixels, all channels, averaged in groups: (T, B, H, W, C) -> (.., O).

    A first frame that stands alone is averaged with a frame of zeros before it.
    """
    x = F.pad(x, (0, 0) * 4 + (-len(x) % time, 0))
    x = x.unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(0, (-1, time))
    x = x.permute(0, 2, 3, 5, 7, 1, 4, 6).flatten(4)  # (T', B, h, w, C * cell)
    return x.unflatten(-1, (out_channels, -1)).mean(-1)


def copy_up(x: Tensor, out_channels: int, time: int, space: int, first: bool) -> Tensor:
    """Channels laid out over cells of time x space x space pixels, repeated as needed: the way back.

    Of a first frame only the last of its copies in time stays.
    """
    x = x.repeat_interleave(out_channels * time * space**2 // x.shape[-1], dim=-1)
    x = x.unflatten(-1, (out_channels, time, space, space))
    x = x.permute(0, 5, 1, 2, 6, 3, 7, 4)
    x = x.flatten(5, 6).flatten(3, 4).flatten(0, 1)  # (T', B, H, W, O)
    return x[time - 1 :] if first else x


# --------------------------------------------------------------------------------------------- the network
class Block(nn.Module):
    """Two normed convolutions and a residual."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = ZeroStartConv(in_channels, out_channels)
        self.norm2 = Norm(out_channels)
        self.conv2 = ZeroStartConv(out_channels, out_channels)
        self.shortcut = Pointwise(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, stream: Stream, overwrite: bool) -> Tensor:
        """(T, B, H, W, C) -> (T, B, H, W, O). overwrite: x is not needed any more."""
        h = self.conv1(x, stream, self.norm1)
        residual = self.shortcut(x)
        return self.conv2(h, stream, self.norm2, residual, overwrite or residual is not x)


class FrameAttention(nn.Module):
    """One head of attention among the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, images=True)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        images = self.norm(x).flatten(0, 1)  # (T * B, H, W, C)
        qkv = conv2d(images, self.to_qkv.weight, self.to_qkv.bias)
        q, k, v = qkv.flatten(1, 2)[:, None].chunk(3, dim=-1)  # (T * B, 1, H W, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].view_as(images)
        return x + conv2d(y, self.proj.weight, self.proj.bias).unflatten(0, x.shape[:2])


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block1 = Block(channels, channels)
        self.attention = FrameAttention(channels)
        self.block2 = Block(channels, channels)

    def forward(self, x: Tensor, stream: Stream, overwrite: bool) -> Tensor:
        x = self.attention(self.block1(x, stream, overwrite))
        return self.block2(x, stream, overwrite=True)


class Level(nn.Module):
    """Blocks at one resolution, and the steps to the next in space and in time, unless it is the last."""

    def __init__(
        self,
        widths: tuple[int, int],
        layers: int,
        resize: type[nn.Module] | None,
        time: type[nn.Module] | None,
    ):
        super().__init__()
        first, self.width = widths
        self.blocks = nn.ModuleList(Block(self.width if i else first, self.width) for i in range(layers))
        self.resize = resize(self.width) if resize else None
        self.time = time(self.width) if time else None
        self.cell = 2 if time else 1, 2 if resize else 1  # of time and of space, that the step shrinks to one


class Encoder(nn.Module):
    """Frames (T, B, H, W, 3 patch^2) -> (T', B, h, w, 2 C): means, then log-variances."""

    def __init__(self, cfg: WanVAEConfig):
        super().__init__()
        widths = [cfg.encoder_width * m for m in (1, *cfg.multipliers)]
        self.conv_in = ZeroStartConv(3 * cfg.patch**2, widths[0])
        self.levels = nn.ModuleList()
        for pair, halve in zip_longest(pairwise(widths), cfg.halve_time):  # none after the last level
            resize = Downsample if halve is not None else None
            self.levels.append(Level(pair, cfg.layers, resize, HalveTime if halve else None))
        self.middle = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = ZeroStartConv(widths[-1], 2 * cfg.latent_channels)
        self.posterior = Pointwise(2 * cfg.latent_channels, 2 * cfg.latent_channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)  # (T, B, H, W, D)
        for level in self.levels:
            shortcut = average_down(x, level.width, *level.cell)
            for block in level.blocks:
                x = block(x, stream, overwrite=True)
            x = x if level.resize is None else level.resize(x, stream)
            x = x if level.time is None else level.time(x, stream)
            x = x + shortcut  # (T', B, H', W', D')
        x = self.middle(x, stream, overwrite=True)  # (T', B, h, w, D)
        return self.posterior(self.conv_out(x, stream, self.norm_out))  # (T', B, h, w, 2 C)


class Decoder(nn.Module):
    """Latents (T', B, h, w, C) -> frames (T, B, H, W, 3 patch^2)."""

    def __init__(self, cfg: WanVAEConfig):
        super().__init__()
        widths = [cfg.decoder_width * m for m in (cfg.multipliers[-1], *cfg.multipliers[::-1])]
        self.latent_in = Pointwise(cfg.latent_channels, cfg.latent_channels)
        self.conv_in = ZeroStartConv(cfg.latent_channels, widths[0])
        self.middle = Middle(widths[0])
        self.levels = nn.ModuleList()
        for pair, double in zip_longest(pairwise(widths), cfg.halve_time[::-1]):  # none after the last level
            resize = Upsample if double is not None else None
            self.levels.append(Level(pair, cfg.layers + 1, resize, DoubleTime if double else None))
        self.norm_out = Norm(widths[-1])
        self.conv_out = ZeroStartConv(widths[-1], 3 * cfg.patch**2)

    def forward(self, z: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(self.latent_in(z), stream)  # (T', B, h, w, D)
        x = self.middle(x, stream, overwrite=True)
        for level in self.levels:
            start = None if level.resize is None else x
            alone = level.time is not None and level.time not in stream.past  # the first frame of a clip
            for block in level.blocks:
                x = block(x, stream, overwrite=x is not start)
            if start is not None:
                x = x if level.time is None else level.time(x, stream)
                x = level.resize(x, stream) + copy_up(start, level.width, *level.cell, alone)
        return self.conv_out(x, stream, self.norm_out)  # (T, B, H, W, 3 patch^2)


# ------------------------------------------------------------------------------------------------- the VAE
class WanVAE(VideoVAE):
    """Its networks see patches of cfg.patch x cfg.patch pixels."""

    def __init__(self, cfg: WanVAEConfig):
        super().__init__(cfg, Encoder(cfg), Decoder(cfg))
        self.set_tiles(256, 256, 1 / 4, 1 / 4)

    def posterior(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, C, T', h, w), of the unscaled latents of a clip (B, 3, T, H, W)."""
        ratio, space, patch = self.cfg.temporal_ratio, self.cfg.spatial_ratio, self.cfg.patch
        frames = latent_frames(clip, ratio, space)
        cells = F.pixel_unshuffle(clip.transpose(1, 2).mT, patch).mT.transpose(1, 2)
        cuts, tiles = cut(clip.shape[2], 1, ratio), self.tiles if self.tiling else None
        both = in_tiles(self.encoder, cells, cuts, frames, tiles, of=space // patch, to=1)
        mean, logvar = both.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as the network makes them -> as the transformer sees them."""
        mean, std = self.statistics(latents.device)
        return ((latents - mean) / std).to(latents.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, k + 1, h, w) -> clip (B, 3, temporal_ratio * k + 1, H, W), cut to [-1, 1]."""
        ratio, space, patch = self.cfg.temporal_ratio, self.cfg.spatial_ratio, self.cfg.patch
        mean, std = self.statistics(latents.device)
        z, count = (latents * std + mean).to(latents.dtype), latents.shape[2]
        cuts, tiles = cut(count, 1, 1), self.tiles if self.tiling else None
        cells = in_tiles(self.decoder, z, cuts, ratio * (count - 1) + 1, tiles, of=1, to=space // patch)
        return F.pixel_shuffle(cells.transpose(1, 2).mT, patch).mT.transpose(1, 2).clamp(-1, 1)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents' channels, (C, 1, 1, 1), in float32."""
        mean, std = torch.tensor([self.cfg.mean, self.cfg.std], device=device)[..., None, None, None]
        return mean, std
