"""Teach a text-to-video model to take its subject from one picture: a LoRA, image pairs, and a few clips.

The method (arXiv 2504.17816) in six lines, each a few lines of code below:
    1. identity injection       look at one picture of a subject, denoise another one       identity_pair
    2. motion preservation      look at one frame of a clip, denoise the whole clip         motion_pair
    3. stochastic switching     a coin picks the task of each step: motion with p = 0.2     draw_task
    4. random reference frame   any frame of the clip, so that no fixed one can be pasted   motion_pair
    5. image-token dropout      half of the motion steps hide the reference                 motion_pair
    6. one gradient             both tasks minimise one denoising loss over one LoRA        train_step

    python train.py --backbone CogVideoX-5b --pairs pairs --clips clips   # the paper's recipe, one GPU
    torchrun --nproc-per-node 8 train.py --accumulate 4 ...               # the same steps on eight
    python train.py ... --resume                                          # goes on from the newest save
"""

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sample
import weights
from sdv import diagnostics, objectives
from sdv.data.cache import Cache, Cached, Networks
from sdv.data.captions import say_cut
from sdv.data.files import digest, sampled_hash
from sdv.data.loader import ENDING, batches
from sdv.data.media import fit, read_image, write_video
from sdv.data.rows import Clips, Pairs, Rows, say_left_out
from sdv.data.sizes import with_model_defaults
from sdv.lora import acts_on, adapt, lora_modules, lora_parameters, strengths
from sdv.models.positions import place_reference
from sdv.objectives import TASKS, Draws, Losses, Pair, denoising_loss
from sdv.run import card, held_out, log, parallel, plan, provenance, report, saves, settings
from sdv.run.base_storage import Storage, hold
from sdv.run.films import Shot, read_shots
from sdv.run.settings import Count, CountOrNone, Guidance, NotNegative, Positive, Rate, Seed, Share
from sdv.seeds import COIN, DROPOUT, LORA, SAMPLE, generator
from sdv.surgery import Surgery


@dataclass(frozen=True)
class Method:
    """the method; defaults are the paper's, or its authors' where the two differ"""

    p_video: Share = 0.2  # probability of a motion step (paper: 0.2)
    coin: Literal["step", "micro"] = "step"  # tossed once a step (paper) or for each micro-batch
    ref_frame: Literal["random", "first"] = "random"  # reference of a motion step (paper: random)
    ref_shift: Share = 0.0  # moves that reference by up to this share of its sides (paper: not at all)
    dropout: Literal["whole", "tokens"] = "whole"  # what motion steps drop (authors: whole; text: tokens)
    p_drop: Share = 0.5  # probability of that image-token dropout (paper: 0.5)
    view_drop: Share = 0.0  # probability that identity steps drop the reference (paper: 0; supplement: 0.5)
    text_drop: Share = 0.0  # probability of an empty prompt instead, in both tasks (paper: 0)
    cls_token: str = "<cls> "  # before the prompt of identity steps (authors: so; paper: before the noun)
    ref_position: str = ""  # where the reference sits beside the video; the model's own if not given
    t_shift: Positive = 1.0  # above 1: trains at noisier times, u -> s u / (1 + (s - 1) u) (paper: 1)
    crop_jitter: NotNegative = 0.0  # random crop of a pair's pictures, share of a side (supplement)
    pcgrad: Literal["none", "exact", "buffer-4", "buffer-8"] = "none"  # gradient surgery (paper: none)


# ── THE METHOD ──────────────────────────────────────────────────────────────────────────────────────────


class Encoders(NamedTuple):
    """The frozen VAE and text encoder, from pixels and prompts to what is seen; a cache remembers it."""

    video: Callable[[Tensor], Tensor]  # clips (B, 3, T, H, W), or latents already, to (B, C, T', H', W')
    text: Callable[[list[str]], Tensor]  # prompts -> (B, L, D)
    ref_tokens: int  # tokens of one reference
    ref_frames: str = "clip"  # field of a batch that has each frame of a clip as a picture of its own


def identity_pair(batch: dict, enc: Encoders, cfg: Method, draws: Draws) -> Pair:
    """Identity injection (eq. 1): look at one picture of a subject, denoise another as a one-frame video."""
    return Pair(
        target=enc.video(batch["target"][:, :, None]),
        ref=enc.video(batch["ref"][:, :, None]),
        # Describes the target; the data put <cls> before it.
        text=enc.text(objectives.keep_text(batch["prompt"], cfg.text_drop, draws)),
        # All of them, in the paper.
        keep=objectives.keep_tokens(enc.ref_tokens, "whole", cfg.view_drop, draws.shared),
    )


