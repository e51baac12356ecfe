"""Rows, seeded batches and the check of a folder, on the media of this repository and broken copies."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import status
from sdv.data import media
from sdv.data import rows as rows_module
from sdv.data.__main__ import main
from sdv.data.loader import batches, locate
from sdv.data.rows import Clips, Pairs
from sdv.data.sizes import MODELS, check_size, count_tokens

MEDIA = Path(__file__).parent / "media"
COGVIDEOX = SimpleNamespace(**MODELS["CogVideoX-5b"])


def write(folder: Path, *rows) -> Path:
    """metadata.jsonl of dictionaries or raw lines."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def pair(n: int, prompt: str = "a dot") -> dict:
    return {"reference_file_name": f"{n}.png", "target_file_name": f"{n}.png", "prompt": prompt}


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """Ten pairs whose grey level is ten times their row."""
    folder = tmp_path_factory.mktemp("dots")
    for n in range(10):
        media.write_image(folder / f"{n}.png", torch.full((3, 16, 24), 10 * n, dtype=torch.uint8))
    return write(folder, *(pair(n, f"dot {n}") for n in range(10)))


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Three clips of three seconds whose grey level rises with every frame."""
    folder = tmp_path_factory.mktemp("ramps")
    levels = torch.arange(48, dtype=torch.uint8).reshape(1, 48, 1, 1) * 5
    for n in range(3):
        media.write_video(folder / f"{n}.mp4", levels.expand(3, 48, 32, 48), 16)
        (folder / f"{n}.txt").write_text(f"ramp {n}")
    return folder


@pytest.fixture
def copy(tmp_path):
    """A pairs folder with one good picture, to be broken."""
    media.write_image(tmp_path / "0.png", torch.zeros(3, 16, 16, dtype=torch.uint8))
    return tmp_path


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]


def take(n: int, *args, **options) -> list[dict]:
    return list(islice(batches(*args, **options), n))


# Sizes


def test_tokens_are_the_papers():
    assert count_tokens(480, 720, 1, 226, COGVIDEOX) == (226, 1350, 1350)
    assert count_tokens(480, 720, 1, 226, COGVIDEOX).total == 2926
    assert count_tokens(480, 720, 49, 226, COGVIDEOX).total == 19126


@pytest.mark.parametrize(
    "size, message",
    [
        ((488, 720, 1), "height 488 is not a multiple of 16 .*: use 480 or 496"),
        ((480, 8, 1), "width 8 is not a multiple of 16 .*: use 16 or 32"),
        ((480, 720, 50), "50 frames are not 4k [+] 1: use 49 or 53"),
        ((480, 720, 0), "0 frames are not 4k [+] 1: use 1 or 5"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(size, message):
    with pytest.raises(ValueError, match=message):
        check_size(*size, COGVIDEOX)


def test_another_models_sizes_are_its_own():
    with pytest.raises(ValueError, match="width 720 is not a multiple of 32"):
        check_size(480, 720, 49, SimpleNamespace(**MODELS["Wan2.2-TI2V-5B"]))


# Items


def test_pair_is_the_fitted_pictures_and_the_marked_prompt():
    pairs = Pairs(MEDIA / "pairs", 64, 96)
    item = pairs[2]
    rows = [json.loads(line) for line in (MEDIA / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert len(pairs) == len(rows)
    assert item["prompt"] == "<cls> " + rows[2]["prompt"]
    assert item["row"] == "metadata.jsonl:3 tiles.jpg"
    for view, name in (("ref", "tiles.jpg"), ("target", "roots.jpg")):
        assert torch.equal(item[view], media.fit(media.read_image(MEDIA / "pairs" / name), 64, 96))
        assert item[view].min() >= -1
        assert item[view].max() <= 1
    assert Pairs(MEDIA / "pairs", 64, 96, cls_token="")[2]["prompt"] == rows[2]["prompt"]


def test_clip_is_read_at_the_training_rate():
    clips = Clips(MEDIA / "clips", 9, 8, 48, 64)
    expected = media.from_uint8(media.read_clip(MEDIA / "clips" / "bunny.mp4", 9, 8, 48, 64))
    assert torch.equal(clips[0]["clip"], expected)
    assert expected.shape == (3, 9, 48, 64)
    assert clips[0]["prompt"].startswith("A big grey cartoon rabbit")


def test_captions_may_lie_beside_the_clips(tmp_path):
    for name in ("b.mp4", "a.MP4"):
        shutil.copy(MEDIA / "clips" / "samoyed.mp4", tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f" Ein Hund – {name}\n", encoding="utf-8")
    clips = Clips(tmp_path, 1, 8, 16, 16)
    assert [clips[i]["prompt"] for i in range(2)] == ["Ein Hund – a.MP4", "Ein Hund – b.mp4"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 rows are bad:\n  b\.mp4: no prompt; write one in b\.txt"):
        Clips(tmp_path, 1, 8, 16, 16)


def test_jitter_moves_each_view_by_itself_and_stays_inside():
    still, moved = Pairs(MEDIA / "pairs", 64, 96), Pairs(MEDIA / "pairs", 64, 96, jitter=0.3)
    (still.rows, moved.rows) = ([row._replace(files=(row.files[0],) * 2) for row in still.rows],) * 2
    for a, b in zip(take(4, still, 1, 0), take(4, moved, 1, 0), strict=True):
        assert a["row"] == b["row"]
        assert torch.equal(a["ref"], a["target"])
        assert not torch.equal(b["ref"], b["target"])
        assert not torch.equal(a["ref"], b["ref"])
        assert b["ref"].shape == a["ref"].shape
    assert_equal(take(4, moved, 1, 0)[3], take(1, moved, 1, 0, start=3)[0])


# Order


def test_every_epoch_is_another_permutation(dots):
    order = [n for batch in take(15, Pairs(dots, 16, 24), 2, seed=5) for n in batch["prompt"]]
    epochs = [tuple(order[i : i + 10]) for i in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 10
    assert len(set(epochs)) == 3
    assert order != [n for batch in take(15, Pairs(dots, 16, 24), 2, seed=6) for n in batch["prompt"]]


def test_batches_pair_the_right_pixels_with_the_prompt(dots):
    for batch in take(4, Pairs(dots, 16, 24), 3, 0):
        levels = (batch["ref"].mean((1, 2, 3)) * 127.5 + 127.5).round() / 10
        assert [f"<cls> dot {int(n)}" for n in levels] == batch["prompt"]


def test_every_row_comes_equally_often():
    counts = Counter(locate(0, k, 10)[1] for k in range(1000))
    assert counts == dict.fromkeys(range(10), 100)
    assert [locate(0, k, 10)[0] for k in (0, 9, 10, 999)] == [0, 0, 1, 99]


@pytest.mark.parametrize("start", [0, 4])
def test_workers_and_resume_change_nothing(dots, ramps, start):
    for dataset in (Pairs(dots, 16, 24, jitter=0.5), Clips(ramps, 5, 8, 32, 48, window="random")):
        whole = take(7, dataset, 2, seed=3)
        for batch, other in zip(whole[start:], take(7 - start, dataset, 2, 3, start, workers=2), strict=True):
            assert_equal(batch, other)


def test_random_windows_lie_anywhere_in_the_clip(ramps):
    clips = Clips(ramps, 5, 8, 32, 48, window="random")
    starts = torch.cat([batch["clip"][:, 0, 0].mean((1, 2)) for batch in take(10, clips, 3, 0)])
    frame = ((starts * 127.5 + 127.5) / 5).round()  # the last start that fits is frame 47 - 4 x 2
    assert frame.min() < 8
    assert 31 < frame.max() <= 39
    assert len(set(frame.tolist())) > 12
    assert (Clips(ramps, 5, 8, 32, 48)[0]["clip"][:, 0] < -0.98).all()


def test_ranks_cut_the_global_batch_without_overlap(dots):
    dataset = Pairs(dots, 16, 24, jitter=0.5)
    whole = take(5, dataset, 4, seed=1)
    ranks = [take(5, dataset, 2, seed=1, rank=rank, world=2) for rank in (0, 1)]
    for batch, left, right in zip(whole, *ranks, strict=True):
        assert batch["row"] == left["row"] + right["row"]
        assert torch.equal(batch["ref"], torch.cat([left["ref"], right["ref"]]))
    rows = [row for part in ranks for batch in part[:2] for row in batch["row"]]
    assert len(set(rows)) == len(rows) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_own_generator_is_left_alone(dots, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(2, Pairs(dots, 16, 24, jitter=0.5), 2, 0, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"seed": -1}, {"start": -1}, {"rank": 2, "world": 2}])
def test_impossible_batches_are_refused_at_once(dots, wrong):
    with pytest.raises(ValueError, match="out of range"):
        batches(Pairs(dots, 16, 24), **({"batch_size": 1, "seed": 0} | wrong))


# Bad input


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"reference_file_name": ', r"metadata\.jsonl:2: broken JSON .*write one object a line"),
        ("[1, 2]", r"metadata\.jsonl:2: is a list; write an object"),
        ({**pair(0), "prompt": None}, r"metadata\.jsonl:2: prompt is None; write a text"),
        ({**pair(0), "prompt": "  "}, r"metadata\.jsonl:2: prompt is '  '"),
        ({**pair(0), "target_file_name": 3}, r"metadata\.jsonl:2: target_file_name is 3"),
        ({"reference_file_name": "0.png", "target_file_name": "0.png"}, "prompt is missing"),
        ({"file_name": "0.png", "prompt": "x"}, "reference_file_name is missing"),
        (pair(7), r"metadata\.jsonl:2: reference_file_name 7\.png is not in .*; fix the name"),
        ({**pair(0), "target_file_name": "../0.png"}, "leaves the folder; use a path inside"),
        ({**pair(0), "target_file_name": "/etc/passwd"}, "leaves the folder"),
        ('{"prompt": "\xff"}'.encode("latin-1"), r"metadata\.jsonl:2: broken JSON"),
    ],
)
def test_bad_rows_are_found_before_training(copy, row, message):
    good = json.dumps(pair(0)).encode()
    raw = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    (copy / "metadata.jsonl").write_bytes(good + b"\r\n" + raw + b"\n\n")
    with pytest.raises(ValueError, match=r"1 of 2 rows are bad:\n  .*") as error:
        Pairs(copy, 16, 16)
    assert error.match(message)
    assert str(copy) in str(error.value)


def test_many_bad_rows_are_counted_and_the_first_five_listed(copy):
    write(copy, pair(0), *(pair(n) for n in range(1, 10)))
    with pytest.raises(ValueError, match="9 of 10 rows are bad") as error:
        Pairs(copy, 16, 16)
    assert [f"jsonl:{n}:" in str(error.value) for n in range(2, 11)] == [True] * 5 + [False] * 4


def test_folders_without_rows_are_refused(copy):
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        Pairs(copy / "gone", 16, 16)
    with pytest.raises(
        FileNotFoundError, match=r"no metadata\.jsonl; write it, one object with reference_file"
    ):
        Pairs(copy, 16, 16)
    with pytest.raises(ValueError, match="holds no rows; give it .* file_name and prompt"):
        Clips(copy, 5, 8, 16, 16)
    with pytest.raises(ValueError, match="holds no rows"):
        Pairs(write(copy, "", " "), 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_in_training_is_one_error_with_its_row(copy, workers):
    """The check of rows does not decode; what it could not see is still told in one clear line."""
    (copy / "0.png").write_bytes((copy / "0.png").read_bytes()[:-30])
    with pytest.raises(
        ValueError, match=r"^metadata\.jsonl:1 0\.png: .*0\.png: cannot be decoded as a picture"
    ):
        next(batches(Pairs(write(copy, pair(0)), 16, 16), 1, 0, workers=workers))


def test_clips_too_short_are_refused_with_both_durations():
    feed = batches(Clips(MEDIA / "clips", 49, 8, 16, 16), 3, 0)
    with pytest.raises(
        ValueError, match=r"^metadata\.jsonl:\d .*lasts (1\.52|5\.28) s, but 49 frames at 8 fps"
    ):
        next(feed)


# Command line


def run(capsys, *words) -> tuple[int, str, str]:
    return status(main, *words), *capsys.readouterr()


def test_check_passes_the_vendored_media(capsys):
    code, out, _ = run(capsys, "check", MEDIA / "clips", "--frames", 13)
    assert code == 0
    assert "ok   metadata.jsonl:3 samoyed.mp4: 960x540, 41 frames in 1.52 s, variable rate" in out
    assert "3 clips: 3 ok, 0 bad" in out
    assert "motion sample, 13 x 480 x 720: 6,976 tokens = text 226 + ref 1,350 + video 5,400" in out
    code, out, _ = run(capsys, "check", MEDIA / "pairs")
    assert code == 0
    assert "ok   metadata.jsonl:3 tiles.jpg: tiles.jpg 1024x768, roots.jpg 510x340" in out
    assert "identity sample, 1 x 480 x 720: 2,926 tokens" in out
    assert "motion sample, 49 x 480 x 720: 19,126 tokens" in out


def test_check_names_every_bad_row(capsys, copy):
    (copy / "1.png").write_bytes(b"\x89PNG but not really")
    write(copy, pair(0), pair(1), "{", pair(2))
    code, out, _ = run(capsys, "check", copy)
    assert code == 1
    assert sorted(line[:26] for line in out.splitlines() if line.startswith("BAD")) == [
        "BAD  metadata.jsonl:2 1.pn",
        "BAD  metadata.jsonl:3: bro",
        "BAD  metadata.jsonl:4: ref",
    ]
    assert "4 pairs: 1 ok, 3 bad" in out
    code, out, _ = run(capsys, "check", MEDIA / "clips", "--fps", 8)  # two are shorter than 49 frames
    assert code == 1 and "3 clips: 1 ok, 2 bad" in out


@pytest.mark.parametrize(("fps", "repeats"), [(8, 0), (16, 0), (17, 1), (24, 5), (32, 8)])
def test_a_clip_with_too_few_frames_a_second_is_said_to_stutter(ramps, capsys, fps, repeats):
    """Every frame of its 16 a second is brighter than the one before; one of 17 may repeat."""
    clips = Clips(ramps, 17, fps, 32, 48)
    same = (clips[0]["clip"].diff(dim=1) == 0).flatten(2).all(2)[0].sum().item()
    said = f"{repeats} of 17 frames repeat the one before: it has too few for {fps:g} a second"
    assert same == repeats
    many = repeats > 1
    assert clips.verify(64) == (f"odd are 3 of 3 rows looked at; 0.mp4: {said}" if many else "")
    code, out, _ = run(capsys, "check", ramps, "--fps", fps, "--height", 32, "--width", 48, "--frames", 17)
    assert code == 0 and out.count("repeat the one before") == 3 * many
    assert not many or f"ok   0.mp4: 48x32, 48 frames in 3.00 s, steady; {said}" in out


def test_check_says_what_is_odd_and_what_is_left_out(capsys, copy):
    media.write_image(copy / "tall.png", torch.zeros(3, 48, 16, dtype=torch.uint8))
    names = {"reference_file_name": "0.png", "prompt": "a"}
    write(copy, *(names | {"target_file_name": name} for name in ("0.png", "tall.png")))
    code, out, _ = run(capsys, "check", copy, "--height", 32, "--width", 32)
    assert code == 0 and "0.png 16x16, 0.png 16x16; reference and target are one file" in out
    assert "0.png 16x16, tall.png 16x48; 33% of 16x48 is used\n" in out
    assert "metadata.jsonl:1 0.png: reference and target" in Pairs(copy, 16, 16).verify(9)
    code, out, _ = run(capsys, "check", copy, "--height", 48, "--width", 48)
    assert "16x16 is enlarged 3.0 times" in out
    clips = copy / "clips"
    shutil.copytree(MEDIA / "clips", clips)
    lines = (clips / "metadata.jsonl").read_text().splitlines()
    (clips / "metadata.jsonl").write_text("\n".join(lines[1:]))
    _, out, _ = run(capsys, "check", clips, "--frames", 13)
    assert f"left out, in no good row: {json.loads(lines[0])['file_name']} (clips end with" in out


def test_check_explains_what_it_cannot_do(capsys, tmp_path):
    for words, message in (
        ((tmp_path / "gone",), "no such folder"),
        ((tmp_path,), "holds no rows"),
        ((MEDIA / "clips", "--frames", 12), "use 9 or 13"),
        ((MEDIA / "clips", "--width", 725), "use 720 or 736"),
    ):
        code, _, err = run(capsys, "check", *words)
        assert code == 1
        assert err.startswith("error: ")
        assert message in err


# The media of this repository


def test_vendored_media_are_small_and_attributed():
    files = [path for path in MEDIA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    text = (MEDIA / "ATTRIBUTION.md").read_text()
    for path in files:
        if path.suffix in (".jpg", ".mp4"):
            assert f"`{path.relative_to(MEDIA)}`" in text


@pytest.mark.parametrize(("kind", "pictures"), [("pairs", 8), ("clips", 24)])
def test_the_contact_sheet_shows_crops_frames_and_captions(tmp_path, kind, pictures, capsys):
    size = ["--height", "32", "--width", "48", "--frames", "9", "--fps", "8"]
    assert main(["check", str(MEDIA / kind), *size, "--sheet", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shapes = {media.read_image(_file(tmp_path, base64.b64decode(one))).shape for one in data}
    assert len(data) == pictures and shapes == {(3, 32, 48)}
    assert all(
        json.loads(line)["prompt"] in html.unescape(page) for line in (MEDIA / kind / "metadata.jsonl").open()
    )


def _file(folder: Path, content: bytes) -> Path:
    (folder / "one.png").write_bytes(content)
    return folder / "one.png"


def test_a_worker_that_was_killed_ends_the_run_with_one_line(dots):
    """And the others, which heed no SIGTERM, with it."""
    script = f"""
