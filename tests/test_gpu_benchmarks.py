"""What whoever has a GPU will run, small and on a CPU: all of it ends, and says what it found."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import book, fullsize, gpu

OURS = {
    "steps": ["sdv", "sdv --keep-attention", "sdv --keep-attention --recompute 0.6", fullsize.IN_TORCH],
    "denoise": ["sdv", fullsize.IN_TORCH, "sdv --compile", "sdv, LoRA not merged"],
    "vae": ["sdv"],
    "storage": ["sdv --base-storage fp8", "sdv --base-storage cpu"],
}
THEIRS = {
    "steps": ["diffusers + peft, LoRA bfloat16", "diffusers + peft, LoRA float32"],
    "denoise": ["diffusers", "diffusers, compiled"], "vae": ["diffusers"], "storage": [],
}  # fmt: skip
CASES = {
    "steps": "{} motion/{} identity", "denoise": "{}, with a reference/{}, text only",
    "vae": "{} decode/{} encode", "storage": "{} identity",
}  # fmt: skip


def test_full_size_steps_small(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    for part in reversed(fullsize.PARTS):  # each alone, as benchmarks.gpu runs them
        monkeypatch.setattr(sys, "argv", ["fullsize", "--dry", "--out", str(tmp_path), "--parts", part])
        fullsize.main()
    rows = [json.loads(line) for line in (tmp_path / "fullsize.jsonl").read_text().splitlines()]
    assert [row for row in rows if "not run" in row] == []
    wanted = {
        (part, what.format(model), who)
        for model in ("cogvideox", "wan")
        for part in fullsize.PARTS
        for what in CASES[part].replace("{}", model).split("/")
        for who in OURS[part] + THEIRS[part]
    }
    assert {(row["part"], row["what"], row["who"]) for row in rows} == wanted and len(rows) == len(wanted)
    assert all(len(row["seconds"]) == 1 for row in rows)
    ours = [row for row in rows if row["who"] == "sdv" and row["part"] in ("denoise", "vae")]
    errors = {(row["part"], row["what"]): row["differs"] for row in ours}
    assert len(errors) == 8 and all(1e-4 < error < 0.03 for error in errors.values())  # bf16, one weights
    said = (tmp_path / "fullsize.md").read_text()
    assert said.count("\n| ") == len(rows) + 1 and f"torch {torch.__version__}" in said


def test_a_failure_is_a_row_and_the_next_measurement_runs(tmp_path, capsys):
    log = book.Book(tmp_path / "x" / "rows.jsonl", 60, "cpu", 1)
    log.row("steps", "a", "sdv", 0, lambda: log.clock(lambda: time.sleep(0.2))[0])
    log.row("steps", "a", "broken", 0, lambda: 1 / 0)
    log.end = 0
    log.row("steps", "a", "late", 0, lambda: pytest.fail("there is no time"))
    log.end = time.time() + 60
    log.row("steps", "a", "slower", 0, lambda: log.clock(lambda: time.sleep(0.4))[0])
    rows = (tmp_path / "x" / "rows.md").read_text().splitlines()[-4:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[1][2] == "not run: ZeroDivisionError: division by zero"
    assert cells[2][2].startswith("not run: TimeoutError: needs 0 s")
    assert float(cells[0][2]) >= 0.2 and 0.3 < float(cells[3][6]) < 0.7  # sdv / this
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_table_has_only_rows_that_compare():
    """A peer that is measured again at an old commit, after a newer one, stands in the old commit's table."""
    row = {"part": "steps", "what": "a", "date": "d", "machine": "m", "versions": {}}
    rows = [row | {"who": who, "commit": c, "seconds": [s]} for who, c, s in (
        ("sdv", "A", 1.0), ("sdv", "B", 3.0), ("diffusers", "A", 2.0))]  # fmt: skip
    old, new = book.table(rows).split("commit ")[1:]
    assert "| diffusers | 2.000 |" in old and " 0.50 |" in old and "diffusers" not in new and "3.000" in new


def test_one_command_for_a_gpu_without_network_or_video_library(monkeypatch, tmp_path):
    monkeypatch.chdir(gpu.ROOT)
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, sys\nsys.modules['av'] = None\n"
        "def refuse(*_):\n    raise OSError('there is no network')\nsocket.socket.connect = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(tmp_path / "found")])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "found/gpu.json").read_text())
    ended = {job["job"]: job["ended"] for job in found["jobs"]}
    assert set(ended.values()) <= {"well", "nothing to do"} and len(ended) == 5
    assert ended["tests"] == ended["kernels"] == ended["compile: denoise"] == "well"
    rows = [json.loads(line) for line in (tmp_path / "found/fullsize.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == set(fullsize.PARTS) and not any("not run" in row for row in rows)
    assert found["versions"]["torch"] == torch.__version__
    assert "| kernels | well |" in (tmp_path / "found/gpu.md").read_text()


def test_what_hangs_is_stopped_and_what_crashes_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    monkeypatch.setattr(gpu, "LEAST", 0.1)

    def job(name: str, code: str, limit: float) -> gpu.Job:
        return gpu.Job(name, [sys.executable, "-S", "-c", code], limit)

    sleep = "s.Popen(['sleep', '60'])"  # a child of its own, which has to end too
    hangs = f"import subprocess as s; a = {sleep}; print('so far', flush=True); {sleep}.wait()"
    jobs = [
        job("hangs", hangs, 2),
        job("crashes", "print('so far'); raise SystemExit(3)", 60),
        job("ends", "", 60),
    ]
    start = time.time()
    rows = {row["job"]: row for row in gpu.run(jobs, 3, start + 60)}
    assert rows["hangs"]["ended"] == "stopped" and rows["hangs"]["said"] == "so far"
    assert rows["crashes"]["ended"] == "failed (3)" and rows["crashes"]["said"] == "so far"
    assert rows["ends"]["ended"] == "well" and time.time() - start < 40
    assert next(gpu.run(jobs, 1, time.time() - 1))["ended"] == "no time left"


def test_nothing_goes_on_when_the_command_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    quick, long = (gpu.Job(name, ["sleep", name], 60) for name in ("0", "50"))
    started, popen = [], subprocess.Popen

    def start(*args, **more) -> subprocess.Popen:
        started.append(popen(*args, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    jobs = gpu.run([quick, long], 2, time.time() + 60)
    assert next(jobs)["ended"] == "well"
    jobs.close()  # as an error, Ctrl-C or SIGTERM in it would
    assert [process.poll() for process in started] == [0, -signal.SIGKILL]


def test_all_measurements_are_asked_for(tmp_path):
    together, alone = gpu.on_gpu(tmp_path, 720)
    asked = {
        tuple(job.command[job.command.index("--parts") + 1 :][:1])
        for job in alone
        if "--parts" in job.command
    }
    assert {part for (part,) in asked} == set(fullsize.PARTS)
    assert sum(job.limit for job in alone) <= 720
    assert all(job.limit <= gpu.COMPILING * 720 for job in together)
    warm = {job.name.removeprefix("compile: ") for job in together if job.name.startswith("compile")}
    triton = ("kernels", *gpu.COMPILED)  # what has Triton kernels of its own to compile
    assert warm == {job.name for job in alone if job.name.startswith(triton)}
