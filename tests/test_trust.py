"""Files as users bring them: read right, by an oracle's value, or refused by name. All are made here."""

import json
import resource
import shutil
import subprocess
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import weights
from helpers import MEDIA, difference, encode, flat, full_disk, status, tree
from sdv.data import media, pixels
from sdv.data.__main__ import main
from sdv.data.rows import CLIP, Clips, scan_rows
from sdv.run.films import read_shots

SIZE = ("--height", 32, "--width", 48, "--frames", 5, "--fps", 8)


def film(path: Path, levels, codec: str = "libx264", **options) -> Path:
    """A clip at 25 frames a second whose grey level says which frame one sees."""
    return encode(path, flat(levels, 48, 64), range(len(levels)), Fraction(1, 25), codec, **options)


def packets(path: Path) -> list[tuple[int, bytes]]:
    with av.open(str(path)) as container:
        return [(packet.pts, bytes(packet)) for packet in container.demux(video=0) if packet.size]


def remux(source: Path, target: Path, stamped: list[tuple[int, bytes]] | None = None) -> Path:
    """The same packets in another container, under their own stamps or given ones in milliseconds."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0) if stamped is None else map(made, stamped):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return target


def made(stamped: tuple[int, bytes]) -> av.Packet:
    packet = av.Packet(stamped[1])
    packet.pts = packet.dts = stamped[0]
    packet.time_base, packet.is_keyframe = Fraction(1, 1000), stamped[0] == 0
    return packet


def shown(path: Path) -> np.ndarray:
    """The oracle: grey levels in the order in which FFmpeg's decoder puts frames out."""
    with av.open(str(path)) as container:
        return np.array([frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)])


def check(capsys, folder: Path, *words) -> tuple[int, str]:
    code = status(main, "check", folder, "--workers", 1, *(words or SIZE))
    return code, capsys.readouterr().out


LEVELS = 4 + 5 * np.arange(50)


# The order of frames


@pytest.mark.parametrize("kind", ["avi", "remuxed.mkv", "remuxed.mp4", "joined.ts", "joined short.ts"])
def test_stamps_that_contradict_the_decoder_are_refused(tmp_path, capsys, kind):
    if "joined" in kind:
        part = film(tmp_path / "part.ts", LEVELS[:9] if "short" in kind else LEVELS, bf="2")
        path = tmp_path / "a.ts"
        path.write_bytes(part.read_bytes() * 2)
    else:
        path = film(tmp_path / "a.avi", LEVELS, bf="3", b_strategy="0", g="16", sc_threshold="0")
        path = path if kind == "avi" else remux(path, tmp_path / kind)
    message = rf"{path.name}: its timestamps contradict the order of its frames; re-encode"
    with pytest.raises(ValueError, match=message):
        media.inspect_clip(path)
    for window in (0.0, 0.5, 1.0):
        for frames, fps in ((16, 25), (3, 6.25), (2, 2)):
            if kind == "joined.ts" and not window:  # the first recording alone is read, and is in order
                continue
            with pytest.raises(ValueError, match=rf"{message}|lasts"):
                media.read_clip(path, frames, fps, 48, 64, window)
    path.with_suffix(".txt").write_text("x")
    (tmp_path / "part.ts").unlink(missing_ok=True)
    code, out = check(capsys, tmp_path)
    assert code == 1 and f"BAD  {path.name}: " in out


def test_the_first_of_joined_recordings_is_read_in_order(tmp_path):
    part = film(tmp_path / "part.ts", LEVELS, bf="2")
    (tmp_path / "a.ts").write_bytes(part.read_bytes() * 2)
    clip = media.read_clip(tmp_path / "a.ts", 16, 25, 48, 64)
    assert np.abs(clip.float().mean((0, 2, 3)).numpy() - LEVELS[:16]).max() < 3


@pytest.mark.parametrize("lag", [0, 39])
def test_hidden_frames_are_no_frames(tmp_path, lag):
    """Frames that are only predicted from have the stamp of the next shown one, or one of their own."""
    path = film(tmp_path / "a.webm", LEVELS[:30], "libvpx", **{"lag-in-frames": "0", "auto-alt-ref": "0"})
    whole = packets(path)
    show_frame = 0x10  # RFC 6386, 9.1
    hidden = {t + 40 - lag: bytes([data[0] & ~show_frame]) + data[1:] for t, data in whole[3::7]}
    order = sorted([*((t, 1, data) for t, data in whole), *((t, 0, data) for t, data in hidden.items())])
    odd = remux(path, tmp_path / "b.webm", [(t, data) for t, _, data in order])
    assert len(packets(odd)) > len(whole)
    levels = shown(odd)
    assert len(levels) == len(whole)
    assert media.inspect_clip(odd).frames == len(whole)
    for window, first in ((0.0, 0), (1.0, 14)):
        clip = media.read_clip(odd, 16, 25, 48, 64, window).float().mean((0, 2, 3)).numpy()
        assert np.abs(clip - levels[first : first + 16]).max() < 2


