"""Filling the cache of latents and text states, beside the loop over diffusers and transformers it replaces.

    python -m benchmarks.cache           # prints a table and writes cache.csv

Pairs and clips of the micro-world with its base's VAE and T5 in bf16: pictures, clips, every frame of a clip
alone (it may become the reference) and prompts, written to disk. Both sides decode with sdv.data. The two
take turns in processes of their own, then two processes of ours share the work; loading is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

import weights
from benchmarks import alternating
from benchmarks.results import write_csv
from microworld import studio
from sdv.data.cache import Cache, Networks
from sdv.data.media import from_uint8
from sdv.data.rows import Clips, Pairs
from sdv.run import parallel
from sdv.run.settings import Parser, run

WORLD = studio.ROOT / "out/cache-benchmark"
PAIRS, CLIPS = 256, 32
FIELDS = "seconds", "gigabytes"


def rows() -> tuple[Pairs, Clips]:
    layout = weights.open_backbone(studio.TOY)
    sides = layout.height, layout.width
    return Pairs(WORLD / "pairs", *sides), Clips(WORLD / "clips", layout.frames, layout.fps, *sides)


def ours(folder: Path) -> dict[str, float]:
    rank, world, _ = parallel.start("cpu")
    backbone = weights.load_backbone(
        studio.TOY, "cpu", torch.bfloat16, ("vae", "text"), log=lambda line: None
    )
    files = (weights.sources(backbone.layout, (part,)) for part in ("vae", "text"))
    cache, sources = Cache(folder, *files, "bfloat16"), rows()
    networks = Networks(lambda x: backbone.vae.encode(x.bfloat16()), backbone.text)
    prompts = {source.prompt(row) for source in sources for row in source.rows}
    with torch.no_grad():
        fill = partial(cache.fill, sources, prompts, lambda: networks, rank, world, parallel.wait)
        return alternating.measured(fill)


def theirs(folder: Path) -> dict[str, float]:
    """What a precompute script does: sample after sample, a file for each."""
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5EncoderModel, T5Tokenizer

    vae = AutoencoderKLCogVideoX.from_pretrained(studio.TOY / "vae", torch_dtype=torch.bfloat16)
    text = T5EncoderModel.from_pretrained(studio.TOY / "text_encoder", torch_dtype=torch.bfloat16)
    tokenizer = T5Tokenizer.from_pretrained(studio.TOY / "tokenizer")
    length = weights.open_backbone(studio.TOY).text_tokens

    def encode(x: torch.Tensor) -> torch.Tensor:
        return vae.encode(from_uint8(x)[None].bfloat16()).latent_dist.mean * vae.config.scaling_factor

    def work() -> None:
        for source in rows():
            for i, row in enumerate(source.rows):
                item = source.load(i, torch.Generator())
                ids = tokenizer(source.prompt(row), padding="max_length", max_length=length).input_ids
                kept = {"text": text(torch.tensor([ids])).last_hidden_state}
                if isinstance(source, Pairs):
                    kept |= {view: encode(item[view][:, None]) for view in ("ref", "target")}
                else:
                    frames = [encode(frame[:, None]) for frame in item["clip"].unbind(1)]
                    kept |= {"clip": encode(item["clip"]), "frames": torch.cat(frames, 2)}
                torch.save(kept, folder / f"{type(source).__name__}-{i}.pt")

    with torch.no_grad():
        return alternating.measured(work)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--child", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"ours": ours, "diffusers": theirs}[args.child](Path(folder))))
        return
    studio.make_world(WORLD, pairs=PAIRS, clips=CLIPS)
    taken = alternating.run("benchmarks.cache", ("ours", "diffusers"), args.pairs)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.cache"]
    taken["two"] = [
        json.loads(subprocess.check_output([sys.executable, *launch, "--child", "ours"]).splitlines()[-1])
        for _ in range(args.pairs)
    ]
    # A frame of a picture or clip that goes through the VAE, every clip's twice.
    frames = 2 * PAIRS + CLIPS * 2 * weights.open_backbone(studio.TOY).frames
    rows = []
    for side, of in taken.items():
        seconds, memory = (statistics.median(turn[field] for turn in of) for field in FIELDS)
        rows.append([side, seconds, frames / seconds, memory, args.pairs])
        print(f"{side:10}{seconds:7.2f} s {frames / seconds:7.1f} frames/s {memory:6.2f} GB")
    columns = "side", "seconds", "frames a second", "GB", "pairs"
    about = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    write_csv(Path(__file__).with_suffix(".csv"), columns, rows, about)
    for field in FIELDS:
        print(f"ours / diffusers, {field}: {alternating.compare(taken, field)[2]:.2f}")


if __name__ == "__main__":
    run(main)