def motion_pair(batch: dict, enc: Encoders, cfg: Method, draws: Draws) -> Pair:
    """Motion preservation (eq. 2): look at one frame of an arbitrary clip, denoise the whole clip."""
    frames = batch[enc.ref_frames]
    # A fixed frame would teach the model to paste: the answer would always begin with what it was shown.
    ref = objectives.random_frame(frames, draws) if cfg.ref_frame == "random" else frames[:, :, :1]
    ref = objectives.shift(ref, cfg.ref_shift, draws)  # beyond the paper: its place tells nothing any more
    # A reference that is often missing keeps text-to-video alive: motion must come from the prompt.
    keep = objectives.keep_tokens(enc.ref_tokens, cfg.dropout, cfg.p_drop, draws.shared)
    text = enc.text(objectives.keep_text(batch["prompt"], cfg.text_drop, draws))
    return Pair(target=enc.video(batch["clip"]), ref=enc.video(ref), text=text, keep=keep)


def draw_task(step: int, micro: int, cfg: "Config") -> str:
    """Stochastic switching (alg. 1): u < p is a motion step. Stateless, so it resumes."""
    if cfg.pcgrad == "exact":  # no coin: both tasks in every step, one after the other
        return "identity" if micro < cfg.accumulate else "motion"
    coin = generator(cfg.seed, COIN, step, micro if cfg.coin == "micro" else 0)
    return "motion" if torch.rand((), generator=coin) < cfg.p_video else "identity"


PAIR_OF = {"identity": identity_pair, "motion": motion_pair}


@dataclass
class Training:
    """What a step uses and changes."""

    enc: Encoders
    dit: nn.Module
    schedule: objectives.Schedule
    feeds: dict[str, Iterator[dict]]  # of each task, endless batches
    optimizer: torch.optim.Optimizer
    surgery: Surgery
    row_counts: dict[str, int]  # of each task
    seen: dict[str, int]  # of each task, samples so far, of all processes
    stop_if_asked: Callable[..., None] = lambda: None  # raises Stopped after a signal


def train_step(step: int, run: Training, cfg: "Config") -> tuple[dict[str, list[Losses]], Tensor]:
    """One turn of algorithm 1's loop: each task's losses, and the norm of the gradient."""
    losses = {}
    for micro in range(cfg.accumulate * (2 if cfg.pcgrad == "exact" else 1)):
        task = draw_task(step, micro, cfg)
        batch, draws = next(run.feeds[task]), next_draws(task, step, micro, run.seen, cfg)
        pair = PAIR_OF[task](batch, run.enc, cfg, draws)
        loss = denoising_loss(run.dit, run.schedule, pair, draws)
        require_finite(loss, batch, task, step)
        (loss.value / cfg.accumulate).backward()
        run.surgery.take(task)
        losses.setdefault(task, []).append(loss)
    parallel.average(run.surgery.sums())  # over processes
    run.surgery.put()  # the tasks' gradients as one: their sum, or PCGrad's
    norm = parallel.whole(nn.utils.clip_grad_norm_(run.surgery.params, cfg.max_grad_norm))
    require_finite_gradient(norm, step)
    run.optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return losses, norm


def next_draws(task: str, step: int, micro: int, seen: dict[str, int], cfg: "Config") -> Draws:
    """Generators for a micro-batch, named by its samples' numbers.

    So one process with 32 samples draws what eight processes with 4 each draw. Counts these samples in
    `seen`, and seeds torch for the LoRA's own dropout.
    """
    (rank, world), size, kind = parallel.ranks(), getattr(cfg, f"{task}_batch"), TASKS.index(task)
    first = seen[task] + rank * size
    seen[task] += world * size
    torch.manual_seed(generator(cfg.seed, LORA, step, micro, rank).initial_seed())
    each = [(cfg.seed, SAMPLE, kind, k) for k in range(first, first + size)]
    return objectives.draws_of((cfg.seed, DROPOUT, step, kind), each)


# ── All other settings ──────────────────────────────────────────────────────────────────────────────────
# Each class adds a group of flags to those before it; its docstring is the group's title in --help.


