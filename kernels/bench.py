"""Times each kernel at the sizes of CogVideoX-5B and Wan2.2-5B, beside its peers and the machine's ceilings.

    python -m kernels.bench           time all on this GPU: CSV, plot and table into benchmarks/kernels/
    python -m kernels.bench --lint    no GPU: compile all for five chips and read the machine code
    python -m kernels.bench --dry     no GPU: each case tiny, untimed; errors and table are real

There are two times. Kernel: the GPU's own, for calls that wait in a queue behind a sleeping GPU, each with a
cold L2 cache; rates and shares use it. Call: wall-clock time of calls in eager mode, host included. Forward
FLOPs of attention: 4 B H Lq Lk K, backward 2.5 times that. Bytes: each large tensor once. A share is of the
machine's own ceiling, measured in the same run: a bf16 matrix product, or a copy (bytes read + written).
"""

import argparse
import csv
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels

from . import lint
from .dispatch import triton

rope, adaln = (import_module(f"kernels.{name}") for name in ("rope", "adaln"))

RESULTS = Path(__file__).parent.parent / "benchmarks/kernels"
NAN = math.nan
FLASH = {
    "FlashAttention 3": ("fa3_fwd_interface", "flash_attn_interface"),
    "FlashAttention 4": ("flash_attn.cute",),
}  # by the modules that may hold it


class Case(NamedTuple):
    """One kernel at one size: its `flops`, or else its `bytes`, of (forward, backward)."""

    name: str
    tokens: int
    inputs: list[Tensor]
    providers: dict[str, Callable]
    exact: Callable  # the formula, given float64
    flops: tuple[float, float] | None
    bytes: tuple[float, float] | None


class Clock(NamedTuple):
    """Milliseconds of a call."""

    kernel: tuple[float, float, float]  # median, 20 %, 80 %
    call: float


class Timing(NamedTuple):
    case: Case
    provider: str
    mode: str
    clock: Clock
    share: float  # of the ceiling
    peak: float  # GB
    error: float  # against float64, on a smaller input: the worst of the outputs, or of the gradients


# ---- what is timed -----------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend) -> Callable:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return call


