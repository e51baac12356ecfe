"""The paper's claims in the micro-world: every ablation is a setting of train.py, at equal numbers of steps.

    python -m microworld.claims --seeds 0 1 2          # goes on where it was stopped
    python -m microworld.claims --rows "full recipe" "image only"

Each run's numbers go to benchmarks/claims/claims.csv as soon as they are there, with a picture a row, and
claims.md is made of them: a table for each guidance on the reference, which dropout makes possible. All rows
film the same subjects, never trained on, from the same noise. Processes with other --rows or --seeds may run
side by side: each adds its rows to the same table.
"""

import datetime
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from microworld import studio
from sdv.data.media import write_image
from sdv.run.settings import Count, NotNegative, Seed, parse, run

HERE = studio.ROOT / "benchmarks/claims"


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
    "captions dropped": {"text_drop": 0.1},
    "PCGrad, buffer 4": {"pcgrad": "buffer-4"},
    "800 pairs": {},
    "8 clips": {},
}


@dataclass(frozen=True)
class Config:
    """the study"""

    rows: tuple[Literal[*ROWS], ...] = tuple(ROWS)  # which of them
    seeds: tuple[Seed, ...] = (0, 1, 2)  # of training; films use seed 0
    steps: Count = 1200  # of each run
    cases: Count = 40  # videos a run is judged by, for each guidance
    ref_guidance: tuple[NotNegative, ...] = (1.0, 1.5)  # on the reference; 1: none
    out: str = "out/study"  # worlds and runs


WORLD = {"pairs": 4000, "clips": 64}  # what all rows are trained on, but these:
COUNTS = {"800 pairs": {"pairs": 800}, "8 clips": {"clips": 8}}
IDENTITY = ("top1", "colour")  # what a claim about identity is judged by
MEASURES = ("top1", "top5", "colour", "shape", "motion", "dynamic", "background", "layout", "copied")


class Claim(NamedTuple):
    """`row` has more (sign 1) or less (sign -1) of a measure, or of "identity", than `than`."""

    words: str
    paper: str
    measure: str
    row: str
    sign: int
    than: str


CLAIMS = (
    Claim("image only freezes motion", "DD 0.8 against 69.6", "dynamic", "image only", -1, "full recipe"),
    Claim("image only: motion is not as asked", "", "motion", "image only", -1, "full recipe"),
    Claim("two stages forget the prompt", "CLIP-T 29.0 against 32.7", "background", "two-stage", -1,
          "full recipe"),
    Claim("two stages forget the subject", "DINO-I 76 against 63", "identity", "two-stage", -1,
          "full recipe"),
    Claim("two stages: identity is higher", "DINO-I 76 against 63", "identity", "two-stage", 1,
          "full recipe"),
    Claim("first frame, no dropout: it pastes", "", "copied", "first frame, no dropout", 1, "full recipe"),
    Claim("first frame, no dropout: identity is higher", "", "identity", "first frame, no dropout", 1,
          "full recipe"),
    Claim("first frame moves less", "DD 37.8 against 69.6", "dynamic", "first frame", -1, "full recipe"),
    Claim("no dropout moves less", "DD 63.0 against 69.6", "dynamic", "no dropout", -1, "full recipe"),
    Claim("no dropout costs identity", "DINO-I 58 against 63", "identity", "no dropout", -1, "full recipe"),
    Claim("reference always dropped: identity is lost", "DINO-I 48.7 against 62.9", "identity",
          "reference always dropped", -1, "full recipe"),
    Claim("switching learns identity", "DINO-I 62.9", "identity", "full recipe", 1, "video only"),
    Claim("p = 0.6 costs identity", "DINO-I 62.8 against 62.9", "identity", "p = 0.6", -1, "full recipe"),
    Claim("p = 0.4 costs identity", "DINO-I 57 against 63", "identity", "p = 0.4", -1, "full recipe"),
    Claim("p = 0.1 has more identity", "", "identity", "p = 0.1", 1, "full recipe"),
    Claim("p = 0.1 moves less as asked", "", "motion", "p = 0.1", -1, "full recipe"),
    Claim("dropping tokens costs identity", "", "identity", "dropout of tokens", -1, "full recipe"),
    Claim("8 clips instead of 64 lose motion", "few are enough", "motion", "8 clips", -1, "full recipe"),
    Claim("8 clips instead of 64 cost identity", "", "identity", "8 clips", -1, "full recipe"),
    Claim("800 pairs instead of 4,000 cost identity", "", "identity", "800 pairs", -1, "full recipe"),
    Claim("PCGrad costs identity", "DINO-I 56 (buffer 8: 74) against 63", "identity", "PCGrad, buffer 4", -1,
          "full recipe"),
    Claim("LoRA on the reference learns less", "", "identity", "LoRA on the reference", -1, "full recipe"),
    Claim("dropping a tenth of the captions costs identity", "", "identity", "captions dropped", -1,
          "full recipe"),
    Claim("<cls> helps identity", "DINO-I 57.5 without", "identity", "no <cls>", -1, "full recipe"),
)  # fmt: skip


# ── Runs ────────────────────────────────────────────────────────────────────────────────────────────────


