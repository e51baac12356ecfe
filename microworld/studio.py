"""The micro-world as a bench: an adapter trained by train.py, held-out subjects filmed by it, and a judge.

What demo.py, claims.py and gradients.py have in common. The base is weights/toy.
"""

import csv
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import sample
import weights
from microworld import metrics, world
from sdv.data.media import fit
from sdv.lora import lora_modules
from sdv.run.settings import DEVICE

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "weights/toy"
SHIPPED = TOY / "adapter.safetensors"
# The paper's recipe at the world's scale: what is not named here is train.py's default, the paper's value.
RECIPE = {
    "rank": 64, "alpha": 64, "lr": 3e-3, "warmup": 50, "dtype": "bfloat16", "recompute": 0.0,
    "identity_batch": 64, "motion_batch": 8, "accumulate": 1, "workers": 0, "verify": 8,
}  # fmt: skip
# Films of an adapter are guided by the picture alone: guidance on the text works against it and mottles the
# subject. The base has only the text; the 5B's guidance of 6 would make this small model's colours glow.
REF_GUIDANCE, BASE_GUIDANCE = 2.0, 3.0


def arguments(options: dict[str, object]) -> list[str]:
    """Settings as a command line has them; paths from the project's folder, where it is run."""
    words = []
    for name, value in options.items():
        here = os.path.relpath(value, ROOT) if isinstance(value, Path) else str(value)
        words += ["--" + name.replace("_", "-"), here]
    return words


def slug(name: str) -> str:
    """A row's name as a file has it."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def make_world(out: Path, **counts: int) -> Path:
    """Write the splits that are asked for, once: pairs= and clips= say how many rows."""
    done = out / "counts.json"
    if not done.is_file() or json.loads(done.read_text()) != counts:
        flags = arguments({"out": out, "base": 0, "heldout": 0} | counts)
        subprocess.run([sys.executable, "-m", "microworld.world", *flags], cwd=ROOT, check=True)
        done.write_text(json.dumps(counts))
    return out


def study_world(out: Path, **counts: int) -> Path:
    """The world of a study's runs, in a folder named by its counts."""
    return make_world(out / "worlds" / "-".join(f"{name}{count}" for name, count in counts.items()), **counts)


def train(out: Path, data: Path, steps: int, **settings: object) -> Path:
    """Run train.py on a world's pairs and clips; returns the adapter. A stopped run goes on."""
    adapter = out / f"step-{steps:06d}" / "adapter.safetensors"
    if not adapter.is_file():
        options = RECIPE | {"backbone": TOY, "steps": steps, "save_every": steps} | settings
        options |= {"pairs": data / "pairs", "clips": data / "clips", "cache": data / "cache", "out": out}
        done = subprocess.run([sys.executable, "train.py", *arguments(options), "--resume"], cwd=ROOT)
        if done.returncode:
            raise SystemExit(done.returncode)  # train.py has said why
    return adapter


class Case(NamedTuple):
    """A held-out subject that is to be filmed: its picture (3, H, W) and what is asked for."""

    ref: Tensor
    truth: world.Scene


def cases(count: int) -> list[Case]:
    """Four prompts for each held-out subject, and its picture on white, as the paper has it."""
    layout, found = weights.open_backbone(TOY), []
    for i in range(-(-count // world.PROMPTS_PER_SUBJECT)):
        portrait, wanted = world.heldout(i, layout.frames)
        picture = world.render(portrait, world.SCALE * layout.height, "white")[0]
        ref = fit(torch.from_numpy(picture).movedim(-1, 0), layout.height, layout.width)
        found += [Case(ref, truth) for truth in wanted]
    return found[:count]


def renders(of: list[Case]) -> list[Tensor]:
    """What a perfect model could make of each case."""
    return [world.to_clip(world.render(case.truth, case.ref.shape[-1])) for case in of]


class Studio:
    """A base of the micro-world, on a GPU if there is one, to which adapters are added one after the other.

    batch: films made at once.
    """

    def __init__(self, steps: int = 25, batch: int = 40 if DEVICE == "cuda" else 10, folder: Path = TOY):
        self.steps, self.batch = steps, batch
        self.folder, toy = folder, weights.open_backbone(TOY)
        self.backbone = self._load()
        cfg = sample.Config(
            backbone=str(folder), steps=steps, height=toy.height, width=toy.width, frames=toy.frames,
            fps=toy.fps, device=DEVICE, dtype="bfloat16",
        )  # fmt: skip
        self.cfg = sample.with_defaults(cfg, self.backbone.layout)

    def _load(self, parts: Sequence[str] = weights.PARTS) -> weights.Backbone:
        return weights.load_backbone(self.folder, DEVICE, torch.bfloat16, parts, log=lambda line: None)

    def put_on(self, adapter: Path | None) -> None:
        """Load an adapter instead of the one before; None is the base."""
        if lora_modules(self.backbone.dit):
            self.backbone.dit = self._load(("dit",)).dit
        if adapter is not None:
            weights.load_adapter(self.backbone.dit, adapter)

    @torch.no_grad()
    def film(
        self, of: list[Case], seed: int = 0, guidance: float = 1.0, ref_guidance: float = REF_GUIDANCE,
        progress: Callable[[], object] = lambda: None,
    ) -> list[Tensor]:  # fmt: skip
        """A clip (3, T, H, W) of every case; the picture is shown only where an adapter is on."""
        backbone, clips = self.backbone, []
        cfg = dataclasses.replace(self.cfg, guidance=guidance, ref_guidance=ref_guidance)
        for first in range(0, len(of), self.batch):
            some = of[first : first + self.batch]
            texts, blank = backbone.text([case.truth.prompt for case in some]), backbone.text([""])
            pictures = torch.stack([case.ref for case in some])[:, :, None].to(DEVICE, torch.bfloat16)
            refs = backbone.vae.encode(pictures) if lora_modules(backbone.dit) else None
            seeds = [1000 * seed + first + i for i in range(len(some))]
            clips += sample.generate(backbone, texts, blank, refs, cfg, seeds, progress).clamp(-1, 1)
        return clips


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV so far."""
    return list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []


def add_row(file: Path, row: dict[str, object]) -> dict[str, str]:
    """Append a row to a CSV that other processes may append to as well; returns it as it is written."""
    row = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items()}
    with suppress(FileExistsError), open(file, "x", newline="") as to:
        csv.DictWriter(to, list(row)).writeheader()
    with open(file, "a+", newline="") as to:
        to.seek(0)
        columns = next(csv.reader(to))
        csv.DictWriter(to, columns).writerow(row)  # at the end, wherever it was read
    return row


def cell(values: list[float], digits: int) -> str:
    """A table's cell: the mean over seeds ± deviation, which a single seed does not have."""
    if not values:
        return "undefined"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def judge(clips: list[Tensor], of: list[Case]) -> dict:
    """microworld.metrics.evaluate of clips that were made of these cases."""
    return metrics.evaluate(clips, [case.truth for case in of], [case.ref for case in of])
