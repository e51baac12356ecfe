"""Times each kernel at the sizes of CogVideoX-5B and Wan2.2-5B, beside its peers and the ceilings of the box.

    python -m kernels.bench           time all on this GPU: CSV, plot and table into benchmarks/kernels/
    python -m kernels.bench --tune    time candidate tiles, print rows for the tables of the kernels
    python -m kernels.bench --lint    no GPU: compile all for five chips and read the machine code
    python -m kernels.bench --dry     no GPU: each case once, tiny, untimed: shows that this file runs

Forward FLOPs of attention: 4 B H Lq Lk K, backward 2.5 times that. Bytes: each large tensor once. A share is
of the box's own ceiling, measured in the same run: a bf16 matrix product, or a copy (bytes read + written).
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels

attention, rope, adaln = (import_module(f"kernels.{name}") for name in ("attention", "rope", "adaln"))

RESULTS = Path(__file__).parent.parent / "benchmarks/kernels"
NAN = math.nan


class Case(NamedTuple):
    """One kernel at one size: its `flops`, or else its `bytes`, of (forward, backward)."""

    name: str
    tokens: int
    inputs: list[Tensor]
    providers: dict[str, Callable]
    flops: tuple[float, float] | None
    bytes: tuple[float, float] | None


class Timing(NamedTuple):
    case: Case
    provider: str
    mode: str
    ms: tuple[float, float, float]  # median, 20 %, 80 %
    share: float  # of the ceiling
    peak: float  # GB
    error: float  # against float64, on a smaller input


# ---- what is timed -----------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend) -> Callable:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return call


def beside_torch(ours: Callable, reference: Callable, **fixed) -> dict[str, Callable]:
    ours, reference = partial(ours, **fixed), partial(reference, **fixed)
    return {"sdv": ours, "torch": reference, "torch.compile": torch.compile(reference, dynamic=False)}


def new(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device).requires_grad_()


def heads(B: int, H: int, L: int, K: int, device: str) -> Tensor:
    return new(B, L, H, K, device=device).transpose(1, 2).detach().requires_grad_()


def attention_cases(device: str, divide: int) -> Iterator[Case]:
    peers = {"sdv": kernels.attention}
    if device == "cuda":
        peers["sdpa flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        peers["sdpa cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    for name, B, H, Lq, Lk, K in (
        ("attention, CogVideoX video", 1, 48, 19126, 19126, 64),
        ("attention, CogVideoX identity", 8, 48, 2926, 2926, 64),
        ("attention, Wan", 1, 24, 27280, 27280, 128),
        ("attention, Wan cross", 1, 24, 27280, 512, 128),
    ):
        H, Lq, Lk = (math.ceil(n / divide) for n in (H, Lq, Lk))
        q, k, v = (heads(B, H, L, K, device) for L in (Lq, Lk, Lk))
        flops = 4.0 * B * H * Lq * Lk * K
        yield Case(name, Lq, [q, k, v], peers, (flops, 2.5 * flops), None)


def rope_cases(device: str, divide: int) -> Iterator[Case]:
    for name, function, text, H, L, K, parameters in (
        ("RoPE, CogVideoX", "rope", 226, 48, 19126, 64, ()),
        ("LayerNorm + RoPE, CogVideoX", "layernorm_rope", 226, 48, 19126, 64, (64, 64)),
        ("RMSNorm + RoPE, Wan", "rmsnorm_rope", 0, 24, 27280, 128, (3072,)),
    ):
        L, text = L // divide, text // divide
        angle = torch.rand(L - text, K // 2, device=device) * 2 * math.pi
        inputs = [
            heads(1, H, L, K, device),
            *(new(n, device=device) for n in parameters),
            angle.cos(),
            angle.sin(),
        ]
        providers = beside_torch(getattr(kernels, function), getattr(rope, function + "_reference"))
        size = 2.0 * H * L * K
        yield Case(name, L, inputs, providers, None, (2 * size, (3 if parameters else 2) * size))


def adaln_cases(device: str, divide: int) -> Iterator[Case]:
    L, text, D = 19126 // divide, 226 // divide, 3072
    x, y = (new(1, L, D, device=device) for _ in range(2))
    gate, scale, shift = (new(1, 2, D, device=device) for _ in range(3))
    affine = [new(D, device=device) for _ in range(2)]
    for name, function, inputs, tensors in (
        ("AdaLN, CogVideoX", "adaln", [x, scale, shift, *affine], (2, 3)),
        ("gated residual, CogVideoX", "gated_residual", [x, y, gate], (3, 3)),
        (
            "gated residual + AdaLN, CogVideoX",
            "gated_residual_adaln",
            [x, y, gate, scale, shift, *affine],
            (4, 6),
        ),
    ):
        ours, reference = getattr(kernels, function), getattr(adaln, function + "_reference")
        moved = tuple(2.0 * L * D * n for n in tensors)
        yield Case(name, L, inputs, beside_torch(ours, reference, segments=(text, L - text)), None, moved)


# ---- how it is timed ---------------------------------------------------------------------------------------


def milliseconds(f: Callable, dry: bool = False) -> tuple[float, float, float]:
    """(median, 20 %, 80 %) with a cold L2 cache; dry, f runs once and nothing is timed."""
    if not dry:
        return tuple(triton.testing.do_bench(f, warmup=100, rep=500, quantiles=[0.5, 0.2, 0.8]))
    f()
    return NAN, NAN, NAN


def ceilings() -> tuple[float, float]:
    """(FLOP/s of a large bf16 product of random numbers, bytes/s of a large copy)"""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    flops = 2 * 8192**3 / milliseconds(lambda: a @ b)[0] * 1e3
    return flops, 2 * source.nbytes / milliseconds(lambda: target.copy_(source))[0] * 1e3


def gradients(f: Callable, inputs: list[Tensor], weights: tuple[Tensor, ...] | None = None):
    """(outputs, weights, a function that computes every gradient of sum(output * weight))"""
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    weights = weights or tuple(torch.randn_like(o) for o in out)
    leaves = [x for x in inputs if x.requires_grad]
    return out, weights, lambda: torch.autograd.grad(out, leaves, weights, retain_graph=True)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def error(f: Callable, case: Case) -> float:
    """Of attention on two heads and 1024 tokens: the largest relative error of an output or gradient.

    The other kernels are held against float64 by test_kernels.py.
    """
    if case.flops is None:
        return NAN
    small = [x.detach()[:1, :2, :1024].clone().requires_grad_() for x in case.inputs]
    wide = [x.detach().double().requires_grad_() for x in small]
    out, weights, backward = gradients(f, small)
    exact, _, exact_backward = gradients(formula, wide, tuple(w.double() for w in weights))
    pairs = zip((*out, *backward()), (*exact, *exact_backward()), strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def timings(case: Case, ceiling: tuple[float, float], dry: bool) -> Iterator[Timing]:
    work, limit = (case.flops, ceiling[0]) if case.flops else (case.bytes, ceiling[1])
    for provider, f in case.providers.items():
        forward = milliseconds(partial(f, *case.inputs), dry)
        if not dry:
            torch.cuda.reset_peak_memory_stats()
        *held, backward = gradients(f, case.inputs)
        back = milliseconds(backward, dry)
        peak = NAN if dry else torch.cuda.max_memory_allocated() / 1e9
        del held, backward
        wrong = error(f, case)
        for mode, ms, amount in (("forward", forward, work[0]), ("backward", back, work[1])):
            yield Timing(case, provider, mode, ms, amount / (ms[0] * 1e-3) / limit, peak, wrong)


# ---- what is written ---------------------------------------------------------------------------------------

COLUMNS = (  # those of Liger Kernel
    *(
        "kernel_name",
        "kernel_provider",
        "kernel_operation_mode",
        "metric_name",
        "metric_unit",
        "x_name",
        "x_value",
    ),
    *("y_value_50", "y_value_20", "y_value_80", "gpu_name", "timestamp", "version"),
)


def rows(timing: Timing, gpu: str, version: str) -> Iterator[list]:
    start = [timing.case.name, timing.provider, timing.mode]
    end = [gpu, datetime.now().isoformat(timespec="seconds"), version]
    for metric, unit, values in (
        ("speed", "ms", timing.ms),
        ("share of ceiling", "ratio", (timing.share,) * 3),
        ("memory", "GB", (timing.peak,) * 3),
        ("error against float64", "ratio", (timing.error,) * 3),
    ):
        yield [*start, metric, unit, "tokens", timing.case.tokens, *values, *end]


HEAD = "| kernel | pass | who | ms | rate | of ceiling | peak GB | error |\n|---|---|---|---|---|---|---|---|"


def markdown(timing: Timing) -> str:
    case, i = timing.case, timing.mode == "backward"
    work, unit = (case.flops[i], "TFLOP/s") if case.flops else (case.bytes[i], "TB/s")
    numbers = f"{timing.ms[0]:.3f}", f"{work / timing.ms[0] / 1e9:.4g} {unit}", f"{timing.share:.0%}"
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
    axes.legend()
    figure.savefig(path, dpi=150)


def write(done: list[Timing], table: list[str], gpu: str, version: str):
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = RESULTS / gpu.replace(" ", "-").lower()
    with name.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(row for t in done for row in rows(t, gpu, version))])
    name.with_suffix(".md").write_text("\n".join(table) + "\n")
    plot(done, name.with_suffix(".png"), gpu)


def bench(dry: bool):
    device, divide = ("cpu", 400) if dry else ("cuda", 1)
    gpu, ceiling = ("dry run", (NAN, NAN)) if dry else (torch.cuda.get_device_name(), ceilings())
    version = f"torch {torch.__version__}, triton {triton.__version__}"
    done = []
    table = [
        f"{gpu}: product {ceiling[0] / 1e12:.0f} TFLOP/s, copy {ceiling[1] / 1e12:.2f} TB/s; {version}\n",
        HEAD,
    ]
    print(*table, sep="\n")
    for cases in (attention_cases, rope_cases, adaln_cases):
        for case in cases(device, divide):
            for timing in timings(case, ceiling, dry):
                table.append(markdown(timing))
                print(table[-1], flush=True)
                done.append(
                    timing._replace(case=case._replace(inputs=[], providers={}))
                )  # lets the tensors go
    if not dry:
        write(done, table, gpu, version)


# ---- tiles -------------------------------------------------------------------------------------------------


def fastest(tiles: Iterable[tuple], put: Callable, call: Callable, dry: bool) -> str:
    """Times call with each of tiles in its table, leaves the fastest there and returns it as text."""
    speed = {}
    for tile in list(tiles)[: 2 if dry else None]:
        put(tile)
        try:
            speed[tile] = milliseconds(call, dry)[0]
        except triton.runtime.errors.TritonError:  # too large for this chip
            continue
    best = min(speed, key=speed.get)
    put(best)
    return f"Tile{tuple(best)}"


def tune_attention(H: int, L: int, K: int, device: str, dry: bool) -> str:
    q = heads(1, H, L, K, device).detach()
    q, scale = q.float() if dry else q, K**-0.5
    (o, lse), tiles, key = attention._forward(q, q, q, scale), attention.TILES, (attention.arch(q), K)
    forward, backward = (
        partial(attention._forward, q, q, q, scale),
        partial(attention._backward, o, q, q, q, o, lse, scale),
    )
    best = []
    for step in attention.Tiles._fields:
        choices = (attention.Tile(*t) for t in product((32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)))
        put = partial(lambda step, tile: tiles.update({key: tiles[key]._replace(**{step: tile})}), step)
        best.append(fastest(choices, put, forward if step == "forward" else backward, dry))
    return f"attention.TILES    {key}: Tiles({', '.join(best)}),"


def tune_rows(module, choices: tuple, case: Case, dry: bool) -> Iterator[str]:
    """For rope.py and adaln.py, on one of the cases."""
    ours = case.providers["sdv"]
    for step in ("forward", "backward"):
        call = partial(ours, *case.inputs) if step == "forward" else gradients(ours, case.inputs)[2]
        best = fastest(
            (module.Tile(*t) for t in product(*choices)), partial(module.TILES.__setitem__, step), call, dry
        )
        yield f'{module.__name__}.TILES    "{step}": {best},    by {case.name}'


def tune(dry: bool):
    device, divide = ("cpu", 400) if dry else ("cuda", 1)
    print("dry run, not timed" if dry else torch.cuda.get_device_name(), f"{datetime.now():%Y-%m-%d}")
    for H, L, K in ((48, 19126, 64), (24, 27280, 128)):
        print(tune_attention(math.ceil(H / divide), L // divide, K, device, dry), flush=True)
    for module, choices, cases in (
        (rope, ((2048, 4096), (8, 16), (2, 3, 4), (2, 4, 8)), rope_cases),
        (adaln, ((8, 16, 32), (1, 2, 3, 4), (1, 2, 4, 8)), adaln_cases),
    ):
        for case in cases(device, divide):
            print(*tune_rows(module, choices, case, dry), sep="\n", flush=True)


def lint(sample: bool) -> int:
    """Prints the table, writes the whole one to lint.csv, and counts the rows with faults."""
    from .lint import Row, table

    done = []
    for row in table(sample):
        print(*(f"{name}={value}" for name, value in row._asdict().items() if value != ""), flush=True)
        done.append(row)
    faults = sum(row.faults != "" for row in done)
    print(f"{len(done)} kernels compiled by Triton {triton.__version__}, {faults} with faults")
    if not sample:
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / "lint.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [[*Row._fields, "triton"], *([*row, triton.__version__] for row in done)]
            )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in ("tune", "lint", "sample", "dry"):
        parser.add_argument(f"--{option}", action="store_true")
    options = parser.parse_args()
    if options.lint:
        return min(lint(options.sample), 1)
    if not torch.cuda.is_available() and not options.dry:
        print(
            "no CUDA device, nothing to time: try --lint, --dry, or TRITON_INTERPRET=1 pytest test_kernels.py"
        )
        return 0
    (tune if options.tune else bench)(options.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
