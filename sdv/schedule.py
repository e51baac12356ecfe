"""Noise processes and their samplers.

A noise process has draw, add_noise, target and timesteps, and lists its samplers. A sampler is a loop
over denoise(x, t, i) -> pred: the caller's network, with its guidance, at time t of step i.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor

from sdv.seeds import normal

Denoise = Callable[[Tensor, float, int], Tensor]


@dataclass(frozen=True)
class VPrediction:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise for t = 0 .. train_steps - 1, and a network that predicts
    v = sqrt(abar_t) noise - sqrt(1 - abar_t) x (arXiv 2202.00512). Defaults are CogVideoX-5B.

    zero_snr: abar is exactly 0 at the last t (arXiv 2305.08891), and sampling starts where training ended.
    train_shift: above 1 it moves the timesteps of training towards noise, see FlowMatching.
    x is (B, C, T, H, W), t is (B,). Arithmetic is in fp32, results have the dtype of x.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = True
    snr_shift_scale: float = 1.0
    train_shift: float = 1.0
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
        """One timestep a sample, uniform unless shifted: (B,) int64."""
        t = torch.randint(self.train_steps, (batch,), generator=rng)
        t = (self.train_steps * _shifted((t + 0.5) / self.train_steps, self.train_shift)).long()
        return t.clamp(max=self.train_steps - 1)  # a large shift rounds up to the end

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
        _check_steps(steps, self.train_steps)
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


@dataclass(frozen=True)
class FlowMatching:
    """x_t = (1 - s) x + s noise with s = t / train_steps in [0, 1], and a network that predicts the flow,
    noise - x (arXiv 2210.02747). Defaults are Wan 2.2 TI2V-5B.

    A shift above 1 moves times towards noise, s -> shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23):
    `shift` those of sampling, `train_shift` those of training, which are uniform if it is 1.
    x is (B, C, T, H, W), t is (B,). Arithmetic is in fp32, results have the dtype of x.
    """

    train_steps: int = 1000
    shift: float = 5.0
    train_shift: float = 1.0
    default_sampler: str = "unipc"

    @property
    def samplers(self) -> dict[str, Callable]:
        return {"unipc": unipc, "euler": euler}

    def draw(self, batch: int, rng: Generator | None = None) -> Tensor:
        """One time a sample: (B,) fp32 in [0, train_steps)."""
        return self.train_steps * _shifted(torch.rand(batch, generator=rng), self.train_shift)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        s = t.to(x.device).float().reshape(-1, *[1] * (x.ndim - 1)) / self.train_steps
        return ((1 - s) * x + s * noise).to(x.dtype)

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The flow, the same at every t."""
        return noise - x

    def sigmas(self, steps: int) -> Tensor:
        """The shares of noise between which a sampler steps: (steps + 1,) float64, from 1 down to 0."""
        _check_steps(steps, self.train_steps)
        even = torch.from_numpy(np.linspace(1, 1 / self.train_steps, steps + 1)[:-1])
        return torch.cat([_shifted(even, self.shift), even.new_zeros(1)])

    def timesteps(self, steps: int) -> Tensor:
        """Where a sampler of so many steps calls the network: (steps,) float64."""
        return self.train_steps * self.sigmas(steps)[:-1]


Schedule = VPrediction | FlowMatching


def _shifted(s: Tensor, shift: float) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampling steps: ask for 1 to {most}")


def ddim(
    schedule: VPrediction, denoise: Denoise, x: Tensor, steps: int, rngs: Sequence[Generator] = ()
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12, sigma = 0): noise x (B, C, T, H, W) -> clean x, fp32. Draws nothing."""
    x = x.float()
    for i, t, now, then in schedule.walk(steps):
        x0 = schedule.to_x0(x, denoise(x, t, i), t)
        kept = ((1 - then) / (1 - now)).sqrt()
        x = kept * x + (then.sqrt() - kept * now.sqrt()) * x0
    return x


def dpm(
    schedule: VPrediction, denoise: Denoise, x: Tensor, steps: int, rngs: Sequence[Generator] = ()
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), the sampler of CogVideoX's vendor: noise x -> clean x in fp32.

    Each step adds fresh noise, a generator for each of B, draw for draw as in diffusers.
    """
    x, before = x.float(), None
    for i, t, now, then in schedule.walk(steps):
        x0 = schedule.to_x0(x, denoise(x, t, i), t)
        h = (then.logit() - now.logit()) / 2  # step in log(alpha / sigma)
        noise, estimate = normal(x.shape, rngs), x0
        if before is not None and then < 1:  # second order: extrapolate x0
            x0_before, signal_before = before
            h_before = (now.logit() - signal_before.logit()) / 2  # infinite where the SNR was zero
            estimate = x0 + h / (2 * h_before) * (x0 - x0_before)
            noise = normal(x.shape, rngs)  # diffusers drops the first draw
        decay = (-2 * h).exp()
        x = ((1 - then) / (1 - now) * decay).sqrt() * x + (1 - decay) * then.sqrt() * estimate
        x = x + ((1 - then) * (1 - decay)).sqrt() * noise.to(x.device)
        before = x0, now
    return x


