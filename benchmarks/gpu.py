"""All that is to be known of a GPU, in one command and within a time, the most telling first.

    python -m benchmarks.gpu --minutes 12     # into benchmarks/<GPU>: gpu.md, fullsize.md, kernels of the day
    python -m benchmarks.gpu --dry            # no GPU: every job, small

First whatever compiles, all at once and not timed: the kernels' tests (are they right?) and a warm-up of each
measurement. Then the measurements, one by one, with the GPU to themselves. Each is a process with a limit of
its own, so that one that hangs or crashes takes nothing with it; what each said is in out/gpu. Needs no
network, no weights, no video library.
"""

import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.book import folder_of, stamp
from benchmarks.models import FULL
from sdv.run.settings import Parser

ROOT = Path(__file__).parent.parent
LOGS = Path("out/gpu")
TESTS = [sys.executable, "-m", "pytest", "test_kernels.py", "-p", "no:cacheprovider"]
BENCH = [sys.executable, "-m", "kernels.bench"]
FULLSIZE = [sys.executable, "-m", "benchmarks.fullsize"]
# By value: what, of which models, for how many seconds at most. Twelve minutes end before the last of them.
MEASUREMENTS = (
    ("steps", ["cogvideox"], 110), ("steps", ["wan"], 110), ("kernels", [], 120), ("vae", ["cogvideox"], 50),
    ("storage", ["cogvideox"], 60), ("vae", ["wan"], 60), ("denoise", ["cogvideox"], 70),
    ("denoise", ["wan"], 80),
)  # fmt: skip
# Of these; a VAE runs whole and in torch alone, and storage has the kernels of steps.
COMPILED = ("steps", "kernels", "denoise")
COMPILING = 0.35  # of the time at most
LEAST = 5.0  # seconds: with less left, nothing starts
NO_TESTS = 5  # what pytest returns where a choice is empty


class Job(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds


class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    start: float
    limit: float


def tests(limit: float) -> list[Job]:
    """Those of Hopper's own kernels apart: one that hangs would take the others with it."""
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [
        Job("tests, Hopper", [*TESTS, "-k", "hopper"], limit),
        Job("tests", [*TESTS, "-k", "not hopper", *spread], limit),
    ]


def on_gpu(folder: Path, seconds: float) -> tuple[list[Job], list[Job]]:
    """(what may run together, what is timed alone)"""
    limit, together, alone = COMPILING * seconds, tests(COMPILING * seconds), []
    for part, models, most in MEASUREMENTS:
        if part == "kernels":
            warm = [*BENCH, "--ms", "1", "--out", str(LOGS / "warm")]
            timed = [*BENCH, "--ms", "150", "--out", str(folder / f"{datetime.date.today()}")]
        else:
            command = [*FULLSIZE, "--parts", part, "--models", *models]
            warm = [*command, "--warm"]
            timed = [*command, "--out", str(folder), "--seconds", str(most - 10)]
        name = ", ".join([part, *models])
        if part in COMPILED:
            together.append(Job(f"compile: {name}", warm, limit))
        alone.append(Job(name, timed, most))
    return together, alone


def on_cpu(folder: Path, seconds: float) -> tuple[list[Job], list[Job]]:
    """The same jobs, small: some tests in Triton's interpreter, all measurements in one process."""
    small = [*FULLSIZE, "--dry", "--no-peers"]
    hopper, others = tests(seconds)
    few = others._replace(command=[*TESTS, "-k", "test_rope_theorems or test_adaln_theorems"])
    warm = Job("compile: denoise", [*small, "--warm", "--parts", "denoise", "--models", "wan"], seconds)
    alone = [Job("kernels", [*BENCH, "--dry"], seconds)]
    alone.append(Job(f"full size, {', '.join(FULL)}", [*small, "--out", str(folder)], seconds))
    return [hopper, few, warm], alone


def run(jobs: list[Job], at_once: int, end: float) -> Iterator[dict]:
    """Run them in order, so many at a time; how each ended."""
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                if (limit := min(job.limit, end - time.time())) < LEAST:
                    yield {"job": job.name, "ended": "no time left", "seconds": 0.0}
                    continue
                with log(job).open("w") as file:
                    process = subprocess.Popen(
                        job.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    )
                running.append(Running(job, process, time.time(), limit))
            for one in list(running):
                spent, code = time.time() - one.start, one.process.poll()
                if code is None and spent < one.limit:
                    continue
                if code is None:
                    kill(one)
                running.remove(one)
                ended = {None: "stopped", 0: "well", NO_TESTS: "nothing to do"}.get(code, f"failed ({code})")
                yield {"job": one.job.name, "ended": ended, "seconds": round(spent, 1), "said": last(one.job)}
            time.sleep(0.1)
    finally:  # also when this process is stopped: nobody else knows their limits
        for one in running:
            kill(one)


def kill(one: Running) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.wait()


def log(job: Job) -> Path:
    return LOGS / f"{job.name.replace(': ', '-').replace(', ', '-').replace(' ', '-')}.log"


def last(job: Job) -> str:
    """The last line that it wrote."""
    lines = log(job).read_text(errors="replace").split("\n")
    return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "")


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/<GPU>]")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device, nothing to time: try --dry")
    device, start, seconds = "cpu" if args.dry else "cuda", time.time(), 60 * args.minutes
    folder = (args.out or (LOGS if args.dry else folder_of(device))).resolve()
    for path in (folder, LOGS):
        path.mkdir(parents=True, exist_ok=True)
    together, alone = (on_cpu if args.dry else on_gpu)(folder, seconds)
    about, done = stamp(device), []
    lines = [f"{about['date']}, {about['machine']}, commit {about['commit']}, "
             + ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
             "", "| job | ended | s | its last line |", "|---|---|---:|---|"]  # fmt: skip
    many = os.cpu_count() or 1
    for jobs, at_once, share in ((together, many, COMPILING), (alone, many if args.dry else 1, 1.0)):
        for row in run(jobs, at_once, start + seconds * (1.0 if args.dry else share)):
            done.append(row)
            lines.append(f"| {row['job']} | {row['ended']} | {row['seconds']} | {row.get('said', '')} |")
            print(f"{row['seconds']:6.1f} s  {row['job']}: {row['ended']}", flush=True)
            (folder / "gpu.md").write_text("\n".join(lines) + "\n")
            (folder / "gpu.json").write_text(json.dumps(about | {"jobs": done}, indent=1) + "\n")
    return int(any(row["ended"].startswith(("failed", "stopped")) for row in done))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else no `finally` is heard
    sys.exit(main())
