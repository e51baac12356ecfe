"""How the gradients of the two objectives interact; each number has a yardstick to compare it with.

A probe takes the gradients of 4 m fixed held-out micro-batches: m for each of two disjoint halves a, b of
each task. The cosine of two noisy gradients is near 0 for any two tasks, so three cosines are measured:

    cross       cos(identity, motion), the mean over all pairs of halves: the paper's number
    identity    cos(identity_a, identity_b)     within one task: what cross would be if both tasks were one,
    motion      cos(motion_a, motion_b)         measured through the same noise
    corrected   <identity, motion> / sqrt(<identity_a, identity_b> <motion_a, motion_b>)

The noise of disjoint halves cancels in their products. So the last is the cosine without noise (Spearman's
correction for attenuation). This estimate can leave [-1, 1]; it is undefined where a yardstick is not
positive. All of them are computed from one Gram matrix of the micro-batches for each part of the model.

Where the gradients act is measured per module, on the update of its weight W: a gradient step in A and B
moves W by gB A + B gA (up to a factor that changes no measure here; AdamW also rescales entries). Its left
directions are what the module writes, its right ones what it reads. At B = 0 every right direction lies in
the span of A, whose dimension is the rank, so two updates overlap far more than two random subspaces of k
of all n input dimensions, whose mean squared cosine is k / n.
The null is therefore a random update of the same structure: same A and B, Gaussian gA and gB of real size.

    python -m sdv.run.report RUN [RUN ...]    draws the probes of runs side by side, also while they train
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdv.lora import LoRA, lora_modules, lora_parameters
from sdv.objectives import TASKS
from sdv.seeds import generator

# Pairs of the four halves (identity a, identity b, motion a, motion b) that each cosine is the mean of.
COMPARED = {"cross": ((0, 2), (0, 3), (1, 2), (1, 3)), "identity": ((0, 1),), "motion": ((2, 3),)}
RANDOM = 4  # stands behind the four halves where subspaces are compared
NULL = {"null": tuple((half, RANDOM) for half in range(RANDOM))}
GROUPS = {
    "q": "attention q", "k": "attention k", "v": "attention v", "out": "attention out", "up": "feed-forward",
    "down": "feed-forward", "mod1": "modulation", "mod2": "modulation", "patch_in": "embeddings",
    "text_in": "embeddings",
}  # fmt: skip


# Gradients


@contextmanager
def untouched(dit: nn.Module) -> Iterator[None]:
    """Evaluation mode, LoRA dropout off; every module's mode and torch's generators are put back."""
    modes = {module: module.training for module in dit.modules()}
    dit.eval()
    device = next(dit.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for module, mode in modes.items():
        module.training = mode


def gradients(losses: Sequence[Callable[[], Tensor]], params: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The gradient of each loss, on the CPU; .grad stays as it is. Ranks share the work, rank 0 gets all.

    A micro-batch is never split, so the numbers do not depend on how many ranks there are. Other ranks return
    nothing: what all of them kept would not fit into one machine's memory.
    """
    running = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
    kept = []
    for first in range(0, len(losses), world):
        mine = min(first + rank, len(losses) - 1)  # in the last round spare ranks keep step, for nothing
        own = torch.autograd.grad(losses[mine](), params)
        for source in range(min(world, len(losses) - first)):
            one = [g.contiguous() if source == rank else g.new_empty(g.shape) for g in own]
            for g in one if world > 1 else ():
                dist.broadcast(g, source)
            if not nn.utils.get_total_norm(one).isfinite():
                raise FloatingPointError("the gradient of a held-out loss is not finite: the model diverged")
            if rank == 0:
                kept.append(tuple(g.cpu() for g in one))
    return kept


# Inner products -> cosines, norms, noise


def parts_of(path: str, leaf: str) -> list[tuple[str, str]]:
    """(kind, name) of every part of the model that this tensor counts in."""
    block, name = re.match(r"\w+\.\d+", path), path.rpartition(".")[2]
    layer, group = block[0] if block else path, GROUPS.get(name, name)
    group = f"cross-{group}" if ".cross." in path else group
    return [("whole", "all"), ("factor", leaf[-1]), ("group", group), ("layer", layer)]