def euler(
    schedule: FlowMatching, denoise: Denoise, x: Tensor, steps: int, rngs: Sequence[Generator] = ()
) -> Tensor:
    """Straight steps along the predicted flow: noise x (B, C, T, H, W) -> clean x in fp32. Draws nothing.

    They are UniPC's steps. FlowMatchEulerDiscreteScheduler of diffusers shifts the end of its grid a second
    time, so its last step is shorter and its films differ.
    """
    x, sigmas = x.float(), schedule.sigmas(steps).tolist()
    for i, (now, then) in enumerate(pairwise(sigmas)):
        x = x + (then - now) * denoise(x, schedule.train_steps * now, i)
    return x


def unipc(
    schedule: FlowMatching, denoise: Denoise, x: Tensor, steps: int, rngs: Sequence[Generator] = ()
) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1 (arXiv 2302.04867), Wan's sampler: noise x -> clean x, fp32. Draws nothing.

    A step from s to s' is the exact solution for an x0 that is constant, or bends as two estimates of it say.
    The network's answer at s' corrects the step that led there, at no further call. As in diffusers, it is
    called at whole timesteps, rounded down.
    """
    times = [int(t) for t in schedule.timesteps(steps).clamp(max=schedule.train_steps * (1 - 1e-6))]
    # lambda of pure noise is infinite; how close to it the first step begins, fp32 says: as in diffusers.
    sigmas = schedule.sigmas(steps).clamp(max=1 - 1e-6).float().double()
    lambdas = -sigmas.logit()  # log(alpha / sigma), as in dpm

    def step(x: Tensor, i: int, x0: Tensor, before: Tensor | None, after: Tensor | None = None) -> Tensor:
        """x from sigma i to i + 1. x0 is the estimate at i, before at i - 1, after, to correct, at i + 1."""
        h = lambdas[i + 1] - lambdas[i]
        grow = torch.expm1(-h)
        first = (grow / -h - 1) / grow  # means of the bend and its square
        estimate, end = x0, 0.5
        if before is not None and i + 1 < steps:  # second order
            r = (lambdas[i - 1] - lambdas[i]) / h
            start = 0.5
            if after is not None:
                second = 2 * ((grow / -h - 1) / -h - 0.5) / grow
                start = (first - second) / (1 - r)
                end = first - start
            estimate = estimate + start / r * (before - x0)
        if after is not None:
            estimate = estimate + end * (after - x0)
        return sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * grow * estimate

    x, begin, x0, before = x.float(), None, None, None
    for i, t in enumerate(times):
        estimate = x - sigmas[i] * denoise(x, t, i)
        if i:
            x = step(begin, i - 1, x0, before, estimate)
        begin, before, x0 = x, x0, estimate
        x = step(x, i, x0, before)
    return x


def guidance(scale: float, t: float, steps: int, dynamic: bool = False) -> float:
    """The weight w of the prompted prediction against the unprompted one: pred = bare + w (prompted - bare).

    A scale of 1 is no guidance, dynamic or not, as in diffusers.
    dynamic: CogVideoX's cosine guidance as released and as diffusers runs it. It has the timestep t where a
    count of steps belongs, so w jumps about in [1, 1 + scale] until t < steps; calling it with t = steps - i
    gives the smooth rise from 1 that the formula was made for.
    """
    if not dynamic or scale == 1:
        return scale
    return 1 + scale * (1 - math.cos(math.pi * ((steps - t) / steps) ** 5)) / 2
