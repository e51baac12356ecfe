"""Imports against files whose contents are known, killed, repeated and spread over processes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import MEDIA, status, tree
from sdv.data import importers, media
from sdv.data.__main__ import main
from sdv.data.rows import Clips, Pairs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PADDING = torch.tensor([250, 0, 250], dtype=torch.uint8).reshape(3, 1, 1)
FULL = dict.fromkeys(importers.SCORES, 5)
TEXTS = ("item", "description_0", "description_1", "category")
SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "collection": pa.string(),
        "quality_assessment": pa.struct(dict.fromkeys(FULL, pa.int64())),
        "description": pa.struct({**dict.fromkeys(TEXTS, pa.string()), "description_valid": pa.bool_()}),
    }
)


def run(*argv, workers: int = 0) -> int:
    return status(main, "import", *argv, "--workers", workers)


def metadata(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def views(n: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(n)
    left, right = torch.randint(0, 240, (2, 3, side, side), generator=rng, dtype=torch.uint8)
    return left, right


def composite(folder: Path, n: int, side: int = 16, margin: int = 8) -> bytes:
    """PNG of two random views, each inside its own frame of padding."""
    frame = side + 2 * margin
    image = PADDING.repeat(1, frame, 2 * frame)
    for x, view in zip((margin, frame + margin), views(n, side), strict=True):
        image[:, margin : margin + side, x : x + side] = view
    media.write_image(folder / "composite.png", image)
    return (folder / "composite.png").read_bytes()


def row(picture: bytes | None, n: int, scores: dict | None = FULL, **description) -> dict:
    """A row as the data set has it."""
    texts = {
        "item": f"thing {n}",
        "description_0": f"thing {n} on the left",
        "description_1": f" thing {n} on the right ",
        "category": "thing",
        "description_valid": True,
    }
    return {
        "image": {"bytes": picture, "path": None},
        "collection": "collection_2",
        "quality_assessment": scores,
        "description": {**texts, **description},
    }


def write(file: Path, rows: list[dict], group: int = 4) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, row_group_size=group)
    return file


@pytest.fixture(scope="module")
def parquets(tmp_path_factory):
    """Two files of ten good rows each; in the second are also a copy of row 3 and two pictures of no use."""
    folder = tmp_path_factory.mktemp("parquets")
    rows = [row(composite(folder, n), n) for n in range(20)]
    bad = [
        row(b"no picture", 20),
        row(rows[3]["image"]["bytes"], 21),
        row(rows[5]["image"]["bytes"][:99], 22),
    ]
    return write(folder / "a.parquet", rows[:10]), write(folder / "b.parquet", rows[10:15] + bad + rows[15:])


# Subjects200K


def test_views_are_the_inner_pixels_in_both_directions(tmp_path):
    file = write(tmp_path / "a.parquet", [row(composite(tmp_path, n, side=512), n) for n in range(2)])
    assert media.read_image(tmp_path / "composite.png").shape == (3, 528, 1056)  # the published size
    assert run("subjects200k", file, tmp_path / "out") == 0
    rows = metadata(tmp_path / "out")
    assert len(rows) == 4
    for n in range(2):
        left, right = views(n, 512)
        forth, back = rows[2 * n : 2 * n + 2]
        expected = [
            (forth, left, right, f"thing {n} on the right"),
            (back, right, left, f"thing {n} on the left"),
        ]
        for found, ref, target, prompt in expected:
            assert torch.equal(media.read_image(tmp_path / "out" / found["reference_file_name"]), ref)
            assert torch.equal(media.read_image(tmp_path / "out" / found["target_file_name"]), target)
            assert found["prompt"] == prompt
    assert main(["check", str(tmp_path / "out")]) == 0
    item = Pairs(tmp_path / "out", 512, 512)[0]
    assert torch.equal(item["target"], media.from_uint8(views(0, 512)[1]))
    assert item["prompt"] == "<cls> thing 0 on the right"


def test_one_direction_and_another_margin(tmp_path):
    file = write(tmp_path / "a.parquet", [row(composite(tmp_path, 7, margin=3), 7)])
    for side, prompt in (("left", "thing 7 on the right"), ("right", "thing 7 on the left")):
        out = tmp_path / side
        assert run("subjects200k", file, out, "--directions", side, "--margin", 3) == 0
        (found,) = metadata(out)
        assert found["prompt"] == prompt
        assert f"-{side}.png" in found["reference_file_name"]
        assert torch.equal(
            media.read_image(out / found["reference_file_name"]), views(7, 16)[side == "right"]
        )


def test_what_is_dropped_is_counted_and_named(tmp_path, capsys):
    good = composite(tmp_path, 0)
    rows = [
        row(good, 0),
        row(good, 1, None),
        row(good, 2, FULL | {"imageQuality": None}),
        *(row(good, 3, FULL | {name: 4}) for name in FULL),
        row(good, 6, description_1=" "),
        row(good, 7) | {"description": None},
        row(good, 8, description_valid=False),
        row(composite(tmp_path, 9), 9, description_valid=None),
        row(good, 10),
        row(None, 11),
        row(good[:-30], 12),
        row((MEDIA / "pairs" / "lawn.jpg").read_bytes(), 13),
        row(composite(tmp_path, 14), 14) | {"image": None},
    ]
    file = write(tmp_path / "rows.parquet", rows)
    assert run("subjects200k", file, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "15 rows: 2 kept, 13 dropped, 0 not needed" in said
    for number, reason in (
        (2, "no quality scores"),
        (3, "a quality score below 5"),
        (2, "no description of a target"),
        (1, "description_valid is false"),
        (1, "the same picture as another row"),
        (4, "unreadable"),
    ):
        assert f"{number:8}  {reason}\n" in said
    assert "rows.parquet:10: rows.parquet:0\n" in said
    assert "rows.parquet:13: is 1024x768, not two square views" in said
    assert "rows.parquet:14" not in said  # the fourth of its kind
    assert "4 pairs in" in said
    assert {found["prompt"].split()[1] for found in metadata(tmp_path / "out")} == {"0", "9"}

    assert run("subjects200k", file, tmp_path / "lower", "--min-quality", 4) == 0
    assert "3  a quality" not in capsys.readouterr().out  # they pass, and are copies of row 0
    assert run("subjects200k", file, tmp_path / "none", "--min-quality", 6) == 1
    assert "nothing was kept" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--limit", 9, "--seed", 3)])
def test_the_number_of_workers_changes_nothing(parquets, tmp_path, options):
    trees = []
    for workers in (0, 1, 2):
        assert run("subjects200k", *parquets, tmp_path / str(workers), *options, workers=workers) == 0
        trees.append(tree(tmp_path / str(workers)))
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) == 2 + 2 * (9 if options else 20)
    assert run("subjects200k", *reversed(parquets), tmp_path / "again", *options) == 0
    assert tree(tmp_path / "again") == trees[0]


def test_a_limit_is_met_although_some_of_the_drawn_are_dropped(parquets, tmp_path):
    drawn = []
    for seed in range(4):
        out = tmp_path / str(seed)
        assert run("subjects200k", *parquets, out, "--limit", 17, "--seed", seed) == 0
        drawn.append({found["prompt"].split()[1] for found in metadata(out)})
        assert len(drawn[-1]) == 17
        written = {name for found in metadata(out) for name in list(found.values())[:2]}
        assert {name for name in tree(out) if name.endswith(".png")} == written  # and nothing more
    assert len(set(map(frozenset, drawn))) > 1
    assert run("subjects200k", *parquets, tmp_path / "all", "--limit", 99) == 0
    assert len(metadata(tmp_path / "all")) == 40


def test_goes_on_from_any_torn_journal(parquets, tmp_path):
    arguments = "subjects200k", *parquets
    whole, out = tmp_path / "whole", tmp_path / "out"
    for limit in ((), ("--limit", 15)):
        shutil.rmtree(whole, ignore_errors=True)
        assert run(*arguments, whole, *limit) == 0
        journal = (whole / "import.jsonl").read_bytes()
        for end in range(0, len(journal) + 1, len(journal) // 7):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            (out / "metadata.jsonl").unlink()
            (out / "import.jsonl").write_bytes(journal[:end])
            if journal.find(b"\n") < end:
                (out / "views" / ".half.png.1.tmp").write_bytes(b"half")
            assert run(*arguments, out, *limit) == 0
            assert tree(out) == tree(whole)
    (lost := next(out.rglob("*-left.png"))).unlink()
    assert run(*arguments, out, "--limit", 15) == 0
    assert lost.is_file()


def test_killed_and_resumed_equals_never_killed(tmp_path):
    rows = [row(composite(tmp_path, n, side=384), n) for n in range(24)]
    file = write(tmp_path / "a.parquet", rows, group=2)
    assert run("subjects200k", file, tmp_path / "whole", "--limit", 20) == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sdv.data", "import", "subjects200k", file, out, "--limit", "20"]
    for lines in (3, 12):
        process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
        while len(journal_of(out)) < lines:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(journal_of(out)) < 21
        assert not (out / "metadata.jsonl").exists()
    assert run("subjects200k", file, out, "--limit", 20, workers=2) == 0
    assert tree(out) == tree(tmp_path / "whole")


def journal_of(out: Path) -> list[bytes]:
    path = out / "import.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def test_a_folder_of_something_else_is_left_alone(parquets, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("subjects200k", *parquets, out) == 0
    before = tree(out)
    for changes, message in (
        (("--limit", 3), "limit None, now 3"),
        (("--directions", "left"), "directions both, now left"),
    ):
        assert run("subjects200k", *parquets, out, *changes) == 1
        assert message in capsys.readouterr().err
    assert run("subjects200k", parquets[0], out) == 1
    assert "was begun otherwise (files" in capsys.readouterr().err
    lock = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    lock += "; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", lock, out / "import.jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        assert run("subjects200k", *parquets, out) == 1
        other.communicate(b"\n")
    assert "another import is writing there" in capsys.readouterr().err
    assert tree(out) == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert run("subjects200k", *parquets, tmp_path / "mine") == 1
    assert "holds files that no import wrote" in capsys.readouterr().err
    assert tree(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_a_wrong_file_is_one_error_before_any_work(parquets, tmp_path, capsys, monkeypatch):
    def error(*argv) -> str:
        assert run("subjects200k", *argv, tmp_path / "out") == 1
        assert not (tmp_path / "out").exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    table = pq.read_table(parquets[0])
    wrong = tmp_path / "wrong.parquet"
    pq.write_table(table.drop_columns(["quality_assessment"]), wrong)
    assert "wrong.parquet: quality_assessment.compositeStructure is missing; give" in error(*parquets, wrong)
    flat = table.set_column(0, "image", table["image"].combine_chunks().field("bytes"))
    pq.write_table(flat, wrong)
    assert "image.bytes is missing" in error(wrong)
    texts = pa.array([{"bytes": "text"}] * len(table))
    pq.write_table(table.set_column(0, "image", texts), wrong)
    assert "image.bytes is string" in error(wrong)
    wrong.write_bytes(parquets[0].read_bytes()[:-40])
    assert "wrong.parquet: is no parquet file, or torn" in error(wrong)
    assert "absent.parquet: no such file" in error("absent.parquet")
    assert "a.parquet is given twice" in error(parquets[0], parquets[0])
    assert "--limit 0: use 1 or more" in error(parquets[0], "--limit", 0)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -e '.[importers]'" in error(parquets[0])


def test_a_damaged_row_group_costs_its_own_rows(parquets, tmp_path, capsys):
    file = tmp_path / "damaged.parquet"
    column = pq.ParquetFile(parquets[0]).metadata.row_group(1).column(0)
    assert column.path_in_schema == "image.bytes"
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(parquets[0].read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    assert run("subjects200k", file, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "10 rows: 6 kept, 4 dropped, 0 not needed" in said
    assert "4  unreadable\n" in said
    assert "damaged.parquet:4: " in said


def test_a_folder_that_cannot_be_written_ends_the_import_and_drops_nothing(parquets, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("subjects200k", *parquets, whole) == 0
    out.mkdir()
    header = (whole / "import.jsonl").read_bytes().splitlines(keepends=True)[0]
    (out / "import.jsonl").write_bytes(header)
    (out / "views").write_text("in the way")
    for workers in (0, 1):  # the error crosses the border of a process, too
        assert run("subjects200k", *parquets, out, workers=workers) == 1
        *_, said = capsys.readouterr().err.splitlines()
        assert "a file stands in the way; name another folder" in said
        assert (out / "import.jsonl").read_bytes() == header
    (out / "views").unlink()
    assert run("subjects200k", *parquets, out) == 0
    assert tree(out) == tree(whole)


# Clips


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two good clips of 2 s at 16 fps, then one of each kind that is not taken."""
    folder = tmp_path_factory.mktemp("videos")
    sizes = {"wide": (48, 32), "wider": (64, 32), "square": (32, 32), "short": (48, 32), "few": (48, 32)}
    for n, (name, (width, height)) in enumerate(sizes.items()):
        frames = {"short": 12, "few": 4}.get(name, 32)
        levels = torch.arange(frames, dtype=torch.uint8).reshape(1, frames, 1, 1) * 5 + n
        media.write_video(folder / f"{name}.mp4", levels.expand(3, frames, height, width), 16)
        (folder / f"{name}.txt").write_text(f"a {name} clip\n")
    (folder / "torn.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:-400])
    (folder / "torn.txt").write_text("a torn clip")
    (folder / "silent.mp4").write_bytes((folder / "wide.mp4").read_bytes())
    return folder


BOUNDS = ("--frames", 9, "--fps", 8, "--min-frames", 8)


def test_a_folder_of_clips_is_filtered_and_linked(videos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("clips", videos, out, *BOUNDS, workers=2) == 0
    said = capsys.readouterr().out
    assert "7 rows: 2 kept, 5 dropped, 0 not needed" in said
    for reason in (
        "width / height below 1.5",
        "fewer than 8 frames",
        "too short for 9 frames at 8 fps",
        "unreadable",
        "no usable row",
    ):
        assert f"{1:8}  {reason}\n" in said
    assert "silent.mp4: no prompt; write one in silent.txt" in said
    assert "torn.mp4: " in said
    for found, name in zip(metadata(out), ("wide", "wider"), strict=True):
        assert found["prompt"] == f"a {name} clip"
        assert (out / found["file_name"]).samefile(videos / f"{name}.mp4")
    assert main(["check", str(out), "--frames", "9", "--fps", "8"]) == 0
    clip = Clips(out, 9, 8, 32, 48)[0]["clip"]
    assert torch.equal(clip, media.from_uint8(media.read_clip(videos / "wide.mp4", 9, 8, 32, 48)))
    before = tree(out)
    assert run("clips", videos, out, *BOUNDS) == 0
    assert tree(out) == before


def test_real_clips_pass_and_may_be_copied_or_symbolic(tmp_path, monkeypatch):
    arguments = "clips", MEDIA / "clips"
    options = ("--frames", 9, "--fps", 8, "--min-aspect", 0.5, "--min-frames", 9)
    assert run(*arguments, tmp_path / "copies", *options, "--copy") == 0
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "other disk")))
    assert run(*arguments, tmp_path / "links", *options) == 0
    prompts = [json.loads(line)["prompt"] for line in (MEDIA / "clips" / "metadata.jsonl").open()]
    for kind in ("copies", "links"):
        rows = metadata(tmp_path / kind)
        assert [found["prompt"] for found in rows] == prompts
        for found, name in zip(rows, ("bunny", "cup", "samoyed"), strict=True):
            path, source = tmp_path / kind / found["file_name"], MEDIA / "clips" / f"{name}.mp4"
            assert path.read_bytes() == source.read_bytes()
            assert path.samefile(source) == (kind == "links") == path.is_symlink()
        assert main(["check", str(tmp_path / kind), "--frames", "9", "--fps", "8"]) == 0


