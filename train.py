"""Teach a text-to-video model to take its subject from one picture: a LoRA, image pairs, and a few clips.

The method (arXiv 2504.17816) in six lines, each a few lines of code on the next screen:
    1. identity injection       look at one picture of a subject, denoise another one       identity_pair
    2. motion preservation      look at one frame of a clip, denoise the whole clip         motion_pair
    3. stochastic switching     a coin picks the task of each step: motion with p = 0.2     draw_task
    4. random reference frame   any frame of the clip, so that no fixed one can be pasted   motion_pair
    5. image-token dropout      half of the motion steps hide the reference                 motion_pair
    6. one gradient             both tasks minimise one denoising loss over one LoRA        the ruled box

    make demo                                                             # tiny model, real photos, CPU
    python train.py --backbone CogVideoX-5b --pairs pairs --clips clips   # the paper's recipe, one 80 GB GPU
    python train.py ... --resume                                          # goes on from the newest save
    python -m sdv.diagnostics out/run      # do the tasks fight? needs --probe-pairs and --probe-clips
"""

import dataclasses
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sample
import weights
from sdv import diagnostics, diagnostics_report
from sdv.cache import Cache, Cached, Networks
from sdv.data import Clips, Pairs, Rows, batches, check_size
from sdv.lora import act_on_reference, add_lora, lora_modules, lora_parameters
from sdv.media import fit, read_image, write_video
from sdv.objectives import (
    Draws,
    Losses,
    Pair,
    Schedule,
    denoising_loss,
    draws_of,
    keep_tokens,
    random_frame,
)
from sdv.positions import place_reference
from sdv.seeds import generator
from sdv.settings import parse, run


@dataclass(frozen=True)
class Config:
    # method
    p_video: float = 0.2  # probability of a motion step (paper: 0.2)
    coin: Literal["step", "micro"] = "step"  # tossed once a step (paper) or for each micro-batch
    ref_frame: Literal["random", "first"] = "random"  # reference of a motion step (paper: random)
    dropout: Literal["whole", "tokens"] = "whole"  # image-token dropout on motion steps, of what
    p_drop: float = 0.5  # its probability (paper: 0.5)
    view_drop: float = 0.0  # the whole reference dropped on identity steps (paper: never; supplement: 0.5)
    crop_jitter: float = 0.0  # random crop of each picture of a pair, share of its side (supplement only)
    cls_token: str = "<cls> "  # put before the prompt of identity steps (paper: yes)
    ref_position: str = ""  # where the reference sits beside the video; the model's own if not given
    t_shift: float = 1.0  # above 1, training is at noisier times: u -> s u / (1 + (s - 1) u) (paper: 1)
    # data
    backbone: str = ""  # checkpoint folder in the diffusers layout
    pairs: str = ""  # folder of image pairs with metadata.jsonl (paper: 200,000)
    clips: str = ""  # folder of captioned clips (paper: 4,000)
    height: int | None = None  # pixels; sizes and rate are the model's own if not given (paper: 480)
    width: int | None = None  # pixels (paper: 720)
    frames: int | None = None  # of a clip, 4k + 1 (paper: 49)
    fps: float | None = None  # clips are resampled to it by their timestamps (paper: 8)
    window: Literal["first", "random"] = "first"  # the part of a long clip (paper: first)
    workers: int = 2  # processes that decode ahead
    verify: int = 64  # rows of each folder decoded before the start; all: python -m sdv.data check
    cache: str = ""  # folder for latents and text states, encoded once; none: encoded in every step
    cache_frames: int = 0  # frames of a clip that can be its reference, where there is a cache; 0: all
    # adapter
    rank: int = 128  # (paper: 128)
    alpha: float = 64.0  # scale = alpha / rank (paper: 64)
    lora_dropout: float = 0.0  # on the input of A (paper's text: 0.2; released code: none)
    targets: tuple[str, ...] = ()  # layers, by the end of their path; the model's own list if not given
    lora_tokens: Literal["all", "ref"] = "all"  # what it acts on (released code: all; text: the subject)
    adapter: str = ""  # start from this LoRA file, with its rank and alpha, instead of from B = 0
    # optimisation
    steps: int = 4000  # (paper: 4,000)
    identity_batch: int = 8  # pairs in a micro-batch; x accumulate = 256 (paper: 256)
    motion_batch: int = 1  # clips in a micro-batch; x accumulate = 32 (paper: 32)
    accumulate: int = 32  # micro-batches in a step
    lr: float = 5e-5  # of AdamW (paper: 5e-5)
    warmup: int = 200  # steps of linear warm-up, constant after it (paper: 200)
    betas: tuple[float, ...] = (0.9, 0.95)  # (paper: 0.9 0.95)
    eps: float = 1e-8  # (paper: 1e-8)
    weight_decay: float = 1e-4  # (paper: 1e-4)
    max_grad_norm: float = 1.0  # (paper: 1.0)
    # gradients
    pcgrad: Literal["none", "exact", "buffer-4", "buffer-8"] = "none"  # gradient surgery (paper: none)
    probe_every: int = 25  # steps between gradient probes; 0, or no held-out data: none (paper: 5 to 50)
    probe_batches: int = 4  # micro-batches in each of a task's two halves; 3 or more for intervals
    probe_pairs: str = ""  # folder of pairs whose subjects are not trained on
    probe_clips: str = ""  # folder of clips that are not trained on
    # system
    out: str = "out/run"  # config.json, metrics.jsonl, samples, saves
    resume: bool = False  # go on from the newest save in --out
    seed: int = 0  # of every draw
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where it runs
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"  # of the frozen networks
    checkpoint_every: int = 1  # recompute every n-th block in backward, less memory for more time; 0: none
    save_every: int = 250  # steps
    keep: int = 3  # newest saves that stay
    sample_every: int = 0  # steps between sample videos; 0: none
    sample_ref: str = ""  # their reference picture
    sample_prompt: str = ""  # their prompt
    sample_steps: int = 50  # their denoising steps


