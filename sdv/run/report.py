"""The probes of one or several runs as a line, a picture and a section of a web page.

    python -m sdv.run.report RUN [RUN ...] --out probes.png --html probes.html

Reads RUN/probes.jsonl, also while it is written. How the numbers are made: sdv.diagnostics.
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from sdv.objectives import TASKS
from sdv.run.log import read_log
from sdv.run.settings import Parser, run

COLOURS = {
    "cross": "#c1272d", "identity": "#e08e0b", "motion": "#2670b5", "corrected": "#5b2a86", "null": "#888888",
}  # fmt: skip
LABELS = {
    "cross": "identity against motion",
    "identity": "identity against identity",
    "motion": "motion against motion",
}
COSINES = ("cross", "identity", "motion", "corrected")  # of a probe, as lines and tables show them
VERB = {"left": "written", "right": "read"}  # left directions are what a layer writes, right what it reads
READING = """The cosine between the two tasks (red) can only be read beside its yardsticks: the cosine between
two disjoint halves of one and the same task. Where red lies with them, the tasks are as alike as a task is to
itself, and a small number is noise; where red lies well below both, the tasks do differ. The corrected cosine
divides the noise out; it is missing where a yardstick is not positive. Bands and bars are 90 % bootstrap
intervals over micro-batches. Energy and maps show how far the leading directions of the weight updates
coincide (1: the same subspace), beside two halves of one task and a random update through one adapter."""


# Rows


def read(run: str | Path) -> list[dict]:
    """The probes of a run, in order."""
    path = Path(run) / "probes.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no probes; train with --val-pairs and --val-clips")
    rows = read_log(path)
    if not rows:
        raise ValueError(f"{path}: no probe is finished yet; wait for the first")
    return rows


def name_of(run: str | Path) -> str:
    """The folder's name and the settings that runs are compared by."""
    config = Path(run) / "config.json"
    if not config.is_file():
        return Path(run).name
    settings = json.loads(config.read_text())
    if "p_video" not in settings:
        raise ValueError(f"{config}: is not of a run of train.py")
    mode = settings.get("pcgrad", "none")
    surgery = "" if mode == "none" else f", PCGrad {mode}"
    return f"{Path(run).name}: p = {settings['p_video']:g}{surgery}, seed {settings['seed']}"


def show(measure: list[float | None]) -> str:
    value, low, high = measure
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return ("undefined" if value is None else f"{value:.2f}") + interval


def verdict(row: dict) -> str:
    """What the corrected cosine allows to say, and no more."""
    value, low, high = row["whole"]["all"]["corrected"]
    if value is None:
        return "too noisy to compare"
    if low is None:
        return "too noisy for an interval"
    if low <= 0 <= high:
        return "not told apart from orthogonal"
    return "the tasks pull together" if low > 0 else "the tasks pull apart"


def line(row: dict) -> str:
    """A probe in one line for the terminal."""
    found = row["whole"]["all"]
    shown = " | ".join(f"{name} {show(found[name])}" for name in COSINES)
    return f"probe at step {row['step']}: cosines {shown}: {verdict(row)} | {row['seconds']:.2f} s"


def cost(run: str | Path) -> str:
    """What the probes of a run took beside its training steps."""
    rows = read(run)
    training = sum({row["step"]: row["seconds"] for row in read_log(Path(run) / "metrics.jsonl")}.values())
    probing = sum(row["seconds"] for row in rows)
    share = f", {probing / training:.1%} of the training time" if training else ""
    return f"{len(rows)} probes took {probing:.1f} s{share}"


# Picture


def band(axis, rows: list[dict], measure: str, color: str, label: str, root: bool = False) -> None:
    """A measure of the whole set over steps with its interval, or dashed its root; gaps where undefined."""
    columns = zip(*(row["whole"]["all"][measure] for row in rows), strict=True)
    values, low, high = ([math.nan if x is None else x for x in column] for column in columns)
    steps, marker = [row["step"] for row in rows], "o" if len(rows) < 50 else ""
    if root:
        values = [x**0.5 if x > 0 else math.nan for x in values]
        axis.plot(steps, values, "--", color=color, label=label, linewidth=1.2)
    else:
        axis.plot(steps, values, marker=marker, markersize=3, color=color, label=label, linewidth=1.6)
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def draw_cosines(axis, rows: list[dict]) -> None:
    axis.axhline(0, color="#444444", linewidth=0.8)
    for name, label in LABELS.items():
        band(axis, rows, name, COLOURS[name], label)
    axis.set_ylim(-0.6, 1.05)
    axis.set_title("Cosine of two gradients: between the tasks, and within each")


