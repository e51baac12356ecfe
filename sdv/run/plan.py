"""What a training step will need, before anything is loaded: memory by cause, FLOPs, seconds, and what helps.

All of it is counted (cost.py) or a count of parameters, but for two things: seconds are FLOPs over measured
speeds, and what --shard gathers is taken from FSDP2's documentation.

Beside a step of two blocks of CogVideoX-5B on two threads of a CPU (benchmarks.dit, 2026-11-23). Seconds
predicted and measured: 6.8 and 6.5 in fp32 (4 % too many), 3.0 and 3.1 in bf16 (2 % too few), if two threads
are twice as fast as one. GB in fp32, before a LoRA's update was added in place: 0.70 and 1.11. The latter is
how much a process grew, and torch's allocator held 0.70 of it; the matrix library and the heap have the rest.

Beside full-size micro-batches of CogVideoX-5B on an H100 (benchmarks/nvidia-h100-80gb-hbm3/fullsize.md) the
memory was 1 % less than measured, 27.6 and 29.5 GB, before a LoRA's update was added in place; since then it
is 2 % less, and was not measured. Seconds agree by the table of that GPU: the shares below
were chosen so; --keep-attention, which had no part in it, comes out within 0.2 %. What is predicted on a GPU
itself, from its own `ceilings`, was not compared with steps since these no longer wait after each call.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from kernels import attention
from sdv.lora import lora_parameters
from sdv.run.base_storage import nbytes
from sdv.run.cost import EncoderCost, Layout, Settings, Task, build, count, encoding

# A step's share of the speed of a large matrix product, on one thread of a CPU (AMD EPYC, AVX-512): one block
# of CogVideoX-5B with its LoRA, 466 tokens. 0.76 to 0.87 of 87 GFLOP/s in fp32, 0.83 to 0.85 of 197 in bf16.
ON_CPU = 0.83
# On a GPU attention has a speed of its own, of which a step reaches ATTENTION_SHARE; what norms, additions
# and modulations take is put down to the matrices. Both shares follow from two training steps, 3.44 s of a
# clip and 1.945 s of eight pairs. A step of sampling with a merged LoRA, which --plan does not predict, would
# come out 14 % too slow. A LoRA apart took about three times as long as its FLOPs say, before its update was
# added in place: that is in the shares.
MATRIX_SHARE, ATTENTION_SHARE = 0.678, 0.93
H100_SOURCE = "an NVIDIA H100 80GB HBM3, measured on 2026-11-26 at commit 778f133; there is no GPU here"
TORCHRUN = 8  # processes that --shard is shown for where there is one
STAGES = ("encoding", "forward", "recompute", "backward")


class Speed(NamedTuple):
    """FLOP/s of matrices and of attention, forward and backward, whose 7 products all count (cost.py)."""

    matrices: float
    forward: float
    backward: float
    source: str

    def seconds(self, flops: Counter) -> float:
        forward = flops["forward", "attention"] + flops["recompute", "attention"]
        backward = flops["backward", "attention"]
        rest = flops.total() - forward - backward
        return rest / self.matrices + forward / self.forward + backward / self.backward


# By the width of a head, in bf16: an 8192 cubed product, and attention at CogVideoX's and at Wan's size, all
# from one run of kernels.bench. No step of Wan was timed with these kernels.
H100 = {
    64: Speed(695e12, 550.7e12, 7 / 5 * 350.4e12, H100_SOURCE),
    128: Speed(695e12, 710.7e12, 7 / 5 * 411.1e12, H100_SOURCE),
}


class Prediction(NamedTuple):
    """Of one task: bytes that are there together, by cause; most of all at once; FLOPs of a micro-batch."""

    memory: dict[str, float]
    peak: float
    flops: Counter


def predict(
    cfg: Settings, layout: Layout, task: Task, world: int, encoders: EncoderCost | None = None
) -> Prediction:
    """One of `world` processes, without encoders if they have left the memory.

    Not in it: the process itself, a GPU's context, samples, probes, and the gradients that --pcgrad keeps.
    """
    dit = build(cfg, layout)
    step = count(cfg, layout, task, len(dit.blocks))
    lora = sum(p.nbytes for p in lora_parameters(dit).values())
    share = world if cfg.shard else 1
    held = {"frozen transformer": (nbytes(dit) - lora) / share}
    held["LoRA, gradients, AdamW"] = 4 * lora / share  # which has two moments
    if cfg.shard:  # whole at a time: what is in no block, the block at work, and the next
        blocks = nbytes(dit.blocks)
        held["gathered from others"] = nbytes(dit) - blocks + 2 * blocks / len(dit.blocks)
    if encoders:
        held["VAE and text encoder"] = encoders.held
        step.flops["encoding", ""] = encoders.flops * getattr(cfg, f"{task}_batch")
    work = {"kept for backward": step.kept, "work on one block": step.peak - step.kept}
    # Before forward they encode; after backward AdamW takes, on a GPU, all square roots at once.
    other = {"or, encoding": encoders.work if encoders else 0}
    other["or, AdamW's step"] = lora / share if cfg.device.startswith("cuda") else 0
    peak = sum(held.values()) + max(sum(work.values()), *other.values())
    return Prediction(held | work | other, peak, step.flops)


def levers(cfg: Settings, world: int) -> list[tuple[str, Settings, int]]:
    """(what to change, settings then, processes then), first of all nothing."""
    changes = [{"recompute": share} for share in (1.0, 0.5, 0.0) if share != cfg.recompute]
    changes += [{"keep_attention": True}] * (cfg.recompute > 0 and not cfg.keep_attention)
    batch = {"identity_batch": cfg.identity_batch, "motion_batch": cfg.motion_batch}
    if halves := {field: n // 2 for field, n in batch.items() if n % 2 == 0}:
        changes.append(halves | {"accumulate": 2 * cfg.accumulate})
    changes += [{"cache": "FOLDER"}] * (not cfg.cache) + [{"rank": cfg.rank // 2}] * (cfg.rank > 1)
    changes += [{"shard": True}] * (not cfg.shard and cfg.base_storage == "device")
    changes += [
        {"base_storage": way} for way in ("fp8", "cpu") if cfg.base_storage == "device" and not cfg.shard
    ]
    found = [("as asked", cfg, world)]
    for change in changes:
        words = (
            (field.replace("_", "-"), "" if value is True else f" {value}") for field, value in change.items()
        )
        name = " ".join(f"--{field}{value}" for field, value in words)
        processes = TORCHRUN if "shard" in change and world == 1 else world
        if "shard" in change:
            name = f"--shard, {processes} processes"
        if "accumulate" in change and len(halves) == 1:  # a single clip cannot be halved
            name += ", twice the pairs" if "motion_batch" in halves else ", twice the clips"
        found.append((name, dataclasses.replace(cfg, **change), processes))
    return found


def rate(work: Callable[[], object], flops: float, device: str) -> float:
    """FLOP/s of work that has so many, over half a second; as in a step, no call waits for the one before."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds(1)
    calls = max(1, round(0.5 / seconds(1)))
    return flops * calls / seconds(calls)


