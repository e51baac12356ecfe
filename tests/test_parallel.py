"""Several processes do what one does; a run stopped, killed or damaged goes on as if it had not been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial

import pytest

from helpers import CALM, MEDIA, ROOT, RUN, argv, assert_close, assert_same, four_pairs, losses
from sdv.data import loader
from sdv.data.loader import locate
from sdv.run import parallel

ALONE = {"OMP_NUM_THREADS": "1"}
STEPS = 6


def command(tiny, out, processes=1, **extra):
    options = {"--backbone": tiny, "--out": out, "--steps": STEPS, **RUN, **CALM}
    options |= {"--" + name.replace("_", "-"): value for name, value in extra.items()}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launch if processes > 1 else []), "train.py", *argv(options)]


def train(tiny, out, processes=1, flags=(), **extra):
    done = subprocess.run(
        [*command(tiny, out, processes, **extra), *flags], cwd=ROOT, env=os.environ | ALONE,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(re.findall("(?m)^(?:error|.rank).*", done.stderr))
    return done.stdout


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One process with micro-batches of four pairs or two clips."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(tiny, out, identity_batch=4, motion_batch=2, save_every=2, keep=9)
    assert {task for _, task, _, _ in losses(out)} == {"identity", "motion"}
    return out


@pytest.mark.parametrize("how", [(), ("--shard",)], ids=["data parallel", "sharded"])
def test_two_processes_equal_one_with_twice_the_batch(tiny, alone, tmp_path, how):
    out = tmp_path / "run"
    train(tiny, out, 2, how, cache=tmp_path / "cache")
    assert_close(out, alone, STEPS)
    for mine, its in zip(losses(out), losses(alone), strict=True):
        assert mine[:2] == its[:2]
        assert mine[2:] == pytest.approx(its[2:], rel=1e-5)


def test_four_micro_batches_of_one_process_equal_two_of_two(tiny, tmp_path):
    """Coin, dropout and noise know the step and the sample, not how the step is cut."""
    same = {"p_video": 0.7, "dropout": "tokens"}
    train(tiny, tmp_path / "one", accumulate=4, **same)
    train(tiny, tmp_path / "two", 2, accumulate=2, **same)
    assert_close(tmp_path / "one", tmp_path / "two", STEPS)


def test_a_run_goes_on_with_another_number_of_processes_and_back(tiny, alone, tmp_path):
    out = tmp_path / "run"
    train(tiny, out, 2, ["--shard"], steps=2)
    train(tiny, out, 1, ["--resume"], steps=4, identity_batch=4, motion_batch=2)
    train(tiny, out, 2, ["--resume"])
    assert_close(out, alone, STEPS)
    refused = subprocess.run(
        [*command(tiny, out, 1), "--resume"], cwd=ROOT, env=os.environ | ALONE, capture_output=True, text=True
    )
    assert "changed: batch was" in refused.stderr


def test_sharded_processes_film_with_and_without_a_reference(tiny, tmp_path):
    """Guidance on the reference calls the network once more where there is one; no rank may wait for that."""
    shots = [{"prompt": "a dog"}, {"prompt": "a cat", "reference_file_name": str(MEDIA / "pairs/lawn.jpg")}]
    manifest = tmp_path / "shots.jsonl"
    manifest.write_text("\n".join(map(json.dumps, [*shots, shots[0]])))
    films = {"sample_every": 9, "sample_steps": 1, "sample_ref_guidance": 2, "sample_manifest": manifest}
    train(tiny, tmp_path / "run", 2, ["--shard"], steps=1, **films)
    names = {f"step-{step:06d}-{i:02d}.mp4" for step in (0, 1) for i in range(3)}
    assert {film.name for film in (tmp_path / "run/samples").iterdir()} == names


def test_signals_are_noted_and_a_second_ctrl_c_ends_at_once():
    def others(number: int, frame: object) -> None:
        pass

    for number in loader.ENDING:
        before = signal.signal(number, others)
        ends = partial(pytest.raises, KeyboardInterrupt) if number == signal.SIGINT else nullcontext
        with ends(), parallel.signals_noted(loader.ENDING, "cpu") as stop_if_asked:
            stop_if_asked()
            os.kill(os.getpid(), number)
            with pytest.raises(parallel.Stopped):
                stop_if_asked()
            with ends():
                os.kill(os.getpid(), number)
        assert signal.signal(number, signal.SIG_IGN) is others
        with parallel.signals_noted(loader.ENDING, "cpu") as stop_if_asked:  # as nohup wants it
            os.kill(os.getpid(), number)
            stop_if_asked()
            with pytest.raises(parallel.Stopped) as stopped:
                stop_if_asked(problem := OSError("a file"))
        assert stopped.value.__cause__ is problem
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_its_processes_saves_and_ends_well(tiny, alone, tmp_path, number):
    """As a terminal, `timeout` and systemd send it: to the workers too, the last two also while it saves."""
    out = tmp_path / "run"
    same = {"identity_batch": 4, "motion_batch": 2, "workers": 2}
    process = subprocess.Popen(
        command(tiny, out, **same), cwd=ROOT, env=os.environ | ALONE, start_new_session=True
    )
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.02)
    os.killpg(process.pid, number)
    while process.poll() is None and not list(out.glob(".step-*")):
        time.sleep(0.001)
    if process.poll() is None and number == signal.SIGTERM:
        os.killpg(process.pid, number)
    assert process.wait(60) == (-number if number == signal.SIGINT else 0)  # so that a shell's loop ends
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)
    (save,) = out.glob("step-*")
    assert 0 < int(save.name.removeprefix("step-")) < STEPS
    train(tiny, out, flags=["--resume"], **same)
    assert_same(out, alone, STEPS)
    assert losses(out) == losses(alone)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_file_that_one_process_cannot_read_costs_no_step(tiny, tmp_path, sharded):
    """Nor after a film, a forward without a backward: what is sharded has to be so again."""
    pairs, out = tmp_path / "pairs", tmp_path / "run"
    rows = four_pairs(pairs)
    broken = rows[locate(0, 3, len(rows))[1]].files[1]  # of the second step, and the second process
    broken.write_bytes(broken.read_bytes()[:2000])
    options = {"pairs": pairs, "p_video": 0, "identity_batch": 1, "verify": 0}
    if sharded:
        (tmp_path / "shots.jsonl").write_text('{"prompt": "a dog"}')
        options |= {"sample_every": 1, "sample_steps": 1, "sample_manifest": tmp_path / "shots.jsonl"}
    done = subprocess.run(
        [*command(tiny, out, 2, **options), *["--shard"] * sharded], cwd=ROOT, env=os.environ | ALONE,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode and broken.name in done.stderr
    assert [save.name for save in out.glob("step-*")] == ["step-000001"]


def test_a_reader_of_its_lines_that_goes_away_costs_no_step(tiny, tmp_path):
    """As with `| tee` and Ctrl-C, which ends tee at once."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(tiny, out, steps=10_000), cwd=ROOT, env=os.environ | ALONE, stdout=subprocess.PIPE, text=True
    )
    said = next(line for line in process.stdout if line.startswith("step"))
    process.stdout.close()
    assert process.wait(60) == 141
    (save,) = out.glob("step-*")
    assert int(save.name.removeprefix("step-")) >= int(re.search(r"\d+", said)[0])