@pytest.mark.parametrize("name", ["a.m4v", "a.ts", "a.m2ts", "a.flv", "a.3gp", "a.mkv"])
def test_other_containers_are_read_in_order(tmp_path, name):
    path = film(tmp_path / name, LEVELS, bf="3", b_strategy="0", g="16", sc_threshold="0")
    assert media.inspect_clip(path).frames == 50
    for window, first in ((0.0, 0), (0.5, 17), (1.0, 34)):
        clip = media.read_clip(path, 16, 25, 48, 64, window).float().mean((0, 2, 3)).numpy()
        assert np.abs(clip - shown(path)[first : first + 16]).max() < 2


# What containers say


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov"])
@pytest.mark.parametrize("where", ["container", "stream"])
def test_tags_may_be_in_any_encoding(tmp_path, name, where):
    plain = film(tmp_path / f"plain{Path(name).suffix}", LEVELS[:20], bf="0")
    path = tmp_path / name
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        (new if where == "container" else stream).metadata.update(title="café é", language="deu")
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data.replace("é".encode(), b"\xe9\xff"))
    if where == "container":
        assert path.read_bytes() != data
    assert media.inspect_clip(path).frames == len(shown(plain)) == 20
    assert media.read_clip(path, 5, 25, 48, 64).shape == (3, 5, 48, 64)


def test_unknown_codecs_are_bad_rows_and_the_rest_goes_on(tmp_path, capsys):
    film(tmp_path / "a.mov", LEVELS)
    data = (tmp_path / "a.mov").read_bytes()
    (tmp_path / "b.mov").write_bytes(data.replace(b"avc1", b"brhq"))
    shutil.copy(tmp_path / "a.mov", tmp_path / "c.mov")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    code, out = check(capsys, tmp_path)
    assert code == 1
    assert "b.mov: FFmpeg has no decoder for it; re-encode it" in out
    assert "3 clips: 2 ok, 1 bad" in out
    with pytest.raises(ValueError, match=r"b\.mov: FFmpeg has no decoder"):
        Clips(tmp_path, 5, 8, 32, 48)[1]


# Shapes


