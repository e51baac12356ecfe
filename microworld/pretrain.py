"""The micro-world's base model from nothing: a CogVideoX of the real classes, on a GPU or on two CPU cores.

    python -m microworld.pretrain --stage new       random weights and a vocabulary
    python -m microworld.pretrain --stage vae       autoencoder, on single frames of the world
    python -m microworld.pretrain --stage whiten    its channels to mean 0, deviation 1; then large batches
    python -m microworld.pretrain --stage latents   its scale, then clips and pictures as latents
    python -m microworld.pretrain --stage dit       transformer and text encoder, text-to-video
    python -m microworld.pretrain --stage score     what the VAE keeps, what the base makes of new prompts

Training goes on where it was stopped, on a CPU bit for bit. Results into weights/toy, which any script takes
as its --backbone; README.md there has the recipe, what it gave, and what it costs: minutes of an H100, or
days of two cores. With `--family wan --out out/wan` the same stages but whiten make a Wan of this world,
in out/wan/model.
"""

import json
import multiprocessing
import os
import shutil
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sample
from microworld import metrics, world
from microworld.learner import Inputs, Learner, Recipe, run
from microworld.sizes import FAMILIES, FRAMES, SIZE
from microworld.studio import BASE_GUIDANCE, TOY
from sdv.data.media import from_uint8, write_image
from sdv.models import cogvideox_vae, wan_vae
from sdv.models.causal_conv import CausalConv
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.models.video_vae import VideoVAE
from sdv.run import settings
from sdv.run.settings import Count, CountOrNone
from sdv.seeds import generator
from weights import Backbone, load_backbone, open_backbone, tiny
from weights.tensors import save_module

# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Config:
    """how the base is made"""

    stage: str  # new, vae, whiten, latents, dit or score
    steps: CountOrNone = 0  # of the stage; of score, its prompts (0: the recipe's)
    batch: CountOrNone = 0  # frames of a step of vae and whiten, clips of one of dit (0: the recipe's)
    clips: Count = 30_000  # drawn for stage dit; the VAE sees single frames of them
    pictures: Count = 48_000  # drawn beside them
    family: str = "cogvideox"  # or wan: of which classes the model is
    t_shift: float = 1.0  # above 1, stage dit trains at noisier times, as train.py's --t-shift
    out: str = "out/base"  # frames, latents, state, logs, pictures to look at
    save_every: Count = 250  # steps between saves
    threads: Count = os.cpu_count() or 1  # of the CPU, and processes that draw
    device: str = "cuda" if CUDA else "cpu"  # where it runs


RECIPES = {
    "vae": Recipe(3000, 1e-3, hold=2 / 3, average=0.995),
    "whiten": Recipe(286, 1e-3, hold=0.3, average=0.99),
    # Its loss after 180 steps of 16 clips: 0.170 at 1e-3, 0.086 at 3e-3, 0.081 at 8e-3.
    "dit": Recipe(
        26_160, 3e-3, 0.5, 0.9995, ("embed", "table", "patch_in", "proj_out", "time_in", "mod", "text_in")
    ),
}
BATCH = {"vae": 8, "whiten": 256, "dit": 64}
PICTURES_A_CLIP = 6  # in a step of pictures, which costs about what one of clips does
LATER = 1_000_000  # pictures are of scenes from this one on, so that they show others than the clips do
BLOCKS = cogvideox_vae.Block, wan_vae.Block


def home(cfg: Config) -> Path:
    """The checkpoint's folder."""
    return TOY if cfg.family == "cogvideox" else Path(cfg.out) / "model"


def begin(cfg: Config) -> None:
    """Write configs and a vocabulary of captions, and take away the weights. Not where a run has begun."""
    if list(Path(cfg.out).glob("*.pt")):
        return print(f"{cfg.out} holds a run: going on with it. Remove it to begin from nothing.")
    if list(home(cfg).glob("*/*.safetensors")):
        before = Path(cfg.out) / "before"
        if before.exists():
            raise FileExistsError(f"{before}: keeps a base already; move it away, or name another --out")
        shutil.copytree(home(cfg), before)
        print(f"the base that was in {home(cfg)} is kept in {before}")
    said = captions_of("clips", 5000, cfg)
    vocabulary = tiny.train_vocabulary(said, 256, umt5=cfg.family == "wan")
    tiny.write_configs(home(cfg), FAMILIES[cfg.family], vocabulary)
    for part in open_backbone(home(cfg)).parts.values():
        (home(cfg) / part.folder / part.file).unlink(missing_ok=True)