def test_a_table_lists_clips_under_any_names(videos, tmp_path, capsys):
    rows = [
        ("wide.mp4", 'a "wide", flat clip'),
        (str(videos / "wider.mp4"), "ein Zug – von fern"),
        ("./wide.mp4", "the same again"),
        ("absent.mp4", "nothing"),
        ("short.mp4", " "),
    ]
    lines = [f'"{path}","{text.replace(chr(34), 2 * chr(34))}"\n' for path, text in rows]
    (tmp_path / "t.csv").write_text("file,text\n" + "".join(lines), encoding="utf-8-sig")
    objects = [json.dumps({"file": path, "text": text}) for path, text in rows]
    (tmp_path / "t.jsonl").write_text("\n".join([*objects, "{broken", "[1]", '{"file": 7, "text": "x"}']))
    columns = "--path-column", "file", "--caption-column", "text"
    for table, dropped in (("t.csv", 3), ("t.jsonl", 6)):
        out = tmp_path / f"out.{table}"
        assert run("clips", tmp_path / table, out, *BOUNDS, *columns, "--root", videos) == 0
        assert [found["prompt"] for found in metadata(out)] == [rows[0][1], rows[1][1]]
        said = capsys.readouterr().out
        assert f"2 kept, {dropped} dropped" in said
        assert "1  the same file as another row\n" in said
        assert f"{dropped - 2}  no usable row\n" in said
        assert "absent.mp4: no such file" in said
        assert run("clips", tmp_path / table, tmp_path / "no", *columns[:2]) == 1
        assert "no column 'caption', it has file, text; name the right ones" in capsys.readouterr().err
    assert run("clips", tmp_path / "t.txt", tmp_path / "no") == 1
    assert run("clips", videos, tmp_path / "no", "--fps", 0) == 1
    assert not (tmp_path / "no").exists()


