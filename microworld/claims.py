"""The paper's claims in the micro-world: every ablation is a setting of train.py, at equal numbers of steps.

    python -m microworld.claims --seeds 0 1 2          # goes on where it was stopped
    python -m microworld.claims --rows "full recipe" "image only"

Each run's numbers go to benchmarks/claims/claims.csv as soon as they are there, with a picture a row, and
claims.md is made of them. All rows film the same subjects, never trained on, from the same noise. A run that
microworld.gradients made is not trained again: its probe changes no bit of training.
"""

import datetime
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from microworld import studio
from sdv.data.media import write_image
from sdv.run.settings import parse, run

HERE = studio.ROOT / "benchmarks/claims"


@dataclass(frozen=True)
class Config:
    rows: tuple[str, ...] = ()  # which of them; all if not given
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; films use seed 0
    steps: int = 1000  # of each run
    pairs: int = 2000  # picture pairs
    clips: int = 64  # clips of other subjects
    cases: int = 40  # videos a run is judged by
    out: str = "out/study"  # worlds and runs


ROWS: dict[str, dict[str, object]] = {  # settings of train.py that differ from the recipe
    "full recipe": {},
    "image only": {"p_video": 0.0},
    "video only": {"p_video": 1.0},
    "two-stage": {},  # half of the steps image only, then half video only
    "first frame, no dropout": {"ref_frame": "first", "p_drop": 0.0},
    "first frame": {"ref_frame": "first"},
    "no dropout": {"p_drop": 0.0},
    "reference always dropped": {"p_drop": 1.0},
    "dropout of tokens": {"dropout": "tokens"},
    "p = 0.1": {"p_video": 0.1},
    "p = 0.4": {"p_video": 0.4},
    "p = 0.6": {"p_video": 0.6},
    "LoRA on the reference": {"lora_tokens": "ref"},
    "no <cls>": {"cls_token": ""},
    "PCGrad, buffer 4": {"pcgrad": "buffer-4"},
    "400 pairs": {},
    "8 clips": {},
}
COUNTS = {"400 pairs": {"pairs": 400}, "8 clips": {"clips": 8}}
MEASURES = ("top1", "top5", "colour", "shape", "motion", "dynamic", "background", "layout", "copied")


class Claim(NamedTuple):
    """`row` has more (sign 1) or less (sign -1) of a measure than `than`."""

    words: str
    paper: str
    measure: str
    row: str
    sign: int
    than: str


CLAIMS = (
    Claim("image only freezes motion", "DD 0.8 against 69.6", "dynamic", "image only", -1, "full recipe"),
    Claim("image only: motion is not as asked", "", "motion", "image only", -1, "full recipe"),
    Claim("two stages forget", "CLIP-T 28.96 against 32.69", "background", "two-stage", -1, "full recipe"),
    Claim("two stages: identity is higher", "DINO-I 76 against 63", "colour", "two-stage", 1, "full recipe"),
    Claim("first frame, no dropout: it pastes", "", "copied", "first frame, no dropout", 1, "full recipe"),
    Claim("first frame, no dropout: identity is higher", "", "colour", "first frame, no dropout", 1,
          "full recipe"),
    Claim("first frame moves less", "DD 37.8 against 69.6", "dynamic", "first frame", -1, "full recipe"),
    Claim("no dropout moves less", "DD 63.0 against 69.6", "dynamic", "no dropout", -1, "full recipe"),
    Claim("no dropout costs identity", "DINO-I 58 against 63", "colour", "no dropout", -1, "full recipe"),
    Claim("reference always dropped: identity is lost", "DINO-I 48.7 against 62.9", "colour",
          "reference always dropped", -1, "full recipe"),
    Claim("switching learns identity", "DINO-I 62.9", "colour", "full recipe", 1, "video only"),
    Claim("p = 0.6 costs identity", "CLIP-I 76.7 against 77.1", "colour", "p = 0.6", -1, "full recipe"),
    Claim("p = 0.4 costs identity", "DINO-I 57 against 63", "colour", "p = 0.4", -1, "full recipe"),
    Claim("p = 0.1 has more identity", "", "colour", "p = 0.1", 1, "full recipe"),
    Claim("p = 0.1 moves less as asked", "", "motion", "p = 0.1", -1, "full recipe"),
    Claim("dropping tokens costs identity", "", "colour", "dropout of tokens", -1, "full recipe"),
    Claim("8 clips instead of 64 lose motion", "few are enough", "motion", "8 clips", -1, "full recipe"),
    Claim("8 clips instead of 64 cost identity", "", "colour", "8 clips", -1, "full recipe"),
    Claim("400 pairs instead of 2,000 cost identity", "", "colour", "400 pairs", -1, "full recipe"),
    Claim("PCGrad costs identity", "DINO-I 56 against 63", "colour", "PCGrad, buffer 4", -1, "full recipe"),
    Claim("LoRA on the reference learns less", "", "colour", "LoRA on the reference", -1, "full recipe"),
    Claim("<cls> helps identity", "DINO-I 57.5 without", "colour", "no <cls>", -1, "full recipe"),
)  # fmt: skip


