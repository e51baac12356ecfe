"""The probe in training: no trace, exact resume, the same on two processes; and its report."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from helpers import MEDIA, assert_same, probe_of, relative_error, toy
from sdv import diagnostics
from sdv.diagnostics import gradients, probe
from sdv.lora import lora_parameters
from sdv.run import report as diagnostics_report
from sdv.run.parallel import average
from sdv.run.settings import run as run_command
from sdv.surgery import Surgery

RUN = {
    "--pairs": MEDIA / "pairs", "--clips": MEDIA / "clips", "--height": 32, "--width": 48, "--frames": 5,
    "--rank": 4, "--alpha": 4, "--accumulate": 2, "--identity-batch": 1, "--p-video": 0.5, "--lr": 0.01,
    "--warmup": 1, "--workers": 0, "--lora-dropout": 0.2, "--verify": 0,
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tiny, tmp_path):
    """Train with these settings into tmp_path/name; held-out rows are copies, which are not refused here."""
    monkeypatch.setattr(train.held_out, "check_unseen", lambda *rows: None)
    for kind in ("pairs", "clips"):
        (tmp_path / kind).mkdir()
        for file in (MEDIA / kind).iterdir():
            (tmp_path / kind / file.name).write_bytes(file.read_bytes())
    probing = {"--val-pairs": tmp_path / "pairs", "--val-clips": tmp_path / "clips", "--val-batches": 3}

    def train_into(name: str, **settings) -> Path:
        flags = {f"--{key.replace('_', '-')}": value for key, value in settings.items()}
        options = {"--backbone": tiny, "--out": tmp_path / name, **RUN, **probing, **flags}
        given = [pair for pair in options.items() if pair[1] is not None]
        words = [str(word) for pair in given for word in pair if word != ""]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        train.main()
        return tmp_path / name

    return train_into


def lines(path: Path, *machine: str) -> list[dict]:
    """Rows of a JSONL file without what the machine, not the run, decides."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in machine} for row in rows]


def assert_same_run(one: Path, two: Path, step: int) -> None:
    assert_same(one, two, step)
    machine = "seconds", "memory_gb"
    assert lines(one / "metrics.jsonl", *machine) == lines(two / "metrics.jsonl", *machine)


def test_training_is_bit_identical_with_and_without_the_probe(run):
    with_probe, without = run("with", steps=3, probe_every=1), run("without", steps=3, probe_every=0)
    assert [row["step"] for row in lines(with_probe / "probes.jsonl")] == [0, 1, 2, 3]
    assert not (without / "probes.jsonl").exists()
    assert_same_run(with_probe, without, 3)