def test_a_torn_save_falls_back_to_the_one_before(tiny, alone, tmp_path):
    out = tmp_path / "run"
    same = {"identity_batch": 4, "motion_batch": 2, "save_every": 2}
    train(tiny, out, steps=4, **same)
    torn = out / "step-000004" / "training.pt"
    os.truncate(torn, torn.stat().st_size // 2)
    said = train(tiny, out, flags=["--resume"], **same)
    assert "step-000004: damaged" in said and "resumed from" in said.split("going back")[1]
    assert_same(out, alone, STEPS)
    assert losses(out) == losses(alone)


# Trains in children of a process that has everything imported, and kills all but the last.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import train
from sdv.run import saves as runs
out, kills, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rng = random.Random(0)
step = lambda: max((int(save.name[5:]) for save in runs.saves(out)), default=0)
for kill in range(kills + 1):
    child = os.fork()
    if not child:
        sys.argv = ["train.py", *arguments, *["--resume"] * bool(runs.saves(out))]
        train.main()
        os._exit(0)
    if kill < kills:
        # At a random moment, but after two steps at most, so that no fast machine ends before the last kill.
        late, far = time.monotonic() + rng.uniform(0.2, 4), step() + rng.choice([1, 2])
        while time.monotonic() < late and step() < far:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) == (kill < kills), f"ended too early, with {status}"
    print("after", kill + 1, "runs:", [save.name for save in runs.saves(out)][-1:], flush=True)
"""


def test_a_run_killed_twenty_times_ends_as_the_one_never_killed(tiny, tmp_path):
    options = {"steps": 60, "save_every": 1, "keep": 2}
    train(tiny, tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    killed.mkdir()
    arguments = command(tiny, killed, **options)[2:]
    subprocess.run([sys.executable, "-c", KILLER, str(killed), "20", *arguments], cwd=ROOT, check=True,
                   env=os.environ | ALONE)  # fmt: skip
    assert_same(killed, tmp_path / "whole", 60)
    assert losses(killed) == losses(tmp_path / "whole")
