"""What one call of each kernel costs the host: all that happens in Python before the GPU is told anything.

    python -m benchmarks.host           # a minute on a CPU: prints a table and writes benchmarks/host.csv

Small tensors and a launcher that does nothing: neither Triton's launch nor the kernel is in the numbers.
Text and video are two segments; x (and y) learn, as in Wan under a LoRA, or norms and modulations too (the
paper's LoRA on CogVideoX: the modulations). Two ways take turns in one process: a custom operator of torch,
which torch.compile needs and which every call once was, and the plain call of eager mode. Of each the
fastest round counts: others say how busy the machine was.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import kernels
from benchmarks.results import write_csv
from kernels import dispatch
from sdv.run.settings import Parser, run

COLUMNS = "operator", "learns", "pass", "operator us", "plain us", "ratio"
CALLS = 10  # of a round: few, so that some rounds end before anybody else wants the core
WAYS = {"operator": lambda args: True, "plain": dispatch.watched}


def new(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def operators() -> dict[str, tuple[Callable, list[Tensor], int]]:
    """Each with its inputs, and how many of them learn where norms and modulations are frozen."""
    q, k, v = (new(1, 40, 2, 64).transpose(1, 2) for _ in range(3))
    tables = torch.rand(2, 30, 32).unbind()
    x, y, (gate, scale, shift) = new(1, 40, 64), new(1, 40, 64), new(1, 2, 3 * 64).chunk(3, 2)
    weight, bias, wide = new(64), new(64), new(128)
    cut = {"segments": (10, 30)}
    return {
        "attention": (kernels.attention, [q, k, v], 3),
        "rope": (kernels.rope, [q, *tables], 1),
        "layernorm_rope": (kernels.layernorm_rope, [q, weight, bias, *tables], 1),
        "rmsnorm_rope": (kernels.rmsnorm_rope, [q, wide, *tables], 1),
        "adaln": (partial(kernels.adaln, **cut), [x, scale, shift, weight, bias], 1),
        "gated_residual": (partial(kernels.gated_residual, **cut), [x, y, gate], 2),
        "gated_residual_adaln": (
            partial(kernels.gated_residual_adaln, **cut), [x, y, gate, scale, shift, weight, bias], 2,
        ),
    }  # fmt: skip


def passes(call: Callable, inputs: list[Tensor]) -> dict[str, Callable]:
    """A forward; and the backward of another, which may be run again and again."""
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in inputs if x.requires_grad]
    back = partial(torch.autograd.grad, out, leaves, [torch.randn_like(o) for o in out], retain_graph=True)
    return {"forward": partial(call, *inputs), "backward": back}


def microseconds(work: Callable) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - start) / CALLS * 1e6


def measure(call: Callable, inputs: list[Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """{pass: {way: the fewest microseconds}}"""
    work, least = {}, {step: dict.fromkeys(WAYS, float("inf")) for step in ("forward", "backward")}
    for turn in range(rounds + 1):  # the first one to get warm
        for way, watched in WAYS.items():
            with patch.object(dispatch, "watched", watched):
                if way not in work:
                    work[way] = passes(call, inputs)
                for step, best in least.items():
                    took = microseconds(work[way][step])
                    best[way] = min(best[way], took) if turn else best[way]
    return least


def results(rounds: int) -> Iterator[list]:
    """[operator, who learns, pass, microseconds of each way, ratio], printed too; a launch does nothing."""
    with dispatch.pretend(90, lambda *launch: None):
        for name, (call, inputs, few) in operators().items():
            learning = [i for i, x in enumerate(inputs) if x.dtype == torch.bfloat16]
            for learns, places in {tuple(learning[:few]): "x", tuple(learning): "all"}.items():
                leaves = [x.detach().requires_grad_(i in learns) for i, x in enumerate(inputs)]
                for step, us in measure(call, leaves, rounds).items():
                    numbers = (
                        f"{us['operator']:.1f}",
                        f"{us['plain']:.1f}",
                        f"{us['plain'] / us['operator']:.2f}",
                    )
                    row = [name, places, step, *numbers]
                    print("{:21} {:4} {:9} {:>6} {:>6} us  {}".format(*row))
                    yield row


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, triton {dispatch.triton.__version__}"
    write_csv(args.out, COLUMNS, results(args.rounds), "1 thread", versions=versions)


if __name__ == "__main__":
    run(main)