@dataclass(frozen=True)
class Data(Method):
    """the model and the data"""

    backbone: str = ""  # checkpoint folder in the layout of diffusers, or of Wan's vendor
    pairs: str = ""  # folder of image pairs with metadata.jsonl (paper: 200,000)
    clips: str = ""  # folder of captioned clips (paper: 4,000)
    height: Count | None = None  # pixels; sizes and rate are the model's own if not given (paper: 480)
    width: Count | None = None  # pixels (paper: 720)
    frames: Count | None = None  # of a clip, 4k + 1 (paper: 49)
    fps: Rate | None = None  # clips are resampled to it by their timestamps (paper: 8)
    window: Literal["first", "random"] = "first"  # the part of a long clip (paper: first)
    workers: CountOrNone = 2  # processes that decode ahead; 0: none
    verify: CountOrNone = 64  # rows of each folder decoded before the start; all: python -m sdv.data check
    cache: str = ""  # folder for latents and text states, encoded once; none: encoded in every step
    cache_frames: CountOrNone = 0  # frames of a clip that the cache keeps as possible references; 0: all


@dataclass(frozen=True)
class Adapter(Data):
    """the adapter"""

    rank: Count = 128  # (paper: 128)
    alpha: Positive = 64.0  # scale = alpha / rank (paper: 64)
    lora_dropout: Share = 0.0  # on the input of A (paper's text: 0.2; released code: none)
    targets: tuple[str, ...] = ()  # layers, by the end of their path; the model's own list if not given
    lora_tokens: Literal["all", "ref"] = "all"  # tokens it acts on (released code: all; text: the subject)
    adapter: str = ""  # start from this LoRA file, with its rank and alpha, instead of from B = 0
    lora_alpha: Positive | None = None  # for an --adapter that does not say its alpha


@dataclass(frozen=True)
class Optimization(Adapter):
    """optimization"""

    steps: Count = 4000  # (paper: 4,000)
    identity_batch: Count = 8  # pairs in a micro-batch; x accumulate x processes = 256 (paper: 256)
    motion_batch: Count = 1  # clips in a micro-batch; x accumulate x processes = 32 (paper: 32)
    accumulate: Count = 32  # micro-batches in a step of each process
    lr: Positive = 5e-5  # learning rate of AdamW (paper: 5e-5)
    warmup: CountOrNone = 200  # steps of linear warm-up, constant after it (paper: 200)
    betas: tuple[Share, ...] = (0.9, 0.95)  # (paper: 0.9 0.95)
    eps: Positive = 1e-8  # (paper: 1e-8)
    weight_decay: NotNegative = 1e-4  # (paper: 1e-4)
    max_grad_norm: Positive = 1.0  # (paper: 1.0)


@dataclass(frozen=True)
class Looking(Optimization):
    """looking at the run"""

    val_pairs: str = ""  # folder of pairs whose subjects are not trained on, for probe and validation
    val_clips: str = ""  # folder of clips that are not trained on
    val_batches: Count = 4  # micro-batches in each of a task's two halves; 3 or more for intervals
    val_every: CountOrNone = 100  # steps between validation losses, where there is held-out data; 0: none
    probe_every: CountOrNone = 25  # steps between gradient probes, likewise; 0: none (paper: 5 to 50)
    sample_every: CountOrNone = 0  # steps between sample videos; 0: none
    sample_manifest: str = ""  # what they show: lines {"prompt", "reference_file_name", "seed"}
    sample_steps: Count = 50  # their denoising steps
    sample_guidance: Guidance | None = None  # on the text; the model's own if not given
    sample_ref_guidance: NotNegative = 1.0  # on the reference; 1: none
    tensorboard: bool = False  # metrics also for TensorBoard (needs the package)


@dataclass(frozen=True)
class Config(Looking):
    """the machine"""

    out: str = "out/run"  # config.json, metrics.jsonl, samples, saves
    resume: bool = False  # go on from the newest save in --out; begin, if there is none
    seed: Seed = 0  # of every draw
    device: str = settings.DEVICE  # where it runs
    dtype: Literal["bfloat16", "float32"] = settings.DTYPE  # of the frozen networks
    recompute: Share = 1.0  # share of the blocks that recompute activations in backward, for less memory
    keep_attention: bool = False  # recomputed blocks keep what self-attention returned: faster, more memory
    base_storage: Storage = "device"  # the base's matrices: as they are, fp8, or on the CPU
    shard: bool = False  # spread the model over all processes (FSDP2); else each holds all of it
    save_every: Count = 250  # steps
    keep: CountOrNone = 3  # newest saves that stay; 0: all
    plan: bool = False  # print predicted memory and time of a step, then stop


RENAMED = {"frozen": "base_storage"}  # still read in this version
# Settings that may differ between two parts of one run: none of them changes what is drawn or learned.
FREE = {"steps", "resume", "out", "workers", "verify", "cache", "device", "recompute", "save_every"}
FREE |= {"keep_attention", "keep", "shard", "plan", "tensorboard"}
FREE |= {"identity_batch", "motion_batch", "accumulate"}  # together they stay the same, see below
FREE |= {"backbone", "pairs", "clips"}  # may move: weights are known by content, rows by names and captions
FREE |= {"adapter"}  # is in the save
FREE |= {name for name in Config.__dataclass_fields__ if name.startswith(("sample_", "probe_", "val_"))}


