"""The micro-world's base model from nothing: a CogVideoX of the real classes, small enough for two CPU cores.

    python -m microworld.pretrain --stage new       random weights and a vocabulary
    python -m microworld.pretrain --stage vae       autoencoder, on single frames of the world
    python -m microworld.pretrain --stage latents   its scale, then clips and pictures as latents
    python -m microworld.pretrain --stage dit       transformer and text encoder, text-to-video
    python -m microworld.pretrain --stage score     what the VAE keeps, what the base makes of new prompts

Training goes on where it was stopped, or from weights/toy if out/base is gone; --steps prolongs it. Results
into weights/toy, which any script takes as its --backbone; README.md there has the recipe and what it gave.
With `--family wan --out out/wan` the same stages make a Wan of this world, in out/wan/model.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sample
from microworld import metrics, world
from microworld.learner import Learner, run
from microworld.sizes import FAMILIES, FRAMES, SIZE
from sdv.data.media import from_uint8, write_image
from sdv.models import cogvideox_vae, wan_vae
from sdv.models.causal_conv import CausalConv
from sdv.run.settings import parse
from sdv.seeds import generator
from weights import Backbone, load_backbone, open_backbone, tiny
from weights.tensors import save_module

# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Config:
    stage: str  # new, vae, latents, dit or score
    steps: int = 0  # length of the stage so far; the rate falls over its last third (0: the recipe's)
    family: str = "cogvideox"  # or wan: of which classes the model is
    t_shift: float = 1.0  # above 1, stage dit trains at noisier times, as train.py's --t-shift
    out: str = "out/base"  # state, logs, pictures to look at
    save_every: int = 100  # steps between saves
    threads: int = 2  # of the CPU


CLIPS, PICTURES = 3000, 6000  # of the world's base split
STEPS = {"vae": 3000, "dit": 7200}
BATCH = {"vae": 4, "clips": 8, "pictures": 48}  # of one part
RATE = {"vae": 1e-3, "dit": 3e-3}  # dit's loss after 180 steps: 0.170 at 1e-3, 0.086 at 3e-3, 0.081 at 8e-3
BLOCKS = cogvideox_vae.Block, wan_vae.Block
VAE = cogvideox_vae.CogVideoXVAE | wan_vae.WanVAE
TOY = Path(__file__).resolve().parent.parent / "weights/toy"


def home(cfg: Config) -> Path:
    """The checkpoint's folder."""
    return TOY if cfg.family == "cogvideox" else Path(cfg.out) / "model"


def begin(cfg: Config) -> None:
    """Write configs and a vocabulary of the captions, and forget all weights. Not where a run has begun."""
    if list(Path(cfg.out).glob("*.pt")):
        return print(f"{cfg.out} holds a run: going on with it. Remove it to begin from nothing.")
    vocabulary = tiny.train_vocabulary(captions(5000, FRAMES), 256, umt5=cfg.family == "wan")
    tiny.create(home(cfg), FAMILIES[cfg.family], vocabulary)
    for part in open_backbone(home(cfg)).parts.values():
        (home(cfg) / part.folder / part.file).unlink()


def load_part(name: str, cfg: Config) -> nn.Module:
    """One network of the folder in fp32, to be trained; random where the folder has no weights of it yet."""
    part = open_backbone(home(cfg)).parts[name]
    if (home(cfg) / part.folder / part.file).is_file():
        module = getattr(load_backbone(home(cfg), parts=(name,)), name)
        return module.get_submodule(part.root).requires_grad_(True)
    torch.manual_seed(0)
    module = part.build().get_submodule(part.root)
    return prepare(module) if name == "vae" else module


def save_part(name: str, module: nn.Module, cfg: Config) -> None:
    part = open_backbone(home(cfg)).parts[name]
    save_module(module, part.names, home(cfg) / part.folder / part.file, torch.bfloat16)


def learner_of(module: nn.Module, name: str, cfg: Config) -> Learner:
    steps = cfg.steps or STEPS[name]
    return Learner(module, Path(cfg.out) / f"{name}.pt", RATE[name], steps, cfg.save_every)


def captions(count: int, frames: int) -> list[str]:
    return [world.scene(i, frames).prompt for i in range(count)]


