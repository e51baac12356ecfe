"""Loading the full-size CogVideoX-5B transformer (random bf16 weights in shards) beside diffusers.

    python -m benchmarks.load            # writes 11 GB into out/load once, prints a table, writes load.csv

The two take turns in processes of their own, files in the page cache. A pass ends when every page of the
weights has been read. Memory is the process's peak, its libraries not counted.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import weights
from benchmarks import alternating
from benchmarks.models import COGVIDEOX
from benchmarks.results import write_csv
from sdv.models.cogvideox_dit import CogVideoXConfig, CogVideoXDiT
from sdv.run.settings import Parser, run
from weights import tiny
from weights.cogvideox import DIT_NAMES
from weights.tensors import rename, reverse

SHARD_BYTES = 2.5e9
CONFIG = tiny.TRANSFORMER | COGVIDEOX["transformer"]


def write(folder: Path) -> None:
    """A checkpoint folder whose transformer has the 5B's shapes; the other parts are configs only."""
    others = {"vae/config.json": tiny.VAE | {"latent_channels": 16}}
    others |= {"text_encoder/config.json": tiny.TEXT_ENCODER | {"d_model": 4096}}
    configs = tiny.CONFIGS | others | {"transformer/config.json": CONFIG}
    tiny.write_configs(folder, configs, tiny.train_vocabulary(tiny.CORPUS.strip().splitlines(), 256))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CogVideoXDiT(CogVideoXConfig()).named_parameters()}
    shards, size = [{}], 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][rename(name, reverse(DIT_NAMES))] = shape
        size += 2 * shape.numel()
    index = {}
    for i, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_() for name, shape in shard.items()}
        save_file(tensors, folder / "transformer" / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    name = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    name.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def child(who: str, folder: Path) -> dict:
    """Seconds until every weight has been read, and the growth of the process's peak memory in GB."""
    if who == "diffusers":
        from diffusers import CogVideoXTransformer3DModel as Stock
    loaded = {}

    def load() -> None:
        if who == "diffusers":
            dit = Stock.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
        else:
            dit = weights.load_backbone(folder, "cpu", torch.bfloat16, ("dit",), log=lambda line: None).dit
        pages = (p.detach().view(-1)[::2048].view(torch.int16).sum() for p in dit.parameters())
        loaded.update(check=sum(map(int, pages)), size=sum(p.nbytes for p in dit.parameters()) / 1e9)

    return alternating.measured(load) | loaded


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--folder", type=Path, default=Path("out/load"))
    parser.add_argument("--child", metavar="WHO", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.folder)))
        return
    if not (args.folder / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file():
        write(args.folder)
    taken = alternating.run(
        "benchmarks.load", ("diffusers", "ours"), args.pairs, "--folder", str(args.folder)
    )
    assert len({turn["check"] for side in taken.values() for turn in side}) == 1, "not the same weights"
    rows, size = [], taken["ours"][0]["size"]
    for field in ("seconds", "gigabytes"):
        mine, theirs, ratio = alternating.compare(taken, field)
        rows.append([field, mine, theirs, ratio, size, args.pairs])
        print(f"{field:10} ours {mine:.2f}  diffusers {theirs:.2f}  ratio {ratio:.3f}  of {size:.2f} GB")
    columns = "figure", "ours", "diffusers", "ratio", "checkpoint GB", "pairs"
    write_csv(Path(__file__).with_suffix(".csv"), columns, rows, f"torch {torch.__version__}")


if __name__ == "__main__":
    run(main)
