"""The demo's page and its judge, on real renders where films would be."""

import base64
import json
import re

import pytest
import torch

from microworld import demo_page, studio
from sdv.data.media import read_clip
from sdv.run import report as diagnostics_report


@pytest.fixture
def run_folder(tmp_path):
    rows = [{"step": i, "task": ("identity", "motion")[i % 2], "loss": 1 / (i + 1)} for i in range(40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_page_holds_everything_itself_and_judges_renders_well(run_folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, result in {"read": [], "draw": b"", "section": "<section>gradients</section>"}.items():
        monkeypatch.setattr(diagnostics_report, name, lambda *_, result=result: result)
    of = studio.cases(4)
    films = {"real": studio.renders(of), "grey": [torch.zeros(3, 17, 64, 64)] * 4}
    scores = {name: studio.judge(clips, of) for name, clips in films.items()}
    good, bad = ([scores[name]["mean"][what] for what in ("top1", "motion", "background")] for name in films)
    assert min(good) == 1.0 and max(bad) <= 0.25
    assert studio.cases(8)[3].ref.equal(of[3].ref)
    page = demo_page.page(run_folder, of, films, scores, "made of renders")
    assert not re.search(r"(src|href)=(?![\"']?data:)", page)
    videos = re.findall(r'<video src="data:video/mp4;base64,([^"]+)" autoplay loop muted', page)
    assert len(videos) == 8
    assert page.count("data:image/png") == 4 + 1
    assert all(case.truth.prompt in page for case in of)

    # A film comes out of the page as it went in, three times as large.
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(videos[0]))
    clip = read_clip(tmp_path / "clip.mp4", 17, 8, 64, 64).float() / 127.5 - 1
    assert (clip - films["real"][0]).square().mean() < 4 / 10**2.5  # 25 dB


def test_a_run_that_drew_one_task_only_has_a_picture(run_folder):
    pytest.importorskip("matplotlib")
    lines = [json.dumps({"step": i, "task": "identity", "loss": 0.5}) for i in range(2)]
    (run_folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    assert demo_page.loss_picture(run_folder).startswith("data:image/png")