def test_a_probe_touches_neither_gradients_nor_generators_nor_modes():
    model = toy()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    params, state = lora_parameters(model), torch.get_rng_state()

    def noisy() -> torch.Tensor:
        assert not any(module.training for module in model.modules())
        return sum((p * torch.randn(p.shape)).sum() for p in params.values())

    probe(model, [noisy] * 4)
    assert [module.training for module in model.modules()] == modes
    assert all((p.grad == 7).all() for p in params.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_repeats_its_probes_and_its_surgery(run):
    settings = {"probe_every": 2, "save_every": 2, "pcgrad": "buffer-4"}
    whole = run("whole", steps=5, **settings)
    parts = run("parts", steps=3, **settings)
    for file in (parts / "step-000003").iterdir():  # as if it had died after the probe at step 2
        file.unlink()
    (parts / "step-000003").rmdir()
    with open(parts / "probes.jsonl", "a") as file:
        file.write('{"step": 4, "whole": {"al')
    run("parts", steps=5, resume="", **settings)
    assert_same_run(whole, parts, 5)
    assert {row["task"] for row in lines(whole / "metrics.jsonl")} == set(diagnostics.TASKS)
    assert [row["step"] for row in lines(parts / "probes.jsonl")] == [0, 2, 4, 5]
    assert lines(whole / "probes.jsonl", "seconds") == lines(parts / "probes.jsonl", "seconds")


def test_the_exact_form_takes_both_tasks_in_a_step_and_needs_both(run):
    out = run("exact", steps=2, pcgrad="exact", probe_every=0)
    rows = [(row["step"], row["task"]) for row in lines(out / "metrics.jsonl")]
    assert rows == [(0, "identity"), (0, "motion"), (1, "identity"), (1, "motion")]
    for bad in ({"p_video": 0}, {"coin": "micro"}):
        with pytest.raises(ValueError, match="--pcgrad needs both tasks"):
            run("bad", steps=1, pcgrad="buffer-8", **bad)


def test_half_of_the_held_out_data_is_refused(run):
    with pytest.raises(ValueError, match="--val-pairs and --val-clips"):
        run("bad", steps=1, val_clips=None)


# Several processes


def worker(rank: int, world: int, folder: str) -> None:
    """Probe, uneven gradients and surgery on one of several ranks; rank 0 writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init-{world}", rank=rank, world_size=world)
    model = toy()
    params = lora_parameters(model)
    rng = torch.Generator().manual_seed(5)
    x, y = torch.randn(12, 2, 24, generator=rng), torch.randn(12, 2, 48, generator=rng)

    def loss(rows: slice) -> torch.Tensor:
        first, second = model.blocks
        hidden = first["q"](x[rows]) + model.patch_in(x[rows].view(-1, 3, 4, 4)).mean((2, 3))[:, None]
        out = first["down"](hidden) + second["down"](second["q"](hidden))
        return (out - y[rows]).square().mean()

    losses = [partial(loss, slice(i, i + 1)) for i in range(12)]
    row = probe(model, losses)
    uneven = gradients(losses[:3], list(params.values()))
    surgery = Surgery(params.values(), "exact", p_video=0.2)
    share = 6 // world
    for task, first in (("identity", 0), ("motion", 6)):
        loss(slice(first + rank * share, first + (rank + 1) * share)).backward()
        surgery.take(task)
    average(surgery.sums())
    surgery.put()
    if rank == 0:
        saved = [p.grad for p in params.values()]
        torch.save((row | {"seconds": 0}, uneven, saved), f"{folder}/world-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_see_what_one_sees(tmp_path):
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    worker(0, 1, str(tmp_path))
    one, two = (torch.load(tmp_path / f"world-{world}.pt", weights_only=False) for world in (1, 2))
    assert one[0] == two[0]
    assert len(one[1]) == len(two[1]) == 3
    torch.testing.assert_close(one[1], two[1], rtol=0, atol=0)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(two[2], one[2], strict=True))


# Report


def test_the_report_of_runs_side_by_side_live_or_with_gaps(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    model = toy(zero_b=True)  # A has no gradient, so that some measures are undefined
    rng = torch.Generator().manual_seed(6)
    params = lora_parameters(model)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "probes.jsonl", "w") as file:
            for step in (0, 25, 50):
                wanted = [
                    {n: torch.randn(p.shape, generator=rng) * n.endswith("B") for n, p in params.items()}
                    for _ in range(12)
                ]
                file.write(json.dumps({"step": step} | probe_of(model, wanted)) + "\n")
            file.write('{"step": 75, "who')  # still being written
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 0, "seconds": 50}\n' * 2)
    settings = {"p_video": 0.2, "pcgrad": "buffer-4", "seed": 3}
    (tmp_path / "two" / "config.json").write_text(json.dumps(settings))
    page = tmp_path / "page.html"
    words = ["x", str(tmp_path / "one"), str(tmp_path / "two"), "--html", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    diagnostics_report.main()
    said = capsys.readouterr().out
    assert "two: p = 0.2, PCGrad buffer-4, seed 3" in said
    assert "3 probes took" in said and "% of the training time" in said
    assert (tmp_path / "one" / "probes.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png;base64,iVBOR" in page.read_text() and page.read_text().count("<tr>") == 3

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="no probes; train with --val-pairs"):
        run_command(diagnostics_report.main)