def draw_corrected(axis, rows: list[dict]) -> None:
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
    band(axis, rows, "corrected", COLOURS["corrected"], "identity against motion, noise divided out")
    undefined = [row["step"] for row in rows if row["whole"]["all"]["corrected"][0] is None]
    if undefined:
        label = f"undefined ({len(undefined)} of {len(rows)})"
        axis.plot(undefined, [-0.9] * len(undefined), "x", color=COLOURS["corrected"], label=label)
    axis.set_ylim(-1, 1.8)
    axis.set_title("Corrected cosine: 0 orthogonal, 1 the same direction")


def draw_norms(axis, rows: list[dict]) -> None:
    for task in TASKS:
        band(axis, rows, f"norm_{task}", COLOURS[task], task)
        band(axis, rows, f"signal_{task}", COLOURS[task], f"{task}, noise taken out", root=True)
    axis.set_yscale("log")  # at first, one may be a hundred times what it is later
    axis.set_title("Norm")


def draw_noise(axis, rows: list[dict]) -> None:
    for task in TASKS:
        band(axis, rows, f"noise_{task}", COLOURS[task], task)
    axis.axhline(rows[-1]["micro_batches"] / 4, color="#444444", linestyle=":", label="in a half")
    axis.set_yscale("log")
    axis.set_title("Noise / signal, micro-batches")


def draw_parts(axis, rows: list[dict]) -> None:
    """Every part of the adapter at the newest probe: cross beside both yardsticks."""
    parts = rows[-1]["group"] | {f"LoRA {name}": found for name, found in rows[-1]["factor"].items()}
    axis.axvline(0, color="#444444", linewidth=0.8)
    for y, found in enumerate(parts.values()):
        for shift, kind in ((-0.22, "identity"), (0, "cross"), (0.22, "motion")):
            value, low, high = found[kind]
            if value is not None:
                axis.plot(value, y + shift, "o", color=COLOURS[kind], markersize=4)
            if low is not None:
                axis.plot([low, high], [y + shift] * 2, color=COLOURS[kind], linewidth=1.2)
    axis.set_yticks(range(len(parts)), parts, fontsize=8)
    axis.set_ylim(max(len(parts), 1) - 0.5, -0.5)
    axis.set_xlim(-0.6, 1.05)
    axis.set_title(f"Cosines by part of the adapter, step {rows[-1]['step']}")


def average(row: dict, paths: Iterable[str], kinds: Iterable[str], columns: Iterable[str]) -> float:
    """Mean of some subspace columns over modules and comparisons; nan if none is defined."""
    at = [row["columns"].index(column) for column in columns]
    cells = [row["modules"][path][kind][i] for path in paths for kind in kinds for i in at]
    known = [x for x in cells if x is not None]
    return sum(known) / len(known) if known else math.nan


def draw_energy(axis, rows: list[dict], side: str) -> None:
    columns = f"{side} second in first", f"{side} first in second"
    for kind, label in (LABELS | {"null": "random"}).items():
        values = [average(row, row["modules"], (kind,), columns) for row in rows]
        label = label if side == "right" else None  # the other one has no room
        axis.plot([row["step"] for row in rows], values, color=COLOURS[kind], label=label, linewidth=1.6)
    axis.set_ylim(0, 1)
    axis.set_title(f"Energy inside the other's subspace, {VERB[side]}", fontsize=8)


