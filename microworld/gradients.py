"""What the two objectives' gradients do to each other over the first steps of training, in the micro-world.

    python -m microworld.gradients --seeds 0 1 2        # goes on where it was stopped

Runs of the full recipe, of image only (p = 0) and of PCGrad with the paper's buffers, probed on the same
held-out batches. Into benchmarks/gradients: the probes of each run, a table of means, one plot.
"""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from microworld import studio
from sdv.run import report
from sdv.run.report import COSINES
from sdv.run.settings import Seed, parse, run

HERE = studio.ROOT / "benchmarks/gradients"
STEPS, EVERY = 1000, 50  # of each run, and between probes (paper: the first 1,000, every 5 to 50)
SETTLED = 100  # the table's means begin after this step
DRAWN = 0  # the seed that the picture shows
RUNS: dict[str, dict[str, object]] = {
    "full recipe": {},
    "image only": {"p_video": 0.0},
    "PCGrad buffer 4": {"pcgrad": "buffer-4"},
    "PCGrad buffer 8": {"pcgrad": "buffer-8"},
}


@dataclass(frozen=True)
class Config:
    """the study"""

    runs: tuple[Literal[*RUNS], ...] = tuple(RUNS)  # which of them
    seeds: tuple[Seed, ...] = (0, 1, 2)  # of training; the probe's own draws do not depend on it
    out: str = "out/gradients"  # worlds and runs


def thin(rows: list[dict], drawn: bool) -> list[dict]:
    """What the table, and for a run that is drawn the picture, show of its probes.

    Of the subspaces their overlap and energy, two digits and no angles; its parts at the last probe.
    """
    columns = [column for column in rows[0]["columns"] if not column.endswith("est")]
    at = [rows[0]["columns"].index(column) for column in columns]

    def few(cells: list[float | None]) -> list[float | None]:
        return [None if cells[i] is None else round(cells[i], 2) for i in at]

    kept = []
    for row in rows:
        modules = row["modules"] if drawn else {}
        modules = {
            path: {kind: few(cells) for kind, cells in kinds.items()} for path, kinds in modules.items()
        }
        no_parts = {"layer": dict.fromkeys(row["layer"], {}), "group": {}, "factor": {}}
        last = drawn and row is rows[-1]
        kept.append(row | {"columns": columns, "modules": modules} | ({} if last else no_parts))
    return kept


def means(folder: Path) -> dict[str, float]:
    """Each cosine's mean over the probes of one run; a probe where it is undefined does not count."""
    found: dict[str, list[float]] = {name: [] for name in COSINES}
    for row in report.read(folder):
        if row["step"] >= SETTLED:
            whole = row["whole"]["all"]
            for name in COSINES:
                found[name] += [whole[name][0]] if whole[name][0] is not None else []
    return {name: statistics.mean(values) for name, values in found.items() if values}


def table() -> str:
    lines = [f"| run | seeds | {' | '.join(COSINES)} |", "|---|---:|" + "---:|" * len(COSINES)]
    for name in RUNS:
        runs = [means(folder) for folder in sorted(HERE.glob(f"{studio.slug(name)}-*"))]
        if runs:
            cells = [studio.cell([one[column] for one in runs if column in one], 3) for column in COSINES]
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    cfg = parse(Config, __doc__)
    out = Path(cfg.out).resolve()
    data = studio.study_world(out, pairs=4000, clips=64)
    unseen = studio.make_world(out / "unseen", pairs=1024, clips=128, seed=1)
    probe = {
        "val_pairs": unseen / "pairs", "val_clips": unseen / "clips", "val_every": 0,
        "probe_every": EVERY, "val_batches": 8,  # micro-batches that a half averages, of rows of their own
    }  # fmt: skip
    for seed in cfg.seeds:
        for name in cfg.runs:
            kept = HERE / f"{studio.slug(name)}-{seed}"
            if kept.is_dir():
                continue
            folder = out / kept.name
            studio.train(folder, data, STEPS, seed=seed, **probe, **RUNS[name])
            probes = map(json.dumps, thin(report.read(folder), seed == DRAWN))
            kept.mkdir(parents=True)  # now that there is something to keep
            shutil.copyfile(folder / "config.json", kept / "config.json")
            (kept / "probes.jsonl").write_text("".join(f"{line}\n" for line in probes))
            (HERE / "table.md").write_text(table())
            print(report.cost(folder))
    drawn = [HERE / f"{studio.slug(name)}-{DRAWN}" for name in RUNS]
    runs = [(report.name_of(one), report.read(one)) for one in drawn if one.is_dir()]
    if runs:
        (HERE / "probes.png").write_bytes(report.draw(runs))
    print(table())


if __name__ == "__main__":
    run(main)
