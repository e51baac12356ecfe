"""Teach a text-to-video model to take its subject from one picture: a LoRA, image pairs, and a few clips.

The method (arXiv 2504.17816) in six lines, each a few lines of code on the next screen:
    1. identity injection       look at one picture of a subject, denoise another one       identity_pair
    2. motion preservation      look at one frame of a clip, denoise the whole clip         motion_pair
    3. stochastic switching     a coin picks the task of each step: motion with p = 0.2     draw_task
    4. random reference frame   any frame of the clip, so that no fixed one can be pasted   motion_pair
    5. image-token dropout      half of the motion steps hide the reference                 motion_pair
    6. one gradient             both tasks minimise one denoising loss over one LoRA        the ruled box

    make demo                                                             # the micro-world, on a CPU
    python train.py --backbone CogVideoX-5b --pairs pairs --clips clips   # the paper's recipe, one 80 GB GPU
    torchrun --nproc-per-node 8 train.py ...                              # several GPUs
    python train.py ... --resume                                          # goes on from the newest save
    python -m sdv.run.report out/run      # do the tasks fight? needs --val-pairs and --val-clips
"""

import dataclasses
import re
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
from sdv import diagnostics
from sdv.data.cache import Cache, Cached, Networks
from sdv.data.loader import batches
from sdv.data.media import fit, read_image, write_video
from sdv.data.rows import Clips, Pairs, Rows
from sdv.data.sizes import check_size
from sdv.lora import adapt, lora_modules, lora_parameters
from sdv.models.positions import place_reference
from sdv.objectives import Draws, Losses, Pair, Schedule, denoising_loss, draws_of, keep_tokens, random_frame
from sdv.run import parallel, plan
from sdv.run import report as diagnostics_report
from sdv.run import saves as runs
from sdv.run.base_storage import Storage, hold
from sdv.run.log import RunLog, by_quarter, log_line, loss_row, peak_memory, read_shots, validate
from sdv.run.settings import parse, run
from sdv.seeds import generator
from sdv.surgery import Surgery


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
    lora_alpha: float | None = None  # for an --adapter that does not say its alpha
    # optimisation
    steps: int = 4000  # (paper: 4,000)
    identity_batch: int = 8  # pairs in a micro-batch; x accumulate x processes = 256 (paper: 256)
    motion_batch: int = 1  # clips in a micro-batch; x accumulate x processes = 32 (paper: 32)
    accumulate: int = 32  # micro-batches in a step of each process
    lr: float = 5e-5  # of AdamW (paper: 5e-5)
    warmup: int = 200  # steps of linear warm-up, constant after it (paper: 200)
    betas: tuple[float, ...] = (0.9, 0.95)  # (paper: 0.9 0.95)
    eps: float = 1e-8  # (paper: 1e-8)
    weight_decay: float = 1e-4  # (paper: 1e-4)
    max_grad_norm: float = 1.0  # (paper: 1.0)
    # looking
    val_pairs: str = ""  # folder of pairs whose subjects are not trained on, for probe and validation
    val_clips: str = ""  # folder of clips that are not trained on
    val_batches: int = 4  # micro-batches in each of a task's two halves; 3 or more for intervals
    val_every: int = 100  # steps between validation losses, where there is held-out data; 0: none
    sample_every: int = 0  # steps between sample videos; 0: none
    sample_manifest: str = ""  # what they show: lines {"prompt", "reference_file_name", "seed"}
    sample_steps: int = 50  # their denoising steps
    tensorboard: bool = False  # metrics also for TensorBoard (needs the package)
    # gradients
    pcgrad: Literal["none", "exact", "buffer-4", "buffer-8"] = "none"  # gradient surgery (paper: none)
    probe_every: int = 25  # steps between gradient probes; 0, or no held-out data: none (paper: 5 to 50)
    # system
    out: str = "out/run"  # config.json, metrics.jsonl, samples, saves
    resume: bool = False  # go on from the newest save in --out
    seed: int = 0  # of every draw
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where it runs
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"  # of the frozen networks
    checkpoint_every: int = 1  # recompute every n-th block in backward, less memory for more time; 0: none
    save_every: int = 250  # steps
    keep: int = 3  # newest saves that stay
    shard: bool = False  # spread the model over all processes (FSDP2); else each holds all of it
    frozen: Storage = "device"  # the base's matrices: as they are, fp8, or on the CPU until they are used
    plan: bool = False  # print predicted memory and time of a step, then stop


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


