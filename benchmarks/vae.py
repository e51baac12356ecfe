"""A full-size VAE with random weights beside diffusers' on this machine's CPU.

    python -m benchmarks.vae cogvideox          # prints a table and writes benchmarks/vae-cogvideox.csv
    python -m benchmarks.vae wan --pairs 1      # Wan2.2's

17 frames, both ways. The two take turns in processes of their own; ratios are pair by pair. Memory is what
the process grows by while it works, weights not counted.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import nn

from benchmarks import alternating
from benchmarks.models import made_as, open_model, stock_vae
from benchmarks.results import write_csv
from sdv.run.settings import Parser, run

SHAPES = {  # of the pixels and of the latents
    "cogvideox": ((1, 3, 17, 240, 360), (1, 16, 5, 30, 45)),
    "wan": ((1, 3, 17, 256, 384), (1, 48, 5, 16, 24)),
}


def network(who: str, model: str, dtype: torch.dtype) -> nn.Module:
    """Ours or diffusers', of the full size, with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        layout, configs = open_model(model, Path(folder))
    if who == "diffusers":
        return stock_vae(configs["vae"], dtype, "cpu")
    with made_as(dtype, "cpu"):
        return layout.parts["vae"].build().eval()


@torch.inference_mode()
def child(who: str, model: str, what: str, dtype: torch.dtype) -> dict:
    """Seconds of one pass, and the growth of the process's peak memory in GB."""
    vae = network(who, model, dtype)
    x = torch.randn(SHAPES[model][what == "decode"], dtype=dtype)
    work = vae.encode if what == "encode" else vae.decode
    return alternating.measured(lambda: work(x))


def compared(model: str, dtypes: Sequence[str], pairs: int) -> Iterator[list]:
    """[dtype, pass, figure, ours, diffusers', ratio, pairs], printed too."""
    for dtype, what in product(dtypes, ("encode", "decode")):
        taken = alternating.run("benchmarks.vae", ("ours", "diffusers"), pairs, what, dtype, model)
        for field in ("seconds", "gigabytes"):
            mine, theirs, ratio = alternating.compare(taken, field)
            print(f"{dtype:9}{what:7}{field:10} ours {mine:7.2f} diffusers {theirs:7.2f} {ratio:.3f}")
            yield [dtype, what, field, mine, theirs, ratio, pairs]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--child", nargs=3, metavar=("WHO", "WHAT", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, what, dtype = args.child
        print(json.dumps(child(who, args.model, what, getattr(torch, dtype))))
        return
    columns = "dtype", "pass", "figure", "ours", "diffusers", "ratio", "pairs"
    file, threads = Path(__file__).with_name(f"vae-{args.model}.csv"), torch.get_num_threads()
    rows = compared(args.model, args.dtypes, args.pairs)
    write_csv(file, columns, rows, f"{threads} threads, torch {torch.__version__}")


if __name__ == "__main__":
    run(main)
