"""What is denoised, what is looked at, and the one loss that both tasks minimise (paper sec. 3.2-3.5)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdv.schedule import Schedule
from sdv.seeds import generator, normal

TASKS = ("identity", "motion")


class Pair(NamedTuple):
    """A batch of either task: what is denoised, and what is looked at. Only how it is built differs."""

    target: Tensor  # (B, C, T, H, W)  clean latents to noise and denoise
    ref: Tensor  # (B, C, 1, H, W)     clean latent of the picture to look at
    text: Tensor  # (B, L, D)          encoded prompts
    keep: Tensor | None = None  # (n,) reference tokens that stay visible; None: all, empty: text-to-video


class Draws(NamedTuple):
    """CPU generators, so that a seed draws the same on every machine.

    Each sample has its own: it gets the same noise whatever batch, process or number of processes it is in.
    """

    shared: torch.Generator  # what a whole step has in common: which reference tokens stay visible
    each: list[torch.Generator]  # B: all that is drawn for one sample: frame, shift, caption, time, noise


class Losses(NamedTuple):
    value: Tensor  # ()    what is minimised
    each: Tensor  # (B,)   per sample, detached
    t: Tensor  # (B,)      the time each sample was noised to


def denoising_loss(dit: nn.Module, schedule: Schedule, pair: Pair, draws: Draws) -> Losses:
    """Eq. 1 and 2: noise the target, let the model look at reference and text, compare its prediction.

    The reference gets no noise and no loss.
    """
    x = pair.target.float()
    t = torch.cat([schedule.draw(1, rng) for rng in draws.each])  # (B,), on the CPU, as schedules want it
    noise = normal(x.shape, draws.each).to(x.device)  # (B, C, T, H, W)
    noisy, target = schedule.add_noise(x, noise, t).to(dit.dtype), schedule.target(x, noise, t)
    t = t.to(x.device)
    pred = dit(noisy, t, pair.text.to(dit.dtype), pair.ref.to(dit.dtype), pair.keep)
    each = (pred.float() - target).square().mean(dim=(1, 2, 3, 4))
    return Losses(each.mean(), each.detach(), t)


def draws_of(shared: tuple[int, ...], each: Sequence[tuple[int, ...]]) -> Draws:
    """Generators made of the numbers that name them."""
    return Draws(generator(*shared), [generator(*key) for key in each])


def random_frame(clips: Tensor, draws: Draws) -> Tensor:
    """One frame of each clip, uniform over its length: (B, C, T, H, W) -> (B, C, 1, H, W)."""
    chosen = [int(torch.randint(clips.shape[2], (), generator=rng)) for rng in draws.each]
    return torch.stack([clip[:, i : i + 1] for clip, i in zip(clips, chosen, strict=True)])


def keep_text(prompts: list[str], p: float, draws: Draws) -> list[str]:
    """Caption dropout: each prompt is left empty with probability p, which trains text guidance's branch."""
    if p == 0:  # nothing is drawn, so that all other draws are what they were
        return prompts
    return [
        "" if torch.rand((), generator=rng) < p else prompt
        for prompt, rng in zip(prompts, draws.each, strict=True)
    ]


def shift(ref: Tensor, share: float, draws: Draws) -> Tensor:
    """Each of ref (B, C, 1, H, W) moved by up to a share of its sides; borders are repeated.

    By whole pixels, or by whole cells of a latent where the reference comes from a cache.
    """
    if share == 0:  # nothing is drawn, so that all other draws are what they were
        return ref
    moved = []
    for one, rng in zip(ref, draws.each, strict=True):
        places = []
        for side in one.shape[-2:]:
            most = int(share * side)
            by = int(torch.randint(-most, most + 1, (), generator=rng))
            places.append((torch.arange(side) + by).clamp(0, side - 1))
        moved.append(one[..., places[0][:, None], places[1]])
    return torch.stack(moved)


def keep_tokens(count: int, mode: str, p: float, rng: torch.Generator) -> Tensor | None:
    """Image-token dropout: which of the reference's tokens stay visible.

    "whole": with probability p none of them, else all. "tokens": each stays with probability 1 - p.
    """
    if mode == "tokens":
        return (torch.rand(count, generator=rng) >= p).nonzero()[:, 0]
    return torch.empty(0, dtype=torch.long) if torch.rand((), generator=rng) < p else None