def measures(gram: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Gram matrices (S, 4m, 4m) of micro-batches, weights (R, 4, 4m) that make halves of them -> each (S, R).

    S: parts of the model. R: ways to make the halves, 1 or one for each draw of the bootstrap.
    norm: of the noisy mean over a half. signal: squared norm without noise. noise: variance of one
    micro-batch over signal, so how many of them hold as much noise as signal.
    """
    products = weights @ gram[:, None] @ weights.mT  # (S, R, 4, 4) of halves
    power = torch.einsum("rhn,snn->srh", weights, gram)  # (S, R, 4) mean over micro-batches
    norms = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # (S, R, 4)
    cosines = products / (norms[..., :, None] * norms[..., None, :])  # (S, R, 4, 4)
    signal = {"identity": products[..., 0, 1], "motion": products[..., 2, 3]}
    out = {kind: cosines[..., *zip(*pairs, strict=True)].mean(-1) for kind, pairs in COMPARED.items()}
    between = products[..., :2, 2:].mean(dim=(-2, -1))
    out["corrected"] = between / (positive(signal["identity"]) * positive(signal["motion"])).sqrt()
    for first, task in zip((0, 2), TASKS, strict=True):
        out[f"norm_{task}"] = norms[..., first : first + 2].mean(-1)
        out[f"signal_{task}"] = signal[task]
        total = power[..., first : first + 2].mean(-1)
        out[f"noise_{task}"] = (total - signal[task]) / positive(signal[task])
    return out


def positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.nan)


def halves_of(picked: Tensor, m: int) -> Tensor:
    """Weights (R, 4, 4m) of halves that are the means of these micro-batches among their own m, (R, 4, n)."""
    share = nn.functional.one_hot(picked, m).double().mean(2)  # (R, 4, m)
    return (torch.eye(4, dtype=torch.float64)[..., None] * share[:, :, None]).flatten(2)


def with_intervals(grams: Tensor, draws: int = 500) -> list[dict[str, list[float | None]]]:
    """Gram matrices (S, 4m, 4m) -> for each {measure: [value, low, high]}, 90 % bootstrap intervals.

    Halves are drawn anew as m - 1 of their m micro-batches, with replacement: the mean of so many varies as
    the real one does, that of m by a factor (m - 1) / m less (Rao and Wu 1988). The drawn measures are moved
    to have the value as median: a half that holds a micro-batch twice is noisier, which pulls cosines down.
    """
    m = grams.shape[-1] // 4
    value = measures(grams, halves_of(torch.arange(m).expand(1, 4, m), m))
    low, high = ({name: torch.full_like(x, torch.nan) for name, x in value.items()} for _ in range(2))
    if m > 2:  # of fewer, too little is left to draw from
        picked = torch.randint(m, (draws, 4, m - 1), generator=generator(m, draws))
        ends = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        for name, x in measures(grams, halves_of(picked, m)).items():
            cut = x.nanquantile(ends, dim=1)  # (3, S)
            cut[:, x.isnan().double().mean(1) > 0.05] = torch.nan  # the interval has no end
            low[name], high[name] = (value[name] + (end - cut[1])[:, None] for end in (cut[0], cut[2]))
    return [
        {name: [tidy(x[s, 0]) for x in (value[name], low[name], high[name])] for name in value}
        for s in range(len(grams))
    ]


def tidy(x: Tensor | float) -> float | None:
    return None if x != x else float(f"{float(x):.5g}")


# Where they act


class Directions(NamedTuple):
    """Singular value decomposition of a weight's update, largest first."""

    left: Tensor  # (..., out, n)
    size: Tensor  # (..., n)
    right: Tensor  # (..., in, n)


def directions(grad_a: Tensor, grad_b: Tensor, a: Tensor, b: Tensor) -> Directions:
    """Of gB A + B gA, which is never formed: it is [gB, B] [A; gA], thin factors of 2 r columns and rows.

    grad_a (..., r, in), grad_b (..., out, r); a (r, in), b (out, r).
    """
    left, left_core = torch.linalg.qr(torch.cat([grad_b, b.expand_as(grad_b)], dim=-1))
    right, right_core = torch.linalg.qr(torch.cat([a.expand_as(grad_a), grad_a], dim=-2).mT)
    u, size, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    return Directions(left @ u, size, right @ vh.mT)


MEASURED = ("overlap", "nearest", "farthest", "second in first", "first in second")
SUBSPACE = tuple(f"{side} {what}" for side in ("left", "right") for what in MEASURED)


def compare(one: Directions, two: Directions, k: int) -> Tensor:
    """The columns SUBSPACE (..., 10) of two updates; nan where one of them has fewer than k directions.

    overlap: mean squared cosine of the k principal angles between the leading subspaces; nearest, farthest:
    the smallest and largest angle, degrees; second in first: share of an update's energy that lies inside the
    other's leading subspace.
    """
    first, second = (x.size.square() / x.size.square().sum(-1, keepdim=True) for x in (one, two))
    columns = []
    for x, y in ((one.left, two.left), (one.right, two.right)):
        between = x.mT @ y  # (..., n, n)
        cosines = torch.linalg.svdvals(between[..., :k, :k]).clamp(max=1)
        angles, share = cosines.acos().rad2deg(), between.square()
        columns += [cosines.square().mean(-1), angles[..., 0], angles[..., -1]]
        columns += [(share[..., :k, :].sum(-2) * second).sum(-1), (share[..., :k].sum(-1) * first).sum(-1)]
    enough = torch.stack([x.size[..., k - 1] > 1e-5 * x.size[..., 0] for x in (one, two)]).all(0)
    return torch.where(enough[..., None], torch.stack(columns, dim=-1), torch.nan)


def subspaces(grad_a: Tensor, grad_b: Tensor, module: LoRA, k: int, seed: int) -> dict[str, list]:
    """Gradients (4, r, in), (4, out, r) of the halves -> {what is compared: columns SUBSPACE}."""
    a, b = module.lora_A.detach().flatten(1), module.lora_B.detach().flatten(1)
    of = directions(with_random(grad_a, generator(seed, 0)), with_random(grad_b, generator(seed, 1)), a, b)
    out = {}
    for kind, pairs in (COMPARED | NULL).items():
        one, two = (Directions(*(x[list(index)] for x in of)) for index in zip(*pairs, strict=True))
        out[kind] = [tidy(x) for x in compare(one, two, k).mean(0)]
    return out


def with_random(grads: Tensor, rng: torch.Generator) -> Tensor:
    """(4, ...) -> (5, ...): Gaussian noise of their root mean square behind them."""
    noise = torch.randn(grads[:1].shape, generator=rng).to(grads)
    return torch.cat([grads, noise * grads.square().mean().sqrt()])


# The probe


def probe(dit: nn.Module, losses: Sequence[Callable[[], Tensor]], leading: int = 8) -> dict:
    """One row of probes.jsonl, of rank 0. losses: 4 m micro-batches, m of each of identity a, b, motion a, b.

    Holds 4 m gradients of the LoRA on the CPU and one on the device. Subspaces have `leading` directions, but
    no more than half of the rank.
    """
    start = time.perf_counter()
    params = lora_parameters(dit)
    with untouched(dit):
        kept = gradients(losses, list(params.values()))
    if not kept:
        return {}
    kept = dict(zip(params, zip(*kept, strict=True), strict=True))  # {name: its 4 m gradients}
    grams, where = defaultdict(lambda: torch.zeros(len(losses), len(losses), dtype=torch.float64)), {}
    for seed, (path, module) in enumerate(lora_modules(dit).items()):
        k, means = min(leading, max(1, module.rank // 2)), []
        for leaf in ("lora_A", "lora_B"):
            stack = torch.stack(kept.pop(f"{path}.{leaf}")).to(module.lora_A.device)
            gram = stack.flatten(1) @ stack.flatten(1).T  # (4m, 4m)
            for part in parts_of(path, leaf):
                grams[part] += gram.double().cpu()
            means.append(stack.unflatten(0, (4, -1)).mean(1).flatten(2))  # (4, r, in), (4, out, r)
        where[path] = subspaces(*means, module, k, seed)
    row = {"micro_batches": len(losses), "columns": SUBSPACE, "modules": where}
    for (kind, name), found in zip(grams, with_intervals(torch.stack(list(grams.values()))), strict=True):
        row.setdefault(kind, {})[name] = found
    return row | {"seconds": time.perf_counter() - start}