# ── THE METHOD ──────────────────────────────────────────────────────────────────────────────────────────


class Encoders(NamedTuple):
    """The frozen eyes and ears: pixels and prompts to what the transformer sees."""

    video: Callable[[Tensor], Tensor]  # clips (B, 3, T, H, W), or latents already, to (B, C, T', H', W')
    text: Callable[[list[str]], Tensor]  # prompts -> (B, L, D)
    ref_tokens: int  # tokens of one reference


def identity_pair(batch: dict, enc: Encoders, cfg: Config, draws: Draws) -> Pair:
    """Identity injection (eq. 1): look at one picture of a subject, denoise another as a one-frame video."""
    return Pair(
        target=enc.video(batch["target"][:, :, None]),
        ref=enc.video(batch["ref"][:, :, None]),
        text=enc.text(batch["prompt"]),  # describes the target; the data put <cls> before it
        keep=keep_tokens(enc.ref_tokens, "whole", cfg.view_drop, draws.shared),  # all, in the paper's recipe
    )


def motion_pair(batch: dict, enc: Encoders, cfg: Config, draws: Draws) -> Pair:
    """Motion preservation (eq. 2): look at one frame of an arbitrary clip, denoise the whole clip."""
    clip, frames = batch["clip"], batch.get("frames", batch["clip"])  # a cache has each frame's own latent
    # A fixed frame would teach the model to paste: the answer would always begin with what it was shown.
    ref = random_frame(frames, draws) if cfg.ref_frame == "random" else frames[:, :, :1]
    # A reference that is often missing keeps text-to-video alive: motion must come from the prompt.
    keep = keep_tokens(enc.ref_tokens, cfg.dropout, cfg.p_drop, draws.shared)
    return Pair(target=enc.video(clip), ref=enc.video(ref), text=enc.text(batch["prompt"]), keep=keep)