def product(rows: int, width: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of (rows, D) and (D, D)."""
    x, w = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, width))
    return rate(lambda: x @ w, 2 * rows * width**2, device)


def ceilings(device: str, dtype: torch.dtype, heads: int, width: int) -> Speed:
    """Of a GPU: an 8192 cubed product, attention of 8192 tokens there and back."""
    q = torch.randn(1, 8192, heads, width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
    out, one = attention(q, q, q), 2 * q.numel() * q.shape[2]  # FLOPs of one product
    back = partial(torch.autograd.grad, out, q, torch.randn_like(out), retain_graph=True)
    forward, backward = rate(lambda: attention(q, q, q), 2 * one, device), rate(back, 7 * one, device)
    name = f"{torch.cuda.get_device_name(device)} as it is now"
    return Speed(product(8192, 8192, device, dtype), forward, backward, name)


def speed(cfg: Settings, layout: Layout) -> Speed | None:
    """What a step reaches on --device; of a GPU that is not here, an H100's. None for what nobody timed."""
    shape, dtype = build(cfg, layout, 1).cfg, getattr(torch, cfg.dtype)
    if not cfg.device.startswith("cuda"):
        found = product(4096, shape.dim, cfg.device, dtype)
        source = f"{ON_CPU} of the {found:.3g} FLOP/s of a matrix product on this CPU as it is now"
        return Speed(*[ON_CPU * found] * 3, source)
    if torch.cuda.is_available():
        top = ceilings(cfg.device, dtype, shape.heads, shape.head_dim)
    elif cfg.dtype == "bfloat16" and shape.head_dim in H100:
        top = H100[shape.head_dim]
    else:
        return None
    source = f"{MATRIX_SHARE} of {top.matrices / 1e12:.0f} TFLOP/s in matrices, {ATTENTION_SHARE} of "
    source += f"{top.forward / 1e12:.0f} and {top.backward / 1e12:.0f} in attention, on {top.source}"
    return Speed(MATRIX_SHARE * top.matrices, *(ATTENTION_SHARE * n for n in top[1:3]), source)


def lora_flops(cfg: Settings, layout: Layout, task: Task, flops: Counter) -> float:
    """What a LoRA of twice the rank adds: its FLOPs are proportional to the rank, the others free of it."""
    layers = len(build(cfg, layout).blocks)
    twice = count(dataclasses.replace(cfg, rank=2 * cfg.rank), layout, task, layers).flops.total()
    return twice - flops.total() + flops["encoding", ""]


def row(name: str, values: list[float], unit: str = "") -> str:
    return f"  {name:<52}" + "".join(f"{value:12,.4g}" for value in values) + f"  {unit}".rstrip()


def table(cfg: Settings, layout: Layout, now: dict[Task, Prediction]) -> list[str]:
    """Memory in GB and FLOPs of a micro-batch by cause, a column for each task."""
    memory, flops = ([one[i] for one in now.values()] for i in (0, 2))
    lines = [row(cause, [each[cause] / 1e9 for each in memory], "GB") for cause in memory[0]]
    lines += [row("peak", [one.peak / 1e9 for one in now.values()], "GB"), ""]
    for key in sorted({key for each in flops for key in each}, key=lambda key: (STAGES.index(key[0]), key)):
        lines.append(row(", ".join(filter(None, key)), [each[key] / 1e12 for each in flops], "TFLOP"))
    lora = [lora_flops(cfg, layout, task, one.flops) for task, one in now.items()]
    lines.append(row("all of it", [each.total() / 1e12 for each in flops], "TFLOP"))
    return [*lines, row("in it, LoRA", [n / 1e12 for n in lora], "TFLOP")]


def timing(cfg: Settings, now: dict[Task, Prediction], reached: Speed | None) -> list[str]:
    """Seconds of a micro-batch and of a step, and hours of the run."""
    if reached is None:
        known = "of an H100 only bf16 was timed, with heads of 64 or 128: --device cuda --dtype bfloat16"
        return [f"time: not known; {known}"]
    each = [reached.seconds(one.flops) for one in now.values()]
    hours = cfg.steps * step_seconds(cfg, now, reached) / 3600
    return [
        row("a micro-batch", each, "s"),
        row(f"a step, {cfg.accumulate} micro-batches", [cfg.accumulate * n for n in each], "s"),
        f"  {cfg.steps} steps: {hours:,.1f} hours, without waiting for data or for other processes"
        + ", or for matrices that are copied or cast" * (cfg.base_storage != "device"),
        f"  at {reached.source}",
        *["  for a GPU's numbers: --device cuda --dtype bfloat16"] * (not cfg.device.startswith("cuda")),
    ]


def step_seconds(cfg: Settings, found: dict[Task, Prediction], reached: Speed) -> float:
    """Of a step of one process, the mean over the tasks as they are drawn."""
    odds = {"identity": 1 - cfg.p_video, "motion": cfg.p_video}
    if cfg.pcgrad == "exact":  # both in every step
        odds = dict.fromkeys(odds, 1)
    return cfg.accumulate * sum(odds[task] * reached.seconds(one.flops) for task, one in found.items())


def report(cfg: Settings, layout: Layout, world: int) -> str:
    """The plan, for people."""
    tasks = [task for task, p in (("identity", 1 - cfg.p_video), ("motion", cfg.p_video)) if p > 0]
    encoders = {task: None if cfg.cache else encoding(cfg, layout, task) for task in tasks}
    found, reached = {}, speed(cfg, layout)
    pace = reached or Speed(1, 1, 1, "FLOPs alone")
    for name, then, n in levers(cfg, world):
        needs = {t: predict(then, layout, t, n, None if then.cache else encoders[t]) for t in tasks}
        waits = then.shard or then.base_storage != "device"  # for what the plan does not time
        found[name] = needs, waits and name != "as asked", step_seconds(then, needs, pace)
    now, _, seconds = found["as asked"]
    here = cfg.device.startswith("cuda") and torch.cuda.is_available()
    room = torch.cuda.get_device_properties(cfg.device).total_memory if here else None

    heads = "".join(f"{task:>12}" for task in tasks)
    size = f"{cfg.frames} x {cfg.height} x {cfg.width}, rank {cfg.rank}, {cfg.dtype}"
    lines = [f"{size}: one of {world} processes, on {cfg.device}", f"{'a micro-batch':<54}{heads}"]
    lines += [*table(cfg, layout, now), *timing(cfg, now, reached), ""]
    lines.append(f"{'peak memory, step time':<54}{heads}")
    for name, (needs, waits, then) in found.items():
        peaks = [one.peak for one in needs.values()]
        remark = "GB, time not known" if waits else f"GB, time x {then / seconds:.2f}"
        if room:
            remark += f", {'fits' if max(peaks) < room else 'does not fit'} {room / 1e9:.0f} GB"
        lines.append(row(name, [peak / 1e9 for peak in peaks], remark))
    return "\n".join(lines)
