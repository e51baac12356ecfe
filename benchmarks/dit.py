"""One LoRA training step of the transformer, ours beside diffusers + peft, on this machine's CPU.

    python -m benchmarks.dit            # prints a table and writes benchmarks/dit.csv

Full width (48 x 64 heads, 226 text tokens), two of the 42 layers, random weights, rank 128, the reference as
one clean frame before a one-frame target: what an identity step does, at 240 x 368. The two take turns in
processes of their own; the ratio is taken pair by pair. In bf16 a LoRA of peft in fp32 multiplies in fp32,
which ours, kept in fp32 as well, does not: so theirs is measured in bf16 too.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch

from benchmarks import alternating
from benchmarks.results import write_csv
from sdv.run.settings import Parser, run

LAYERS, RANK, ALPHA = 2, 128, 64.0
SIZE = (1, 16, 1, 30, 46)  # one latent frame of 240 x 368 pixels
SUFFIXES = ["to_q", "to_k", "to_v", "to_out.0", "proj", "text_proj"]
SUFFIXES += ["norm1.linear", "norm2.linear", "ff.net.2"]


def ours():
    from sdv.lora import add_lora
    from sdv.models.cogvideox_dit import CogVideoXConfig, CogVideoXDiT

    dit = CogVideoXDiT(CogVideoXConfig(layers=LAYERS))
    add_lora(dit, RANK, ALPHA, dit.lora_targets)
    return dit, lambda video, t, text, ref: dit(video, t, text, ref)


def diffusers():
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
    from peft import LoraConfig

    dit = CogVideoXTransformer3DModel(
        num_attention_heads=48, num_layers=LAYERS, use_rotary_positional_embeddings=True
    )
    dit.requires_grad_(False)
    dit.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=SUFFIXES))
    grid = SIZE[3] // 2, SIZE[4] // 2
    crop = get_resize_crop_region_for_grid(grid, 45, 30)

    def predict(video, t, text, ref):
        frames = torch.cat([ref, video], dim=2).transpose(1, 2)
        rope = get_3d_rotary_pos_embed(64, crop, grid, frames.shape[1])
        return dit(frames, text, t, image_rotary_emb=rope, return_dict=False)[0][:, 1:].transpose(1, 2)

    return dit, predict


def child(who: str, dtype: torch.dtype, their_lora: torch.dtype, repeats: int) -> dict:
    """Median seconds of a forward and backward pass, and the growth of the process's peak memory in GB."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # made as float32 first, the weights themselves would be the peak
    dit, predict = {"ours": ours, "diffusers": diffusers}[who]()
    torch.set_default_dtype(torch.float32)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if who == "ours" else their_lora)
    video, ref = torch.randn(SIZE, dtype=dtype), torch.randn(SIZE, dtype=dtype)
    text, t = torch.randn(1, 226, 4096, dtype=dtype), torch.tensor([500])
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        predict(video, t, text, ref).float().square().mean().backward()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds[1:]), "gigabytes": (peak - before) * 1024 / 1e9}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="turns that each side takes")
    parser.add_argument("--repeats", type=int, default=3, help="steps in a turn")
    parser.add_argument("--child", nargs=3, metavar=("WHO", "DTYPE", "LORA"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, *dtypes = args.child
        print(json.dumps(child(who, *(getattr(torch, dtype) for dtype in dtypes), args.repeats)))
        return
    rows = []
    for dtype, lora in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        words = dtype, lora, "--repeats", str(args.repeats)
        taken = alternating.run("benchmarks.dit", ("ours", "diffusers"), args.pairs, *words)
        for field in ("seconds", "gigabytes"):
            mine, theirs, ratio = alternating.compare(taken, field)
            rows.append([dtype, lora, field, mine, theirs, ratio])
            print(f"{dtype}, their LoRA {lora}: {field} {mine:.3f}, theirs {theirs:.3f}, ratio {ratio:.3f}")
    columns = "dtype", "their LoRA", "figure", "ours", "diffusers + peft", "ratio"
    file, threads = Path(__file__).with_suffix(".csv"), torch.get_num_threads()
    write_csv(file, columns, rows, f"{threads} threads", torch=torch.__version__)


if __name__ == "__main__":
    run(main)