def test_a_seeded_subset_of_clips_is_full(videos, tmp_path):
    names = [f"{n:02}-{name}.mp4" for n in range(6) for name in ("wide", "square", "torn", "wider")]
    for name in names:
        shutil.copy(videos / name[3:], tmp_path / name)
    (tmp_path / "t.csv").write_text("path,caption\n" + "".join(f"{name},{name}\n" for name in names))
    chosen = []
    for seed, workers in ((0, 0), (0, 2), (1, 0)):
        out = tmp_path / f"{seed}-{workers}"
        options = *BOUNDS, "--limit", 7, "--seed", seed
        assert run("clips", tmp_path / "t.csv", out, *options, workers=workers) == 0
        chosen.append(metadata(out))
        assert {found["prompt"][3:7] for found in chosen[-1]} == {"wide"}
        assert len(list(out.glob("*.mp4"))) == len({found["prompt"] for found in chosen[-1]}) == 7
    assert chosen[0] == chosen[1] != chosen[2]
    assert tree(tmp_path / "0-0") == tree(tmp_path / "0-2")


def test_what_has_changed_is_looked_at_again(videos, tmp_path):
    """A download that was missing or torn, a corrected table, another film under the old name."""
    table, vids, out = tmp_path / "t.csv", tmp_path / "vids", tmp_path / "out"
    vids.mkdir()
    shutil.copy(videos / "torn.mp4", vids / "a.mp4")
    shutil.copy(videos / "wider.mp4", vids / "c.mp4")
    table.write_text("path,caption\na.mp4,first\nb.mp4,second\nc.mp4,third\n")

    def imported(*flags: object) -> dict[str, Path]:
        assert run("clips", table, out, *BOUNDS, *flags) == 0
        return {found["prompt"]: out / found["file_name"] for found in metadata(out)}

    assert imported("--root", vids).keys() == {"third"}
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(videos / "wide.mp4", vids / name)
    assert list(imported("--root", vids)) == ["first", "second", "third"]
    table.write_text("path,caption\nc.mp4,first\nb.mp4,second\na.mp4,third\n")
    assert imported("--root", vids)["first"].samefile(vids / "c.mp4")
    (vids / "b.mp4").unlink()
    shutil.copy(videos / "wider.mp4", vids / "b.mp4")
    shutil.copy(videos / "square.mp4", vids / "a.mp4")
    found = imported("--root", vids)
    assert found.keys() == {"first", "second"} and found["second"].samefile(vids / "b.mp4")
    assert len(list(out.glob("*.mp4"))) == 2
    before = tree(out)
    imported("--root", vids)
    assert tree(out) == before
