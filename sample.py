"""One picture of a subject and a prompt -> a video of that subject.

    python sample.py --backbone CogVideoX-5b --adapter adapter.safetensors \\
        --ref dog.jpg --prompt "a white dog runs along a beach" --out out/samples
    python sample.py ... --manifest shots.jsonl     # lines {"prompt", "reference_file_name", "seed"}

Several prompts, seeds and references share one load. Without a reference it is plain text-to-video. A seed
gives the same noise on every machine, because noise is drawn on the CPU. Films that exist are kept, so the
same command continues where it was stopped.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import weights
from sdv.data.captions import clean_caption, say_cut
from sdv.data.files import make_folder
from sdv.data.media import fit, read_image, write_video
from sdv.data.pixels import say_crop
from sdv.data.sizes import with_model_defaults
from sdv.lora import merge, require_mergeable, round_lora
from sdv.run import settings
from sdv.run.films import Shot, film_names, list_film, read_shots
from sdv.run.settings import Count, Guidance, NotNegative, Positive, Rate, Seed
from sdv.schedule import VPrediction, guidance
from sdv.seeds import generator, normal


@dataclass(frozen=True)
class Film:
    """what to film"""

    backbone: str  # checkpoint folder in the layout of diffusers, or of Wan's vendor
    prompt: tuple[str, ...] = ()  # one or more
    ref: str = ""  # picture of the subject; none: text-to-video
    seed: tuple[Seed, ...] | None = None  # one or more [0]
    manifest: str = ""  # a list of films instead of the three above
    ref_fit: Literal["crop", "pad"] = "crop"  # reference to the size: cut, or white borders (paper's tests)
    adapter: str = ""  # LoRA file; none: the base model
    lora_alpha: Positive | None = None  # for an --adapter that does not say its alpha
    out: str = "out/samples"  # folder for the MP4 files
    height: Count | None = None  # pixels; sizes and rate are the model's own if not given
    width: Count | None = None  # pixels
    frames: Count | None = None  # 4k + 1
    fps: Rate | None = None  # of the written file


@dataclass(frozen=True)
class Config(Film):
    """how it is sampled"""

    steps: Count = 50  # denoising steps
    sampler: str = ""  # CogVideoX: ddim or dpm; Wan: unipc or euler; the checkpoint's own if not given
    guidance: Guidance | None = None  # on the text; 1: none, half the time; the model's own if not given
    ref_guidance: NotNegative = 1.0  # on the reference; 1: none (paper)
    dynamic_guidance: bool = False  # the vendor's cosine guidance on the text
    negative: str | None = None  # what to move away from; the model's own words if not given
    merge: bool = False  # fold the adapter into the weights: faster, but rounded to their dtype
    compile: bool = False  # torch.compile of each block: the first film waits for it
    tiling: bool = False  # decode in spatial tiles: less memory
    device: str = settings.DEVICE  # where it runs
    dtype: Literal["bfloat16", "float32"] = settings.DTYPE  # of networks; the sampler is fp32


# ── The loop ────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def generate(
    backbone: weights.Backbone,
    texts: Tensor,
    negative: Tensor,
    refs: Tensor | None,
    cfg: Config,
    seeds: Sequence[int],
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] under texts (B, L, D) and references (B, C, 1, H', W') or None.

    negative (1, L, D) is the negative prompt. The network is called as in training, and once more for each
    guidance:

        pred = e(text, ref) + (w - 1) [e(text, ref) - e(negative, ref)]
                            + (v - 1) [e(text, ref) - e(text, no ref)]

    w is the paper's guidance on the text: the reference stands on both sides, so that the subject is never
    argued away. v is guidance on the reference, which the paper has not; its image-token dropout has trained
    the branch without one. Dual guidance elsewhere (arXiv 2211.09800) gives up text and picture one after the
    other; here each is given up alone, so that 1 turns either of them off.
    """
    dit, schedule = backbone.dit, backbone.schedule
    rngs = [generator(seed) for seed in seeds]
    shape = backbone.layout.latent_shape(cfg.frames, cfg.height, cfg.width)
    noise = normal((len(rngs), *shape), rngs).to(cfg.device)
    texts, negatives = (x.to(cfg.device, dit.dtype) for x in (texts, negative.expand_as(texts)))
    refs = None if refs is None else refs.to(dit.dtype)
    no_tokens = torch.empty(0, dtype=torch.long)  # of the reference stay, as dropout leaves them

    def denoise(x: Tensor, t: float, i: int) -> Tensor:
        x, times = x.to(dit.dtype), torch.full((len(x),), t, device=x.device)
        pred = cond = dit(x, times, texts, refs).float()
        w = guidance(cfg.guidance, t, cfg.steps, cfg.dynamic_guidance)
        if w != 1:
            pred = pred + (w - 1) * (cond - dit(x, times, negatives, refs).float())
        if refs is not None and cfg.ref_guidance != 1:
            pred = pred + (cfg.ref_guidance - 1) * (cond - dit(x, times, texts, refs, no_tokens).float())
        if not pred.isfinite().all():
            raise FloatingPointError(
                f"denoising step {i + 1} of {cfg.steps}: the prediction is not finite. Look at the adapter "
                "and its strength, or try --dtype float32"
            )
        progress()
        return pred

    sampler = schedule.samplers[cfg.sampler or schedule.default_sampler]
    latents = sampler(schedule, denoise, noise, cfg.steps, rngs).to(dit.dtype)  # (B, C, T', H', W')
    return torch.cat([backbone.vae.decode(one[None]).float().cpu() for one in latents])


