"""The folder of a run: saves that are whole, in their order, under the umask, on a disk that is full."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import weights
from helpers import full_disk, toy
from sdv.data.files import save_safetensors, write_whole
from sdv.run import saves
from sdv.run.log import RunLog, log_line

QUIET = []


def save(out, step, keep=2, size=4):
    def adapter(path):
        write_whole(path, lambda to: save_safetensors({"x": torch.full((size,), float(step))}, to))

    return saves.write_save(out, step, adapter, {"step": step, "past": torch.ones(size)}, keep)


def steps(out):
    return [saves.step_of(folder) for folder in saves.saves(out)]


def test_saves_past_a_million_steps_are_in_their_order(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 10_000_000):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == [999_999, 1_000_000, 10_000_000]
    folder, state = saves.newest_whole(tmp_path, QUIET.append)
    assert folder.name == "step-10000000" and state["step"] == 10_000_000


def test_what_is_no_save_is_none(tmp_path):
    save(tmp_path, 7)
    for name in ("step-", "step-old", "step-000007-copy", "step-²", ".step-000009.tmp"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [7]


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (0, [1, 2, 3, 4])])
def test_as_many_stay_as_were_asked_for_and_zero_is_all(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        assert save(tmp_path, step, keep).is_dir()
    assert steps(tmp_path) == left
    assert not list(tmp_path.glob(".*"))


def test_an_old_save_that_somebody_reads_on_a_network_disk_ends_nothing(tmp_path, monkeypatch):
    """There a deleted file that is open stays in its folder under another name."""
    save(tmp_path, 1, keep=1)
    remove = os.rmdir

    def in_use(path, **place):
        if ".old.tmp" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, **place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", in_use)
        save(tmp_path, 2, keep=1)
        save(tmp_path, 3, keep=1)
    save(tmp_path, 4, keep=1)
    assert steps(tmp_path) == [4] and not list(tmp_path.glob(".step-*"))


def test_ranks_that_see_another_newest_save_do_not_train_together(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    with pytest.raises(OSError, match="one process reads step-000002, the first one step-000001"):
        saves.newest_whole(tmp_path, QUIET.append, lambda name: "step-000001")


def test_a_save_that_goes_back_behind_a_damaged_one_is_not_deleted_for_it(tmp_path):
    save(tmp_path, 10), save(tmp_path, 30)
    (tmp_path / "step-000030" / "training.pt").write_bytes(b"torn")
    said = []
    assert saves.newest_whole(tmp_path, said.append)[1]["step"] == 10
    assert "step-000030: damaged" in said[0]
    save(tmp_path, 20, keep=1)
    assert steps(tmp_path) == [20, 30]
    save(tmp_path, 30, keep=1)
    assert saves.newest_whole(tmp_path, said.append)[1]["step"] == 30 and steps(tmp_path) == [30]


@pytest.mark.parametrize("name", ["training.pt", "adapter.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [b"", b"\x80\x04.", b"PK\x03\x04", b"\0" * 300, b"{}", b"\x80\x02}q\x00.", "cut short", "missing"],
)
def test_any_damage_goes_back_to_the_save_before(tmp_path, name, damage):
    save(tmp_path, 1), save(tmp_path, 2)
    file = tmp_path / "step-000002" / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(whole[:-30] if damage == "cut short" else damage)
    assert saves.newest_whole(tmp_path, QUIET.append)[0].name == "step-000001"


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_state_runs_no_code_when_it_is_read(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    torch.save({"step": 2, "past": Touches(tmp_path / "ran")}, tmp_path / "step-000002" / "training.pt")
    assert saves.newest_whole(tmp_path, QUIET.append)[0].name == "step-000001"
    assert not (tmp_path / "ran").exists()


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path):
    for left in (".step-000003.tmp", ".step-000001.old.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "training.pt").write_bytes(b"half")
    save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


# ------------------------------------------------------------------------------------------- a full disk
@pytest.mark.parametrize(("name", "size"), [("adapter.safetensors", 10_000), ("training.pt", 4_800)])
def test_on_a_full_disk_the_last_saves_stay_and_nothing_else(tmp_path, name, size):
    """The adapter has 40 kB, or 19.3, where the state beside it has 20.3 and does not fit."""
    save(tmp_path, 1), save(tmp_path, 2)
    with full_disk(20_000), pytest.raises(OSError, match="File too large.*free some space") as error:
        save(tmp_path, 3, keep=1, size=size)
    assert f"{tmp_path}/.step-000003.tmp/{name}" in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert saves.newest_whole(tmp_path, QUIET.append)[1]["step"] == 2
    save(tmp_path, 3)
    assert steps(tmp_path) == [2, 3]


def test_an_adapter_and_a_row_that_do_not_fit_are_named(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    with full_disk(200):
        with pytest.raises(OSError, match="a.safetensors: could not be written .File too large"):
            weights.tensors.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(100)})
        with pytest.raises(OSError, match="metrics.jsonl: could not be written .File too large"):
            log.write("metrics", {"step": 1, "loss": [0.5] * 100})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_save_that_breaks_off_for_another_reason_leaves_nothing(tmp_path):
    save(tmp_path, 1)

    def stopped(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saves.write_save(tmp_path, 2, stopped, {}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


# ------------------------------------------------------------------------------------------- permissions
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_what_is_written_has_the_permissions_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        plain = tmp_path / "plain"
        plain.write_text("")
        folder = save(tmp_path, 1)
        model = toy()
        save_safetensors({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "a")
        weights.tensors.save_tensors(tmp_path / "b.safetensors", {"x": torch.ones(3)})
        weights.tensors.save_tensors(tmp_path / "b.pth", {"x": torch.ones(3)})
    finally:
        os.umask(before)
    files = [*folder.iterdir(), tmp_path / "a", tmp_path / "b.safetensors", tmp_path / "b.pth"]
    assert len(files) == 5
    for file in files:
        assert file.stat().st_mode == plain.stat().st_mode == 0o100666 & ~umask | 0o100000, file


def test_a_file_that_is_replaced_has_them_too(tmp_path):
    file = tmp_path / "a.safetensors"
    save_safetensors({"x": torch.ones(1)}, file)
    file.chmod(0o600)
    weights.tensors.save_tensors(file, {"x": torch.zeros(2)})
    umask = os.umask(0o022)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("x").tolist() == [0, 0]


# ------------------------------------------------------------------------------------- settings and rows
@pytest.mark.parametrize("text", [b"{", b"\xff\xfe{", b"3", b"[1]", b"[" * 100_000])
def test_damaged_settings_of_a_run_are_named(tmp_path, text):
    save(tmp_path, 1)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json: damaged"):
        saves.require_same(tmp_path, {}, {}, {})


def test_a_setting_that_had_another_name_or_did_not_count_is_compared(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "config.json").write_text('{"frozen": "fp8", "cut": null}')
    others = {"base_storage": "device", "cut": 4}, {"frozen": "base_storage"}  # defaults, old names
    saves.require_same(tmp_path, {"base_storage": "fp8", "cut": 4}, *others)
    with pytest.raises(ValueError, match="changed: base_storage was 'fp8', is 'device'"):
        saves.require_same(tmp_path, {"base_storage": "device"}, *others)


def test_a_fresh_run_keeps_no_row_of_another(tmp_path):
    for name in ("metrics", "probes", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"step": 99}\n')
    saves.begin(tmp_path, {"seed": 1}, {"torch": "2"}, resume=False)
    assert [file.read_text() for file in tmp_path.glob("*.jsonl")] == [""]
    saves.begin(tmp_path, {"seed": 1}, {"torch": "3"}, resume=True)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content == {"seed": 1, "parts": [{"torch": "2"}, {"torch": "3"}]}


def test_rows_are_cut_back_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(5))
    file.write_text(text + '{"step": 5, "lo')
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="metrics.jsonl"):
            saves.cut_back(file, 3)
    assert file.read_text() == text + '{"step": 5, "lo' and len(list(tmp_path.iterdir())) == 1
    assert [row["step"] for row in saves.cut_back(file, 3)] == [0, 1, 2]
    assert file.read_text() == "".join(text.splitlines(keepends=True)[:3])
    assert saves.cut_back(tmp_path / "nothing.jsonl", 3) == [] and not (tmp_path / "nothing.jsonl").exists()


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[1]", b"{}", b'{"step": "x"}', b"3", b""])
def test_a_damaged_row_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: damaged"):
        saves.cut_back(file, 3)
    assert file.read_bytes().count(b"\n") == 3


def test_a_line_of_the_log_says_how_long_the_rest_takes():
    """60 steps are left, of one minute or two by turns."""
    row = {"task": "motion", "loss": 1.0, "quarters": [1.0] * 4, "grad_norm": 0.1, "memory_gb": 1.0}
    rows = [row | {"step": step, "seconds": (60.0, 120.0)[step % 2]} for step in range(200)]
    assert log_line(rows, 260).endswith("| 120.00 s, 1:30:00 left")