def draw_task(step: int, micro: int, cfg: Config) -> str:
    """Stochastic switching (alg. 1): u < p is a motion step. Stateless, so it resumes."""
    if cfg.pcgrad == "exact":  # no coin: both tasks in every step, one after the other
        return "identity" if micro < cfg.accumulate else "motion"
    coin = generator(cfg.seed, COIN, step, micro if cfg.coin == "micro" else 0)
    return "motion" if torch.rand((), generator=coin) < cfg.p_video else "identity"


def probe_losses(
    held_out: dict[str, Rows], enc: Encoders, dit: nn.Module, schedule: Schedule, cfg: Config
) -> list[Callable[[], Tensor]]:
    """Do the tasks fight (sec. 4)? Both losses on rows never trained on, with draws that no step changes."""
    losses, size = [], {"identity": cfg.identity_batch, "motion": cfg.motion_batch}
    for kind, (task, rows) in enumerate(held_out.items()):
        for i, batch in enumerate(diagnostics.held_out(rows, cfg.probe_batches, size[task])):
            # References are hidden in p_drop of the micro-batches by count: a coin for each of a few would
            # give the two halves of a task different objectives. No view drop.
            n, p = i % cfg.probe_batches, cfg.p_drop
            p = int((n + 1) * p) - int(n * p) if cfg.dropout == "whole" else p
            recipe = dataclasses.replace(cfg, view_drop=0.0, p_drop=p)
            key = 0, PROBE, kind, i  # not of the run's seed, so that runs compare
            draw = partial(draws_of, key, [(*key, k) for k in range(size[task])])
            pair = PAIR_OF[task](batch, enc, recipe, draw())
            losses.append(lambda pair=pair, draw=draw: denoising_loss(dit, schedule, pair, draw()).value)
    return losses


PAIR_OF = {"identity": identity_pair, "motion": motion_pair}
COIN, SAMPLE = range(2)  # the second number of a seed says what is drawn from it; 2 and 3 are sdv.data's
PROBE, SHARED = 4, 5


# ── Looking at it ───────────────────────────────────────────────────────────────────────────────────────


def quarters(losses: list[Losses], train_steps: int) -> list[float | None]:
    """Mean loss in each quarter of the noise range: the mean over all of it hides where it is learned."""
    each, t = torch.cat([loss.each for loss in losses]), torch.cat([loss.t for loss in losses])
    which = (t * 4 / train_steps).long().clamp(max=3)
    return [each[which == q].mean().item() if (which == q).any() else None for q in range(4)]


