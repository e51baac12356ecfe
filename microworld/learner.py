"""How the micro-world's networks learn: bf16 beside fp32, two optimisers, steps that can be resumed."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdv.models.layers import stays_float32

PARTS = 2  # of a step's batch, each with its own gradient
WARMUP = 100
AVERAGE = 0.995  # of the running mean of the weights, which is what is kept


class Learner:
    """A module in bf16, its weights in fp32, their running mean and two optimisers, saved as one file.

    bf16 is the faster half; sums of small updates need fp32. Filters and matrices learn by Muon, which after
    1,300 steps of AdamW took the VAE's error from 0.062 to 0.055 in the next hundred; the rest by AdamW.
    """

    def __init__(self, module: nn.Module, file: Path, rate: float, steps: int, save_every: int):
        self.module, self.rate, self.steps, self.save_every = module, rate, steps, save_every
        self.file, self.log = file, file.with_suffix(".jsonl")
        # Matrices as they multiply: a filter's taps are columns.
        self.master = [
            p.detach().float().flatten(min(1, p.ndim - 1)).requires_grad_() for p in module.parameters()
        ]
        self.mean = [p.detach().clone() for p in self.master]
        for path, parameter in module.named_parameters():
            dtype = torch.float32 if stays_float32(module, path) else torch.bfloat16
            parameter.data = parameter.data.to(dtype)
        tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
        matrices, others = [], []
        for parameter, master in zip(module.parameters(), self.master, strict=True):
            (matrices if master.ndim == 2 and id(parameter) not in tables else others).append(master)
        self.optimisers = [
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.step = 0
        if self.file.is_file():
            state = torch.load(self.file)
            self.step = state["step"]
            for mine, saved in zip(self.master + self.mean, state["master"] + state["mean"], strict=True):
                mine.data.copy_(saved)
            for mine, saved in zip(self.optimisers, state["optimisers"], strict=True):
                mine.load_state_dict(saved)
        self.show(self.master)

    @torch.no_grad()
    def show(self, weights: list[Tensor]) -> None:
        """Copy fp32 weights (the master's or the mean) into the module."""
        for parameter, weight in zip(self.module.parameters(), weights, strict=True):
            parameter.copy_(weight.view_as(parameter))

    def gradients(self, losses: dict[str, Tensor]) -> tuple[dict[str, float], tuple[Tensor, ...]]:
        grads = torch.autograd.grad(sum(losses.values()), list(self.module.parameters()))
        return {name: value.item() for name, value in losses.items()}, grads

    def learn(self, parts: list[tuple[Tensor, ...]]) -> None:
        """One step by the mean gradient. The rate rises, stays, and falls to zero over the last third."""
        for master, *grads in zip(self.master, *parts, strict=True):
            master.grad = sum(grad.float().reshape(master.shape) for grad in grads) / len(grads)
        nn.utils.clip_grad_norm_(self.master, 1.0)
        left = 3 * (self.steps - self.step) / self.steps
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.rate * min(1.0, (self.step + 1) / WARMUP, left)
            optimiser.step()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, self.master, 1 - min(AVERAGE, self.step / (self.step + 10)))
        self.show(self.master)

    def save(self) -> None:
        state = {"step": self.step, "master": self.master, "mean": self.mean}
        state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)


def run(
    learner: Learner, loss_at: Callable[[int, int], dict[str, Tensor]], check: Callable[[], dict]
) -> None:
    """Learn until the stage's last step; with each save, log the mean losses and what check says.

    A step is PARTS small batches, each in a thread of its own: a core then waits for the other once a step,
    not at the end of every operation.
    """
    recent, start = [], time.perf_counter()
    bar = tqdm(total=learner.steps, initial=learner.step, unit="step")
    pool = ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,))
    while learner.step < learner.steps:
        work = partial(lambda step, part: learner.gradients(loss_at(step, part)), learner.step)
        losses, gradients = zip(*pool.map(work, range(PARTS)), strict=True)
        learner.learn(gradients)
        recent += losses
        bar.update()
        if learner.step % learner.save_every == 0 or learner.step == learner.steps:
            learner.save()
            names = {name for row in recent for name in row}
            row = {name: np.mean([row[name] for row in recent if name in row]) for name in sorted(names)}
            row = {"step": learner.step, **row, "seconds": time.perf_counter() - start}
            learner.show(learner.mean)
            row |= check()
            learner.show(learner.master)
            with learner.log.open("a") as log:
                log.write(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")
            bar.write(json.dumps({key: round(value, 4) for key, value in row.items()}))
            recent, start = [], time.perf_counter()
