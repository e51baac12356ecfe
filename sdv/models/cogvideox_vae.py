"""CogVideoX's causal 3-D VAE: 4 x 8 x 8 pixels to one latent, as a stream of short chunks of frames.

Inside, activations are time first and channels last, (T, B, H, W, C). Norms span the frames of a chunk, so
the cut into chunks is part of what the network computes. A norm only finds scale and shift; the convolution
after it applies them to a band of rows at a time (causal_conv.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdv.models.causal_conv import CausalConv, Stream, bands, conv2d
from sdv.models.video_vae import VideoVAE

ENCODE_FRAMES = 8  # frames that are encoded together, and share the statistics of their norms
DECODE_FRAMES = 2  # latent frames that are decoded together


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

    def __post_init__(self):
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"widths {self.widths} are not multiples of the {self.groups} groups of a norm")
        halvings = range(min(len(self.widths), 4))
        if self.temporal_ratio not in [2**n for n in halvings]:
            raise ValueError(
                f"temporal_ratio {self.temporal_ratio} is not one of {[2**n for n in halvings]}: "
                f"one halving at most after each of {len(self.widths) - 1} levels, and {ENCODE_FRAMES} frames"
            )

    @property
    def spatial_ratio(self) -> int:
        return 2 ** (len(self.widths) - 1)

    def halves_time(self, level: int) -> bool:
        return 2**level < self.temporal_ratio


class Pointwise(nn.Conv3d):
    """1x1x1 convolution of (..., C)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


# ----------------------------------------------------------------------------------------------- norms
class Affine(NamedTuple):
    """What a norm has found: scale and shift in float32, each (T, B, h, w, C), for h x w cells of a frame."""

    scale: Tensor
    shift: Tensor

    def activate(self, x: Tensor, frames: slice, low: int, high: int) -> Tensor:
        """silu(scale * x + shift) for some frames and the rows low..high of x (T, B, H, W, C)."""
        cells, columns = self.scale.shape[2:4]
        rows = torch.arange(low, high, device=x.device) // (x.shape[2] // cells)
        scale, shift = (each[frames, :, rows, :, None] for each in self)  # (T', B, R, w, 1, C)
        band = x[frames, :, low:high].unflatten(3, (columns, -1))  # (T', B, R, w, W / w, C)
        band = torch.addcmul(shift, band.to(scale.dtype), scale)
        return F.silu(band).flatten(3, 4).to(x.dtype)  # (T, B, R, W, C)


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
        squares = sum((x[:, :, top:bottom] - centre).square().sum((0, 2, 3)) for top, bottom in bands(x))
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


def stretched(frames: int, to: int) -> Tensor:
    """For each of `to` frames, which of `frames` it repeats. With an odd number the first stands alone."""
    if to > 1 and to % 2:
        return torch.cat(
            [torch.zeros(1, dtype=torch.long), 1 + torch.arange(to - 1) * (frames - 1) // (to - 1)]
        )
    return torch.arange(to) * frames // to


# --------------------------------------------------------------------------------------------- resizing
def each_frame(function: Callable[[Tensor], Tensor], x: Tensor, stream: Stream) -> Tensor:
    """Apply a function of images (B, H, W, C) to every frame of (T, B, H, W, C)."""
    if not stream.lean:
        return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    out = None
    for t, frame in enumerate(x):
        y = function(frame)
        out = y.new_empty(len(x), *y.shape) if out is None else out
        out[t] = y
    return out


class Downsample(nn.Conv2d):
    """Halve rows and columns with a strided convolution; average pairs of frames first if time is halved."""

    def __init__(self, channels: int, halve_time: bool):
        super().__init__(channels, channels, 3, stride=2)
        self.halve_time = halve_time

    def forward(self, x: Tensor, z: Tensor | None, stream: Stream) -> Tensor:
        if self.halve_time and len(x) > 1:
            single = len(x) % 2
            pairs = torch.lerp(x[single::2], x[single + 1 :: 2], 0.5)
            x = torch.cat([x[:single], pairs])  # (T', B, H, W, C)
        return each_frame(self.shrink, x, stream)  # (T', B, H / 2, W / 2, C)

    def shrink(self, images: Tensor) -> Tensor:
        images = F.pad(images, (0, 0, 0, 1, 0, 1))
        return conv2d(images, self.weight, self.bias, stride=2)


# A row of the enlarged image sees two rows of the small one: which of the three taps fall on each of them.
FOLD = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (even or odd row, small row, tap)


class Upsample(nn.Conv2d):
    """Double rows and columns (and frames) by nearest neighbour, then a 3x3 convolution, in one step.

    Each of four outputs of a pixel is a 2x2 convolution of the small image: 16 products instead of 36. Frames
    are doubled last, since equal frames have equal convolutions.
    """

    def __init__(self, channels: int, double_time: bool):
        super().__init__(channels, channels, 3)
        self.double_time = double_time

    def forward(self, x: Tensor, z: Tensor, stream: Stream) -> Tensor:
        frames = len(x)
        x = each_frame(self.enlarge, x, stream)  # (T, B, 2 H, 2 W, C)
        if self.double_time and frames > 1:
            x = x[stretched(frames, 2 * frames - frames % 2).to(x.device)]
        return x  # (T', B, 2 H, 2 W, C)

    def enlarge(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:3]
        fold = FOLD.to(self.weight)
        weights = torch.einsum("pir,qjs,ocrs->pqocij", fold, fold, self.weight)
        rows = []
        for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
            y = conv2d(images, weights[p, q], self.bias, padding=1)  # (B, H + 1, W + 1, C)
            rows.append(y[:, p : p + height, q : q + width])
        y = torch.stack(rows, dim=-2).unflatten(-2, (2, 2))  # (B, H, W, 2, 2, C)
        return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, 2 H, 2 W, C)


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

    def forward(self, x: Tensor, z: Tensor | None, stream: Stream) -> Tensor:
        h = self.conv1(x, stream, self.norm1(x, z))  # (T, B, H, W, O)
        return self.conv2(h, stream, self.norm2(h, z), residual=self.shortcut(x))