def held_out_losses(
    held_out: dict[str, Rows], enc: Encoders, dit: nn.Module, schedule: Schedule, cfg: Config
) -> dict[str, list[Callable[[], Losses]]]:
    """Do the tasks fight (sec. 4)? Both losses on rows never trained on, with draws that no step changes."""
    losses, size = {}, {"identity": cfg.identity_batch, "motion": cfg.motion_batch}
    for kind, (task, rows) in enumerate(held_out.items()):
        losses[task] = []
        for i, batch in enumerate(diagnostics.held_out(rows, cfg.val_batches, size[task])):
            # References are hidden in p_drop of the micro-batches by count: a coin for each of a few would
            # give the two halves of a task different objectives. No view drop.
            n, p = i % cfg.val_batches, cfg.p_drop
            p = int((n + 1) * p) - int(n * p) if cfg.dropout == "whole" else p
            recipe = dataclasses.replace(cfg, view_drop=0.0, p_drop=p)
            key = 0, PROBE, kind, i  # not of the run's seed, so that runs compare
            draw = partial(draws_of, key, [(*key, k) for k in range(size[task])])
            pair = PAIR_OF[task](batch, enc, recipe, draw())
            losses[task].append(lambda pair=pair, draw=draw: denoising_loss(dit, schedule, pair, draw()))
    return losses


PAIR_OF = {"identity": identity_pair, "motion": motion_pair}
COIN, SAMPLE = range(2)  # the second number of a seed says what is drawn from it; 2 and 3 are sdv.data's
PROBE, SHARED = 4, 5


# ── The run ─────────────────────────────────────────────────────────────────────────────────────────────


def require_finite(loss: Losses, batch: dict, task: str, step: int) -> None:
    finite = torch.isfinite(loss.each).tolist()
    if not all(finite):
        bad = [row for row, good in zip(batch["row"], finite, strict=True) if not good]
        raise FloatingPointError(
            f"step {step + 1}, {task}: the loss of {', '.join(bad)} is not finite. Look at these rows, or "
            "lower --lr; the saves before this step are whole."
        )


# Settings that may differ between two parts of one run: none of them changes what is drawn or learned.
FREE = {"steps", "resume", "out", "workers", "verify", "cache", "device", "checkpoint_every", "save_every"}
FREE |= {"keep", "shard", "plan", "tensorboard", "identity_batch", "motion_batch", "accumulate"}  # see below
FREE |= {name for name in Config.__dataclass_fields__ if name.startswith(("sample_", "probe_", "val_"))}


def kept_settings(cfg: Config, world: int) -> dict:
    """What all parts of a run have in common: the batch of a step, however cut, and what is not FREE."""
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE}
    batches = {"identity": cfg.identity_batch, "motion": cfg.motion_batch}
    return settings | {"batch": {task: n * cfg.accumulate * world for task, n in batches.items()}}


