"""A full-size VAE with random weights beside diffusers' on this machine's CPU.

    python -m benchmarks.vae cogvideox          # prints a table and writes benchmarks/vae-cogvideox.csv
    python -m benchmarks.vae wan --pairs 1      # Wan2.2's

17 frames, both ways. The two take turns in processes of their own; ratios are pair by pair. Memory is what
the process grows by while it works, weights not counted.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import nn

from benchmarks import alternating
from benchmarks.results import write_csv
from sdv.run.settings import Parser, run

SHAPES = {  # of the pixels and of the latents
    "cogvideox": ((1, 3, 17, 240, 360), (1, 16, 5, 30, 45)),
    "wan": ((1, 3, 17, 256, 384), (1, 48, 5, 16, 24)),
}


def ours(model: str) -> nn.Module:
    if model == "wan":
        from sdv.models.wan_vae import WanVAE, WanVAEConfig

        return WanVAE(WanVAEConfig())
    from sdv.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig

    return CogVideoXVAE(CogVideoXVAEConfig())


def diffusers(model: str) -> nn.Module:
    if model == "wan":
        from diffusers import AutoencoderKLWan

        from sdv.models.wan_vae import MEAN, STD

        return AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
            patch_size=2, scale_factor_spatial=16, temperal_downsample=[False, True, True],
            latents_mean=list(MEAN), latents_std=list(STD),
        )  # fmt: skip
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(block_out_channels=(128, 256, 256, 512), scaling_factor=0.7)


@torch.inference_mode()
def child(who: str, model: str, what: str, dtype: torch.dtype) -> dict:
    """Seconds of one pass, and the growth of the process's peak memory in GB."""
    torch.set_default_dtype(dtype)  # made as float32 first, the weights themselves would be the peak
    vae = {"ours": ours, "diffusers": diffusers}[who](model).eval()
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
