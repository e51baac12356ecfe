"""Where should Wan's reference sit? One adapter for each place and seed, on a Wan of the micro-world.

    python -m microworld.placement --seeds 0 1 2        # goes on where it was stopped

weights/toy/README.md has the commands that make that Wan, placement.md what came out.
Rows of one seed see the same data, noise and times, so their losses compare step by step. Into placement.csv.
"""

import datetime
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import weights
from microworld import studio
from sdv.models.wan_dit import WanDiT
from sdv.objectives import TASKS
from sdv.run.log import read_log
from sdv.run.settings import Count, Seed, parse, run

FILE = studio.ROOT / "benchmarks/placement.csv"
LAST, CASES = 200, 40  # steps over which the losses are averaged; videos that a run is judged by
MEASURES = ("top1", "top5", "colour", "motion", "dynamic", "background", "copied")


@dataclass(frozen=True)
class Config:
    """the study"""

    backbone: str = "out/wan/model"  # a Wan of the micro-world
    places: tuple[Literal[*WanDiT.ref_positions], ...] = WanDiT.ref_positions  # which of them
    seeds: tuple[Seed, ...] = (0, 1, 2)  # of training
    steps: Count = 600  # of each run
    out: str = "out/placement"  # worlds and runs


def losses(folder: Path, after: int) -> dict[str, float]:
    """Each task's mean training loss after a step."""
    late = [row for row in read_log(folder / "metrics.jsonl") if row["step"] >= after]
    return {
        f"{task} loss": statistics.mean(row["loss"] for row in late if row["task"] == task) for task in TASKS
    }


def main() -> None:
    cfg = parse(Config, __doc__)
    backbone, out = Path(cfg.backbone).resolve(), Path(cfg.out).resolve()
    weights.open_backbone(backbone)  # is it there? weights/toy/README.md has the commands that make it
    layout = weights.open_backbone(studio.TOY)
    sizes = {name: getattr(layout, name) for name in ("height", "width", "frames", "fps")}
    data = studio.study_world(out, pairs=2000, clips=64)
    base, of = studio.Studio(folder=backbone), studio.cases(CASES)
    done = {(row["place"], row["seed"], row["steps"]) for row in studio.read_table(FILE)}
    for seed in cfg.seeds:
        for place in cfg.places:
            if (place, str(seed), str(cfg.steps)) in done:
                continue
            settings = {"backbone": backbone, "ref_position": place, "seed": seed} | sizes
            folder = out / f"{place}-{seed}"
            base.put_on(studio.train(folder, data, cfg.steps, **settings))
            seen = studio.judge(base.film(of, guidance=3.0, ref_guidance=1.0), of)["mean"]
            row = {"place": place, "seed": seed, "steps": cfg.steps} | losses(folder, cfg.steps - LAST)
            row |= {measure: seen[measure] for measure in MEASURES} | {"date": datetime.date.today()}
            print(json.dumps(studio.add_row(FILE, row)))


if __name__ == "__main__":
    run(main)