def train_row(name: str, seed: int, cfg: Config) -> Path:
    """The adapter of one row."""
    study, half = Path(cfg.out).resolve(), cfg.steps // 2
    data = studio.study_world(study, **WORLD | COUNTS.get(name, {}))
    out = study / f"{studio.slug(name)}-{seed}"
    if name != "two-stage":
        return studio.train(out, data, cfg.steps, seed=seed, **ROWS[name])
    first = studio.train(out / "images", data, half, seed=seed, p_video=0.0)
    return studio.train(out / "videos", data, cfg.steps - half, seed=seed, p_video=1.0, adapter=first)


def sheet(of: list[studio.Case], clips: list[torch.Tensor], rows: int = 5) -> torch.Tensor:
    """References with every fourth frame of their clips, the first prompt of each subject: (3, H, W)."""
    chosen = list(zip(of, clips, strict=True))[:: max(1, len(of) // rows)][:rows]
    strips = [torch.cat([case.ref, *clip[:, ::4].unbind(1)], dim=-1) for case, clip in chosen]
    return torch.cat(strips, -2)


def judge_run(
    name: str, seed: int, guidances: list[float], cfg: Config, base: studio.Studio, of: list[studio.Case]
) -> Iterator[dict]:
    """Rows of the table: the films of one run at each of these guidances on the reference."""
    start = time.perf_counter()
    base.put_on(train_row(name, seed, cfg))
    minutes = round((time.perf_counter() - start) / 60, 1)
    for v in guidances:
        clips = base.film(of, ref_guidance=v)
        if seed == cfg.seeds[0] and v == cfg.ref_guidance[-1]:
            write_image(HERE / f"{studio.slug(name)}.png", sheet(of, clips))
        means = studio.judge(clips, of)["mean"]
        row = {"row": name, "seed": seed, "steps": cfg.steps, "ref_guidance": v, "cases": len(of)}
        row |= {"minutes": minutes} | {measure: means[measure] for measure in MEASURES}
        yield row | {"date": str(datetime.date.today())}


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


Found = dict[str, dict[str, list[float]]]  # {row: {measure: a value for each seed}}


def verdict(claim: Claim, measure: str, found: Found) -> str:
    """Shown or refuted only if the means differ by more than both rows' spreads over seeds together.

    Of two rows that are alike, and have three seeds each, 8 % would be told apart: look at the gap as well.
    """
    if claim.row not in found or claim.than not in found:
        return "not run"
    a, b = (found[name][measure] for name in (claim.row, claim.than))
    if min(len(a), len(b)) < 3:
        return f"{statistics.mean(a):.3f} against {statistics.mean(b):.3f}, fewer than three seeds"
    gap = claim.sign * (statistics.mean(a) - statistics.mean(b))
    noise = spread(a) + spread(b)
    word = "shown" if gap > noise else "refuted" if gap < -noise else "not shown"
    return f"{word} ({statistics.mean(a):.3f} against {statistics.mean(b):.3f})"


def section(found: Found) -> str:
    """Rows and verdicts at one guidance."""
    lines = ["| row | seeds | " + " | ".join(MEASURES) + " |", "|---|---:|" + "---:|" * len(MEASURES)]
    for name in (name for name in ROWS if name in found):
        cells = [studio.cell(found[name][measure], 3) for measure in MEASURES]
        lines.append(f"| {name} | {len(found[name]['top1'])} | " + " | ".join(cells) + " |")
    lines += ["", "| claim | the paper | measure | verdict |", "|---|---|---|---|"]
    for claim in CLAIMS:
        for measure in IDENTITY if claim.measure == "identity" else (claim.measure,):
            lines.append(f"| {claim.words} | {claim.paper} | {measure} | {verdict(claim, measure, found)} |")
    return "\n".join(lines) + "\n"


def report(rows: list[dict]) -> str:
    text = "# Rows and verdicts\n\nBy `python -m microworld.claims`: means over seeds ± deviation.\n"
    for v in dict.fromkeys(row["ref_guidance"] for row in rows):
        found: Found = defaultdict(lambda: defaultdict(list))
        for row in (row for row in rows if row["ref_guidance"] == v):
            for measure in MEASURES:
                found[row["row"]][measure].append(float(row[measure]))
        text += f"\n## Guidance on the reference {float(v):g}, on the text none\n\n{section(found)}"
    return text


def alike(table: Path, cfg: Config) -> list[dict[str, str]]:
    """The rows that may be averaged: runs of as many steps, judged by as many films."""
    same = str(cfg.steps), str(cfg.cases)
    return [row for row in studio.read_table(table) if (row["steps"], row["cases"]) == same]


def main() -> None:
    cfg = parse(Config, __doc__)
    HERE.mkdir(exist_ok=True)
    base, of, table = studio.Studio(), studio.cases(cfg.cases), HERE / "claims.csv"
    done = {(row["row"], row["seed"], row["ref_guidance"]) for row in alike(table, cfg)}
    for seed, name in itertools.product(cfg.seeds, cfg.rows):
        left = [v for v in cfg.ref_guidance if (name, str(seed), f"{v:.4g}") not in done]
        for row in judge_run(name, seed, left, cfg, base, of) if left else ():
            print(json.dumps(studio.add_row(table, row)))
        (HERE / "claims.md").write_text(report(alike(table, cfg)))


if __name__ == "__main__":
    run(main)