def flash_attention(module) -> Callable:
    """Both take and give (B, L, H, K); one of them gives more."""

    def call(q, k, v):
        out = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def attention_peers(device: str) -> dict[str, Callable]:
    """sdpa is what torch picks. FlashAttention if installed: of 3 the forward is `pip install fa3-fwd`."""
    peers = {"sdv": kernels.attention, "sdpa": torch.nn.functional.scaled_dot_product_attention}
    if device == "cuda":
        peers["sdpa flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        peers["sdpa cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    for name, modules in FLASH.items():
        for module in modules:
            try:
                peers[name] = flash_attention(import_module(module))
                break
            except (ImportError, OSError):  # OSError: its library is made for another CUDA or torch
                continue
    return peers


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def new(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device).requires_grad_()


def heads(B: int, H: int, L: int, K: int, device: str) -> Tensor:
    return new(B, L, H, K, device=device).transpose(1, 2).detach().requires_grad_()


def attention_cases(device: str, divide: int) -> Iterator[Case]:
    for name, B, H, Lq, Lk, K in (
        ("attention, CogVideoX video", 1, 48, 19126, 19126, 64),
        ("attention, CogVideoX identity", 8, 48, 2926, 2926, 64),
        ("attention, Wan", 1, 24, 27280, 27280, 128),
        ("attention, Wan cross", 1, 24, 27280, 512, 128),
    ):
        H, Lq, Lk = (math.ceil(n / divide) for n in (H, Lq, Lk))
        q, k, v = (heads(B, H, L, K, device) for L in (Lq, Lk, Lk))
        flops = 4.0 * B * H * Lq * Lk * K
        yield Case(name, Lq, [q, k, v], attention_peers(device), formula, (flops, 2.5 * flops), None)


def beside_torch(name: str, module, device: str, **fixed) -> tuple[dict[str, Callable], Callable]:
    """(providers, the formula)"""
    ours, torchs = (
        partial(getattr(kernels, name), **fixed),
        partial(getattr(module, f"{name}_reference"), **fixed),
    )
    compiled = torch.compile(torchs, dynamic=False, backend="inductor" if device == "cuda" else "eager")
    return {"sdv": ours, "torch": torchs, "torch.compile": compiled}, torchs


def rope_cases(device: str, divide: int) -> Iterator[Case]:
    for name, function, text, H, L, K, parameters in (
        ("RoPE, CogVideoX", "rope", 226, 48, 19126, 64, ()),
        ("LayerNorm + RoPE, CogVideoX", "layernorm_rope", 226, 48, 19126, 64, (64, 64)),
        ("RMSNorm + RoPE, Wan", "rmsnorm_rope", 0, 24, 27280, 128, (3072,)),
    ):
        L, text = L // divide, text // divide
        angle = torch.rand(L - text, K // 2, device=device) * 2 * math.pi
        weights = (new(n, device=device) for n in parameters)
        inputs = [heads(1, H, L, K, device), *weights, angle.cos(), angle.sin()]
        size = 2.0 * H * L * K
        moved = (2 * size, (3 if parameters else 2) * size)
        yield Case(name, L, inputs, *beside_torch(function, rope, device), None, moved)


def adaln_cases(device: str, divide: int) -> Iterator[Case]:
    L, text, D = 19126 // divide, 226 // divide, 3072
    x, y = (new(1, L, D, device=device) for _ in range(2))
    gate, scale, shift = (new(1, 2, D, device=device) for _ in range(3))
    norm = [scale, shift, *(new(D, device=device) for _ in range(2))]
    for name, function, inputs, tensors in (
        ("AdaLN, CogVideoX", "adaln", [x, *norm], (2, 3)),
        ("gated residual, CogVideoX", "gated_residual", [x, y, gate], (3, 3)),
        ("gated residual + AdaLN, CogVideoX", "gated_residual_adaln", [x, y, gate, *norm], (4, 6)),
    ):
        moved = tuple(2.0 * L * D * n for n in tensors)
        both = beside_torch(function, adaln, device, segments=(text, L - text))
        yield Case(name, L, inputs, *both, None, moved)


# ---- how it is timed ---------------------------------------------------------------------------------------


def wall(f: Callable, n: int) -> tuple[float, float]:
    """Milliseconds a call, n in a row, until (the host, the GPU) is done with the last."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        f()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host * 1e3 / n, (time.perf_counter() - start) * 1e3 / n


def clock(f: Callable, ms: float) -> Clock:
    """Of f on the GPU, in about `ms` milliseconds each way; with 0, f runs once and nothing is timed."""
    f()
    if not ms:
        return Clock((NAN, NAN, NAN), NAN)
    host, call = wall(f, 3)
    n = min(max(int(ms / call), 3), 100)
    _, call = wall(f, n)
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any L2 cache holds
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    torch.cuda._sleep(int(2e6 * n * (host + 0.1)))  # about 2e6 cycles a millisecond: the host gets ahead
    for start, end in marks:
        flush.zero_()
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    took = torch.tensor([start.elapsed_time(end) for start, end in marks])
    return Clock(tuple(took.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()), call)


def memory(f: Callable) -> float:
    """GB at most, while f runs."""
    torch.cuda.reset_peak_memory_stats()
    f()
    return torch.cuda.max_memory_allocated() / 1e9


def ceilings(ms: float) -> tuple[float, float]:
    """(FLOP/s of a large bf16 product of random numbers, bytes/s of a large copy)"""
    if not ms:
        return NAN, NAN
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    times = (clock(f, ms).kernel[0] * 1e-3 for f in (lambda: a @ b, lambda: target.copy_(source)))
    return tuple(work / t for work, t in zip((2 * 8192**3, 2 * source.nbytes), times, strict=True))


def gradients(f: Callable, inputs: list[Tensor], weights: tuple[Tensor, ...] | None = None):
    """(outputs, weights, a function that computes every gradient of sum(output * weight))"""
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    weights = weights or tuple(torch.randn_like(o) for o in out)
    leaves = [x for x in inputs if x.requires_grad]
    return out, weights, lambda: torch.autograd.grad(out, leaves, weights, retain_graph=True)


def error(f: Callable, small: Case, mode: str) -> float:
    """The largest relative error against float64 of an output, or of a gradient."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in small.inputs]
    out, weights, backward = gradients(f, small.inputs)
    exact, _, exact_backward = gradients(small.exact, wide, tuple(w.double() for w in weights))
    pairs = (out, exact) if mode == "forward" else (backward(), exact_backward())
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*pairs, strict=True))


def timings(case: Case, small: Case, ceiling: tuple[float, float], ms: float) -> Iterator[Timing]:
    """A provider may lack a pass or refuse a size: then it says so instead."""
    work, limit = (case.flops, ceiling[0]) if case.flops else (case.bytes, ceiling[1])
    for provider, f in case.providers.items():
        for mode, amount in zip(("forward", "backward"), work, strict=True):
            try:
                call = partial(f, *case.inputs) if mode == "forward" else gradients(f, case.inputs)[2]
                peak = memory(call) if ms else NAN
                took = clock(call, ms)
                compiling = ms and provider == "torch.compile"  # the small size too would take it long
                wrong = NAN if compiling else error(small.providers[provider], small, mode)
            except Exception as reason:
                why = f"{type(reason).__name__}: {reason}".splitlines()[0]
                print(f"{case.name}, {mode}, {provider}: not run: {why}")
                continue
            share = amount / (took.kernel[0] * 1e-3) / limit
            yield Timing(case, provider, mode, took, share, peak, wrong)