# ── Stage vae: frames of the world, one at a time ───────────────────────────────────────────────────────


def world_frames(out: Path, clips: int, pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips (N, T, H, W, 3) and pictures (N, 1, H, W, 3), uint8, of the base split, drawn once."""
    shapes = {"clips": (clips, FRAMES, SIZE, SIZE, 3), "pictures": (pictures, 1, SIZE, SIZE, 3)}
    for name, shape in shapes.items():
        if not (out / f"{name}.npy").is_file():
            frames = np.lib.format.open_memmap(out / f"{name}.tmp", "w+", np.uint8, shape)
            for i in tqdm(range(len(frames)), name):
                frames[i] = world.render(world.scene(i, shape[1]), SIZE)
            os.replace(out / f"{name}.tmp", out / f"{name}.npy")
    return tuple(np.load(out / f"{name}.npy", mmap_mode="r") for name in shapes)


def causal_convs(vae: VAE) -> list[CausalConv]:
    return [module for module in vae.modules() if isinstance(module, CausalConv)]


def learn_newest_taps(vae: VAE) -> None:
    """Leave a convolution's other two taps at zero, where prepare puts them, by giving them no gradient.

    The finished VAE codes every frame of a clip by itself. Called when the parameters have their type.
    After a start of zeros a picture meets the newest tap only.
    """
    for conv in causal_convs(vae):
        if not conv.zero_start:
            conv.weight.register_hook(lambda grad: F.pad(grad[:, :, 2:], (0, 0, 0, 0, 2, 0)))


@torch.no_grad()
def prepare(vae: VAE) -> VAE:
    """A start that learns fast: filters of one frame, residual branches at zero, little noise on latents."""
    for conv in causal_convs(vae):
        conv.weight *= 3**0.5  # a third of the inputs is left
        conv.weight[:, :, :2] = 0
    for block in (module for module in vae.modules() if isinstance(module, BLOCKS)):
        nn.init.zeros_(block.conv2.weight)
    last = vae.encoder.posterior if isinstance(vae, wan_vae.WanVAE) else vae.encoder.conv_out
    last.bias[vae.cfg.latent_channels :] = -6.0
    return vae


def train_vae(cfg: Config) -> None:
    out = Path(cfg.out)
    clips, pictures = world_frames(out, CLIPS, PICTURES)
    vae = load_part("vae", cfg)
    learner = learner_of(vae, "vae", cfg)
    learn_newest_taps(vae)
    held = [world.render(world.scene(i, 1, "heldout"), SIZE)[0] for i in range(48)]
    held = from_uint8(torch.from_numpy(np.stack(held))).movedim(-1, 1)[:, :, None].bfloat16()

    def loss_at(step: int, part: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([1, step, part])
        half = BATCH["vae"] // 2
        moving = clips[np.sort(rng.integers(len(clips), size=half)), rng.integers(FRAMES, size=half)]
        lone = pictures[np.sort(rng.integers(len(pictures), size=half)), 0]
        frames = from_uint8(torch.from_numpy(np.concatenate([moving, lone])))
        x = frames.movedim(-1, 1)[:, :, None].bfloat16()  # (B, 3, 1, H, W)
        mean, logvar = vae.posterior(x)
        noise = torch.randn(mean.shape, generator=generator(2, step, part)).bfloat16()
        y = vae.decode(vae.scaled(mean + torch.exp(logvar / 2) * noise))
        error = (y - x).float()
        kl = (mean.square() + logvar.exp() - 1 - logvar).float().mean() / 2
        edges = sum(error.diff(dim=side).abs().mean() for side in (-1, -2))
        return {"l1": error.abs().mean(), "edges": edges, "kl": 1e-4 * kl}

    @torch.no_grad()
    def check() -> dict[str, float]:
        y = vae.decode(vae.encode(held)).float().clamp(-1, 1)
        show(out / "vae.png", torch.cat([held[:16].float(), y[:16]], dim=2))
        save_part("vae", vae, cfg)
        return {"psnr": psnr(y, held.float())}

    run(learner, loss_at, check)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over the clips (B, 3, T, H, W) in [-1, 1], dB."""
    return float((10 * torch.log10(4 / (x - y).square().mean((1, 2, 3, 4)))).mean())


def show(path: Path, clips: Tensor, scale: int = 3) -> None:
    """A sheet: a row per clip of (B, 3, T, H, W), or 8 clips a row if they are short."""
    sheet = clips.permute(0, 2, 1, 3, 4).flatten(0, 1)  # (B * T, 3, H, W)
    across = clips.shape[2] if clips.shape[2] > 3 else 8 * clips.shape[2]
    rows = [torch.cat(list(row), dim=-1) for row in sheet.split(across)]
    sheet = torch.cat([row for row in rows if row.shape[-1] == rows[0].shape[-1]], dim=-2)
    write_image(path, F.interpolate(sheet[None], scale_factor=scale)[0])


# ── Stage latents: the VAE's scale, and what the transformer will see ───────────────────────────────────


@torch.no_grad()
def make_latents(cfg: Config) -> None:
    out, config = Path(cfg.out), home(cfg) / "vae/config.json"
    vae = load_backbone(home(cfg), dtype=torch.bfloat16, parts=("vae",)).vae

    def encode(frames: np.ndarray) -> Tensor:
        """(N, T, H, W, 3) uint8 -> unscaled latents (N, C, T, h, w)."""
        x = from_uint8(torch.from_numpy(frames).flatten(0, 1)).movedim(-1, 1)[:, :, None]
        z = vae.posterior(x.bfloat16())[0][:, :, 0]  # (N * T, C, h, w)
        return z.unflatten(0, frames.shape[:2]).transpose(1, 2)

    for name, frames in zip(("clips", "pictures"), world_frames(out, CLIPS, PICTURES), strict=True):
        step = 128 // frames.shape[1]
        starts = tqdm(range(0, len(frames), step), f"{name} to latents")
        latents = torch.cat([encode(frames[i : i + step]) for i in starts])
        if name == "clips":
            content = json.loads(config.read_text()) | scale(latents, cfg)
            config.write_text(json.dumps(content, indent=2) + "\n")
            vae = load_backbone(home(cfg), dtype=torch.bfloat16, parts=("vae",)).vae
        torch.save(vae.scaled(latents), out / f"{name}.latents.pt")


def scale(latents: Tensor, cfg: Config) -> dict[str, object]:
    """What gives latents (N, C, T, h, w) unit variance, as the VAE's config has it."""
    if cfg.family == "cogvideox":
        return {"scaling_factor": round(1 / latents.float().std().item(), 4)}
    channels = latents.float().transpose(0, 1).flatten(1)
    moments = {"latents_mean": channels.mean(1), "latents_std": channels.std(1)}
    return {name: [round(value, 4) for value in moment.tolist()] for name, moment in moments.items()}


# ── Stage dit: text-to-video ────────────────────────────────────────────────────────────────────────────


def train_dit(cfg: Config) -> None:
    out = Path(cfg.out)
    layout = open_backbone(home(cfg))
    dit, text = load_part("dit", cfg), layout.parts["text"].build()
    text.encoder = load_part("text", cfg)
    both = nn.ModuleList([dit, text.encoder])
    both.in_float32 = getattr(dit, "in_float32", ())
    learner = learner_of(both, "dit", cfg)
    vae = load_backbone(home(cfg), dtype=torch.bfloat16, parts=("vae",)).vae
    backbone = Backbone(layout, dit, vae, text)
    latents = {name: torch.load(out / f"{name}.latents.pt") for name in ("clips", "pictures")}
    prompts = {"clips": captions(CLIPS, FRAMES), "pictures": captions(PICTURES, 1)}
    ids = {name: text.tokenize(prompts[name]) for name in prompts}
    blank, schedule = text.tokenize(""), replace(layout.schedule, train_shift=cfg.t_shift)

    def loss_at(step: int, part: int) -> dict[str, Tensor]:
        # A quarter of the steps are pictures, as one-frame videos: what identity injection denoises later.
        name = "pictures" if np.random.default_rng([3, step]).random() < 0.25 else "clips"
        rng, draws = np.random.default_rng([4, step, part]), generator(5, step, part)
        rows = torch.from_numpy(rng.integers(len(latents[name]), size=BATCH[name]))
        dropped = torch.from_numpy(rng.random(len(rows)) < 0.1)[:, None]  # for guidance
        x = latents[name][rows].float()
        t = schedule.draw(len(x), draws)
        noise = torch.randn(x.shape, generator=draws)
        features = text.encode(torch.where(dropped, blank, ids[name][rows]))
        pred = dit(schedule.add_noise(x, noise, t).bfloat16(), t, features)
        return {name: F.mse_loss(pred.float(), schedule.target(x, noise, t))}

    def check() -> dict[str, float]:
        save_part("dit", dit, cfg)
        save_part("text", text.encoder, cfg)
        if learner.step % (5 * cfg.save_every):
            return {}
        truths = new_scenes(10)
        clips = film(backbone, [truth.prompt for truth in truths], seed=0)
        show(out / "dit.png", clips[:, :, ::2], scale=1)
        return agreement(clips, truths)

    run(learner, loss_at, check)


def new_scenes(count: int) -> list[world.Scene]:
    """Scenes of held-out subjects, all motions in turn."""
    return [wanted for i in range(count) for wanted in world.heldout(i)[1]][:count]


def film(backbone: Backbone, prompts: list[str], seed: int, steps: int = 25) -> Tensor:
    """Text-to-video: prompts -> clips (B, 3, T, H, W)."""
    cfg = sample.Config(
        backbone="", prompt=(), steps=steps, height=SIZE, width=SIZE, frames=FRAMES, fps=8.0, device="cpu",
        dtype="bfloat16",
    )  # fmt: skip
    cfg = sample.with_defaults(cfg, backbone.layout)
    texts, blank, seeds = backbone.text(prompts), backbone.text([""]), range(seed, seed + len(prompts))
    return sample.generate(backbone, texts, blank, None, cfg, seeds).clamp(-1, 1)


def agreement(clips: Tensor, truths: list[world.Scene]) -> dict[str, float]:
    """Share of clips (B, 3, T, H, W) that move as asked, and that are where they should be."""
    tracks = [metrics.track(clip) for clip in clips]
    moved = [metrics.motion_class(seen) == truth.motion for seen, truth in zip(tracks, truths, strict=True)]
    placed = [seen.place == truth.background for seen, truth in zip(tracks, truths, strict=True)]
    return {"motion": float(np.mean(moved)), "background": float(np.mean(placed))}


# ── Stage score: what the VAE keeps of real clips, what the base makes of new prompts ───────────────────


def score(cfg: Config) -> None:
    out, truths = Path(cfg.out), new_scenes(cfg.steps or 40)
    backbone = load_backbone(home(cfg), dtype=torch.bfloat16)
    real = torch.stack([world.to_clip(world.render(truth, SIZE)) for truth in truths])
    with torch.no_grad():
        coded = [backbone.vae.decode(backbone.vae.encode(clip[None].bfloat16())) for clip in real]
    coded = torch.cat(coded).float().clamp(-1, 1)
    prompts = [truth.prompt for truth in truths]
    made = torch.cat([film(backbone, prompts[i : i + 10], seed=i) for i in range(0, len(prompts), 10)])
    for name, clips in (("real", real), ("vae", coded), ("base", made)):
        row = agreement(clips, truths) | ({"psnr": psnr(clips, real)} if name == "vae" else {})
        print(name, len(clips), "clips", json.dumps({key: round(value, 3) for key, value in row.items()}))
        show(out / f"score-{name}.png", clips[:16, :, ::2], scale=1)


def main() -> None:
    cfg = parse(Config, __doc__)
    stages = {"new": begin, "vae": train_vae, "latents": make_latents, "dit": train_dit, "score": score}
    if cfg.stage not in stages:
        raise SystemExit(f"stage {cfg.stage!r}: choose one of {', '.join(stages)}")
    if cfg.family not in FAMILIES:
        raise SystemExit(f"family {cfg.family!r}: choose one of {', '.join(FAMILIES)}")
    torch.set_num_threads(cfg.threads)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    stages[cfg.stage](cfg)


if __name__ == "__main__":
    main()