def make_norm(cfg: CogVideoXVAEConfig, channels: int, spatial: bool) -> Norm | SpatialNorm:
    return SpatialNorm(cfg.groups, channels, cfg.latent_channels) if spatial else Norm(cfg.groups, channels)


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next; called one by one, to free memory."""

    def __init__(self, blocks: list[Block], resize: nn.Module | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resize = resize

    def layers(self) -> list[nn.Module]:
        return [*self.blocks, self.resize] if self.resize is not None else list(self.blocks)


def make_blocks(cfg: CogVideoXVAEConfig, before: int, width: int, layers: int, spatial: bool) -> list[Block]:
    return [Block(cfg, width if i else before, width, spatial) for i in range(layers)]


class Encoder(nn.Module):
    """One chunk of frames (T, B, H, W, 3) -> (T', B, h, w, 2 C): means, then log-variances."""

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__()
        widths = cfg.widths
        self.conv_in = CausalConv(3, widths[0])
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            resize = Downsample(width, cfg.halves_time(i)) if i + 1 < len(widths) else None
            self.levels.append(Level(make_blocks(cfg, before, width, cfg.layers, spatial=False), resize))
        self.middle = Level(make_blocks(cfg, widths[-1], widths[-1], 2, spatial=False))
        self.norm_out = Norm(cfg.groups, widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * cfg.latent_channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)  # (T, B, H, W, C)
        for level in (*self.levels, self.middle):
            for layer in level.layers():
                x = layer(x, None, stream)  # (T', B, h, w, C)
        return self.conv_out(x, stream, self.norm_out(x))


class Decoder(nn.Module):
    """One chunk of latent frames (T', B, h, w, C) -> (T, B, H, W, 3)."""

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__()
        widths = cfg.widths[::-1]
        self.conv_in = CausalConv(cfg.latent_channels, widths[0])
        self.middle = Level(make_blocks(cfg, widths[0], widths[0], 2, spatial=True))
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            resize = Upsample(width, cfg.halves_time(i)) if i + 1 < len(widths) else None
            self.levels.append(Level(make_blocks(cfg, before, width, cfg.layers + 1, spatial=True), resize))
        self.norm_out = make_norm(cfg, widths[-1], spatial=True)
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(z, stream)  # (T', B, h, w, C)
        for level in (self.middle, *self.levels):
            for layer in level.layers():
                x = layer(x, z, stream)  # (T, B, H, W, C)
        return self.conv_out(x, stream, self.norm_out(x, z))  # (T, B, H, W, 3)


# ------------------------------------------------------------------------------------------------- the VAE
def chunks(frames: int, size: int) -> list[tuple[int, int]]:
    """Cut frames into runs of `size`; the first run takes the remainder as well."""
    starts = [0, *range(frames % size + size, frames, size)]
    return list(zip(starts, [*starts[1:], frames], strict=True))


class CogVideoXVAE(VideoVAE):
    """3-D causal VAE; the cut into chunks belongs to it, because norms span the frames of a chunk."""

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__(cfg, Encoder(cfg), Decoder(cfg))
        self.set_tiles(cfg.height // 2, cfg.width // 2)

    def scaled(self, latents: Tensor) -> Tensor:
        return latents * self.cfg.scaling

    def posterior(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.in_tiles(self.encode_tile, clip, of=self.spatial_ratio, to=1).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """For odd k the network makes temporal_ratio frames of the first latent; all but the last are cut."""
        return self.in_tiles(self.decode_tile, latents / self.cfg.scaling, of=1, to=self.spatial_ratio)

    def encode_tile(self, clip: Tensor) -> Tensor:
        (batch, _, frames, height, width), space = clip.shape, self.spatial_ratio
        frames = (frames - 1) // self.temporal_ratio + 1
        out = clip.new_empty(batch, 2 * self.latent_channels, frames, height // space, width // space)
        return self.in_chunks(self.encoder, clip, ENCODE_FRAMES, out)

    def decode_tile(self, z: Tensor) -> Tensor:
        (batch, _, latents, height, width), space = z.shape, self.spatial_ratio
        extra = 0 if latents % 2 else self.temporal_ratio - 1
        frames = (latents - 1) * self.temporal_ratio + 1 + extra
        out = z.new_empty(batch, 3, frames, height * space, width * space)
        return self.in_chunks(self.decoder, z, DECODE_FRAMES, out)[:, :, extra:]

    def in_chunks(self, network: nn.Module, x: Tensor, size: int, out: Tensor) -> Tensor:
        """Send x (B, C, T, H, W) through a network a few frames at a time, into out (B, C', T', H', W')."""
        done = 0
        for y in self.chunks_through(network, x, chunks(x.shape[2], size)):
            out[:, :, done : done + y.shape[2]] = y
            done += y.shape[2]
        return out
