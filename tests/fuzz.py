"""Mutated files for all that is read from a disk: a good one with small damages, configs with a wrong value.

    python tests/fuzz.py                                          # a minute for each target
    python tests/fuzz.py --target clips --seconds 600 --seed 7 --keep out/fuzz

One seed gives one sequence of inputs. A child process works, with 6 GB; a new one goes on where it died.
    accepted    read without a word (not a proof that pixels or weights are right)
    clear       ValueError or OSError with the name of the file or its folder
    unnamed     one without it        traceback    any other exception
    hang        over 15 s of work     memory       refused, or 1.5 GB more than before        crash    it died
The exit status is 1 if one of the last five columns is not zero.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fuzz_inputs import TARGETS, Late, make_seeds, verdict

COLUMNS = ("accepted", "clear", "unnamed", "traceback", "hang", "memory", "crash")
SECONDS, GIGABYTES, GROWTH = 15, 6, 1.5  # of one input; GROWTH in GB


# The child


def late(*_) -> None:
    raise Late


def work_on(target: str, first: int, seed: str, folder: Path, seconds: float) -> None:
    """Lines "B label path", then "E column label said path", for the inputs from the first on."""
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    signal.signal(signal.SIGPROF, late)
    for i in range(first, sys.maxsize):
        if time.monotonic() > end:
            return
        one = TARGETS[target](folder / "seeds", folder, random.Random(f"{seed}/{target}/{i}"))
        print("B", one.label, one.path, sep="\t", flush=True)
        used = resource.getrusage(resource.RUSAGE_SELF)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        deaf = int(used.ru_utime + used.ru_stime) + 2 * SECONDS  # then the system ends it
        resource.setrlimit(resource.RLIMIT_CPU, (deaf, resource.RLIM_INFINITY))
        column, said = verdict(one)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used.ru_maxrss) / 1e6
        if grown > GROWTH:
            column, said = "memory", f"{grown:.1f} GB more; {said}"
        print("E", column, one.label, repr(said[:200]), one.path, sep="\t", flush=True)


# The parent


def watch(target: str, seconds: float, seed: str, folder: Path, keep: Path | None) -> tuple[Counter, Counter]:
    """(inputs by column, what was said of the bad ones)."""
    counts, told, i, end = Counter(), Counter(), 0, time.monotonic() + seconds

    def count(column: str, label: str, said: str, path: str) -> None:
        counts[column] += 1
        if column not in ("accepted", "clear"):
            told[f"{target}, {column}: {label}: {said}"] += 1
            if keep and Path(path).is_file():
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, keep / f"{target}-{column}-{i}-{Path(path).name}")

    while (left := end - time.monotonic()) > 0:
        words = [sys.executable, __file__, "--child", target, str(i), seed, str(folder), str(left)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        begun, started = None, i
        for line in child.stdout:
            kind, *rest = line.decode(errors="replace").rstrip("\n").split("\t")
            if kind == "B":
                begun = rest
            elif kind == "E":
                count(*rest)
                i, begun = i + 1, None
        status = child.wait()
        if status and begun:
            count("hang" if status == -signal.SIGXCPU else "crash", begun[0], f"status {status}", begun[1])
            i += 1
        elif status and i == started:
            raise RuntimeError(f"it does not start: {' '.join(words)}")
    return counts, told


def fuzz(
    targets: list[str], seconds: float, seed: str = "0", keep: Path | None = None
) -> tuple[dict, list[str]]:
    """({target: inputs by column}, the commonest things said of bad ones)."""
    found, told = {}, []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "seeds").mkdir()
        make_seeds(Path(folder) / "seeds")
        for target in targets:
            found[target], said = watch(target, seconds, seed, Path(folder), keep)
            told += [f"{number:5d} x {text}" for text, number in said.most_common(12)]
    return found, told


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="of each target")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of the bad columns")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        target, first, seed, folder, seconds = args.child
        work_on(target, int(first), seed, Path(folder), float(seconds))
        return 0
    found, told = fuzz(args.target, args.seconds, args.seed, args.keep)
    print("| target | inputs | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) + 1))
    for target, counts in found.items():
        print(
            f"| {target} | {sum(counts.values()):,} | " + " | ".join(f"{counts[c]:,}" for c in COLUMNS) + " |"
        )
    print("\n".join(told))
    return int(any(counts[column] for counts in found.values() for column in COLUMNS[2:]))


if __name__ == "__main__":
    sys.exit(main())
