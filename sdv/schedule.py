"""Noise processes and their samplers.

A noise process answers to add_noise, target, to_x0, timesteps and draw, and lists its samplers. A sampler is
a loop over denoise(x, t, i) -> pred: the caller's network, with its guidance, at time t of step i.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Generator, Tensor

Denoise = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class VPrediction:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise for t = 0 .. train_steps - 1, and a network that predicts
    v = sqrt(abar_t) noise - sqrt(1 - abar_t) x (arXiv 2202.00512). Defaults are CogVideoX-5B.

    zero_snr: abar is exactly 0 at the last t (arXiv 2305.08891), and sampling starts where training ended.
    x is (B, C, T, H, W), t is (B,). Arithmetic is in fp32, results have the dtype of x.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = True
    snr_shift_scale: float = 1.0
    default_sampler: str = "ddim"

    @property
    def samplers(self) -> dict[str, Callable]:
        return {"ddim": ddim, "dpm": dpm}

    @cached_property
    def abar(self) -> Tensor:
        """The share of signal in the variance of x_t, (train_steps,) float64, falling."""
        ends = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(*ends, self.train_steps, dtype=torch.float64) ** 2
        abar = (1 - betas).cumprod(dim=0)
        abar = abar / (self.snr_shift_scale + (1 - self.snr_shift_scale) * abar)
        if self.zero_snr:
            alpha = abar.sqrt()
            abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return abar

    def draw(self, batch: int, rng: Generator | None = None) -> Tensor:
        """One uniform timestep a sample: (B,) int64."""
        return torch.randint(self.train_steps, (batch,), generator=rng)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._scales(x, t)
        return (alpha * x + sigma * noise).to(x.dtype)

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v. The plain MSE on it is the MSE on the implied clean x, weighted by 1 / (1 - abar_t)."""
        alpha, sigma = self._scales(x, t)
        return (alpha * noise - sigma * x).to(x.dtype)

    def to_x0(self, x_t: Tensor, pred: Tensor, t: Tensor | int) -> Tensor:
        """The clean x that a predicted v implies."""
        alpha, sigma = self._scales(x_t, t)
        return (alpha * x_t - sigma * pred).to(x_t.dtype)

    def timesteps(self, steps: int) -> Tensor:
        """Where a sampler of so many steps calls the network: (steps,) int64, evenly down from the last t."""
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"{steps} sampling steps: ask for 1 to {self.train_steps}")
        ends = np.arange(self.train_steps, 0, -self.train_steps / steps)[:steps]  # rounding can add one
        return torch.from_numpy(ends.round().astype(np.int64) - 1)

    def walk(self, steps: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """A sampler's steps: i, t, abar at t and abar where the step ends, which is 1, no noise, below t = 0.

        As in diffusers, a step is train_steps // steps long: a remainder can leave a little noise in the end.
        """
        for i, t in enumerate(self.timesteps(steps).tolist()):
            end = t - self.train_steps // steps
            yield i, t, self.abar[t], self.abar[end] if end >= 0 else self.abar.new_ones(())

    def _scales(self, x: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) in fp32, one per sample of x."""
        abar = self.abar[torch.as_tensor(t).cpu()].reshape(-1, *[1] * (x.ndim - 1))
        return abar.sqrt().to(x.device, torch.float32), (1 - abar).sqrt().to(x.device, torch.float32)


def ddim(
    schedule: VPrediction, denoise: Denoise, x: Tensor, steps: int, rng: Generator | None = None
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12, sigma = 0): noise x (B, C, T, H, W) -> clean x in fp32, without rng."""
    x = x.float()
    for i, t, now, then in schedule.walk(steps):
        x0 = schedule.to_x0(x, denoise(x, t, i), t)
        kept = ((1 - then) / (1 - now)).sqrt()
        x = kept * x + (then.sqrt() - kept * now.sqrt()) * x0
    return x


def dpm(
    schedule: VPrediction, denoise: Denoise, x: Tensor, steps: int, rng: Generator | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), the sampler of CogVideoX's vendor: noise x -> clean x in fp32.

    Each step adds fresh noise, drawn from rng on the CPU, draw for draw as in diffusers.
    """
    x, before = x.float(), None
    for i, t, now, then in schedule.walk(steps):
        x0 = schedule.to_x0(x, denoise(x, t, i), t)
        h = (then.logit() - now.logit()) / 2                              # step in log(alpha / sigma)
        noise, estimate = torch.randn(x.shape, generator=rng), x0
        if before is not None and then < 1:                               # second order: extrapolate x0
            x0_before, signal_before = before
            h_before = (now.logit() - signal_before.logit()) / 2          # infinite where the SNR was zero
            estimate = x0 + h / (2 * h_before) * (x0 - x0_before)
            noise = torch.randn(x.shape, generator=rng)                   # diffusers drops the first draw
        decay = (-2 * h).exp()
        x = ((1 - then) / (1 - now) * decay).sqrt() * x + (1 - decay) * then.sqrt() * estimate
        x = x + ((1 - then) * (1 - decay)).sqrt() * noise.to(x.device)
        before = x0, now
    return x


def guidance(scale: float, t: int, steps: int, dynamic: bool = False) -> float:
    """The weight w of the prompted prediction against the unprompted one: pred = bare + w (prompted - bare).

    dynamic: CogVideoX's cosine guidance as released and as diffusers runs it. It has the timestep t where a
    count of steps belongs, so w jumps about in [1, 1 + scale] until t < steps; calling it with t = steps - i
    gives the smooth rise from 1 that the formula was made for.
    """
    if not dynamic:
        return scale
    return 1 + scale * (1 - math.cos(math.pi * ((steps - t) / steps) ** 5)) / 2