def test_extreme_shapes_are_read_in_bounded_memory(tmp_path):
    script = (
        "import resource, torch; from sdv.data import media\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for h, w in ((2, 30000), (30000, 2), (3, 8000), (1, 1), (90, 20000)):\n"
        "    image = torch.full((3, h, w), 99, dtype=torch.uint8)\n"
        "    for mode, zoom in (('crop', 1.0), ('crop', 1.4), ('pad', 1.0)):\n"
        "        out = media.resize(image, 480, 720, mode, zoom); assert out.shape == (3, 480, 720)\n"
        "        assert (out == 99).all() or mode == 'pad'\n"
        "print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500e6


@pytest.mark.parametrize("size, zoom, at", [((96, 144), 1, (0.5, 0.5)), ((700, 500), 2.5, (0.2, 0.9))])
def test_cut_before_enlarged_equals_enlarged_before_cut(monkeypatch, size, zoom, at):
    photo = media.read_image(MEDIA / "pairs" / "fig_tree.jpg")
    whole = pixels.resize(photo, *size, zoom=zoom, at=at)
    monkeypatch.setattr(pixels, "WHOLE_PIXELS", 0)
    part = pixels.resize(photo, *size, zoom=zoom, at=at)
    off = (part.int() - whole.int()).abs()  # 2: a level of the first pass, times a weight of up to 1.25
    assert off.max() <= 2 and (off == 2).double().mean() < 1e-5
    assert difference(part, whole) < 0.1


def test_frames_too_large_are_refused_before_they_are_decoded(tmp_path, capsys):
    head = b"GIF89a" + (40496).to_bytes(2, "little") + (4124).to_bytes(2, "little") + b"\xf0\0\0" + bytes(6)
    frame = b"\x2c\0\0\0\0\x40\0\x30\0\0\x02\x02\x44\x01\0\x3b"
    (tmp_path / "a.gif").write_bytes(head + frame)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.gif", "prompt": "x"}')
    code, out = check(capsys, tmp_path)
    assert code == 1 and "a.gif" in out.splitlines()[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # kB, of all tests so far


# Rows


def lay(folder: Path, *rows: dict | str | bytes) -> Path:
    shutil.copy(MEDIA / "clips" / "samoyed.mp4", folder / "a.mp4")
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return folder


ROW = {"file_name": "a.mp4", "prompt": "a dog"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({**ROW, "file_name": "x" * 300 + ".mp4"}, r"file_name x+ cannot be looked for \(File name"),
        ({**ROW, "file_name": "/".join(["y" * 200] * 30)}, r"metadata\.jsonl:2: .* \(File name too long"),
        (b"[" * 100_000, r"metadata\.jsonl:2: broken JSON \(nested too deeply"),
        (b'{"file_name": ' + b'{"a":' * 100_000, r"metadata\.jsonl:2: broken JSON \(nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", r"metadata\.jsonl:2: broken JSON"),
        ({**ROW, "prompt": "a \ud83d dog"}, r"jsonl:2 a\.mp4: prompt has U\+D83D in it, half of a letter"),
        ({**ROW, "prompt": "a \udc15"}, "half of a letter"),
        ({**ROW, "prompt": "a\0dog"}, r"U\+0000 in it, a control character"),
        ({**ROW, "prompt": "the dog\x92s tail"}, r"U\+0092 in it, a control character"),
        ({**ROW, "prompt": "caf\ufffd"}, "a letter that was lost"),
        ({**ROW, "prompt": "\ufeff \u200b"}, r"metadata\.jsonl:2 a\.mp4: prompt is empty"),
        ({**ROW, "file_name": "\ud83d.mp4"}, r"metadata\.jsonl:2: file_name .* is not in"),
        ({**ROW, "file_name": "a\0.mp4"}, r"metadata\.jsonl:2: file_name .* is not in"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_and_the_rest_goes_on(tmp_path, capsys, row, message):
    lay(tmp_path, ROW, row, ROW)
    with pytest.raises(ValueError, match=rf"1 of 3 rows are bad:\n  .*{message}"):
        Clips(tmp_path, 5, 8, 32, 48)
    code, out = check(capsys, tmp_path)
    assert code == 1
    assert "3 clips: 2 ok, 1 bad" in out


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_captions_come_in_any_encoding_that_says_what_it_is(tmp_path, encoding):
    text = "ein Hund – \U0001f415 läuft\r\nüber die Wiese\r\n"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "txt").mkdir()
    shutil.copy(MEDIA / "clips" / "samoyed.mp4", tmp_path / "txt" / "a.mp4")
    (tmp_path / "txt" / "a.txt").write_bytes(mark + text.encode(encoding))
    expected = "ein Hund – \U0001f415 läuft\nüber die Wiese"
    assert [row.prompt for row in Clips(tmp_path / "txt", 5, 8, 32, 48).rows] == [expected]
    lay(tmp_path, ROW)
    lines = [json.dumps({**ROW, "prompt": text}, ensure_ascii=False), json.dumps({**ROW, "prompt": "b"})]
    (tmp_path / "metadata.jsonl").write_bytes(mark + "\r\n".join(lines).encode(encoding))
    assert [row.prompt for row in Clips(tmp_path, 5, 8, 32, 48).rows] == [expected, "b"]
    shots = [json.dumps({"prompt": text}, ensure_ascii=False), ""]
    (tmp_path / "shots.jsonl").write_bytes(mark + "\n".join(shots).encode(encoding))
    assert [shot.prompt for shot in read_shots(tmp_path / "shots.jsonl")] == [expected]


@pytest.mark.parametrize(
    "text", ["a cup\x1a", "a cup\0\0", "\ufeff\ufeffa cup\u200b", "\u200ea cup\u2028", "ï»¿a cup"]
)
def test_what_editors_put_around_a_caption_goes(tmp_path, text):
    lay(tmp_path, {**ROW, "prompt": text})
    assert Clips(tmp_path, 5, 8, 32, 48).rows[0].prompt == "a cup"


@pytest.mark.parametrize("data", ["café".encode("cp1252"), "a cup".encode("utf-16-le"), b"\xff\xfea"])
def test_captions_in_other_encodings_are_refused_by_name(tmp_path, data):
    shutil.copy(MEDIA / "clips" / "samoyed.mp4", tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.mp4: .*a\.txt.*UTF-8"):
        Clips(tmp_path, 5, 8, 32, 48)


@pytest.mark.parametrize("named, stored", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_may_be_composed_or_not(tmp_path, named, stored):
    name, folder = unicodedata.normalize(named, "é.mp4"), unicodedata.normalize(stored, "Bär")
    (tmp_path / folder).mkdir()
    lay(tmp_path, {**ROW, "file_name": f"{unicodedata.normalize(named, 'Bär')}/{name}"})
    (tmp_path / "a.mp4").rename(tmp_path / folder / unicodedata.normalize(stored, "é.mp4"))
    assert Clips(tmp_path, 5, 8, 32, 48)[0]["clip"].shape == (3, 5, 32, 48)
    inner = tmp_path / folder
    (inner / unicodedata.normalize(named, "é.txt")).write_text("x")
    assert len(scan_rows(inner, CLIP)[0]) == 1


def test_hidden_files_are_nobodys_and_others_are_told(tmp_path, capsys):
    lay(tmp_path, ROW)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "a.txt").write_text("a dog")
    for name in ("._a.mp4", "._a.txt", ".DS_Store", ".b.mp4"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "1 clips: 1 ok, 0 bad" in out and "left out" not in out
    for name in ("b.ogv", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    shutil.copy(tmp_path / "a.mp4", tmp_path / "d.M4V")
    (tmp_path / "d.txt").write_text("a dog again")
    code, out = check(capsys, tmp_path)
    assert code == 0
    assert "2 clips: 2 ok, 0 bad" in out
    assert "left out, in no good row: b.ogv, b.txt, c.txt (clips end with" in out


def test_captions_that_are_cut_are_counted(tmp_path, capsys, tiny):
    """The tiny model reads as many tokens as its config says; SentencePiece's own count is the oracle."""
    from sentencepiece import SentencePieceProcessor

    limit = json.loads((tiny / "transformer/config.json").read_text())["max_text_seq_length"]
    pieces = SentencePieceProcessor(model_file=str(tiny / "tokenizer/spiece.model"))
    long = "a white dog runs along a beach " * limit
    lay(tmp_path, ROW, {**ROW, "prompt": long})
    code, out = check(capsys, tmp_path, *SIZE, "--backbone", tiny)
    assert code == 0
    tokens = f"{len(pieces.encode(long.strip())) + 1:,}"
    assert f"1 of 2 captions are cut to {limit} tokens: metadata.jsonl:2 a.mp4 ({tokens})\n" in out
    own = weights.open_backbone(tiny)  # whose sizes are taken where none is given
    assert (
        f"motion sample, {own.frames} x {own.height} x {own.width}: "
        in check(capsys, tmp_path, "--backbone", tiny)[1]
    )
    lay(tmp_path, ROW)
    assert (
        f"no caption is cut: all have {limit} tokens or less"
        in check(capsys, tmp_path, *SIZE, "--backbone", tiny)[1]
    )


# Consoles


def command(folder: Path, console: str, then: str = "") -> subprocess.CompletedProcess:
    words = f"{sys.executable} -m sdv.data check '{folder}' {' '.join(map(str, SIZE))} --workers 1 {then}"
    env = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": console, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-o", "pipefail", "-c", words], capture_output=True, env=env)


def test_a_console_that_cannot_show_a_letter_gets_its_number(tmp_path):
    lay(tmp_path, {**ROW, "file_name": "犬 \U0001f415.mp4"}, {**ROW, "file_name": "無.mp4"})
    (tmp_path / "a.mp4").rename(tmp_path / "犬 \U0001f415.mp4")
    done = command(tmp_path, "cp1252")
    assert done.returncode == 1
    assert rb"ok   metadata.jsonl:1 \u72ac \U0001f415.mp4: 960x540" in done.stdout
    assert b"2 clips: 1 ok, 1 bad" in done.stdout
    assert done.stderr == b""


def test_a_closed_pipe_is_no_error(tmp_path):
    lay(tmp_path, *[ROW] * 3)
    done = command(tmp_path, "utf-8", "| head -n 1")
    assert done.stdout.startswith(b"ok   metadata.jsonl:1")
    assert done.stderr == b""
    assert done.returncode == 141


# Full disks


@pytest.mark.parametrize("room, file", [(50, "import.jsonl"), (100_000, "000000.mp4")])
def test_an_import_onto_a_full_disk_goes_on_when_there_is_room(tmp_path, capsys, room, file):
    words = ("--copy", "--workers", 0, "--frames", 9, "--min-frames", 9, "--min-aspect", 0.5)
    assert status(main, "import", "clips", MEDIA / "clips", tmp_path / "whole", *words) == 0
    with full_disk(room):
        assert status(main, "import", "clips", MEDIA / "clips", tmp_path / "out", *words) == 1
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f"error: {tmp_path / 'out' / file}: could not be written (File too large); free some"
    )
    assert not list(tmp_path.rglob(".*.tmp"))
    assert status(main, "import", "clips", MEDIA / "clips", tmp_path / "out", *words) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_pictures_and_films_are_written_whole_or_not_at_all(tmp_path, name):
    noise = torch.randint(256, (3, 5, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def write() -> None:
        if name == "a.png":
            media.write_image(tmp_path / name, noise[:, 0])
        else:
            media.write_video(tmp_path / name, noise, 8)

    write()
    before = tree(tmp_path)
    with full_disk(1000), pytest.raises(OSError, match=rf"{name}: could not be written .*free some space"):
        write()
    assert tree(tmp_path) == before
