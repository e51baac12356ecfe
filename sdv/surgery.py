"""Gradient surgery: a step in which the two tasks do not conflict (PCGrad, arXiv 2001.06782)."""

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sdv.objectives import TASKS


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    return sum((a * b).sum(dtype=torch.float64).item() for a, b in zip(x, y, strict=True))


def project(grads: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """PCGrad (arXiv 2001.06782): without the part along `other`, if the two conflict (negative product)."""
    share = min(0.0, dot(grads, other)) / (dot(other, other) or 1.0)
    return [g - share * o for g, o in zip(grads, other, strict=True)]


class Surgery:
    """Collects each task's gradient of a step, and puts back one in which the tasks do not conflict.

    exact: a step holds both tasks and takes (1 - p) g_identity + p g_motion, each projected off the other.
    buffer-n: a step holds one task, projected off the mean of the other's last n gradients; the coin draws
    the tasks by p, so nothing needs a weight. none: leaves .grad alone. `past` are the buffers, on the CPU;
    they belong to a save.
    """

    def __init__(self, params: Iterable[nn.Parameter], mode: str, p_video: float):
        self.params, self.mode = list(params), mode
        self.share = {"identity": 1 - p_video, "motion": p_video}
        kept = int(mode.removeprefix("buffer-")) if mode.startswith("buffer-") else 0
        self.past = {task: deque(maxlen=kept) for task in TASKS}
        self.fresh: dict[str, list[Tensor]] = {}

    def restore(self, past: dict[str, list[list[Tensor]]]) -> None:
        for task, kept in past.items():
            self.past[task].extend([g.cpu() for g in grads] for grads in kept)

    def take(self, task: str) -> None:
        """Move .grad, after each backward, to the task's sum."""
        if self.mode != "none":
            before = self.fresh.get(task) or [0.0] * len(self.params)
            self.fresh[task] = [b + p.grad for b, p in zip(before, self.params, strict=True)]
            for p in self.params:
                p.grad = None

    def sums(self) -> list[Tensor]:
        """What a step has collected, for an average over processes in place."""
        if self.mode == "none":
            return [p.grad for p in self.params]
        return [g for grads in self.fresh.values() for g in grads]

    def put(self) -> None:
        """Project, and write .grad."""
        if self.mode == "none":
            return
        fresh, self.fresh = self.fresh, {}
        if self.mode == "exact":
            identity, motion = (fresh[task] for task in TASKS)
            pairs = zip(project(identity, motion), project(motion, identity), strict=True)
            grads = [self.share["identity"] * i + self.share["motion"] * m for i, m in pairs]
        else:
            ((task, grads),) = fresh.items()
            other = self.past[TASKS[1 - TASKS.index(task)]]
            self.past[task].append([g.to("cpu", copy=True) for g in grads])  # clipping works in place
            if other:
                mean = [torch.stack(gs).mean(0) for gs in zip(*other, strict=True)]
                grads = project(grads, [m.to(g.device) for m, g in zip(mean, grads, strict=True)])
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
