"""Two sides measured alternately, each time in a process of its own, and compared pair by pair."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

Runs = dict[str, list[dict]]  # {side: what each of its processes printed}


def run(module: str, sides: Sequence[str], pairs: int, *arguments: str) -> Runs:
    """Run `python -m MODULE --child SIDE ARGUMENTS` for each side in turn; its last line is a JSON object."""
    runs: Runs = {side: [] for side in sides}
    for side in tuple(sides) * pairs:
        command = [sys.executable, "-m", module, "--child", side, *arguments]
        runs[side].append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    return runs


def compare(runs: Runs, field: str) -> tuple[float, float, float]:
    """Medians of ours and of diffusers', and the median of the ratios of the pairs."""
    ours, theirs = ([run[field] for run in runs[side]] for side in ("ours", "diffusers"))
    ratios = (a / b for a, b in zip(ours, theirs, strict=True))
    return statistics.median(ours), statistics.median(theirs), statistics.median(ratios)


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds that work takes, and GB by which it raises this process's peak memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "gigabytes": (peak - before) * 1024 / 1e9}