def with_defaults(cfg: Config, layout: weights.Layout) -> Config:
    """Fill what was not given with the model's own values; refuse what cannot be before loading."""
    if cfg.negative:
        cfg = dataclasses.replace(cfg, negative=clean_caption(cfg.negative, "--negative"))
    guides = cfg.negative is not None or cfg.dynamic_guidance
    cfg = with_model_defaults(cfg, layout)
    if cfg.guidance == 1 and guides:
        raise ValueError("--guidance 1 switches guidance off: leave out --negative and --dynamic-guidance")
    if cfg.dynamic_guidance and not isinstance(layout.schedule, VPrediction):
        raise ValueError("--dynamic-guidance is of CogVideoX's vendor: this model has none")
    layout.schedule.timesteps(cfg.steps)
    if cfg.sampler not in ("", *layout.schedule.samplers):
        raise ValueError(f"--sampler {cfg.sampler}: this model has {', '.join(layout.schedule.samplers)}")
    return cfg


# ── The films ───────────────────────────────────────────────────────────────────────────────────────────


def wanted(cfg: Config) -> list[Shot]:
    """The films that are asked for, by prompts and seeds or by a manifest."""
    if bool(cfg.prompt) == bool(cfg.manifest) or (cfg.manifest and (cfg.ref or cfg.seed)):
        raise ValueError("give --prompt, with --ref and --seed, or --manifest, which names all three")
    if len(cfg.prompt) > 1 and not any(" " in prompt for prompt in cfg.prompt):
        print(f"{len(cfg.prompt)} prompts of one word each; if they are one prompt, put it in quotes")
    if not cfg.adapter and (cfg.merge or cfg.lora_alpha is not None):
        raise ValueError("--merge and --lora-alpha are about an adapter: give --adapter as well")
    if cfg.manifest:
        shots = read_shots(cfg.manifest)
    else:
        for prompt in cfg.prompt:
            if os.path.isfile(prompt) and Path(prompt).suffix:  # "dog" may be meant as a word
                raise ValueError(
                    f"--prompt {prompt}: is a file; give words, or --manifest for a list of films"
                )
        ref = Path(cfg.ref) if cfg.ref else None
        prompts = [prompt and clean_caption(prompt, "--prompt") for prompt in cfg.prompt]
        shots = [Shot(prompt, ref, seed) for prompt in prompts for seed in cfg.seed or (0,)]
    bare = sum(not shot.ref for shot in shots)
    if cfg.ref_guidance != 1 and bare == len(shots):
        raise ValueError(
            f"--ref-guidance {cfg.ref_guidance:g}: there is no reference to be guided by; give --ref"
        )
    if cfg.ref_guidance != 1 and bare:
        print(f"{bare} of {len(shots)} films have no reference: --ref-guidance has no effect on them")
    return shots


