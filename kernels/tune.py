"""Times candidate tiles on this GPU and prints rows for the tables of the kernels.

python -m kernels.tune
python -m kernels.tune --dry      no GPU: two candidates for each table, launched nowhere
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from importlib import import_module
from itertools import product

import torch

from .bench import Case, adaln_cases, clock, gradients, heads, rope_cases
from .dispatch import pretend, triton

attention, rope, adaln = (import_module(f"kernels.{name}") for name in ("attention", "rope", "adaln"))
MS = 100  # for each candidate


def fastest(tiles: Iterable[tuple], put: Callable, call: Callable, dry: bool) -> str:
    """Times call with each of tiles in its table, leaves the fastest there and returns it as text."""
    speed = {}
    for tile in list(tiles)[: 2 if dry else None]:
        put(tile)
        try:
            speed[tile] = clock(call, 0 if dry else MS).kernel[0]
        except (triton.runtime.errors.TritonError, RuntimeError):  # too large for chip or compiler
            continue
    best = min(speed, key=speed.get)
    put(best)
    return f"Tile{tuple(best)}"


def tune_attention(H: int, L: int, K: int, device: str, dry: bool) -> str:
    q = heads(1, H, L, K, device).detach()
    tiles, key, forward = (
        attention.TILES,
        (attention.arch(q), K),
        partial(attention._portable_forward, q, q, q, K**-0.5),
    )
    o, lse = forward()
    backward = partial(attention._backward, o, q, q, q, o, lse, K**-0.5)
    best = []
    for step in attention.Tiles._fields:
        choices = (attention.Tile(*t) for t in product((32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)))
        put = partial(lambda step, tile: tiles.update({key: tiles[key]._replace(**{step: tile})}), step)
        best.append(fastest(choices, put, forward if step == "forward" else backward, dry))
    return f"attention.TILES    {key}: Tiles({', '.join(best)}),"


def tune_rows(module, name: str, choices: tuple, case: Case, dry: bool) -> Iterator[str]:
    """For rope.py and adaln.py, on one of the cases, which they know by name."""
    ours = case.providers["sdv"]
    for step in ("forward",) if name == "none" else ("forward", "backward"):  # a turn back is a turn
        call = partial(ours, *case.inputs) if step == "forward" else gradients(ours, case.inputs)[2]
        key = (module.dispatch.arch(case.inputs[0]), step, name)
        best = fastest(
            (module.Tile(*t) for t in product(*choices)), partial(module.TILES.__setitem__, key), call, dry
        )
        yield f"{module.__name__}.TILES    {key}: {best},    by {case.name}"


def tune(dry: bool):
    device, divide = ("cpu", 400) if dry else ("cuda", 1)
    print("dry run, not timed" if dry else torch.cuda.get_device_name(), f"{datetime.now():%Y-%m-%d}")
    for H, L, K in ((48, 19126, 64), (24, 27280, 128)):
        print(tune_attention(math.ceil(H / divide), L // divide, K, device, dry), flush=True)
    gated = ("adaln", "gated_residual", "gated_residual_adaln")
    for module, names, choices, cases in (
        (rope, ("none", "layer", "rms"), ((2048, 4096), (8, 16), (2, 3, 4), (2, 4, 8, 16)), rope_cases),
        (adaln, gated, ((8, 16, 32), (1, 2, 3, 4), (1, 2, 4, 8, 16)), adaln_cases),
    ):
        for name, case in zip(names, cases(device, divide), strict=True):
            print(*tune_rows(module, name, choices, case, dry), sep="\n", flush=True)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dry", action="store_true")
    if parser.parse_args().dry:
        with pretend(90, lambda *launch: None):
            tune(dry=True)
    elif torch.cuda.is_available():
        tune(dry=False)
    else:
        raise SystemExit("error: no CUDA device, nothing to time: try --dry")


if __name__ == "__main__":
    main()
