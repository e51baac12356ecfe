"""What is denoised, what is looked at, and the one loss that both tasks minimise (paper sec. 3.2-3.5)."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Pair(NamedTuple):
    """One training example of either task; only how it is built differs between them."""

    target: Tensor  # (B, C, T, H, W)  clean latents to noise and denoise
    ref: Tensor  # (B, C, 1, H, W)     clean latent of the picture to look at
    text: Tensor  # (B, L, D)          encoded prompts
    keep: Tensor | None = None  # (n,) reference tokens that stay visible; None: all, empty: text-to-video


class Losses(NamedTuple):
    value: Tensor  # ()    what is minimised
    each: Tensor  # (B,)   per sample, detached
    t: Tensor  # (B,)      the time each sample was noised to


class Schedule(Protocol):
    """What the loss needs of a noise process; see sdv.schedule."""

    def draw(self, batch: int, rng: torch.Generator) -> Tensor: ...
    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...


def denoising_loss(dit: nn.Module, schedule: Schedule, pair: Pair, rng: torch.Generator) -> Losses:
    """Eq. 1 and 2: noise the target, let the model look at reference and text, compare its prediction.

    The reference gets no noise and no loss. rng is a CPU generator: a seed draws the same on every machine.
    """
    x = pair.target.float()
    t = schedule.draw(len(x), rng).to(x.device)                           # (B,)
    noise = torch.randn(x.shape, generator=rng).to(x.device)              # (B, C, T, H, W)
    noisy = schedule.add_noise(x, noise, t).to(dit.dtype)
    pred = dit(noisy, t, pair.text.to(dit.dtype), pair.ref.to(dit.dtype), pair.keep)
    each = (pred.float() - schedule.target(x, noise, t)).square().mean(dim=(1, 2, 3, 4))
    return Losses(each.mean(), each.detach(), t)


def random_frame(clip: Tensor, rng: torch.Generator) -> Tensor:
    """One frame of each clip, uniform over its length: (B, C, T, H, W) -> (B, C, 1, H, W)."""
    i = torch.randint(clip.shape[2], (len(clip),), generator=rng).to(clip.device)
    return clip[torch.arange(len(clip), device=clip.device), :, i][:, :, None]


def keep_tokens(count: int, mode: str, p: float, rng: torch.Generator) -> Tensor | None:
    """Image-token dropout: which of the reference's tokens stay visible.

    "whole": with probability p none of them, else all. "tokens": each stays with probability 1 - p.
    """
    u = torch.rand(count if mode == "tokens" else 1, generator=rng)
    if mode == "tokens":
        return (u >= p).nonzero()[:, 0]
    if mode == "whole":
        return torch.empty(0, dtype=torch.long) if u.item() < p else None
    raise ValueError(f"image-token dropout {mode!r}; expected 'whole' or 'tokens'")
