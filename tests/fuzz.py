"""Mutated files for everything that is read from a disk: a good file with a small damage, or a config with one
wrong value. Nothing may end in a traceback, without a name, in a crash, in no time, or with the memory full.

    python tests/fuzz.py                                  # a minute for each target
    python tests/fuzz.py --target clips --seconds 600 --seed 7 --keep out/fuzz

A child process works, with 6 GB and 15 s for an input; a new one goes on after it has died. Columns:
    accepted    read without a word (not a proof that pixels or weights are right)
    clear       ValueError or OSError with the name of the file or its folder
    unnamed     one without it        traceback    any other exception
    hang        over 15 s             memory       refused, or 1.5 GB more than before        crash    it died
One seed gives one sequence of inputs. The exit status is 1 if one of the last five columns is not zero.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import numpy as np
import torch

import weights
from sdv.data import media
from sdv.data.rows import CLIP, PAIR, Clips, Pairs, scan_rows
from sdv.lora import add_lora
from weights.tiny import CONFIGS, CORPUS, create, train_vocabulary

COLUMNS = ("accepted", "clear", "unnamed", "traceback", "hang", "memory", "crash")
SECONDS, GIGABYTES, GROWTH = 15, 6, 1.5  # of one input; GROWTH in GB
FILES = {
    "pictures": (".jpg", ".png", ".webp", ".bmp"),
    "clips": (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".ts"),
}
JSONS = (
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
WRONG = (-1, 0, 1, 3, 2.5, 10**6, 10**20, 1e308, float("nan"), "x", "8", None, [], {}, True, [1, 2], "absent")


class Try(NamedTuple):
    """One input: what it is, the file that an error has to name, and what reads it."""

    label: str
    path: Path
    read: Callable[[], object]


# Good files


def make_seeds(folder: Path) -> None:
    """Of every kind that is read, small."""
    y, x = np.mgrid[:48, :64]
    pictures = [
        np.stack([(x * 4 + t * 9) % 256, (y * 5 + t * 5) % 256, (x * y // 8 + t * 20) % 256], 2).astype(
            np.uint8
        )
        for t in range(24)
    ]
    for name, codec, pixels in (
        ("a.png", "png", "rgb24"), ("a.bmp", "bmp", "bgr24"), ("a.jpg", "mjpeg", "yuvj420p"),
        ("a.webp", "libwebp", "yuv420p"),
    ):  # fmt: skip
        coder = av.CodecContext.create(codec, "w")
        coder.width, coder.height, coder.pix_fmt, coder.time_base = 64, 48, pixels, 1
        frame = av.VideoFrame.from_ndarray(pictures[0], format="rgb24").reformat(format=pixels)
        (folder / name).write_bytes(
            b"".join(bytes(packet) for packet in coder.encode(frame) + coder.encode(None))
        )
    for name, codec, pixels in (
        ("a.mp4", "libx264", "yuv420p"), ("b.mp4", "libx265", "yuv420p"), ("a.mkv", "libx264", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"), ("a.webm", "libvpx", "yuv420p"), ("a.avi", "mpeg4", "yuv420p"),
        ("b.avi", "libx264", "yuv420p"), ("a.mov", "libx264", "yuv420p"), ("a.gif", "gif", "rgb8"),
    ):  # fmt: skip
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25, options=quiet)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    create(folder / "tiny", CONFIGS, train_vocabulary(CORPUS.strip().splitlines(), 256))
    dit = weights.load_backbone(folder / "tiny", parts=("dit",), log=lambda line: None).dit
    add_lora(dit, 4, 4.0, ("attn.q", "attn.v"))
    for name, kind in (("a.safetensors", "diffusers"), ("b.safetensors", "kohya")):
        weights.save_adapter(dit, folder / name, kind)


def mutate(data: bytes, rng: random.Random, low: int = 0, high: int = 0) -> tuple[str, bytes]:
    """A small damage between two places: its kind, and the bytes."""
    out, high = bytearray(data), min(high or len(data), len(data))
    kind = rng.choice(["bit", "bit", "bytes", "cut", "splice", "zero", "number", "twice"])
    at = rng.randrange(low, high)
    if kind == "bit":
        for _ in range(rng.choice([1, 1, 2, 8])):
            out[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for _ in range(rng.choice([1, 4, 32])):
            out[rng.randrange(low, high)] = rng.randrange(256)
    elif kind == "cut":
        del out[at:]
    elif kind == "splice":
        size, source = rng.choice([1, 4, 16, 200]), rng.randrange(len(out))
        out[at : at + size] = out[source : source + size * rng.choice([0, 1, 2])]
    elif kind == "zero":
        size = rng.choice([4, 64, 500])
        out[at : at + size] = bytes(len(out[at : at + size]))
    elif kind == "number":
        value = rng.choice(
            [b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x80\0\0\0", b"\0\1\0\0", b"\xff\xff"]
        )
        out[at : at + len(value)] = value
    else:
        size = rng.choice([8, 100, 1000])
        out[at:at] = out[at : at + size]
    return kind, bytes(out)


# Targets


def damaged(names: list[Path], work: Path, rng: random.Random, *spans: tuple[int, int]) -> tuple[str, Path]:
    """A mutated copy of one of the files; a span counts from the end if it is negative."""
    source = rng.choice(names)
    data = source.read_bytes()
    low, high = rng.choice([(0, 0), *spans])
    kind, data = mutate(data, rng, max(0, len(data) + low) if low < 0 else low, high)
    path = work / f"m_{source.name}"
    path.write_bytes(data)
    return f"{source.name} {kind}", path


def media_tries(kind: str, seeds: Path, work: Path, rng: random.Random) -> Try:
    names = sorted(path for path in seeds.iterdir() if path.suffix in FILES[kind])
    label, path = damaged(names, work, rng, (0, 700), (0, 1500), (-2500, 0))

    def read_clip() -> None:
        media.inspect_clip(path)
        media.read_clip(path, 5, 8, 32, 48, rng.choice([0.0, 0.7]))

    def read_picture() -> None:
        media.fit(media.read_image(path), 96, 144)

    return Try(label, path, read_clip if kind == "clips" else read_picture)


def row_tries(seeds: Path, work: Path, rng: random.Random) -> Try:
    """metadata.jsonl, or a caption beside its clip."""
    folder = work / "rows"
    folder.mkdir(exist_ok=True)
    for name in ("a.jpg", "a.mp4"):
        shutil.copyfile(seeds / name, folder / name)
    pair = {"reference_file_name": "a.jpg", "target_file_name": "a.jpg", "prompt": "ein Bär \U0001f43b"}
    lines = [json.dumps(pair, ensure_ascii=n % 2 == 0).encode() for n in range(4)]
    if rng.random() < 0.7:
        path, data = folder / "metadata.jsonl", b"\n".join(lines)
    else:
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        path, data = folder / "a.txt", "ein Bär \U0001f43b, der läuft".encode(rng.choice(["utf-8", "utf-16"]))
    kind, data = mutate(data, rng)
    path.write_bytes(data)

    def read() -> None:
        scan_rows(folder, PAIR if path.suffix == ".jsonl" else CLIP)
        Pairs(folder, 16, 16)[0] if path.suffix == ".jsonl" else Clips(folder, 5, 8, 16, 16)[0]

    return Try(f"{path.name} {kind}", path, read)


def adapter_tries(seeds: Path, work: Path, rng: random.Random) -> Try:
    names = sorted(seeds.glob("*.safetensors"))
    header = 8 + min(struct.unpack("<Q", name.read_bytes()[:8])[0] for name in names)
    label, path = damaged(names, work, rng, (0, header), (0, header), (0, 12))

    def read() -> None:
        with torch.device("meta"):
            dit = weights.open_backbone(seeds / "tiny").parts["dit"].build()
        weights.load_adapter(dit, path)

    return Try(label, path, read)


def load_and_run(folder: Path) -> None:
    """Every part of a tiny model once."""
    model = weights.load_backbone(folder, log=lambda line: None)
    with torch.no_grad():
        text = model.text(["a dog"])
        latent = model.vae.encode(torch.zeros(1, 3, 1, 32, 48))
        model.dit(latent, torch.tensor([500]), text, latent)
    model.schedule.timesteps(4)
    model.schedule.add_noise(latent, latent, torch.tensor([500]))


def weight_tries(seeds: Path, work: Path, rng: random.Random) -> Try:
    """A checkpoint of which one file is damaged: headers of weights, configs, the vocabulary."""
    folder, tiny = work / "checkpoint", seeds / "tiny"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny, folder)
    unread = ("model_index.json", "tokenizer_config.json")
    path = rng.choice(
        sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unread)
    )
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0] if path.suffix == ".safetensors" else 0
    kind, data = mutate(data, rng, 0, header)
    path.write_bytes(data)
    return Try(f"{path.name} {kind}", path, partial(load_and_run, folder))


def config_tries(seeds: Path, work: Path, rng: random.Random) -> Try:
    """A checkpoint with one wrong value in one field of a config."""
    folder, tiny = work / "configured", seeds / "tiny"
    if not folder.exists():
        shutil.copytree(tiny, folder)
    for name in JSONS:
        shutil.copyfile(tiny / name, folder / name)
    path = folder / rng.choice(JSONS)
    config = json.loads(path.read_text())
    field, value = rng.choice(sorted(config)), rng.choice(WRONG)
    config[field] = value
    if value == "absent":
        del config[field]
    path.write_text(json.dumps(config))
    return Try(f"{path.parent.name} {field}", path, partial(load_and_run, folder))


TARGETS: dict[str, Callable[[Path, Path, random.Random], Try]] = {
    "pictures": partial(media_tries, "pictures"),
    "clips": partial(media_tries, "clips"),
    "rows": row_tries,
    "adapters": adapter_tries,
    "weights": weight_tries,
    "configs": config_tries,
}


# The child


class Late(BaseException):
    """The alarm has rung."""


def verdict(one: Try) -> tuple[str, str]:
    """(column, what was said)."""
    names = one.path.name, f"{one.path.parent.name}/", str(one.path.parent)
    try:
        one.read()
    except Late:
        return "hang", ""
    except MemoryError as error:
        return "memory", str(error)
    except (ValueError, OSError) as error:
        clear = any(name in str(error) for name in names) and not isinstance(error, UnicodeError)
        return ("clear" if clear else "unnamed"), f"{type(error).__name__} {error}"
    except BaseException as error:
        text = f"{type(error).__name__} {error}"
        return ("memory" if "memory" in text or "alloc" in text else "traceback"), text
    return "accepted", ""


def work_on(target: str, first: int, seed: str, folder: Path) -> None:
    """Lines "B label", then "E column label said", for the inputs from the first on, without end."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))

    def ring(*_) -> None:
        raise Late

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    signal.signal(signal.SIGALRM, ring)
    for i in range(first, sys.maxsize):
        one = TARGETS[target](folder / "seeds", folder, random.Random(f"{seed}/{target}/{i}"))
        print(f"B\t{one.label}\t{one.path}", flush=True)
        before = peak()
        signal.alarm(SECONDS)
        column, said = verdict(one)
        signal.alarm(0)
        if peak() - before > GROWTH:
            column, said = "memory", f"{peak() - before:.1f} GB more; {said}"
        print(f"E\t{column}\t{one.label}\t{said[:200]!r}\t{one.path}", flush=True)


# The parent


def lines_of(process: subprocess.Popen, end: float) -> Iterator[str]:
    """Its lines, until it dies, is silent for too long, or the time is over."""
    buffer, heard = b"", time.monotonic()
    while time.monotonic() < end and time.monotonic() - heard < SECONDS + 15:
        if select.select([process.stdout], [], [], 0.2)[0]:
            heard = time.monotonic()
            if not (got := os.read(process.stdout.fileno(), 2**16)):
                return
            *lines, buffer = (buffer + got).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)


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

    while time.monotonic() < end:
        words = [sys.executable, __file__, "--child", target, str(i), seed, str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        begun, started = None, i
        for line in lines_of(process, end):
            kind, *rest = line.split("\t")
            if kind == "B":
                begun = rest
            elif kind == "E":
                count(*rest)
                i, begun = i + 1, None
        alive = process.poll() is None
        process.kill()
        process.wait()
        if time.monotonic() >= end:
            break
        if begun is None and i == started:
            raise RuntimeError(f"it does not start: {' '.join(words)}")
        if begun:
            count("hang" if alive else "crash", begun[0], f"status {process.returncode}", begun[1])
            i += 1
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
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        target, first, seed, folder = args.child
        work_on(target, int(first), seed, Path(folder))
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
