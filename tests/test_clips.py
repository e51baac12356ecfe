"""Clips, against known timestamps, the display matrix of ISO 14496-12, BT.709 and BT.601."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from helpers import MEDIA, blocks, chw, difference, encode, flat
from sdv.data import media
from sdv.data.media import read_clip, write_video

RNG = np.random.default_rng(3)
GAPS = RNG.choice([7, 20, 33, 41, 90, 180], 49)  # milliseconds: as irregular as a phone in the dark
STAMPS = np.concatenate([[0], np.cumsum(GAPS)])
LEVELS = 4 + 5 * np.arange(50)  # the colour of a frame says which one it is


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def irregular(request, tmp_path_factory):
    """50 frames at known, irregular times that start at 5 s; a keyframe every 10; B-frames out of order."""
    path = tmp_path_factory.mktemp("clip") / f"a.{request.param}"
    encode(path, flat(LEVELS), STAMPS + 5000, g="10", bf="3", b_strategy="0", sc_threshold="0")
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stamps != sorted(stamps)
    return path


@pytest.mark.parametrize("fps", [4, 8, 12.5, 60])
@pytest.mark.parametrize("window", [0.0, 0.37, 1.0])
def test_frames_are_the_nearest_in_time(irregular, fps, window):
    frames = 9
    start = window * (STAMPS[-1] / 1000 - (frames - 1) / fps)
    wanted = start + np.arange(frames) / fps
    expected = [LEVELS[np.abs(STAMPS / 1000 - moment).argmin()] for moment in wanted]
    clip = media.read_clip(irregular, frames, fps, 16, 16, window)
    assert (clip.shape, clip.dtype) == ((3, frames, 16, 16), torch.uint8)
    assert np.abs(clip.float().mean((0, 2, 3)).numpy() - expected).max() < 2


@pytest.mark.parametrize("window", np.linspace(0, 1, 12))
def test_one_seek_finds_the_window(irregular, monkeypatch, window):
    """Decoding from the start must stay a fallback: one opening for the stamps, one for the frames."""
    media._packets.cache_clear()  # of the stamps
    opened, count = media._opened, []
    monkeypatch.setattr(media, "_opened", lambda path: count.append(path) or opened(path))
    media.read_clip(irregular, 3, 12.5, 16, 16, window)
    assert len(count) == 2


def test_frames_cut_away_by_an_edit_list_are_not_read(tmp_path):
    """Shifted a second before zero, the first ten frames are needed to decode the others, but never shown."""
    whole = encode(tmp_path / "a.mp4", flat(LEVELS), np.arange(50) * 100, g="50", bf="0", sc_threshold="0")
    cut = tmp_path / "b.mp4"
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as source, av.open(str(cut), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (t - int(1 / packet.time_base) for t in (packet.pts, packet.dts))
                packet.stream = stream
                container.mux(packet)
    levels = media.read_clip(cut, 3, 10, 16, 16).float().mean((0, 2, 3))
    assert levels.round().tolist() == LEVELS[10:13].tolist()


def test_nearest_breaks_ties_to_the_earlier_frame():
    wanted = np.array([0.0, 0.25, 0.26, 0.75, 0.9, 5.0])
    assert media.nearest(np.array([0.0, 0.5, 1.0]), wanted).tolist() == [0, 0, 1, 1, 2, 2]
    assert media.nearest(np.array([0.0]), wanted).tolist() == [0] * 6


def test_a_late_window_does_not_decode_what_comes_before(irregular):
    """The first quarter of the file is destroyed; the last window neither notices nor changes."""
    whole = media.read_clip(irregular, 5, 8, 16, 16, window=1.0)
    data = bytearray(irregular.read_bytes())
    with av.open(str(irregular)) as container:
        early = [p for p in container.demux(video=0) if p.pts is not None and not p.is_keyframe][:6]
    for packet in early:
        data[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
    torn = irregular.with_name(f"torn{irregular.suffix}")
    torn.write_bytes(data)
    assert torch.equal(media.read_clip(torn, 5, 8, 16, 16, window=1.0), whole)
    with pytest.raises(ValueError, match="torn.* cannot be decoded"):
        media.read_clip(torn, 5, 8, 16, 16)
    with pytest.raises(ValueError, match="torn.*(damaged|cannot be decoded)"):
        media.inspect_clip(torn)


def test_a_container_that_seeks_too_far_is_read_from_its_start(irregular, monkeypatch):
    expected = media.read_clip(irregular, 9, 8, 16, 16)
    opened = media._opened
    seeks = []

    class Overshoots:
        def __init__(self, container):
            self.container, self.demux, self.decode = container, container.demux, container.decode

        def seek(self, stamp, stream):
            seeks.append(stamp)
            self.container.seek(stamp + int(3 / stream.time_base), stream=stream)

    @contextmanager
    def overshooting(path):
        with opened(path) as (container, stream):
            yield Overshoots(container), stream

    monkeypatch.setattr(media, "_opened", overshooting)
    assert torch.equal(media.read_clip(irregular, 9, 8, 16, 16), expected)
    assert len(seeks) == 1


def test_short_clips_are_refused_with_both_durations(tmp_path):
    path = encode(tmp_path / "a.mp4", flat(LEVELS[:13]), np.arange(13) * 125)  # 13 frames at 8 fps
    assert media.read_clip(path, 13, 8, 16, 16).shape[1] == 13
    with pytest.raises(
        ValueError, match=r"lasts 1\.54 s, but 17 frames at 8 fps need more than 2\.00 s; ask"
    ):
        media.read_clip(path, 17, 8, 16, 16)
    assert media.read_clip(path, 1, 8, 16, 16, window=1.0).float().mean().round() == LEVELS[12]


def test_reading_holds_the_chosen_frames_only(tmp_path):
    """100 frames of 1080 x 720 are 233 MB decoded; choosing 5 of them must cost a fraction of that."""
    picture = blocks(360)
    path = encode(tmp_path / "a.mp4", [picture] * 100, np.arange(100) * 40, preset="ultrafast")
    script = (
        "import resource, sys, torch; from sdv.data import media; torch.set_num_threads(1)\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "media.read_clip(sys.argv[1], 1, 8, 64, 64); before = peak()\n"
        "media.read_clip(sys.argv[1], 5, 1.2, 64, 64); print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 0.2 * 100 * picture.nbytes


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Overwrite the display matrix in the track header of an MP4 (ISO 14496-12, 8.3.2), 16.16 fixed."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version, flags, times, ids, duration, layer, volume: 40 bytes
    rows = (a, b, 0, c, d, 0, 0, 0)
    data[at : at + 32] = b"".join((n << 16).to_bytes(4, "big", signed=True) for n in rows)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
        (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0),
    ],
)  # fmt: skip
def test_display_matrix_moves_every_pixel_where_it_says(tmp_path, matrix):
    a, b, c, d = matrix
    path = encode(tmp_path / "a.mp4", [blocks()] * 3, np.arange(3) * 40)
    with_matrix(path, a, b, c, d)
    y, x = np.mgrid[:32, :48]
    column, row = a * x + c * y, b * x + d * y
    expected = np.empty((np.ptp(row) + 1, np.ptp(column) + 1, 3), np.uint8)
    expected[row - row.min(), column - column.min()] = blocks()
    info = media.inspect_clip(path)
    assert (info.height, info.width) == expected.shape[:2]
    clip = media.read_clip(path, 1, 8, info.height, info.width)
    centres = clip[:, 0, 8::16, 8::16].int() - chw(expected)[:, 8::16, 8::16].int()
    assert centres.abs().max() < 12


def test_clips_are_measured(tmp_path):
    info = media.inspect_clip(MEDIA / "clips" / "samoyed.mp4")
    assert info[:3] == (540, 960, 41)
    assert info.seconds == pytest.approx(1.5174, abs=1e-3)
    assert not info.steady
    assert media.inspect_clip(MEDIA / "clips" / "cup.mp4").steady
    tags = {"sample_aspect_ratio": Fraction(2, 1)}  # pixels twice as wide as high
    wide = encode(tmp_path / "a.mp4", [blocks()] * 3, np.arange(3) * 40, tags=tags)
    assert media.inspect_clip(wide)[:2] == (32, 96)
    plain = encode(tmp_path / "a.flv", [blocks()] * 50, np.arange(50) * 40, bf="0")
    assert media.inspect_clip(plain).seconds == pytest.approx(2)  # FLV gives its frames no duration
    untimed = encode(tmp_path / "a.mpg", [blocks()] * 50, np.arange(50) * 40, bf="0")
    with pytest.raises(ValueError, match=r"a\.mpg: \d+ frames carry no timestamp; re-encode"):
        media.inspect_clip(untimed)


@pytest.mark.parametrize("tag, size, matrix", [(1, 64, 709), (5, 64, 601), (2, 64, 601), (2, 1280, 709)])
def test_colours_follow_the_tag_or_the_players_convention(tmp_path, tag, size, matrix):
    """Y'CbCr of one colour is written by hand; the RGB that comes back is the textbook's."""
    kr, kb = {709: (0.2126, 0.0722), 601: (0.299, 0.114)}[matrix]
    y, cb, cr = 120, 100, 160
    yn, un, vn = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    red, blue = yn + 2 * (1 - kr) * vn, yn + 2 * (1 - kb) * un
    green = (yn - kr * red - kb * blue) / (1 - kr - kb)
    height, width = size // 2, size
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace = tag
        rows = {y: height, cb: height // 4, cr: height // 4}  # the three planes, as rows of the full width
        raw = np.concatenate([np.full((n, width), value, np.uint8) for value, n in rows.items()])
        frame = av.VideoFrame.from_ndarray(raw, format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    got = media.read_clip(tmp_path / "a.mp4", 1, 8, 16, 16).float().mean((1, 2, 3)) / 255
    assert torch.allclose(got, torch.tensor([red, green, blue]), atol=1.2 / 255)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, name):
    path = encode(tmp_path / "a.mp4", flat([50, 60]), [0, 40], tags={"color_trc": transfer})
    with pytest.raises(ValueError, match=rf"a\.mp4: is HDR \({name}\); tone-map"):
        media.read_clip(path, 1, 8, 16, 16)


def test_damaged_clips_are_refused(tmp_path):
    whole = (MEDIA / "clips" / "cup.mp4").read_bytes()
    middle = len(whole) // 2
    cases = {
        "text.mp4": b"not a video at all" * 40,
        "empty.mp4": b"",
        "header.mp4": whole[:2000],
        "torn.mp4": whole[: len(whole) * 6 // 10],
        "hole.mp4": whole[:middle] + bytes(4000) + whole[middle + 4000 :],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: .*; replace the file"):
            media.inspect_clip(tmp_path / name)


def test_concealed_damage_is_refused(tmp_path):
    """A wrong bit in CAVLC is noticed and painted over by the decoder; the reader passes neither frame on."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(5)]
    path = encode(tmp_path / "a.mp4", pictures, np.arange(5) * 125, coder="0", g="1")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        second = list(container.demux(video=0))[1]
    data[second.pos + second.size // 2] ^= 0x5A
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert [frame.is_corrupt for frame in container.decode(video=0)].count(True) == 1
    with pytest.raises(ValueError, match=r"a\.mp4: damaged"):
        media.inspect_clip(path)
    with pytest.raises(ValueError, match=r"a\.mp4: .* cannot be decoded"):
        media.read_clip(path, 5, 8, 16, 16)


def test_a_file_is_decoded_on_four_threads_at_most_and_on_one_in_a_pool(monkeypatch):
    """Each holds frames of its own: 32 files on 32 threads each would fill a machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)

    def threads() -> int:
        with media._opened(MEDIA / "clips" / "cup.mp4") as (_, stream):
            return stream.codec_context.thread_count

    assert threads() == 4
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threads).result() == 1


def test_what_is_interlaced_is_said_to_be(tmp_path):
    for name, flags in (("fields.ts", "+ilme+ildct"), ("frames.ts", "+low_delay")):
        encode(tmp_path / name, flat(LEVELS), np.arange(50) * 40, flags=flags)
    assert "deinterlace it" in media.say_interlaced(tmp_path / "fields.ts")
    assert not media.say_interlaced(tmp_path / "frames.ts")


def test_a_file_is_read_for_its_stamps_once_until_it_is_another(tmp_path, monkeypatch):
    """A random window needs all of them, and would read gigabytes for each sample."""
    path, opened = tmp_path / "a.mp4", []
    encode(path, flat(LEVELS), STAMPS)
    once = read_clip(path, 4, 8, 32, 48, window=0.5)
    av_open = av.open
    monkeypatch.setattr(av, "open", lambda *args, **more: opened.append(args) or av_open(*args, **more))
    assert torch.equal(read_clip(path, 4, 8, 32, 48, window=0.5), once) and len(opened) == 1
    encode(path, flat(LEVELS[::-1]), STAMPS)
    assert not torch.equal(read_clip(path, 4, 8, 32, 48, window=0.5), once)


def test_data_of_a_frame_that_pyav_does_not_know_spoils_no_clip(tmp_path):
    """FFmpeg gives the frame of a JPEG its EXIF block, a kind of side data that PyAV 18 has no name for."""
    tags = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\1\0\0\0\0\0\0"
    plain, tagged = tmp_path / "a.avi", tmp_path / "b.avi"
    with av.open(str(plain), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for level in LEVELS[:9]:
            picture = np.full((32, 48, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(plain)) as source, av.open(str(tagged), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for old in source.demux(video=0):
            if old.size:
                data = bytes(old)
                new = av.Packet(data[:2] + b"\xff\xe1" + (len(tags) + 2).to_bytes(2) + tags + data[2:])
                new.pts, new.dts, new.time_base, new.stream = old.pts, old.dts, old.time_base, stream
                new.is_keyframe = True
                container.mux(new)
    with av.open(str(tagged)) as container, pytest.raises(ValueError, match="not a valid"):
        next(container.decode(video=0)).side_data.get("DISPLAYMATRIX")
    assert torch.equal(read_clip(tagged, 9, 8, 32, 48), read_clip(plain, 9, 8, 32, 48))


def test_sound_without_pictures_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"a\.mp4: holds no video stream"):
        media.read_clip(tmp_path / "a.mp4", 1, 8, 16, 16)


def test_written_video_plays_in_a_browser(tmp_path):
    clip = torch.zeros(3, 9, 48, 64, dtype=torch.uint8)
    clip[1] = 255  # pure green: the two matrices disagree most
    media.write_video(tmp_path / "a.mp4", media.from_uint8(clip), 8)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate, len(frames)) == (64, 48, 8, 9)
    assert (frames[0].colorspace, frames[0].color_range) == (1, 1)
    assert [frame.time for frame in frames] == [i / 8 for i in range(9)]
    luma = np.frombuffer(frames[0].planes[0], np.uint8).reshape(48, -1)[:, :64]
    assert abs(luma.mean() - (16 + 219 * 0.7152)) < 1  # BT.709; BT.601 would give 144.6
    with pytest.raises(ValueError, match=r"b\.mp4: 33x32 is odd"):
        media.write_video(tmp_path / "b.mp4", torch.zeros(3, 1, 32, 33), 8)


@pytest.mark.parametrize("fps", [8, 16, 24, 23.976])
def test_video_round_trip(tmp_path, fps):
    base = media.read_clip(MEDIA / "clips" / "bunny.mp4", 13, 8, 96, 144)
    media.write_video(tmp_path / "a.mp4", base, fps)
    again = media.read_clip(tmp_path / "a.mp4", 13, fps, 96, 144)
    assert difference(again, base) < 5
    assert abs((again.double() - base.double()).mean()) < 0.5


def test_a_clip_that_ends_where_its_last_moment_begins_is_too_short(tmp_path):
    write_video(tmp_path / "a.mp4", torch.zeros(3, 8, 16, 16, dtype=torch.uint8), 8)  # 1 s
    assert read_clip(tmp_path / "a.mp4", 8, 8, 16, 16).shape[1] == 8
    with pytest.raises(ValueError, match=r"lasts 1\.00 s"):
        read_clip(tmp_path / "a.mp4", 9, 8, 16, 16)