# ── The script ──────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    cfg = parse(Config, __doc__)
    rank, world, device = parallel.start(cfg.device)
    cfg = dataclasses.replace(cfg, device=device)
    say = print if rank == 0 else lambda *words: None

    # 1. What is asked for, checked before anything slow: sizes, and every row of the data.
    layout = weights.open_backbone(cfg.backbone)
    missing = [name for name in ("height", "width", "frames", "fps") if getattr(cfg, name) is None]
    cfg = dataclasses.replace(cfg, **{name: getattr(layout, name) for name in missing})
    check_size(cfg.height, cfg.width, cfg.frames, layout.spatial_ratio, layout.temporal_ratio, layout.patch)
    if cfg.plan:
        return say(plan.report(cfg, layout, world))
    sides = cfg.height, cfg.width
    data, held_out = {}, {}
    if cfg.p_video < 1:
        data["identity"] = Pairs(cfg.pairs, *sides, cfg.cls_token, cfg.crop_jitter)
    if cfg.p_video > 0:
        data["motion"] = Clips(cfg.clips, cfg.frames, cfg.fps, *sides, cfg.window)
    if bool(cfg.val_pairs) != bool(cfg.val_clips):
        raise ValueError("--val-pairs and --val-clips belong together: a probe compares both tasks")
    if cfg.val_pairs and (cfg.val_every or cfg.probe_every):
        held_out["identity"] = Pairs(cfg.val_pairs, *sides, cfg.cls_token)
        held_out["motion"] = Clips(cfg.val_clips, cfg.frames, cfg.fps, *sides)
        diagnostics.check_unseen(held_out.values(), data.values())
    folders = (*data.values(), *held_out.values())
    for folder in folders:
        folder.verify(cfg.verify)
    if cfg.cache and (cfg.crop_jitter or cfg.window == "random"):
        raise ValueError("--cache keeps one view of a file: leave out --crop-jitter and --window random")
    if cfg.pcgrad != "none" and (cfg.coin != "step" or not 0 < cfg.p_video < 1):
        raise ValueError("--pcgrad needs both tasks, one in a step: 0 < --p-video < 1 and --coin step")
    if cfg.shard and (cfg.pcgrad != "none" or (cfg.probe_every and held_out)):
        raise ValueError("--shard splits every gradient over processes: use --pcgrad none --probe-every 0")
    if cfg.shard and cfg.frozen != "device":
        raise ValueError("--shard and --frozen both say where the base's matrices are: choose one of them")
    film = sample.with_defaults(
        sample.Config(
            backbone=cfg.backbone, prompt=(), steps=cfg.sample_steps, height=cfg.height, width=cfg.width,
            frames=cfg.frames, fps=cfg.fps, device=cfg.device,
        ), layout,
    )  # fmt: skip

    def attach(dit: nn.Module, file: str | Path) -> str:
        """Give it the LoRA, a file's or a new one, and its place for the reference; says which LoRA it is."""
        if file:
            which = weights.load_adapter(dit, file, cfg.lora_alpha)
        else:
            adapt(dit, cfg.rank, cfg.alpha, cfg.targets, cfg.lora_tokens)
            which = f"a new LoRA of rank {cfg.rank}, alpha {cfg.alpha}"
        place_reference(dit, cfg.ref_position or dit.ref_position)
        return which

    if not cfg.resume:
        with torch.device("meta"):  # tried on a model without memory
            attach(layout.parts["dit"].build(), cfg.adapter)
    shots = read_shots(cfg.sample_manifest) if cfg.sample_every else []
    pictures = [shot.ref and fit(read_image(shot.ref), *sides) for shot in shots]
    out, settings = Path(cfg.out), kept_settings(cfg, world)
    if cfg.resume:
        runs.require_same(out, settings)
    elif rank == 0:
        runs.begin(out, settings)

    # 2. The frozen eyes and ears. A latent is the mean of the VAE's posterior, so a picture always looks the
    #    same; samples go through one by one, so that rounding does not depend on the batch they are in.
    dtype = getattr(torch, cfg.dtype)

    def networks() -> Networks:
        eyes = weights.load_backbone(cfg.backbone, cfg.device, dtype, ("vae", "text"), say)

        @torch.no_grad()
        def video(clips: Tensor) -> Tensor:
            return torch.cat([eyes.vae.encode(clip[None].to(cfg.device, dtype)) for clip in clips])

        return Networks(video, lambda prompts: torch.cat([eyes.text([prompt]) for prompt in prompts]))

    ref_tokens = cfg.height * cfg.width // (layout.spatial_ratio * layout.patch) ** 2
    if cfg.cache:  # they are needed once, and leave the memory before the transformer comes
        files = (weights.sources(layout, (part,)) for part in ("vae", "text"))
        store = Cache(cfg.cache, *files, cfg.dtype, cfg.cache_frames)
        prompts = {rows.prompt(row) for rows in folders for row in rows.rows}
        prompts |= {film.negative, *(shot.prompt for shot in shots)}
        say(store.fill(folders, prompts, networks, rank, world))
        data, held_out = ({task: Cached(rows, store) for task, rows in d.items()} for d in (data, held_out))
        move = partial(Tensor.to, device=cfg.device)
        enc = Encoders(move, lambda prompts: move(store.text(prompts)), ref_tokens)
    else:
        enc = Encoders(*networks(), ref_tokens)

    # 3. The pretrained transformer, frozen, and the LoRA in it: the only thing that learns.
    home = cfg.device if cfg.frozen == "device" else "cpu"  # the whole base may not fit on the device
    backbone = weights.load_backbone(cfg.backbone, home, dtype, ("dit",), say)
    if shots:
        backbone.vae = weights.load_backbone(cfg.backbone, cfg.device, dtype, ("vae",), say).vae
    dit, schedule = backbone.dit, dataclasses.replace(backbone.schedule, train_shift=cfg.t_shift)
    dit.checkpoint_every = cfg.checkpoint_every
    torch.manual_seed(cfg.seed)
    newest, state = runs.newest_whole(out, say) if cfg.resume else (None, {})
    say(attach(dit, newest / "adapter.safetensors" if newest else cfg.adapter))
    hold(dit, cfg.frozen, cfg.device)
    for module in lora_modules(dit).values():
        module.dropout = cfg.lora_dropout
    if cfg.shard:
        parallel.shard(dit)
    params = lora_parameters(dit)
    say(f"LoRA: {len(params) // 2} modules, {sum(p.numel() for p in params.values()):,} parameters, in")
    say("  " + ", ".join(dict.fromkeys(re.sub(r"blocks\.\d+\.", "", path) for path in lora_modules(dit))))
    # Precision has one owner, here: the frozen networks run in --dtype, because their activations fill the
    # memory; the LoRA and AdamW's moments stay fp32, because their updates are too small for bf16.
    say(f"precision: networks {cfg.dtype}; LoRA, AdamW, noise and loss float32")
    optimizer = torch.optim.AdamW(params.values(), cfg.lr, tuple(cfg.betas), cfg.eps, cfg.weight_decay)
    surgery = Surgery(params.values(), cfg.pcgrad, cfg.p_video)
    held = held_out_losses(held_out, enc, dit, schedule, cfg)
    probe = [partial(lambda loss: loss().value, loss) for losses in held.values() for loss in losses]
    with torch.no_grad():
        frames = (p if p is None else p[None, :, None].to(cfg.device, dtype) for p in pictures)
        refs = [frame if frame is None else backbone.vae.encode(frame) for frame in frames]

    # 4. Where the run stands. Draws have no state: the step, and the samples seen so far, are all of it.
    first, seen, history = 0, dict.fromkeys(PAIR_OF, 0), []
    if newest:
        parallel.load_optimizer(dit, optimizer, state["optimizer"])
        first, seen = state["step"], state["samples"]
        surgery.restore(state["past"])
        if rank == 0:
            history = runs.cut_back(out / "metrics.jsonl", first)
            for name in ("probes", "validation"):
                runs.cut_back(out / f"{name}.jsonl", first)
        say(f"resumed from {newest}")
    size = {"identity": cfg.identity_batch, "motion": cfg.motion_batch}
    place = rank, world, cfg.workers, cfg.device
    feeds = {
        task: batches(rows, size[task], cfg.seed, seen[task] // (size[task] * world), *place)
        for task, rows in data.items()
    }
    log = RunLog(out, cfg.tensorboard)

    def save(step: int) -> None:
        """All ranks give their share, rank 0 writes."""
        lora = {name: parallel.whole(p) for name, p in params.items()}
        state = {"optimizer": parallel.optimizer_state(dit, optimizer), "step": step, "samples": seen}
        state["past"] = {task: list(past) for task, past in surgery.past.items()}
        if rank == 0:
            runs.write_save(out, step, partial(weights.save_adapter, dit, lora=lora), state, cfg.keep)
        parallel.wait()

    # 5. Train.
    dit.train()
    asked_to_stop = parallel.on_sigterm(cfg.device)
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, unit="step", disable=rank > 0)
    tell = bar.write if rank == 0 else say
    for step in bar:
        # Once in a while: a save, a look.
        if step > first and step % cfg.save_every == 0:
            save(step)
        if probe and cfg.probe_every and step % cfg.probe_every == 0:
            row = {"step": step} | diagnostics.probe(dit, probe)
            log.write("probes", row)
            tell(diagnostics_report.line(row))
        if held and cfg.val_every and step % cfg.val_every == 0:
            for task, losses in held.items():
                with diagnostics.untouched(dit):
                    row = {"step": step, "task": task} | validate(losses, schedule.train_steps)
                log.write("validation", row)
                tell(f"held out, {task}: loss {row['loss']:.4f} | by t {by_quarter([row])}")
        if shots and step % cfg.sample_every == 0:
            # Every rank films its share; where the model is sharded, spare ranks film along.
            with diagnostics.untouched(dit):
                for start in range(0, len(shots), world):
                    i = min(start + rank, len(shots) - 1)
                    texts = enc.text([shots[i].prompt]), enc.text([film.negative])
                    (clip,) = sample.generate(backbone, *texts, refs[i], film, [shots[i].seed])
                    if i == start + rank:
                        write_video(out / "samples" / f"step-{step:06d}-{i:02d}.mp4", clip, cfg.fps)

        # ┌────────────────────────────────────────────────────────────────────────────────────────────┐
        start, losses = time.perf_counter(), {}
        for micro in range(cfg.accumulate * (2 if cfg.pcgrad == "exact" else 1)):
            task = draw_task(step, micro, cfg)
            batch, kind = next(feeds[task]), list(PAIR_OF).index(task)
            own = range(seen[task] + rank * size[task], seen[task] + (rank + 1) * size[task])
            draws = draws_of((cfg.seed, SHARED, step, micro), [(cfg.seed, SAMPLE, kind, k) for k in own])
            seen[task] += world * size[task]
            torch.manual_seed(draws.shared.initial_seed() + rank)  # LoRA dropout draws from torch's own
            loss = denoising_loss(dit, schedule, PAIR_OF[task](batch, enc, cfg, draws), draws)
            require_finite(loss, batch, task, step)
            (loss.value / cfg.accumulate).backward()
            surgery.take(task)
            losses.setdefault(task, []).append(loss)
        surgery.put()  # the mean over all ranks
        grad_norm = parallel.whole(nn.utils.clip_grad_norm_(params.values(), cfg.max_grad_norm))
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # └────────────────────────────────────────────────────────────────────────────────────────────┘

        for task in losses:
            row = {"step": step, "task": task} | loss_row(losses[task], schedule.train_steps)
            row |= {"grad_norm": grad_norm.item(), "lr": optimizer.param_groups[0]["lr"]}
            row |= {"seconds": time.perf_counter() - start, "memory_gb": peak_memory(cfg.device)}
            log.write("metrics", row)
            history.append(row)
        tell(log_line(history, cfg.steps))
        if asked_to_stop():
            save(step + 1)
            say(f"stopped by SIGTERM after step {step + 1}; --resume goes on from there")
            return

    # 6. The end: the adapter, ready for sample.py and for diffusers.
    bar.close()
    if probe and cfg.probe_every and rank == 0:
        print(diagnostics_report.cost(out))
    save(cfg.steps)
    say(f"adapter: {runs.saves(out)[-1] / 'adapter.safetensors'}")


if __name__ == "__main__":
    run(main)