# ── Runs ────────────────────────────────────────────────────────────────────────────────────────────────


def train_row(name: str, seed: int, cfg: Config) -> Path:
    """The adapter of one row."""
    study, half = Path(cfg.out).resolve(), cfg.steps // 2
    data = studio.study_world(study, **{"pairs": cfg.pairs, "clips": cfg.clips} | COUNTS.get(name, {}))
    out, settings = study / f"{studio.slug(name)}-{seed}", studio.STUDY | {"seed": seed}
    if name != "two-stage":
        return studio.train(out, data, cfg.steps, **settings | ROWS[name])
    first = studio.train(out / "images", data, half, **settings, p_video=0.0)
    return studio.train(out / "videos", data, cfg.steps - half, **settings, p_video=1.0, adapter=first)


def sheet(of: list[studio.Case], clips: list[torch.Tensor], rows: int = 5) -> torch.Tensor:
    """References with every fourth frame of their clips, the first prompt of each subject: (3, H, W)."""
    chosen = list(zip(of, clips, strict=True))[:: len(of) // rows][:rows]
    strips = [torch.cat([case.ref, *clip[:, ::4].unbind(1)], dim=-1) for case, clip in chosen]
    return torch.cat(strips, -2).repeat_interleave(2, -1).repeat_interleave(2, -2)


def judge_row(name: str, seed: int, cfg: Config, base: studio.Studio, of: list[studio.Case]) -> dict:
    start = time.perf_counter()
    base.put_on(train_row(name, seed, cfg))
    trained = time.perf_counter() - start
    clips = base.film(of)
    if seed == cfg.seeds[0]:
        write_image(HERE / f"{studio.slug(name)}.png", sheet(of, clips))
    means = studio.judge(clips, of)["mean"]
    about = {"row": name, "seed": seed, "steps": cfg.steps, "cases": len(of)}
    about["minutes"] = round(trained / 60, 1)
    return about | means | {"date": str(datetime.date.today())}


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(claim: Claim, found: dict[str, dict[str, list[float]]]) -> str:
    """Shown or refuted only if the means differ by more than both rows' spreads over seeds together."""
    if claim.row not in found or claim.than not in found:
        return "not run"
    a, b = (found[name][claim.measure] for name in (claim.row, claim.than))
    if min(len(a), len(b)) < 3:
        return f"{statistics.mean(a):.2f} against {statistics.mean(b):.2f}, too few seeds"
    gap = claim.sign * (statistics.mean(a) - statistics.mean(b))
    noise = spread(a) + spread(b)
    word = "shown" if gap > noise else "refuted" if gap < -noise else "not shown"
    return f"{word} ({statistics.mean(a):.2f} against {statistics.mean(b):.2f})"


def report(rows: list[dict]) -> str:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for measure in MEASURES:
            found[row["row"]][measure].append(float(row[measure]))
    lines = ["# Rows and verdicts\n", "By `python -m microworld.claims`: means over seeds ± deviation.\n"]
    lines += ["| row | seeds | " + " | ".join(MEASURES) + " |", "|---|---:|" + "---:|" * len(MEASURES)]
    for name in (name for name in ROWS if name in found):
        cells = [f"{statistics.mean(v):.2f} ± {spread(v):.2f}" for v in (found[name][m] for m in MEASURES)]
        lines.append(f"| {name} | {len(found[name]['top1'])} | " + " | ".join(cells) + " |")
    lines += ["\n| claim | the paper | measure | verdict |", "|---|---|---|---|"]
    lines += [f"| {c.words} | {c.paper} | {c.measure} | {verdict(c, found)} |" for c in CLAIMS]
    return "\n".join(lines) + "\n"


def main() -> None:
    cfg = parse(Config, __doc__)
    unknown = set(cfg.rows) - ROWS.keys()
    if unknown:
        raise ValueError(f"--rows {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    HERE.mkdir(exist_ok=True)
    base, of, table = studio.Studio(), studio.cases(cfg.cases), HERE / "claims.csv"
    done = {(row["row"], row["seed"], row["steps"]) for row in studio.read_table(table)}
    for seed in cfg.seeds:
        for name in cfg.rows or ROWS:
            if (name, str(seed), str(cfg.steps)) not in done:
                print(json.dumps(studio.add_row(table, judge_row(name, seed, cfg, base, of))))
            (HERE / "claims.md").write_text(report(studio.read_table(table)))


if __name__ == "__main__":
    run(main)
