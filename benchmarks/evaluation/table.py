"""Samples -> rows of means with what is needed to read them, as Markdown and CSV, beside the paper's.

Shares are shown as percentages, as the paper has them; speed in hundredths of the short side per second.
"""

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.evaluation.scores import MEASURES
from benchmarks.evaluation.yardsticks import Sample

BASE, STILL = "base, no reference", "the reference as a still film"
CEILING, FLOOR = "other pictures of the subject (ceiling)", "other subjects of its noun (floor)"
DRAWS = 2000  # of the bootstrap
THEIRS = "VBench smoothness", "VBench dynamic", "CLIP-T", "CLIP-I", "DINO-I"
PAPER = {  # arXiv 2504.17816v3: CLIP ViT-B/32, DINO ViT-S/16, 30 subjects x 4 prompts
    "the paper, CogVideoX-5B": (98.45, 69.64, 32.69, 77.14, 62.88),
    "the paper, Wan 2.2-5B": (98.53, 66.67, 32.38, 78.28, 60.18),
    "the paper, trained on images only": (99.60, 0.84, 32.67, 71.15, 43.19),
    "the paper, images first, then videos": (96.04, 81.51, 28.96, 84.73, 76.13),
}


class Cell(NamedTuple):
    mean: float
    deviation: float | None = None  # of the means of each seed; None with one seed
    low: float | None = None  # 95 % interval over subjects; None with one subject
    high: float | None = None


class Row(NamedTuple):
    name: str
    samples: int
    subjects: int
    seeds: int
    cells: dict[str, Cell]


def summarise(name: str, samples: Sequence[Sample]) -> Row:
    """Mean of every measure that all samples have, its deviation over seeds, its interval over subjects."""
    subjects = [sample.subject for sample in samples]
    seeds = sorted({sample.seed for sample in samples if sample.seed is not None})
    cells = {}
    for measure in MEASURES:
        values = [sample.scores[measure] for sample in samples if measure in sample.scores]
        if len(values) < len(samples) or not values:
            continue
        by_seed = [
            statistics.fmean(v for v, sample in zip(values, samples, strict=True) if sample.seed == seed)
            for seed in seeds
        ]
        deviation = statistics.stdev(by_seed) if len(seeds) > 1 else None
        cells[measure] = Cell(statistics.fmean(values), deviation, *bootstrap(values, subjects))
    return Row(name, len(samples), len(set(subjects)), len(seeds), cells)


def bootstrap(values: Sequence[float], subjects: Sequence[str]) -> tuple[float | None, float | None]:
    """95 % percentile interval of the mean when whole subjects are drawn anew, with all that shows them.

    The films of one subject are no independent witnesses: 120 films of 30 subjects are 30.
    """
    names, which = np.unique(subjects, return_inverse=True)
    if len(names) < 2:
        return None, None
    sums, counts = np.bincount(which, values), np.bincount(which)
    drawn = np.random.default_rng(0).integers(0, len(names), (DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def paper_rows() -> list[Row]:
    return [
        Row(name, 120, 30, 1, {m: Cell(v / 100) for m, v in zip(THEIRS, values, strict=True)})
        for name, values in PAPER.items()
    ]


def position(
    films: Sequence[Sample], floor: Sequence[Sample], ceiling: Sequence[Sample], measure: str
) -> str:
    """Where films stand between other subjects of the noun (0) and the subject itself (100 %).

    Of the subjects that have all three, each counted alike.
    """
    groups = [defaultdict(list) for _ in range(3)]
    for group, samples in zip(groups, (films, floor, ceiling), strict=True):
        for sample in samples:
            group[sample.subject].append(sample.scores[measure])
    subjects = set.intersection(*(set(group) for group in groups))
    if not subjects:
        return f"{measure}: no subject has another picture and another subject of its noun"
    mean, low, high = (statistics.fmean(statistics.fmean(g[s]) for s in subjects) for g in groups)
    if high <= low:
        return f"{measure} cannot tell these subjects apart: its ceiling is not above its floor"
    share = 100 * (mean - low) / (high - low)
    return (
        f"{measure} of the films stands at {share:.0f} % of the way from floor to ceiling, "
        f"of {len(subjects)} subjects that have both"
    )


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A column for every measure that any row of ours has: mean ± deviation over seeds [interval], in %."""
    shown = [m for m in MEASURES if any(m in row.cells for row in rows)]
    lines = ["| | n | " + " | ".join(shown) + " |", "|---|---:|" + "---:|" * len(shown)]
    for row in rows:
        cells = [_text(row.cells[m]) if m in row.cells else "" for m in shown]
        lines.append(f"| {row.name} | {row.samples} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _text(cell: Cell) -> str:
    deviation = "" if cell.deviation is None else f" ± {100 * cell.deviation:.2f}"
    interval = "" if cell.low is None else f" [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return f"{100 * cell.mean:.2f}{deviation}{interval}"


def as_csv(rows: Sequence[Row]) -> str:
    """A line for every number, unrounded and not in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "n", "subjects", "seeds", "measure", *Cell._fields])
    writer.writerows([*row[:4], measure, *cell] for row in rows for measure, cell in row.cells.items())
    return text.getvalue()