def load_part(name: str, cfg: Config) -> nn.Module:
    """One network of the folder in fp32, to be trained; a new one where the folder has no weights of it."""
    part = open_backbone(home(cfg)).parts[name]
    if (home(cfg) / part.folder / part.file).is_file():
        module = getattr(load_backbone(home(cfg), parts=(name,)), name).get_submodule(part.root)
    else:
        torch.manual_seed(0)
        module = part.build().get_submodule(part.root)
        prepare(module)
    return module.to(cfg.device).requires_grad_(True)


def save_part(name: str, module: nn.Module, cfg: Config) -> None:
    part = open_backbone(home(cfg)).parts[name]
    save_module(module, part.names, home(cfg) / part.folder / part.file, torch.bfloat16)


def learner_of(module: nn.Module, stage: str, cfg: Config) -> Learner:
    recipe = RECIPES[stage]
    return Learner(module, recipe._replace(steps=cfg.steps or recipe.steps))


def set_vae(cfg: Config, **content: object) -> None:
    """Change fields of the VAE's config."""
    file = home(cfg) / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | content, indent=2) + "\n")


# ── What is drawn ───────────────────────────────────────────────────────────────────────────────────────


def scene(kind: str, i: int) -> world.Scene:
    """The i-th of the "clips" or "pictures" that the base learns from."""
    return world.scene(i, FRAMES) if kind == "clips" else world.scene(LATER + i, 1)


def draw_some(job: tuple[Path, str, range]) -> list[str]:
    """Draws into a file; returns the captions."""
    file, kind, some = job
    frames, scenes = np.load(file, mmap_mode="r+"), [scene(kind, i) for i in some]
    for i, one in zip(some, scenes, strict=True):
        frames[i] = world.render(one, SIZE)
    return [one.prompt for one in scenes]


def captions_of(kind: str, count: int, cfg: Config) -> list[str]:
    """Of the first `count` clips or pictures: from the file beside the frames, or made again without it."""
    file = Path(cfg.out) / f"{kind}-{count}.json"
    return json.loads(file.read_text()) if file.is_file() else [scene(kind, i).prompt for i in range(count)]


def world_frames(cfg: Config) -> dict[str, np.ndarray]:
    """Clips (N, T, H, W, 3) and pictures (N, 1, H, W, 3), uint8, drawn once, by all cores."""
    files = {}
    for kind, count, frames in (("clips", cfg.clips, FRAMES), ("pictures", cfg.pictures, 1)):
        file = files[kind] = Path(cfg.out) / f"{kind}-{count}.npy"
        if not file.is_file():
            unfinished = file.with_suffix(".tmp")
            np.lib.format.open_memmap(unfinished, "w+", np.uint8, (count, frames, SIZE, SIZE, 3))
            jobs = [(unfinished, kind, range(count)[i : i + 50]) for i in range(0, count, 50)]
            with multiprocessing.get_context("spawn").Pool(cfg.threads) as pool:
                said = list(tqdm(pool.imap(draw_some, jobs), kind, len(jobs)))
            file.with_suffix(".json").write_text(json.dumps(list(chain(*said))))
            os.replace(unfinished, file)
    return {kind: np.load(file, mmap_mode="r") for kind, file in files.items()}


def pixels(frames: np.ndarray, device: str) -> Tensor:
    """Frames (N, H, W, 3) uint8 -> clips of one frame (N, 3, 1, H, W) in [-1, 1], bf16."""
    return from_uint8(torch.from_numpy(np.array(frames)).to(device)).movedim(-1, 1)[:, :, None].bfloat16()


# ── Stages vae and whiten: frames of the world, one at a time ───────────────────────────────────────────


def causal_convs(vae: VideoVAE) -> list[CausalConv]:
    return [module for module in vae.modules() if isinstance(module, CausalConv)]