import multiprocessing, os, signal
from sdv.data.loader import batches
from sdv.data.rows import Pairs
from sdv.run.settings import run

def main():
    feed = batches(Pairs({str(dots)!r}, 16, 16), 2, 0, workers=2)
    next(feed)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in range(99):
        next(feed)

run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "\nA process that decodes was ended: give fewer --workers" in done.stderr, done.stderr
    busy = script.replace(
        "        next(feed)\n\nrun", "        sum(range(10**5))\n    [*zip(range(99), feed)]\n\nrun"
    )
    done = subprocess.run([sys.executable, "-c", busy], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "give fewer" in done.stderr
    crash = script.replace("        next(feed)\n\nrun", "        raise KeyError\n\nrun")
    done = subprocess.run([sys.executable, "-c", crash], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "KeyError" in done.stderr


def test_workers_decode_before_the_first_batch_is_asked_for_and_their_own_errors_stay(dots):
    import multiprocessing

    class Broken(Pairs):
        def load(self, index: int, rng: torch.Generator) -> dict:
            raise RuntimeError("stack expects each tensor to be equal size")

    before = len(multiprocessing.active_children())
    feed = batches(Broken(dots, 16, 16), 2, 0, workers=1)
    assert len(multiprocessing.active_children()) == before + 1
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker process 0"):
        next(feed)


def test_rows_are_known_by_their_captions_too(tmp_path):
    shutil.copytree(MEDIA / "pairs", tmp_path / "pairs")
    before, file = Pairs(tmp_path / "pairs", 16, 16).summary(), tmp_path / "pairs" / "metadata.jsonl"
    shutil.copytree(tmp_path / "pairs", tmp_path / "elsewhere" / "pairs")
    assert Pairs(tmp_path / "elsewhere" / "pairs", 16, 16).summary() == before
    file.write_text(file.read_text().replace('"prompt": "', '"prompt": "now '))
    assert Pairs(tmp_path / "pairs", 16, 16).summary() != before


def test_rows_are_verified_from_the_first_to_the_last(monkeypatch):
    pairs, seen = Pairs(MEDIA / "pairs", 16, 16), []
    pairs.rows = pairs.rows * 25
    monkeypatch.setattr(Pairs, "_look", lambda self, index: (seen.append(index) or "", ""))
    pairs.verify(10)
    assert sorted(seen) == list(range(0, 100, 10))


def test_a_jittered_crop_enlarges_by_its_share_at_most(monkeypatch):
    zooms = []

    def resize(image, *size, zoom=1, at=None):
        zooms.append(zoom)
        return image

    monkeypatch.setattr(rows_module, "resize", resize)
    pairs = Pairs(MEDIA / "pairs", 16, 16, jitter=0.1)
    for k in range(20):
        pairs.load(k % 4, torch.Generator().manual_seed(k))
    assert min(zooms) >= 1 and 1.05 < max(zooms) <= 1.1
