"""One picture of a subject and a prompt -> a video of that subject.

    python sample.py --backbone CogVideoX-5b --adapter adapter.safetensors \
        --ref dog.jpg --prompt "a white dog runs along a beach" --out out/samples

Several prompts and several seeds share one load. Without --ref it is plain text-to-video. A seed means the
same noise on every machine, because noise is drawn on the CPU.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import weights
from sdv.data.captions import clean_caption
from sdv.data.media import fit, read_image, write_video
from sdv.data.sizes import check_size
from sdv.lora import merge
from sdv.run.settings import parse, run
from sdv.schedule import guidance
from sdv.seeds import generator, normal


@dataclass(frozen=True)
class Config:
    backbone: str  # checkpoint folder in the diffusers layout
    prompt: tuple[str, ...]  # one or more
    ref: str = ""  # picture of the subject; none: text-to-video
    adapter: str = ""  # LoRA file; none: the base model
    lora_alpha: float | None = None  # for an adapter file that does not say it
    merge: bool = False  # fold the adapter into the weights: faster, but rounded to their dtype
    negative: str | None = None  # what to move away from; the model's own words if not given
    out: str = "out/samples"  # folder for the MP4 files
    seed: tuple[int, ...] = (0,)  # one or more
    steps: int = 50  # denoising steps
    sampler: str = ""  # CogVideoX: ddim or dpm; Wan: unipc or euler; the checkpoint's own if not given
    guidance: float | None = None  # the model's own if not given
    dynamic_guidance: bool = False  # the vendor's cosine guidance
    height: int | None = None  # pixels; sizes and rate are the model's own if not given
    width: int | None = None  # pixels
    frames: int | None = None  # 4k + 1
    fps: float | None = None  # of the written file
    ref_fit: Literal["crop", "pad"] = "crop"  # reference to the size: cut, or white borders (paper's tests)
    tiling: bool = False  # decode in spatial tiles: less memory
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where it runs
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"  # of networks; the sampler is fp32


# ── The loop ────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def generate(
    backbone: weights.Backbone,
    texts: Tensor,
    blank: Tensor,
    refs: Tensor | None,
    cfg: Config,
    seeds: Sequence[int],
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] under texts (B, L, D) and references (B, C, 1, H', W') or None.

    blank (1, L, D) is the negative prompt. Guidance is on the text only: the reference stands in both halves,
    so the subject is never argued away. The network is called as in training.
    """
    dit, schedule = backbone.dit, backbone.schedule
    rngs = [generator(seed) for seed in seeds]
    noise = normal((len(rngs), *latent_shape(backbone.layout, cfg)), rngs).to(cfg.device)
    texts = torch.cat([blank.expand_as(texts), texts]).to(dit.dtype)
    refs = None if refs is None else torch.cat([refs, refs]).to(dit.dtype)

    def denoise(x: Tensor, t: int, i: int) -> Tensor:
        both, times = torch.cat([x, x]).to(dit.dtype), torch.full((2 * len(x),), t, device=x.device)
        uncond, cond = dit(both, times, texts, refs).float().chunk(2)
        progress()
        return uncond + guidance(cfg.guidance, t, cfg.steps, cfg.dynamic_guidance) * (cond - uncond)

    sampler = schedule.samplers[cfg.sampler or schedule.default_sampler]
    latents = sampler(schedule, denoise, noise, cfg.steps, rngs).to(dit.dtype)  # (B, C, T', H', W')
    return torch.cat([backbone.vae.decode(one[None]).float().cpu() for one in latents])


def latent_shape(layout: weights.Layout, cfg: Config) -> tuple[int, int, int, int]:
    """(C, T', H', W') of a video of the asked size."""
    frames = (cfg.frames - 1) // layout.temporal_ratio + 1
    size = cfg.height // layout.spatial_ratio, cfg.width // layout.spatial_ratio
    return layout.channels, frames, *size


def with_defaults(cfg: Config, layout: weights.Layout) -> Config:
    """Fill what was not given with the model's own values; refuse what cannot be before loading."""
    missing = [name for name, value in vars(cfg).items() if value is None and hasattr(layout, name)]
    cfg = dataclasses.replace(cfg, **{name: getattr(layout, name) for name in missing})
    check_size(cfg.height, cfg.width, cfg.frames, layout.spatial_ratio, layout.temporal_ratio, layout.patch)
    layout.schedule.timesteps(cfg.steps)
    if cfg.sampler not in ("", *layout.schedule.samplers):
        raise ValueError(f"--sampler {cfg.sampler}: this model has {', '.join(layout.schedule.samplers)}")
    return cfg


# ── The script ──────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    cfg = parse(Config, __doc__)
    cfg = dataclasses.replace(cfg, prompt=tuple(p and clean_caption(p, "--prompt") for p in cfg.prompt))
    dtype = getattr(torch, cfg.dtype)

    # 1. Whatever can be wrong with the input is found before the weights are read: the sizes, the picture,
    #    and the adapter, which is tried on a model without memory.
    layout = weights.open_backbone(cfg.backbone)
    cfg = with_defaults(cfg, layout)
    picture = fit(read_image(cfg.ref), cfg.height, cfg.width, cfg.ref_fit) if cfg.ref else None
    if cfg.adapter:
        with torch.device("meta"):
            print(weights.load_adapter(layout.parts["dit"].build(), cfg.adapter, cfg.lora_alpha))

    # 2. The text encoder is as large as the transformer and is needed once: it goes before the other comes.
    text = weights.load_backbone(cfg.backbone, cfg.device, dtype, parts=("text",)).text
    texts = {prompt: text([prompt]) for prompt in (*cfg.prompt, cfg.negative)}
    del text

    # 3. The rest of the model, and the reference as one clean latent frame.
    backbone = weights.load_backbone(cfg.backbone, cfg.device, dtype, parts=("dit", "vae"))
    backbone.vae.tiling = cfg.tiling
    if cfg.adapter:
        weights.load_adapter(backbone.dit, cfg.adapter, cfg.lora_alpha)
    if cfg.merge:
        merge(backbone.dit)
    ref = None
    if picture is not None:
        with torch.no_grad():
            ref = backbone.vae.encode(picture[None, :, None].to(cfg.device, dtype))

    # 4. One video for every prompt and seed.
    jobs = list(product(enumerate(cfg.prompt), cfg.seed))
    bar = tqdm(total=len(jobs) * cfg.steps, unit="step")
    for (number, prompt), seed in jobs:
        start = time.perf_counter()
        (clip,) = generate(backbone, texts[prompt], texts[cfg.negative], ref, cfg, [seed], bar.update)
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48]
        path = Path(cfg.out) / f"{number:02d}-seed{seed}-{words}.mp4"
        write_video(path, clip, cfg.fps)
        seconds = time.perf_counter() - start
        bar.write(f"{path}  {cfg.frames} frames {cfg.width}x{cfg.height}  {seconds:.1f} s")
    bar.close()


if __name__ == "__main__":
    run(main)