def kept_settings(cfg: Config, world: int) -> dict:
    """What all parts of a run have in common beside model and data: a step's batch, and what is not FREE."""
    kept = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in FREE}
    cut = {"identity": cfg.identity_batch, "motion": cfg.motion_batch, "accumulate": cfg.accumulate * world}
    kept["batch"] = {task: cut[task] * cut["accumulate"] for task in TASKS}
    # A coin, or a dropout of the LoRA's inputs, for each micro-batch depends on how many there are.
    micro = cfg.coin == "micro" or cfg.lora_dropout > 0
    kept["cut"], kept["processes"] = (cut, world) if micro else (None, None)
    # A cache may hold only some frames of a clip, and a reference from it is moved by cells of a latent.
    kept["cached"] = bool(cfg.cache) if cfg.cache_frames or cfg.ref_shift else None
    return kept


def refuse_conflicts(cfg: Config) -> None:
    """ValueError for settings that do not go together, before anything is opened."""
    trains_both = 0 < cfg.p_video < 1
    looks = bool(cfg.val_pairs) and bool(cfg.val_every or cfg.probe_every)
    asked = any(getattr(cfg, name) not in (0, getattr(Config, name)) for name in ("val_every", "probe_every"))
    data, made = (
        {Path(folder).resolve() for folder in folders if folder}
        for folders in ((cfg.pairs, cfg.clips, cfg.val_pairs, cfg.val_clips), (cfg.cache, cfg.out))
    )
    for wrong, words in (
        (not cfg.backbone, "--backbone: name the folder of the model to train"),
        (cfg.p_video < 1 and not cfg.pairs and not cfg.plan, "--pairs: name the folder of image pairs"),
        (cfg.p_video > 0 and not cfg.clips and not cfg.plan, "--clips: name the folder of clips"),
        (cfg.plan and cfg.adapter, "--plan counts a new LoRA: give --rank instead of --adapter"),
        (len(cfg.betas) != 2 or max(cfg.betas) == 1, "--betas: give two numbers below 1"),
        (cfg.lora_alpha is not None and not cfg.adapter, "--lora-alpha is about a file: give --adapter too"),
        (bool(cfg.sample_every) != bool(cfg.sample_manifest),
         "--sample-every and --sample-manifest belong together: how often to film, and what"),
        (bool(cfg.val_pairs) != bool(cfg.val_clips),
         "--val-pairs and --val-clips belong together: a probe compares both tasks"),
        (asked and not cfg.val_pairs and not cfg.val_clips,
         "--val-every and --probe-every look at held-out rows: give --val-pairs and --val-clips"),
        (data & made, "--cache and --out need folders of their own, beside those of the data"),
        (cfg.cache_frames and not cfg.cache, "--cache-frames is about a cache: give --cache too"),
        (cfg.adapter and cfg.targets and not cfg.resume,
         "--targets places a new LoRA, and that of an --adapter has its places: leave out --targets"),
        (cfg.cache and (cfg.crop_jitter or cfg.window == "random"),
         "--cache keeps one view of a file: leave out --crop-jitter and --window random"),
        (cfg.pcgrad != "none" and (cfg.coin != "step" or not trains_both),
         "--pcgrad needs both tasks, one in a step: 0 < --p-video < 1 and --coin step"),
        (cfg.shard and (cfg.pcgrad != "none" or (cfg.probe_every and looks)),
         "--shard splits every gradient over processes: use --pcgrad none --probe-every 0"),
        (cfg.keep_attention and not cfg.recompute,
         "--keep-attention is about recomputed blocks: give --recompute above 0"),
        (cfg.shard and cfg.base_storage != "device",
         "--shard and --base-storage both say where the base's matrices are: choose one of them"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(words)


# ── The run ─────────────────────────────────────────────────────────────────────────────────────────────


LOWER_LR = "begin a new run with a lower --lr, from a save of this one if its losses were good (--adapter)"


def require_finite(loss: Losses, batch: dict, task: str, step: int) -> None:
    finite = torch.isfinite(loss.each).tolist()
    if not all(finite):
        bad = [row for row, good in zip(batch["row"], finite, strict=True) if not good]
        raise FloatingPointError(
            f"step {step + 1}, {task}: the loss of {', '.join(bad)} is not finite. Look at these rows; or "
            + LOWER_LR
        )


def require_finite_gradient(norm: Tensor, step: int) -> None:
    if not norm.isfinite():
        raise FloatingPointError(
            f"step {step + 1}: the gradient is not finite, though the losses are: " + LOWER_LR
        )


def open_rows(cfg: Config, say: Callable[[str], None]) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Checked rows to train on, and rows held out, of each task."""
    sides, data, unseen = (cfg.height, cfg.width), {}, {}
    if cfg.p_video < 1:
        data["identity"] = Pairs(cfg.pairs, *sides, cfg.cls_token, cfg.crop_jitter)
    if cfg.p_video > 0:
        data["motion"] = Clips(cfg.clips, cfg.frames, cfg.fps, *sides, cfg.window)
    if cfg.val_pairs and (cfg.val_every or cfg.probe_every):
        unseen["identity"] = Pairs(cfg.val_pairs, *sides, cfg.cls_token)
        unseen["motion"] = Clips(cfg.val_clips, cfg.frames, cfg.fps, *sides)
        held_out.check_unseen(unseen.values(), data.values())
        for task, rows in unseen.items():
            there = min(map(len, held_out.two_halves(rows)))
            places = getattr(cfg, f"{task}_batch") * cfg.val_batches
            if there < places:
                say(f"held out, {task}: a half has {there} rows for {places}: intervals will be too narrow")
    for name, rows in (*data.items(), *(("held out, " + task, rows) for task, rows in unseen.items())):
        odd = rows.verify(cfg.verify)
        say(f"{name}: {len(rows):,} rows of {rows.folder}" + (odd and f"; {odd}"))
        if isinstance(rows, Clips) and (said := say_left_out(rows.folder, rows.rows)):
            say(f"  {said}")
    return data, unseen


def attach(dit: nn.Module, file: str | Path, cfg: Config) -> str:
    """Give it the LoRA, a file's or a new one, and its place for the reference; says which LoRA it is."""
    if file:
        which = weights.load_adapter(dit, file, cfg.lora_alpha)
    else:
        adapt(dit, cfg.rank, cfg.alpha, cfg.targets, cfg.lora_tokens)
        which = f"a new LoRA of rank {cfg.rank}, alpha {cfg.alpha}"
    place_reference(dit, cfg.ref_position or dit.ref_position)
    return which


def refuse_other_lora(dit: nn.Module, cfg: Config) -> None:
    """ValueError for a setting of a new LoRA that the one of --adapter has otherwise."""
    has = strengths(dit) | {"lora_tokens": {acts_on(dit)}}
    for name, values in has.items():
        if getattr(cfg, name) not in values | {getattr(Config, name)}:  # a default was not asked for
            asked, there = getattr(cfg, name), ", ".join(map(str, sorted(values)))
            raise ValueError(f"--{name.replace('_', '-')} {asked}: {cfg.adapter} has {there}; leave it out")


def open_encoders(
    cfg: Config, layout: weights.Layout, folders: list[Rows], shots: list[Shot], film_cfg: sample.Config,
    say: Callable[[str], None],
) -> tuple[Encoders, nn.Module | None, Cache | None]:  # fmt: skip
    """The frozen encoders, the VAE if there is something to film, and the cache if there is to be one.

    A latent is the mean of the VAE's posterior, so that a picture always looks the same; samples go through
    one by one, so that rounding does not depend on the batch they are in.
    """
    dtype, opened = getattr(torch, cfg.dtype), {}

    def networks() -> Networks:
        frozen = weights.load_backbone(cfg.backbone, cfg.device, dtype, ("vae", "text"), say)
        opened["vae"] = frozen.vae

        @torch.no_grad()
        def video(clips: Tensor) -> Tensor:
            return torch.cat([frozen.vae.encode(clip[None].to(cfg.device, dtype)) for clip in clips])

        return Networks(video, lambda prompts: torch.cat([frozen.text([prompt]) for prompt in prompts]))

    ref_tokens = cfg.height * cfg.width // (layout.spatial_ratio * layout.patch) ** 2
    if not cfg.cache:
        return Encoders(*networks(), ref_tokens), opened["vae"], None
    # With a cache they are needed once, and leave the memory before the transformer comes.
    files = (weights.sources(layout, (part,)) for part in ("vae", "text"))
    store = Cache(cfg.cache, *files, cfg.dtype, cfg.cache_frames, layout.parts["text"].note)
    prompts = {rows.prompt(row) for rows in folders for row in rows.rows}
    prompts |= {shot.prompt for shot in shots} | ({film_cfg.negative} if shots else set())
    prompts |= {""} if cfg.text_drop else set()
    say(store.fill(folders, prompts, networks, *parallel.ranks(), parallel.wait, parallel.from_first))
    vae = opened.pop("vae", None)
    if shots and vae is None:
        vae = weights.load_backbone(cfg.backbone, cfg.device, dtype, ("vae",), say).vae

    def move(x: Tensor) -> Tensor:
        return x.to(cfg.device)

    enc = Encoders(move, lambda prompts: move(store.text(prompts)), ref_tokens, ref_frames="frames")
    return enc, vae if shots else None, store


def save(out: Path, step: int, run: Training, cfg: Config) -> None:
    """All ranks give their share, rank 0 writes: adapter, model card, and what a resumed run needs."""
    lora = {name: parallel.whole(p) for name, p in lora_parameters(run.dit).items()}
    state = {"optimizer": parallel.optimizer_state(run.dit, run.optimizer), "step": step, "samples": run.seen}
    state["past"] = {task: list(past) for task, past in run.surgery.past.items()}
    stock = acts_on(run.dit) == "all" and run.dit.ref_position == "leading"  # what diffusers can run

    def write_adapter(file: Path) -> None:
        weights.save_adapter(run.dit, file, lora=lora)
        text = card.model_card(cfg, run.dit, stock, run.row_counts, step, sys.argv)
        file.with_name("README.md").write_text(text, encoding="utf-8", errors="backslashreplace")

    if parallel.ranks()[0] == 0:
        saves.write_save(out, step, write_adapter, state, cfg.keep)
    parallel.wait()


class Looks(NamedTuple):
    """What a run is looked at by: held-out losses, and films."""

    losses: dict[str, list[Callable[[], Losses]]]  # of each task, on rows that are not trained on
    backbone: weights.Backbone
    film_cfg: sample.Config
    shots: list[Shot]
    refs: list[Tensor | None]
    run_log: log.RunLog


def is_due(step: int, every: int, cfg: Config) -> bool:
    """Whether a look that comes every so many steps comes now; after the last step all do."""
    return every > 0 and (step % every == 0 or step == cfg.steps)


def look(step: int, at: Looks, run: Training, cfg: Config, tell: Callable[[str], None]) -> None:
    """The gradient probe, held-out losses and films that are due; after the last step all of them."""
    rank, world = parallel.ranks()

    def asking(loss: Callable[[], Losses]) -> Callable[[], Losses]:
        return lambda: run.stop_if_asked() or loss()  # even the losses of one look can take a minute

    losses_of = {task: list(map(asking, losses)) for task, losses in at.losses.items()}
    if losses_of and is_due(step, cfg.probe_every, cfg):
        probes = [lambda loss=loss: loss().value for losses in losses_of.values() for loss in losses]
        found = diagnostics.probe(run.dit, probes)
        if rank == 0:  # others have helped, and got nothing
            row = {"step": step} | found
            at.run_log.write("probes", row)
            tell(report.line(row))
    for task, losses in losses_of.items() if is_due(step, cfg.val_every, cfg) else ():
        with diagnostics.untouched(run.dit):
            row = {"step": step, "task": task} | held_out.validate(losses, run.schedule.train_steps)
        at.run_log.write("validation", row)
        tell(f"held out, {task}: loss {row['loss']:.4f} | by t {log.by_quarter([row])}")
    # Every rank films its share. A sharded model has to be called equally often by all: spare ranks film too,
    # and films with a reference, which may be guided by it, have rounds of their own.
    groups = [[i for i, ref in enumerate(at.refs) if (ref is None) == none] for none in (False, True)]
    rounds = [group[start : start + world] for group in groups for start in range(0, len(group), world)]
    for films in rounds if is_due(step, cfg.sample_every, cfg) else ():
        i = films[min(rank, len(films) - 1)]
        with diagnostics.untouched(run.dit):
            texts = run.enc.text([at.shots[i].prompt]), run.enc.text([at.film_cfg.negative])
            shot = at.refs[i], at.film_cfg, [at.shots[i].seed]
            (clip,) = sample.generate(at.backbone, *texts, *shot, run.stop_if_asked)
        if rank < len(films):
            write_video(Path(cfg.out) / "samples" / f"step-{step:06d}-{i:02d}.mp4", clip, cfg.fps)


def stoppable(feed: Iterator[dict], stop_if_asked: Callable[..., None]) -> Iterator[dict]:
    """A task's batches. Before each, all processes stop if one was asked to, or cannot read its own."""
    while True:
        try:
            batch, problem = next(feed), None
        except (ValueError, OSError, RuntimeError) as error:  # a bad file, or a worker that is gone
            batch, problem = None, error
        stop_if_asked(problem)
        yield batch


def train(
    first: int, run: Training, looks: Looks, history: list[dict], cfg: Config, say: Callable[[str], None]
) -> int:
    """Steps from `first` on, with their saves and looks; returns how many are done, fewer after a signal.

    A step or look that a signal interrupts is given up: the grace that follows is for the save. Batches that
    cannot be read end it too, lines that cannot be said and, in a process alone, numbers and films that
    cannot be written: their error comes after the save.
    """
    reached, saved, seen, problem, (rank, _) = first, first, dict(run.seen), None, parallel.ranks()
    mute = []  # why nobody hears what is said: a terminal that was closed, a `tee` that Ctrl-C ended
    hidden = rank > 0 or None  # None: unless a terminal shows it, since a log file has a line for each step
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, unit="step", disable=hidden)

    def tell(words: str) -> None:
        try:
            bar.write(words) if rank == 0 else say(words)
        except OSError as error:
            mute.append(error)

    with parallel.signals_noted(ENDING, cfg.device) as run.stop_if_asked, bar:
        run.feeds = {task: stoppable(feed, run.stop_if_asked) for task, feed in run.feeds.items()}
        try:
            for step in bar:
                run.stop_if_asked(*mute[:1])
                if step > first and step % cfg.save_every == 0:
                    save(Path(cfg.out), step, run, cfg)
                    saved = step
                look(step, looks, run, cfg, tell)
                start = time.perf_counter()
                losses, norm = train_step(step, run, cfg)
                reached, seen = step + 1, dict(run.seen)
                for task, found in losses.items():
                    row = {"step": step, "task": task} | log.loss_row(found, run.schedule.train_steps)
                    row |= {"grad_norm": norm.item(), "lr": run.optimizer.param_groups[0]["lr"]}
                    row |= {"seconds": time.perf_counter() - start, "memory_gb": log.peak_memory(cfg.device)}
                    looks.run_log.write("metrics", row)
                    history.append(row)
                tell(log.log_line(history, cfg.steps))
        except parallel.Stopped as stop:
            run.seen = seen  # the samples of a step that was not finished come again
            problem = stop.__cause__
        except OSError as error:  # a row of numbers or a film that cannot be written: the weights are as good
            if parallel.ranks()[1] > 1:
                raise  # the others have not been told, and would wait in the save for ever
            run.seen, problem = seen, error
        if reached > saved:
            save(Path(cfg.out), reached, run, cfg)  # in here, where a second SIGTERM does not end it
        if reached == 0 < cfg.steps:
            tell("stopped before the first step was done: nothing is saved; start again")
        elif reached < cfg.steps:
            tell(f"stopped after step {reached}; --resume goes on (a file may be replaced, not its row)")
    run.stop_if_asked = lambda: None
    if problem:
        raise problem
    return reached


def main() -> int | None:
    cfg = settings.parse(Config, __doc__, renamed=RENAMED)
    refuse_conflicts(cfg)
    if not cfg.plan:  # which counts for a GPU on any machine
        settings.check_device(cfg.device)

    # 1. What is asked for, checked before anything slow: sizes, every row of the data, the adapter.
    layout = weights.open_backbone(cfg.backbone)
    cfg = with_model_defaults(cfg, layout)
    rank, world, device = parallel.start(cfg.device)
    cfg = dataclasses.replace(cfg, device=device)
    say = print if rank == 0 else lambda *words: None
    if cfg.resume and not parallel.from_first(saves.saves(Path(cfg.out))):
        say(f"{cfg.out}: no save to resume from: a new run begins")
        refuse_conflicts(cfg := dataclasses.replace(cfg, resume=False))
    if cfg.plan:
        return say(plan.report(cfg, layout, world))
    weights.check_weights(layout)
    if cfg.shard and world == 1:
        raise ValueError("--shard spreads the model over processes: start them with torchrun")
    data, unseen = open_rows(cfg, say)
    folders = [*data.values(), *unseen.values()]
    captions = ((row.origin, rows.prompt(row)) for rows in folders for row in rows.rows)
    say(
        say_cut(captions, *weights.token_counter(layout))
        or "captions: none is longer than the text encoder reads"
    )
    out, dtype, kept = Path(cfg.out), getattr(torch, cfg.dtype), kept_settings(cfg, world)
    kept["data"] = {task: rows.summary() for task, rows in data.items()}
    kept["model"] = parallel.from_first(rank == 0 and digest(*map(sampled_hash, weights.sources(layout))))
    if cfg.resume:  # a config.json of an older version lacks some of these: they count as the same
        unknown = {name: kept[name] for name in ("cut", "processes", "cached", "data", "model")}
        saves.require_same(out, kept, dataclasses.asdict(Config()) | unknown, RENAMED)
    else:
        with torch.device("meta"):  # tried on a model that has shapes and no numbers
            attach(trial := layout.parts["dit"].build(), cfg.adapter, cfg)
        refuse_other_lora(trial, cfg)
    newest, state = saves.newest_whole(out, say, parallel.from_first) if cfg.resume else (None, {"step": 0})
    first = state["step"]
    if first > cfg.steps or (first == cfg.steps and not (cfg.val_pairs or cfg.sample_every)):
        raise ValueError(f"--steps {cfg.steps}: {newest} is as far as that or farther; give more to go on")
    film_cfg = sample.with_defaults(
        sample.Config(
            cfg.backbone, height=cfg.height, width=cfg.width, frames=cfg.frames, fps=cfg.fps,
            steps=cfg.sample_steps, guidance=cfg.sample_guidance, ref_guidance=cfg.sample_ref_guidance,
            device=cfg.device,
        ), layout,
    )  # fmt: skip
    shots = read_shots(cfg.sample_manifest) if cfg.sample_every else []
    pictures = [shot.ref and fit(read_image(shot.ref), cfg.height, cfg.width) for shot in shots]
    held = saves.begin(out, kept, provenance.provenance(cfg), resume=cfg.resume) if rank == 0 else None
    run_log = log.RunLog(out, cfg.tensorboard, first, held)

    # 2. The VAE and the text encoder, frozen.
    enc, vae, store = open_encoders(cfg, layout, folders, shots, film_cfg, say)
    if store:
        data, unseen = ({task: Cached(rows, store) for task, rows in d.items()} for d in (data, unseen))

    # 3. The pretrained transformer, frozen, and the LoRA in it: the only thing that learns.
    home = cfg.device if cfg.base_storage == "device" else "cpu"  # the whole base may not fit on the device
    backbone = weights.load_backbone(cfg.backbone, home, dtype, ("dit",), say)
    dit, backbone.vae = backbone.dit, vae
    schedule = dataclasses.replace(backbone.schedule, train_shift=cfg.t_shift)
    dit.recompute, dit.keep_attention = cfg.recompute, cfg.keep_attention
    torch.manual_seed(cfg.seed)
    say(attach(dit, newest / "adapter.safetensors" if newest else cfg.adapter, cfg))
    hold(dit, cfg.base_storage, cfg.device)
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
    losses = held_out.held_out_losses(unseen, PAIR_OF, enc, dit, schedule, cfg)
    with torch.no_grad():
        frames = (p if p is None else p[None, :, None].to(cfg.device, dtype) for p in pictures)
        refs = [frame if frame is None else vae.encode(frame) for frame in frames]

    # 4. Where the run stands. Draws have no state: the step, and the samples seen so far, are all of it.
    seen, history = state.get("samples", dict.fromkeys(TASKS, 0)), []
    if newest:
        parallel.load_optimizer(dit, optimizer, state.pop("optimizer"))  # 4 GB that each rank would keep
        surgery.restore(state.pop("past"))
        if rank == 0:
            for name, every in (("probes", cfg.probe_every), ("validation", cfg.val_every)):
                saves.cut_back(out / f"{name}.jsonl", first + (not is_due(first, every, cfg)))
            history = saves.cut_back(out / "metrics.jsonl", first)
        say(f"resumed from {newest}")
    feeds = {}
    for task, rows in data.items():
        size = getattr(cfg, f"{task}_batch")
        start = seen[task] // (size * world)
        feeds[task] = batches(rows, size, cfg.seed, start, rank, world, cfg.workers, cfg.device)
    training = Training(
        enc, dit, schedule, feeds, optimizer, surgery, {task: len(rows) for task, rows in data.items()}, seen
    )

    # 5. Train.
    dit.train()
    looks = Looks(losses, backbone, film_cfg, shots, refs, run_log)
    reached = train(first, training, looks, history, cfg, say)

    # 6. The end: a last look at the adapter that was saved, ready for sample.py and for diffusers.
    if reached < cfg.steps:
        return int(reached == 0)  # an error: nothing is saved
    look(reached, looks, training, cfg, say)
    if rank == 0:  # the others may not see its files yet
        if losses and cfg.probe_every:
            print(report.cost(out))
        print(f"adapter: {out / f'step-{reached:06d}' / 'adapter.safetensors'}")


if __name__ == "__main__":
    settings.run(main)
