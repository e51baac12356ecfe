"""The full-size CogVideoX VAE (215,583,907 random parameters) beside diffusers' on this machine's CPU.

    python -m benchmarks.vae            # prints a table and writes benchmarks/vae.csv

17 frames of 240 x 360, both ways. The two take turns in processes of their own; ratios are pair by pair.
Memory is what the process grows by while it works, weights not counted.
"""

import argparse
import csv
import datetime
import json
import platform
from pathlib import Path

import torch

from benchmarks import turns

FRAMES, HEIGHT, WIDTH = 17, 240, 360


def ours():
    from sdv.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig

    vae = CogVideoXVAE(CogVideoXVAEConfig())
    return vae, vae.encode, vae.decode


def diffusers():
    from diffusers import AutoencoderKLCogVideoX

    widths = (128, 256, 256, 512)
    vae = AutoencoderKLCogVideoX(block_out_channels=widths, scaling_factor=0.7)
    return vae, lambda clip: vae.encode(clip).latent_dist.mean, lambda latents: vae.decode(latents).sample


@torch.inference_mode()
def child(who: str, what: str, dtype: torch.dtype) -> dict:
    """Seconds of one pass, and the growth of the process's peak memory in GB."""
    vae, encode, decode = {"ours": ours, "diffusers": diffusers}[who]()
    vae.eval().to(dtype)
    shape = (1, 3, FRAMES, HEIGHT, WIDTH) if what == "encode" else (1, 16, 5, HEIGHT // 8, WIDTH // 8)
    x = torch.randn(shape, dtype=dtype)
    return turns.measured(lambda: (encode if what == "encode" else decode)(x))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--pairs", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--child", nargs=3, metavar=("WHO", "WHAT", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, what, dtype = args.child
        print(json.dumps(child(who, what, getattr(torch, dtype))))
        return
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dtype", "pass", "figure", "ours", "diffusers", "ratio", "pairs", "machine", "date"])
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        for dtype in args.dtypes:
            for what in ("encode", "decode"):
                taken = turns.take("benchmarks.vae", ("ours", "diffusers"), args.pairs, what, dtype)
                for field in ("seconds", "gigabytes"):
                    mine, theirs, ratio = turns.compare(taken, field)
                    today = str(datetime.date.today())
                    writer.writerow([dtype, what, field, mine, theirs, ratio, args.pairs, machine, today])
                    file.flush()
                    print(f"{dtype:9}{what:7}{field:10} ours {mine:7.2f} diffusers {theirs:7.2f} {ratio:.3f}")


if __name__ == "__main__":
    main()
