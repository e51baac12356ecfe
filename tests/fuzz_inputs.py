"""Inputs of the fuzzer: good files of every kind that is read, small damages, and what became of one."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

import weights
from sdv.data import media
from sdv.data.rows import CLIP, PAIR, Clips, Pairs, scan_rows
from sdv.lora import add_lora
from weights.tiny import CONFIGS, CORPUS, create, train_vocabulary

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
    """One input: what it is, the file that an error has to name, what reads it, the checkpoint it is of."""

    label: str
    path: Path
    read: Callable[[], object]
    checkpoint: Path | None = None


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


NUMBERS = b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x80\0\0\0", b"\0\1\0\0", b"\xff\xff"


def mutate(data: bytes, rng: random.Random, low: int = 0, high: int = 0) -> tuple[str, bytes]:
    """A small damage between two places (0: the end): its kind, and the bytes."""
    out, high = bytearray(data), min(high or len(data), len(data))
    kind = rng.choice(["bit", "bit", "bytes", "cut", "splice", "zero", "number", "twice"])
    at, size = rng.randrange(low, high), rng.choice([1, 4, 16, 100, 500])
    if kind == "bit":
        for _ in range(rng.choice([1, 1, 2, 8])):
            out[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for _ in range(rng.choice([1, 4, 32])):
            out[rng.randrange(low, high)] = rng.randrange(256)
    elif kind == "cut":
        del out[at:]
    elif kind == "splice":
        source = rng.randrange(len(out))
        out[at : at + size] = out[source : source + size * rng.choice([0, 1, 2])]
    elif kind == "zero":
        out[at : at + size] = bytes(len(out[at : at + size]))
    elif kind == "number":
        value = rng.choice(NUMBERS)
        out[at : at + len(value)] = value
    else:
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
    return Try(f"{path.name} {kind}", path, partial(load_and_run, folder), folder)


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
    return Try(f"{path.parent.name} {field}", path, partial(load_and_run, folder), folder)


TARGETS: dict[str, Callable[[Path, Path, random.Random], Try]] = {
    "pictures": partial(media_tries, "pictures"),
    "clips": partial(media_tries, "clips"),
    "rows": row_tries,
    "adapters": adapter_tries,
    "weights": weight_tries,
    "configs": config_tries,
}


# Verdicts


class Late(BaseException):
    """The time of an input is over."""


def verdict(one: Try) -> tuple[str, str]:
    """(column, what was said)."""
    names = one.path.name, f"{one.path.parent.name}/", str(one.checkpoint or one.path)
    try:
        one.read()
    except Late:
        return "hang", ""
    except (ValueError, OSError) as error:
        clear = any(name in str(error) for name in names) and not isinstance(error, UnicodeError)
        return ("clear" if clear else "unnamed"), f"{type(error).__name__} {error}"
    except BaseException as error:
        text = f"{type(error).__name__} {error}"
        full = isinstance(error, MemoryError) or "memory" in text or "alloc" in text
        return ("memory" if full else "traceback"), text
    return "accepted", ""
