"""The demo's page: videos side by side, numbers, losses and gradients, in one file that needs no network."""

import base64
import html
import io
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from microworld import studio
from sdv.data.media import write_image, write_video
from sdv.run import report
from sdv.run.log import read_log

FPS = 8
SHOWN = {  # what the table shows of microworld.metrics: what it is called, and what a good video has
    "top1": ("right subject among 100", "high"),
    "colour": ("colours agree", "high"),
    "shape": ("silhouette agrees", "high"),
    "motion": ("moves as asked", "high"),
    "dynamic": ("moves at all", "as in renders"),
    "background": ("background as asked", "high"),
    "smoothness": ("smoothness", "as in renders"),
    "flicker": ("flicker", "as in renders"),
    "copied": ("copied from the picture", "as in renders"),
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2430; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d8dde5; }
table { border-collapse: collapse; } tr + tr { border-top: 1px solid #e4e8ee; }
td, th { padding: .3rem .7rem; text-align: left; font-weight: normal; }
th { color: #5a6577; font-size: .85rem; } td.n { text-align: right; }
.films td { padding: .25rem; } .films td:nth-child(2) { width: 12rem; font-size: .9rem; }
video, .films img { width: 144px; height: 144px; border-radius: 6px; display: block; }
.note { color: #5a6577; font-size: .9rem; }
"""


def data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def embedded(image: Tensor, fps: float = 0) -> str:
    """A picture (3, H, W), or a clip (3, T, H, W) at its rate, three times as large, as a data address."""
    large = image.repeat_interleave(3, -1).repeat_interleave(3, -2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("clip.mp4" if fps else "picture.png")
        write_video(file, large, fps) if fps else write_image(file, large)
        return data_address("video/mp4" if fps else "image/png", file.read_bytes())


def film_row(case: studio.Case, clips: list[Tensor]) -> str:
    video = '<td><video src="{}" autoplay loop muted playsinline></video></td>'
    films = "".join(video.format(embedded(clip, FPS)) for clip in clips)
    picture, prompt = embedded(case.ref), html.escape(case.truth.prompt)
    return f'<tr><td><img alt="reference" src="{picture}"></td><td>{prompt}</td>{films}</tr>\n'


def score_table(scores: dict[str, dict]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in scores)
    rows = ""
    for field, (label, wanted) in SHOWN.items():
        cells = "".join(f'<td class="n">{score["mean"][field]:.2f}</td>' for score in scores.values())
        rows += f"<tr><td>{label}</td>{cells}<td class='note'>{wanted}</td></tr>\n"
    return f"<table>\n<tr><th></th>{head}<th>a good video</th></tr>\n{rows}</table>\n"


def loss_picture(run_folder: Path) -> str:
    """Both tasks' losses over the steps, with a running mean, as a data address."""
    import matplotlib.figure

    rows = read_log(run_folder / "metrics.jsonl")
    figure = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    for task, colour in (("identity", "#e08e0b"), ("motion", "#2670b5")):
        steps, losses = ([r[key] for r in rows if r["task"] == task] for key in ("step", "loss"))
        if not steps:  # a short run may have drawn one task only
            continue
        kernel = torch.ones(1, 1, min(15, len(losses)))
        smooth = F.conv1d(torch.tensor(losses)[None, None], kernel / kernel.sum())[0, 0]
        axis.plot(steps, losses, ".", ms=3, alpha=0.35, color=colour)
        axis.plot(steps[len(steps) - len(smooth) :], smooth, color=colour, label=task)
    axis.set(xlabel="step", ylabel="denoising loss")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return data_address("image/png", picture.getvalue())


def page(
    training: Path, of: list[studio.Case], films: dict[str, list[Tensor]], scores: dict[str, dict], made: str
) -> str:
    """The whole page. films and scores have one entry a column; training is the fresh adapter's run."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in films)
    rows = "".join(film_row(case, list(clips)) for case, *clips in zip(of, *films.values(), strict=True))
    probes = [(report.name_of(training), report.read(training))]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>sdv: one picture in, a video of that subject out</title>
<style>{STYLE}</style>
<h1>One picture of a subject in, a video of that subject out</h1>
<p>None of these subjects was seen in training, by the base or by an adapter. The base is a text-to-video
model that knows the world's motions and backgrounds; it sees only the prompt. An adapter also sees the
picture. It learned from pairs of pictures (<em>identity</em>) and from a few clips of other subjects
(<em>motion</em>), never from a video of a subject beside its picture.</p>
<table class="films">
<tr><th>picture</th><th>prompt</th>{head}</tr>
{rows}</table>
<h2>Measured</h2>
{score_table(scores)}
<p class="note">Means over {len(of)} videos a column: a share is known to about
&plusmn;{100 / len(of) ** 0.5:.0f} points. Right subject: the look, with place, size and rotation taken out,
is nearer to the picture's subject than to 99 others of the same species.
microworld/metrics.py says how each number
is made.</p>
<h2>Training of the fresh adapter</h2>
<p>Each step is one task, motion with probability 0.2.</p>
<img alt="loss of both tasks" style="max-width:100%" src="{loss_picture(training)}">
{report.section(probes, report.draw(probes))}
<p class="note">{made}</p>
</html>
"""