# ── The script ──────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    cfg = settings.parse(Config, __doc__)
    dtype, out = getattr(torch, cfg.dtype), Path(cfg.out)

    # 1. Whatever can be wrong with the input is found before the weights are read: the sizes, the pictures,
    #    and the adapter, which is tried on a model that has shapes and no numbers.
    shots = wanted(cfg)
    settings.check_device(cfg.device)
    layout = weights.open_backbone(cfg.backbone)
    cfg = with_defaults(cfg, layout)
    weights.check_weights(layout)
    pictures = list(dict.fromkeys(shot.ref for shot in shots if shot.ref))
    for ref in pictures:
        _, height, width = read_image(ref).shape
        if cfg.ref_fit == "crop" and (said := say_crop(height, width, cfg.height, cfg.width)):
            print(f"{ref}: {said}; --ref-fit pad shows all of it")
    if cfg.adapter:
        with torch.device("meta"):
            dit = layout.parts["dit"].build()
            print(weights.load_adapter(dit, cfg.adapter, cfg.lora_alpha))
        if cfg.merge:
            require_mergeable(dit, cfg.adapter)
        if not pictures:
            print("no --ref: text-to-video, by the base with its adapter")
    elif pictures:
        print("no --adapter: the base alone has not learned to look at a reference")
    negative = [cfg.negative] if cfg.negative and cfg.guidance != 1 else []
    prompts = dict.fromkeys([*(shot.prompt for shot in shots), *negative])
    cut = say_cut(((f"{prompt:.30}...", prompt) for prompt in prompts), *weights.token_counter(layout))
    if cut:
        print(cut)
    adapter = weights.adapter_files(Path(cfg.adapter)) if cfg.adapter else []
    note = layout.parts["text"].note  # how prompts are cleaned depends on what is installed
    made_by = dataclasses.asdict(cfg) | ({"cleaning": note} if note else {})
    names = film_names(shots, made_by, weights.sources(layout), adapter)
    films = dict(zip(names, shots, strict=True))
    for name in [name for name in films if (out / name).exists()]:
        print(f"{out / name} is there already and is kept")
        list_film(out, name, films.pop(name))
    if not films:
        return
    make_folder(out)

    # 2. The text encoder is as large as the transformer and is needed once: it goes before the other comes.
    text = weights.load_backbone(cfg.backbone, cfg.device, dtype, parts=("text",)).text
    asked = {cfg.negative, *(shot.prompt for shot in films.values())}
    texts = {prompt: text([prompt]).cpu() for prompt in asked}  # 4 MB each: a long list would fill the GPU
    del text

    # 3. The rest of the model, and each reference as one clean latent frame.
    backbone = weights.load_backbone(cfg.backbone, cfg.device, dtype, parts=("dit", "vae"))
    if cfg.adapter:
        weights.load_adapter(backbone.dit, cfg.adapter, cfg.lora_alpha)
    if cfg.merge:
        merge(backbone.dit)
    else:
        round_lora(backbone.dit)
    if cfg.compile:
        for block in backbone.dit.blocks:
            block.compile()
    with torch.no_grad():
        refs = {}
        for ref in {shot.ref for shot in films.values() if shot.ref}:
            picture = fit(read_image(ref), cfg.height, cfg.width, cfg.ref_fit)
            refs[ref] = backbone.vae.encode(picture[None, :, None].to(cfg.device, dtype))
    backbone.vae.tiling = cfg.tiling  # of films alone: a picture fits

    # 4. The films, one by one.
    bar = tqdm(total=len(films) * cfg.steps, unit="step")
    for name, shot in films.items():
        start = time.perf_counter()
        prompts = texts[shot.prompt], texts[cfg.negative]
        (clip,) = generate(backbone, *prompts, refs.get(shot.ref), cfg, [shot.seed], bar.update)
        write_video(out / name, clip, cfg.fps, durable=True)
        list_film(out, name, shot)
        seconds = time.perf_counter() - start
        bar.write(f"{out / name}  {cfg.frames} frames {cfg.width}x{cfg.height}  {seconds:.1f} s")
    bar.close()


if __name__ == "__main__":
    settings.run(main)