def draw_maps(figure, cell, rows: list[dict], side: str) -> None:
    """Layer x step: overlap of leading subspaces, between the tasks, within one and at random."""
    modules = rows[0]["modules"]
    layers = {name: [p for p in modules if f"{p}.".startswith(f"{name}.")] for name in rows[0]["layer"]}
    ticks, every = sorted({0, len(rows) // 2, len(rows) - 1}), -(-len(layers) // 12)
    axes = [figure.add_subplot(part) for part in cell.subgridspec(1, 3)]
    shown = {"between the tasks": ("cross",), "within a task": TASKS, "random": ("null",)}
    for axis, (title, kinds) in zip(axes, shown.items(), strict=True):
        column = [f"{side} overlap"]
        table = [[average(row, paths, kinds, column) for row in rows] for paths in layers.values()]
        image = axis.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="magma", interpolation="nearest")
        axis.set_xticks(ticks, [rows[i]["step"] for i in ticks], fontsize=7)
        names = list(layers)[::every] if axis is axes[0] else []
        axis.set_yticks(range(0, len(layers), every) if names else [], names, fontsize=7)
        axis.set_title(f"{VERB[side]}: {title}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("subspace overlap", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def draw_run(figure, name: str, rows: list[dict]) -> list:
    """A run's column: cosines, corrected cosine, norms and noise, parts, energy, maps. Returns the plots."""
    figure.suptitle(name, fontsize=11, fontweight="bold")
    grid = figure.add_gridspec(7, 6, height_ratios=[1.3, 1, 1.1, 1.3, 1, 1, 1])
    plots = [
        (draw_cosines, grid[0, :]), (draw_corrected, grid[1, :]), (draw_norms, grid[2, :3]),
        (draw_noise, grid[2, 3:]), (draw_parts, grid[3, :]), (partial(draw_energy, side="left"), grid[4, :3]),
        (partial(draw_energy, side="right"), grid[4, 3:]),
    ]  # fmt: skip
    axes = [figure.add_subplot(cell) for _, cell in plots]
    for axis, (plot, _) in zip(axes, plots, strict=True):
        plot(axis, rows)
        axis.grid(alpha=0.25)
        axis.tick_params(which="both", labelsize=8)
        axis.set_xlabel("cosine" if plot is draw_parts else "step", fontsize=8)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=6.5, frameon=False)
    draw_maps(figure, grid[5, :], rows, "left")
    draw_maps(figure, grid[6, :], rows, "right")
    return axes


def draw(runs: list[tuple[str, list[dict]]]) -> bytes:
    """A PNG with a column for each run, on common scales."""
    import matplotlib.figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(6.4 * len(runs), 18), layout="constrained")
        columns = figure.subfigures(1, len(runs), squeeze=False)[0]
        drawn = [draw_run(column, *run) for column, run in zip(columns, runs, strict=True)]
        for same in zip(*drawn, strict=True):
            low, high = zip(*(axis.get_ylim() for axis in same), strict=True)
            for axis in same:
                axis.set_ylim(*((max(low), min(high)) if axis.yaxis_inverted() else (min(low), max(high))))
        picture = io.BytesIO()
        figure.savefig(picture, dpi=100, format="png")
    return picture.getvalue()


# Page


def section(runs: list[tuple[str, list[dict]]], picture: bytes) -> str:
    """HTML for a page: how to read it, the newest numbers of each run, and the picture that `draw` made."""
    head = "".join(f"<th>{name}</th>" for name in ("run", "step", *COSINES, "so"))
    body = ""
    for name, rows in runs:
        found = rows[-1]["whole"]["all"]
        shown = (show(found[name]) for name in COSINES)
        cells = [name, str(rows[-1]["step"]), *shown, verdict(rows[-1])]
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>\n"
    data = base64.b64encode(picture).decode()
    return (
        '<section id="gradients">\n<h2>What the gradients do to each other</h2>\n'
        f"<p>{READING}</p>\n"
        f"<table>\n<tr>{head}</tr>\n{body}</table>\n"
        '<img alt="gradient probes over training" style="max-width:100%" '
        f'src="data:image/png;base64,{data}">\n'
        "</section>\n"
    )


def main() -> None:
    about = __doc__.split("\n\n")[0]
    parser = Parser(prog="python -m sdv.run.report", description=about)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of train.py")
    parser.add_argument("--out", type=Path, help="the picture (default: probes.png in the first run)")
    parser.add_argument("--html", type=Path, help="also a page that holds it")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "probes.png"
    runs = [(name_of(run), read(run)) for run in args.runs]
    for folder, (name, rows) in zip(args.runs, runs, strict=True):
        print(f"{name}\n  {line(rows[-1])}\n  {cost(folder)}")
    picture = draw(runs)
    out.write_bytes(picture)
    print(out)
    if args.html:
        head = "<!doctype html>\n<meta charset='utf-8'>\n<title>Gradient probes</title>\n"
        args.html.write_text(head + section(runs, picture), encoding="utf-8")
        print(args.html)


if __name__ == "__main__":
    run(main)