def learn_newest_taps(vae: VideoVAE) -> None:
    """Leave a convolution's other two taps at zero, where prepare puts them, by giving them no gradient.

    The finished VAE codes every frame of a clip by itself, but for its norms. Called when the parameters
    have their type. After a start of zeros a picture meets the newest tap only.
    """
    for conv in causal_convs(vae):
        if not conv.zero_start:
            conv.weight.register_hook(lambda grad: F.pad(grad[:, :, 2:], (0, 0, 0, 0, 2, 0)))


@torch.no_grad()
def prepare(module: nn.Module) -> None:
    """A start that learns fast, of a random network: what it adds to its input is nothing yet."""
    if isinstance(module, VideoVAE):
        for conv in causal_convs(module):
            conv.weight *= 3**0.5  # filters of one frame: a third of the inputs is left
            conv.weight[:, :, :2] = 0
        for block in (part for part in module.modules() if isinstance(part, BLOCKS)):
            nn.init.zeros_(block.conv2.weight)
        last = module.encoder.posterior if isinstance(module, wan_vae.WanVAE) else module.encoder.conv_out
        last.bias[module.cfg.latent_channels :] = -6.0  # little noise on the latents
    if isinstance(module, CogVideoXDiT):
        for block in module.blocks:
            for linear in (block.mod1, block.mod2):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
                linear.bias.unflatten(0, (2, 3, -1))[:, 2] = 1.0  # the gates
        last = [linear for block in module.blocks for linear in (block.attn.out, block.ff.down)]
        for linear in (*last, module.mod_out, module.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


@torch.no_grad()
def whiten(vae: cogvideox_vae.CogVideoXVAE, frames: Tensor) -> None:
    """Give each latent channel of frames (N, 3, 1, H, W) mean 0 and deviation 1 by the layers around it.

    What decoder and norms make of a latent stays as it was, except at the borders, where a convolution's
    padding of zeros now stands for the mean.
    """
    mean = vae.posterior(frames)[0].float().transpose(0, 1).flatten(1)  # (C, N T h w)
    centre, size = mean.mean(1), mean.std(1)
    count, last = vae.cfg.latent_channels, vae.encoder.conv_out
    last.weight[:count] /= size.view(-1, 1, 1, 1, 1)
    last.bias[:count] = (last.bias[:count] - centre) / size
    last.bias[count:] -= 2 * size.log()  # the log-variance
    norms = [norm for norm in vae.modules() if isinstance(norm, cogvideox_vae.SpatialNorm)]
    for layer in (vae.decoder.conv_in, *(part for norm in norms for part in (norm.scale, norm.shift))):
        layer.bias += torch.einsum("oi...,i->o", layer.weight, centre)
        layer.weight *= size.view(1, -1, *[1] * (layer.weight.ndim - 2))


def train_vae(cfg: Config) -> None:
    """Stage vae, or whiten, which begins by whitening."""
    stage, seen = cfg.stage, world_frames(cfg)
    file, batch = Path(cfg.out) / f"{stage}.pt", cfg.batch or BATCH[stage]

    def frames(step: int) -> np.ndarray:
        """(B, H, W, 3): one half from clips, one of pictures."""
        rng, half = np.random.default_rng([1, step]), batch // 2
        moving = np.sort(rng.integers(len(seen["clips"]), size=half)), rng.integers(FRAMES, size=half)
        lone = np.sort(rng.integers(len(seen["pictures"]), size=batch - half))
        return np.concatenate([seen["clips"][moving], seen["pictures"][lone, 0]])

    vae = load_part("vae", cfg)
    if stage == "whiten" and not file.is_file():
        if cfg.family != "cogvideox":
            raise ValueError("--stage whiten: a Wan's config has the mean and deviation of each channel")
        some = np.concatenate([frames(RECIPES[stage].steps + k) for k in range(-(-512 // batch))])
        whiten(vae, pixels(some, cfg.device).float())
        set_vae(cfg, scaling_factor=1.0)
        save_part("vae", vae, cfg)
        vae = load_part("vae", cfg)
    learner = learner_of(vae, stage, cfg)
    learn_newest_taps(vae)
    held = [world.render(world.scene(i, 1, "heldout"), SIZE)[0] for i in range(48)]
    held = pixels(np.stack(held), cfg.device)

    def draw(step: int) -> tuple[str, Inputs]:
        x = pixels(frames(step), cfg.device)
        shape = len(x), vae.cfg.latent_channels, 1, *(side // vae.cfg.spatial_ratio for side in x.shape[3:])
        return "loss", {"x": x, "noise": noise_of(shape, 2, step, cfg.device).bfloat16()}

    def loss_of(inputs: Inputs) -> Tensor:
        """L1, L1 between neighbours, and a little of the distance of the latents' spread from 1."""
        x, (mean, logvar) = inputs["x"], vae.posterior(inputs["x"])
        y = vae.decode(vae.scaled(mean + torch.exp(logvar / 2) * inputs["noise"]))
        error, mean, logvar = (y - x).float(), mean.float(), logvar.float()
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return error.abs().mean() + sum(error.diff(dim=d).abs().mean() for d in (-1, -2)) + 1e-4 * kl

    @torch.no_grad()
    def check() -> dict[str, float]:
        y = vae.decode(vae.encode(held)).float().clamp(-1, 1).cpu()
        show(file.with_suffix(".png"), torch.cat([held[:16].float().cpu(), y[:16]], dim=2))
        save_part("vae", vae, cfg)
        return {"psnr": psnr(y, held.float().cpu())}

    run(learner, file, draw, loss_of, check, cfg.save_every)


def noise_of(shape: tuple[int, ...], stage: int, step: int, device: str) -> Tensor:
    """A step's noise, drawn where it is needed: other numbers on a GPU, but there the same ones each time."""
    rng = torch.Generator(device).manual_seed(generator(stage, step).initial_seed())
    return torch.randn(shape, generator=rng, device=device)


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
    def load_vae() -> VideoVAE:
        return load_backbone(home(cfg), cfg.device, torch.bfloat16, ("vae",)).vae

    for kind, frames in world_frames(cfg).items():
        vae, latents, step = load_vae(), [], 2048 // frames.shape[1] if CUDA else 16
        for i in tqdm(range(0, len(frames), step), f"{kind} to latents"):
            some = frames[i : i + step]  # (N, T, H, W, 3)
            z = vae.posterior(pixels(some.reshape(-1, *some.shape[2:]), cfg.device))[0]  # (N T, C, 1, h, w)
            latents.append(z[:, :, 0].unflatten(0, some.shape[:2]).transpose(1, 2).cpu())  # (N, C, T, h, w)
        latents = torch.cat(latents)
        if kind == "clips":
            set_vae(cfg, **scale(latents, cfg))
            vae = load_vae()
        torch.save(vae.scaled(latents.to(cfg.device)).cpu(), Path(cfg.out) / f"{kind}.latents.pt")


def scale(latents: Tensor, cfg: Config) -> dict[str, object]:
    """What gives latents (N, C, T, h, w) unit variance, as the VAE's config has it."""
    if cfg.family == "cogvideox":
        return {"scaling_factor": round(1 / latents.float().std().item(), 4)}
    channels = latents.float().transpose(0, 1).flatten(1)
    moments = {"latents_mean": channels.mean(1), "latents_std": channels.std(1)}
    return {name: [round(value, 4) for value in moment.tolist()] for name, moment in moments.items()}


# ── Stage dit: text-to-video ────────────────────────────────────────────────────────────────────────────


def train_dit(cfg: Config) -> None:
    out, batch = Path(cfg.out), cfg.batch or BATCH["dit"]
    layout = open_backbone(home(cfg))
    dit, text = load_part("dit", cfg), layout.parts["text"].build()
    text.encoder = load_part("text", cfg)
    both = nn.ModuleDict({"dit": dit, "text": text.encoder})
    both.in_float32 = getattr(dit, "in_float32", ())
    learner = learner_of(both, "dit", cfg)
    vae = load_backbone(home(cfg), cfg.device, torch.bfloat16, ("vae",)).vae
    backbone = Backbone(layout, dit, vae, text)
    latents = {kind: torch.load(out / f"{kind}.latents.pt").to(cfg.device) for kind in ("clips", "pictures")}
    said = {kind: captions_of(kind, len(x), cfg) for kind, x in latents.items()}
    ids = {kind: text.tokenize(prompts).to(cfg.device) for kind, prompts in said.items()}
    blank, schedule = text.tokenize("").to(cfg.device), replace(layout.schedule, train_shift=cfg.t_shift)

    def draw(step: int) -> tuple[str, Inputs]:
        # A quarter of the steps are pictures, as one-frame videos: what identity injection denoises later.
        kind, count = ("pictures", PICTURES_A_CLIP * batch) if step % 4 == 3 else ("clips", batch)
        rng = generator(4, step)
        rows = torch.randint(len(latents[kind]), (count,), generator=rng).to(cfg.device)
        dropped = (torch.rand(count, 1, generator=rng) < 0.1).to(cfg.device)  # for guidance
        t, x = schedule.draw(count, rng), latents[kind][rows].float()
        noise = noise_of(x.shape, 5, step, cfg.device)
        noisy, target = schedule.add_noise(x, noise, t).bfloat16(), schedule.target(x, noise, t)
        said = torch.where(dropped, blank, ids[kind][rows])
        return kind, {"noisy": noisy, "t": t.to(cfg.device), "ids": said, "target": target}

    def loss_of(inputs: Inputs) -> Tensor:
        pred = dit(inputs["noisy"], inputs["t"], text.encode(inputs["ids"]))
        return F.mse_loss(pred.float(), inputs["target"])

    def check() -> dict[str, float]:
        save_part("dit", dit, cfg)
        save_part("text", text.encoder, cfg)
        if learner.step % (20 * cfg.save_every):
            return {}
        truths = new_scenes(10)
        clips = film(backbone, [truth.prompt for truth in truths], 0, cfg.device)
        show(out / "dit.png", clips[:, :, ::2], scale=1)
        return agreement(clips, truths)

    run(learner, out / "dit.pt", draw, loss_of, check, cfg.save_every, graph=cfg.device.startswith("cuda"))


def new_scenes(count: int) -> list[world.Scene]:
    """Scenes of held-out subjects, all motions in turn."""
    return [wanted for i in range(count) for wanted in world.heldout(i)[1]][:count]


def film(backbone: Backbone, prompts: list[str], seed: int, device: str, steps: int = 25) -> Tensor:
    """Text-to-video: prompts -> clips (B, 3, T, H, W)."""
    cfg = sample.Config(
        backbone="", steps=steps, guidance=BASE_GUIDANCE, height=SIZE, width=SIZE, frames=FRAMES,
        fps=8.0, device=device, dtype="bfloat16",
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


@torch.no_grad()
def score(cfg: Config) -> None:
    out, truths = Path(cfg.out), new_scenes(cfg.steps or 100)
    backbone = load_backbone(home(cfg), cfg.device, torch.bfloat16)
    real = torch.stack([world.to_clip(world.render(truth, SIZE)) for truth in truths])
    coded = [backbone.vae.decode(backbone.vae.encode(clip[None].to(cfg.device).bfloat16())) for clip in real]
    coded, prompts = torch.cat(coded).float().clamp(-1, 1).cpu(), [truth.prompt for truth in truths]
    starts = tqdm(range(0, len(prompts), 10), "films")
    made = torch.cat([film(backbone, prompts[i : i + 10], i, cfg.device) for i in starts])
    for name, clips in (("real", real), ("vae", coded), ("base", made)):
        row = agreement(clips, truths) | ({"psnr": psnr(clips, real)} if name == "vae" else {})
        print(name, len(clips), "clips", json.dumps({key: round(value, 3) for key, value in row.items()}))
        show(out / f"score-{name}.png", clips[:16, :, ::2], scale=1)


STAGES = {
    "new": begin, "vae": train_vae, "whiten": train_vae, "latents": make_latents, "dit": train_dit,
    "score": score,
}  # fmt: skip


def main() -> None:
    cfg = settings.parse(Config, __doc__)
    for name, choices in (("stage", STAGES), ("family", FAMILIES)):
        if getattr(cfg, name) not in choices:
            raise ValueError(f"--{name} {getattr(cfg, name)}: choose one of {', '.join(choices)}")
    torch.set_num_threads(cfg.threads)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    settings.run(main)