# ---- what is written ---------------------------------------------------------------------------------------

COLUMNS = (  # those of Liger Kernel
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "gpu_name", "timestamp", "version",
)  # fmt: skip


def rows(timing: Timing, gpu: str, version: str) -> Iterator[list]:
    start = [timing.case.name, timing.provider, timing.mode]
    end = [gpu, datetime.now().isoformat(timespec="seconds"), version]
    for metric, unit, values in (
        ("kernel", "ms", timing.clock.kernel),
        ("call", "ms", (timing.clock.call,) * 3),
        ("share of ceiling", "ratio", (timing.share,) * 3),
        ("memory", "GB", (timing.peak,) * 3),
        ("error against float64", "ratio", (timing.error,) * 3),
    ):
        yield [*start, metric, unit, "tokens", timing.case.tokens, *values, *end]


HEAD = """| kernel | pass | who | kernel ms | call ms | rate | of ceiling | peak GB | error |
|---|---|---|---|---|---|---|---|---|"""


def markdown(timing: Timing) -> str:
    case, i, (ms, *_) = timing.case, timing.mode == "backward", timing.clock.kernel
    work, unit = (case.flops[i], "TFLOP/s") if case.flops else (case.bytes[i], "TB/s")
    numbers = f"{ms:.3f}", f"{timing.clock.call:.3f}", f"{work / ms / 1e9:.4g} {unit}", f"{timing.share:.0%}"
    cells = case.name, timing.mode, timing.provider, *numbers, f"{timing.peak:.1f}", f"{timing.error:.1e}"
    return f"| {' | '.join(cells)} |"


def plot(done: list[Timing], path: Path, gpu: str):
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(f"{t.case.name}, {t.mode}" for t in done))
    providers = list(dict.fromkeys(t.provider for t in done))
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(labels) + 1), layout="constrained")
    for i, provider in enumerate(providers):
        mine = [t for t in done if t.provider == provider]
        at = [labels.index(f"{t.case.name}, {t.mode}") + 0.8 * i / len(providers) for t in mine]
        axes.barh(at, [100 * t.share for t in mine], 0.8 / len(providers), label=provider)
    axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel="% of the box's own ceiling", title=gpu)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def write(done: list[Timing], table: list[str], gpu: str, version: str, name: Path):
    name.parent.mkdir(parents=True, exist_ok=True)
    with name.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(row for t in done for row in rows(t, gpu, version))])
    name.with_suffix(".md").write_text("\n".join(table) + "\n")


def bench(ms: float, folder: Path):
    device, divide, little = ("cuda", 1, 20) if ms else ("cpu", 200, 400)
    gpu, ceiling = torch.cuda.get_device_name() if ms else "dry run", ceilings(ms)
    version = f"torch {torch.__version__}, triton {triton.__version__}"
    title = f"{gpu}: product {ceiling[0] / 1e12:.0f} TFLOP/s, copy {ceiling[1] / 1e12:.2f} TB/s; {version}\n"
    done, table, name = [], [title, HEAD], folder / gpu.replace(" ", "-").lower()
    print(*table, sep="\n")
    for cases in (attention_cases, rope_cases, adaln_cases):
        for case, small in zip(cases(device, divide), cases(device, little), strict=True):
            for timing in timings(case, small, ceiling, ms):
                table.append(markdown(timing))
                print(table[-1], flush=True)
                # Lets the tensors go, else they would count as memory of the next case's first provider.
                timing = timing._replace(case=case._replace(inputs=[], providers={}))
                done.append(timing)
            if ms:  # after every case: a later one may hang, or end the process
                write(done, table, gpu, version, name)
    if ms and importlib.util.find_spec("matplotlib"):
        plot(done, name.with_suffix(".png"), gpu)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for option in ("lint", "sample", "dry"):
        parser.add_argument(f"--{option}", action="store_true")
    parser.add_argument("--ms", type=float, default=300, help="milliseconds of GPU for each number")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.lint:
        return min(lint.report(None if options.sample else options.out / "lint.csv"), 1)
    if torch.cuda.is_available() or options.dry:
        bench(0 if options.dry else options.ms, options.out)
    else:
        raise SystemExit(
            "error: no CUDA device, nothing to time: try --lint or --dry, or pytest test_kernels.py"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