def mean(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"


def log_line(rows: list[dict], steps: int) -> str:
    """The newest row, then means over the last 100: of each task, and of this task by timestep quarter."""
    now, recent = rows[-1], rows[-100:]
    losses = {task: [row["loss"] for row in recent if row["task"] == task] for task in PAIR_OF}
    own = [row["quarters"] for row in recent if row["task"] == now["task"]]
    means = " ".join(f"{task} {mean(values)}" for task, values in losses.items())
    by_t = " ".join(mean([row[q] for row in own]) for q in range(4))
    return (
        f"step {now['step'] + 1:>5}/{steps} {now['task']:<8} loss {now['loss']:.4f} | mean {means} "
        f"| by t {by_t} | grad {now['grad_norm']:.3f} | {now['seconds']:.2f} s | {now['memory_gb']:.1f} GB"
    )


def peak_memory(device: str) -> float:
    """GB: of the GPU's allocator, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def require_finite(loss: Losses, batch: dict, task: str, step: int) -> None:
    finite = torch.isfinite(loss.each).tolist()
    if not all(finite):
        bad = [row for row, good in zip(batch["row"], finite, strict=True) if not good]
        raise FloatingPointError(
            f"step {step + 1}, {task}: the loss of {', '.join(bad)} is not finite. Look at these rows, or "
            "lower --lr; the saves before this step are whole."
        )


# ── Saves ───────────────────────────────────────────────────────────────────────────────────────────────


def saves(out: Path) -> list[Path]:
    return sorted(out.glob("step-*"))


def save(
    out: Path, dit: nn.Module, optimizer: torch.optim.Optimizer, surgery: diagnostics.Surgery,
    step: int, taken: dict[str, int], keep: int,
) -> Path:  # fmt: skip
    """A folder that appears whole or not at all; older ones go only when it stands."""
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights.save_adapter(dit, temporary / "adapter.safetensors")
    state = {"optimizer": optimizer.state_dict(), "step": step, "taken": taken}
    state["past"] = {task: list(past) for task, past in surgery.past.items()}
    torch.save(state, temporary / "training.pt")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in saves(out)[:-keep]:
        shutil.rmtree(old)
    return final


# Settings that may differ between two parts of one run: none of them changes what is drawn or learned.
FREE = {"steps", "resume", "out", "workers", "verify", "cache", "device", "checkpoint_every"}
FREE |= {"save_every", "keep"}
FREE |= {name for name in Config.__dataclass_fields__ if name.startswith(("sample_", "probe_"))}


def open_run(cfg: Config) -> Path | None:
    """Make the output folder, or with --resume compare the settings and return the newest save."""
    out, kept = Path(cfg.out), saves(Path(cfg.out))
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE}
    settings = json.loads(json.dumps(settings))
    if not cfg.resume:
        if kept:
            raise FileExistsError(f"{out}: holds a run, {kept[-1].name}; give --resume or another --out")
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").write_text("")
        (out / "probes.jsonl").unlink(missing_ok=True)
        (out / "config.json").write_text(json.dumps(settings, indent=2))
        return None
    if not kept:
        raise FileNotFoundError(f"{out}: no save to resume from; leave out --resume")
    before = json.loads((out / "config.json").read_text())
    changed = [f"{n} was {before.get(n)!r}, is {v!r}" for n, v in settings.items() if before.get(n) != v]
    if changed:
        raise ValueError(f"{out}: a resumed run keeps its settings; changed: {'; '.join(changed)}")
    return kept[-1]


def cut_back(path: Path, step: int) -> list[dict]:
    """Leave a JSONL file the rows of the steps before this one; a killed process may have torn the last."""
    if not path.exists():
        return []
    rows = [row for row in map(json.loads, path.read_text().split("\n")[:-1]) if row["step"] < step]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


# ── The script ──────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    cfg = parse(Config, __doc__)

    # 1. What is asked for, checked before anything slow: sizes, and every row of the data.
    layout = weights.open_backbone(cfg.backbone)
    missing = [name for name in ("height", "width", "frames", "fps") if getattr(cfg, name) is None]
    cfg = dataclasses.replace(cfg, **{name: getattr(layout, name) for name in missing})
    check_size(cfg.height, cfg.width, cfg.frames, layout.spatial_ratio, layout.temporal_ratio, layout.patch)
    sides = cfg.height, cfg.width
    data, held_out = {}, {}
    if cfg.p_video < 1:
        data["identity"] = Pairs(cfg.pairs, *sides, cfg.cls_token, cfg.crop_jitter)
    if cfg.p_video > 0:
        data["motion"] = Clips(cfg.clips, cfg.frames, cfg.fps, *sides, cfg.window)
    if bool(cfg.probe_pairs) != bool(cfg.probe_clips):
        raise ValueError("--probe-pairs and --probe-clips belong together: a probe compares both tasks")
    if cfg.probe_every and cfg.probe_pairs:
        held_out["identity"] = Pairs(cfg.probe_pairs, *sides, cfg.cls_token)
        held_out["motion"] = Clips(cfg.probe_clips, cfg.frames, cfg.fps, *sides)
        diagnostics.check_unseen(held_out.values(), data.values())
    folders = (*data.values(), *held_out.values())
    for folder in folders:
        folder.verify(cfg.verify)
    if cfg.cache and (cfg.crop_jitter or cfg.window == "random"):
        raise ValueError("--cache keeps one view of a file: leave out --crop-jitter and --window random")
    if cfg.pcgrad != "none" and (cfg.coin != "step" or not 0 < cfg.p_video < 1):
        raise ValueError("--pcgrad needs both tasks, one in a step: 0 < --p-video < 1 and --coin step")
    shot = sample.with_defaults(
        sample.Config(
            backbone=cfg.backbone, prompt=(cfg.sample_prompt,), seed=(cfg.seed,), steps=cfg.sample_steps,
            height=cfg.height, width=cfg.width, frames=cfg.frames, fps=cfg.fps, device=cfg.device,
        ), layout,
    )  # fmt: skip
    shot_picture = fit(read_image(cfg.sample_ref), cfg.height, cfg.width) if cfg.sample_every else None
    newest = open_run(cfg)
    out = Path(cfg.out)

    # 2. The frozen eyes and ears. A latent is the mean of the VAE's posterior, so a picture always looks the
    #    same; samples go through one by one, so that rounding does not depend on the batch they are in.
    dtype = getattr(torch, cfg.dtype)

    def networks() -> Networks:
        eyes = weights.load_backbone(cfg.backbone, cfg.device, dtype, parts=("vae", "text"))

        @torch.no_grad()
        def video(clips: Tensor) -> Tensor:
            return torch.cat([eyes.vae.encode(clip[None].to(cfg.device, dtype)) for clip in clips])

        return Networks(video, lambda prompts: torch.cat([eyes.text([prompt]) for prompt in prompts]))

    ref_tokens = cfg.height * cfg.width // (layout.spatial_ratio * layout.patch) ** 2
    if cfg.cache:  # they are needed once, and leave the memory before the transformer comes
        store = Cache(cfg.cache, weights.sources(layout, ("vae", "text")), cfg.dtype, cfg.cache_frames)
        prompts = {rows.prompt(row) for rows in folders for row in rows.rows} | {"", cfg.sample_prompt}
        print(store.fill(folders, prompts, networks))
        data, held_out = ({task: Cached(rows, store) for task, rows in d.items()} for d in (data, held_out))
        move = partial(Tensor.to, device=cfg.device)
        enc = Encoders(move, lambda prompts: move(store.text(prompts)), ref_tokens)
    else:
        enc = Encoders(*networks(), ref_tokens)

    # 3. The pretrained transformer, frozen, and the LoRA in it: the only thing that learns.
    parts = ("dit", "vae") if cfg.sample_every else ("dit",)
    backbone = weights.load_backbone(cfg.backbone, cfg.device, dtype, parts)
    dit, schedule = backbone.dit, dataclasses.replace(backbone.schedule, train_shift=cfg.t_shift)
    dit.checkpoint_every = cfg.checkpoint_every
    torch.manual_seed(cfg.seed)
    if newest or cfg.adapter:
        print(weights.load_adapter(dit, newest / "adapter.safetensors" if newest else cfg.adapter))
    else:
        places = dit.lora_targets if cfg.lora_tokens == "all" else dit.visual_targets
        add_lora(dit, cfg.rank, cfg.alpha, cfg.targets or places)
        if cfg.lora_tokens == "ref":
            act_on_reference(dit)
    place_reference(dit, cfg.ref_position or dit.ref_position)
    for module in lora_modules(dit).values():
        module.dropout = cfg.lora_dropout
    params = lora_parameters(dit)
    print(f"LoRA: {len(params) // 2} modules, {sum(p.numel() for p in params.values()):,} parameters")
    # Precision has one owner, here: the frozen networks run in --dtype, because their activations fill the
    # memory; the LoRA and AdamW's moments stay fp32, because their updates are too small for bf16.
    print(f"precision: networks {cfg.dtype}; LoRA, AdamW, noise and loss float32")
    optimizer = torch.optim.AdamW(params.values(), cfg.lr, tuple(cfg.betas), cfg.eps, cfg.weight_decay)
    surgery = diagnostics.Surgery(params.values(), cfg.pcgrad, cfg.p_video)
    probe = probe_losses(held_out, enc, dit, schedule, cfg)
    if cfg.sample_every:
        with torch.no_grad():
            shot_ref = backbone.vae.encode(shot_picture[None, :, None].to(cfg.device, dtype))

    # 4. Where the run stands. Draws have no state: the step, and the batches taken so far, are all of it.
    first, taken, rows = 0, dict.fromkeys(PAIR_OF, 0), []
    if newest:
        state = torch.load(newest / "training.pt", map_location=cfg.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        first, taken = state["step"], state["taken"]
        surgery.restore(state["past"])
        rows = cut_back(out / "metrics.jsonl", first)
        cut_back(out / "probes.jsonl", first)
        print(f"resumed from {newest}")
    size = {"identity": cfg.identity_batch, "motion": cfg.motion_batch}
    feeds = {
        task: batches(folder, size[task], cfg.seed, taken[task], workers=cfg.workers, device=cfg.device)
        for task, folder in data.items()
    }
    metrics = open(out / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  (open as long as the run)

    # 5. Train.
    dit.train()
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, unit="step")
    for step in bar:
        # Once in a while: a save, a look.
        if step > first and step % cfg.save_every == 0:
            save(out, dit, optimizer, surgery, step, taken, cfg.keep)
        if probe and step % cfg.probe_every == 0:
            row = {"step": step} | diagnostics.probe(dit, probe)
            with open(out / "probes.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            bar.write(diagnostics_report.line(row))
        if cfg.sample_every and step % cfg.sample_every == 0:
            dit.eval()
            texts = enc.text([cfg.sample_prompt]), enc.text([""])
            (clip,) = sample.generate(backbone, *texts, shot_ref, shot, [cfg.seed])
            write_video(out / "samples" / f"step-{step:06d}.mp4", clip, cfg.fps)
            dit.train()

        # ┌────────────────────────────────────────────────────────────────────────────────────────────┐
        start, seen = time.perf_counter(), {}
        for micro in range(cfg.accumulate * (2 if cfg.pcgrad == "exact" else 1)):
            task = draw_task(step, micro, cfg)
            batch, kind = next(feeds[task]), list(PAIR_OF).index(task)
            samples = range(taken[task] * size[task], (taken[task] + 1) * size[task])
            draws = draws_of((cfg.seed, SHARED, step, micro), [(cfg.seed, SAMPLE, kind, k) for k in samples])
            taken[task] += 1
            torch.manual_seed(draws.shared.initial_seed())  # LoRA dropout draws from the global generator
            loss = denoising_loss(dit, schedule, PAIR_OF[task](batch, enc, cfg, draws), draws)
            require_finite(loss, batch, task, step)
            (loss.value / cfg.accumulate).backward()
            surgery.take(task)
            seen.setdefault(task, []).append(loss)
        surgery.put()
        grad_norm = nn.utils.clip_grad_norm_(params.values(), cfg.max_grad_norm)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # └────────────────────────────────────────────────────────────────────────────────────────────┘

        for task, losses in seen.items():
            row = {
                "step": step, "task": task, "loss": torch.cat([loss.each for loss in losses]).mean().item(),
                "quarters": quarters(losses, schedule.train_steps), "grad_norm": grad_norm.item(),
                "lr": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - start,
                "memory_gb": peak_memory(cfg.device),
            }  # fmt: skip
            rows.append(row)
            metrics.write(json.dumps(row) + "\n")
        bar.write(log_line(rows, cfg.steps))

    # 6. The end: the adapter, ready for sample.py and for diffusers.
    bar.close()
    if probe:
        print(diagnostics_report.cost(out))
    final = save(out, dit, optimizer, surgery, cfg.steps, taken, cfg.keep)
    print(f"adapter: {final / 'adapter.safetensors'}")


if __name__ == "__main__":
    run(main)
