"""Pairs and clips per second of the data loader, by workers, beside a plain PyAV loop over the same files.

    python -m benchmarks.loader          # prints a table and writes loader.csv

The clips and photos of tests/media at 480 x 720, 9 frames at 8 a second. The plain loop decodes frames in
order, takes the first one at or after each wanted time, scales it by swscale and cuts the centre; FFmpeg
takes as many threads for it as it likes. "cores": CPU seconds of all processes in a second (Linux).
"""

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.results import write_csv
from sdv.data.loader import batches
from sdv.data.rows import Clips, Pairs
from sdv.run.settings import Parser, run

MEDIA = Path(__file__).resolve().parent.parent / "tests/media"
HEIGHT, WIDTH, FRAMES, FPS = 480, 720, 9, 8


def plain(image: av.VideoFrame) -> np.ndarray:
    """Cover the size, cut the centre: (3, HEIGHT, WIDTH)."""
    scale = max(HEIGHT / image.height, WIDTH / image.width)
    wide, high = round(image.width * scale), round(image.height * scale)
    rgb = image.to_ndarray(format="rgb24", width=wide, height=high)
    top, left = (high - HEIGHT) // 2, (wide - WIDTH) // 2
    return rgb[top : top + HEIGHT, left : left + WIDTH].transpose(2, 0, 1)


def plain_clip(path: Path) -> torch.Tensor:
    frames = []
    with av.open(str(path)) as container:
        for image in container.decode(video=0):
            while len(frames) < FRAMES and image.time >= len(frames) / FPS:
                frames.append(plain(image))
            if len(frames) == FRAMES:
                break
    return torch.from_numpy(np.stack(frames, 1))


def plain_picture(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.from_numpy(plain(next(container.decode(video=0))).copy())


def cpu_seconds() -> float:
    """User and system time of this process and its workers."""
    pids = os.getpid(), *(child.pid for child in multiprocessing.active_children())
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(ticks) for stat in stats for ticks in stat[11:13]) / os.sysconf("SC_CLK_TCK")


def rate(items: Iterator, count: int) -> tuple[float, float]:
    """Items per second and cores used, the first item not counted: starting workers is not loading."""
    next(items)
    used, start = cpu_seconds(), time.perf_counter()
    for _ in range(count):
        next(items)
    seconds = time.perf_counter() - start
    return count / seconds, (cpu_seconds() - used) / seconds


def again(load: Callable[[int], object], n: int) -> Iterator:
    i = 0
    while True:
        yield load(i % n)
        i += 1


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="items of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("pairs", "clips"):
            shutil.copytree(MEDIA / name, folder / name)
        sources = {
            "pairs": Pairs(folder / "pairs", HEIGHT, WIDTH),
            "clips": Clips(folder / "clips", FRAMES, FPS, HEIGHT, WIDTH),
        }
        loops = {
            "pairs": lambda row: [plain_picture(file) for file in row.files],
            "clips": lambda row: plain_clip(row.files[0]),
        }
        for name, data in sources.items():
            files = data.rows
            loop = again(lambda i, n=name, r=files: loops[n](r[i]), len(files))
            alone, alone_cores = rate(loop, args.count)
            for workers in args.workers:
                found, cores = rate(batches(data, 1, seed=0, workers=workers), args.count)
                rows.append([name, workers, found, cores, alone, alone_cores, found / alone])
                print(
                    f"{name}, {workers} workers: {found:.2f}/s on {cores:.2f} cores; plain {alone:.2f}/s on "
                    f"{alone_cores:.2f}; {found / alone:.2f}"
                )
    columns = "what", "workers", "a second", "cores", "plain, a second", "plain, cores", "ratio"
    write_csv(Path(__file__).with_suffix(".csv"), columns, rows, f"{os.cpu_count()} cores")


if __name__ == "__main__":
    run(main)
