"""Pictures and clips on disk <-> tensors, through PyAV. Knows pixels and timestamps, nothing of training.

What is read comes out upright (EXIF, container matrix), with square pixels, as 8-bit RGB. A file that cannot
be read raises one ValueError or FileNotFoundError that names it, the reason and the fix.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from sdv.data.files import write_whole
from sdv.data.orientation import bare_png, turn_of_matrix, turn_of_picture
from sdv.data.pixels import from_uint8, resize, to_uint8

# swscale's quick path truncates: 1 to 1.5 levels of 255 too dark on average. This flag makes it round.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
CODECS = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
REPLACE = "replace the file, re-encode it, or remove its row"
UNSPECIFIED, BT709 = 2, 1  # AVColorSpace
HDR = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
FRAME_PIXELS = 2**26  # of a clip, twice those of 8K: what says it has more would only fill the memory
REORDER = 32  # packets that may follow a frame and be shown before it: 16 frames of two fields
UNTIMED = "frames carry no timestamp; re-encode it to MP4"
OUT_OF_ORDER = "its timestamps contradict the order of its frames; re-encode each recording to MP4"


# Pictures


def read_image(path: str | Path) -> torch.Tensor:
    """JPEG, PNG, WebP or BMP -> uint8 (3, H, W), turned upright by EXIF, transparency laid on white.

    Grey, palette, 16-bit and CMYK files become 8-bit RGB; colour profiles are not applied.
    """
    return decode_image(_existing(path).read_bytes(), path)


def decode_image(data: bytes, path: str | Path) -> torch.Tensor:
    """`read_image` of the bytes of a file; `path` is what errors call it."""
    codec = next((name for magic, name in CODECS.items() if data.startswith(magic)), None)
    if codec is None:
        raise ValueError(f"{path}: not a JPEG, PNG, WebP or BMP picture; convert it to one of these")
    with _decoding(path, "picture"):
        decoder = av.CodecContext.create(codec, "r")
        decoder.options = {"err_detect": "crccheck+explode"}  # else a torn file comes back half grey
        packet = av.Packet(bare_png(data) if codec == "png" else data)
        frames = decoder.decode(packet) + decoder.decode(None)
        if not frames:
            raise ValueError(f"{path}: holds no picture; replace the file")
        return turn_of_picture(data)(_rgb(frames[0], path))


def write_image(path: str | Path, image: torch.Tensor) -> None:
    """(3, H, W), uint8 or float in [-1, 1] -> 8-bit RGB PNG."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; give the file the ending .png")
    write_whole(Path(path), lambda to: to.write_bytes(encode_png(image)), durable=False)


def encode_png(image: torch.Tensor) -> bytes:
    """(3, H, W), uint8 or float in [-1, 1] -> the bytes of an 8-bit RGB PNG."""
    frame = _frame(image if image.dtype == torch.uint8 else to_uint8(image))
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "rgb24"
    encoder.time_base = Fraction(1)
    encoder.options = {"compression_level": "1"}  # a fourth of the time of the default, a photo as small
    return b"".join(bytes(packet) for packet in encoder.encode(frame) + encoder.encode(None))


def fit(images: torch.Tensor, height: int, width: int, mode: str = "crop") -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32 (..., 3, height, width) in [-1, 1]: `resize`, then `from_uint8`."""
    return from_uint8(resize(images, height, width, mode))


# Clips


class Timeline(NamedTuple):
    """When each frame is shown, in presentation order, known without decoding one of them."""

    pts: np.ndarray  # (n,) integer stamps of the container, each once
    seconds: np.ndarray  # (n,) the same, counted from the first frame
    end: float  # seconds at which the last frame leaves the screen
    keys: list[int]  # stamps of the keyframes
    doubtful: bool  # some frames have the same stamp, or the clock goes back somewhere


class ClipInfo(NamedTuple):
    height: int  # upright
    width: int
    frames: int
    seconds: float
    steady: bool  # constant frame rate


def read_clip(
    path: str | Path, frames: int, fps: float, height: int, width: int, window: float = 0.0
) -> torch.Tensor:
    """Video file -> uint8 (3, T, H, W): moments 1/fps apart, for each the frame nearest in time, resized.

    `window` in [0, 1] slides the first moment from the clip's start to the latest place that still fits.
    Never pads: a clip that ends too early is refused. Holds only the chosen frames, at the target size.
    """
    span = (frames - 1) / fps
    line = _timeline(path, until=math.inf if window else span)
    check_length(path, line.end, frames, fps)
    start = window * max(0.0, line.seconds[-1] - span)
    chosen = line.pts[nearest(line.seconds, start + np.arange(frames) / fps)].tolist()
    shown = _decode(path, chosen, line, height, width)
    return torch.stack([shown[pts] for pts in chosen], dim=1)


def nearest(seconds: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index into ascending `seconds` of the entry closest to each wanted time; a tie goes to the earlier."""
    right = np.searchsorted(seconds, wanted).clip(max=len(seconds) - 1)
    left = (right - 1).clip(min=0)
    return np.where(wanted - seconds[left] <= seconds[right] - wanted + 1e-6, left, right)


def check_length(path: str | Path, lasts: float, frames: int, fps: float) -> None:
    """Raise ValueError unless `frames` moments 1/fps apart lie inside a clip of `lasts` seconds."""
    needed = (frames - 1) / fps
    if needed > 0 and needed >= lasts:
        raise ValueError(
            f"{path}: lasts {lasts:.2f} s, but {frames} frames at {fps:g} fps need more than {needed:.2f} s; "
            "ask for fewer frames or a higher fps, or remove its row"
        )


def say_repeats(path: str | Path, frames: int, fps: float) -> str:
    """What to say of a clip that `read_clip` shows many frames of twice; nothing, of another one.

    A tenth may repeat: clips of 23 frames a second read at 24, or a few that the recorder dropped.
    """
    line = _timeline(path, until=(frames - 1) / fps)
    repeats = frames - len(set(nearest(line.seconds, np.arange(frames) / fps).tolist()))
    if repeats <= frames / 10:
        return ""
    return f"{repeats} of {frames} frames repeat the one before: it has too few for {fps:g} a second"


def say_interlaced(path: str | Path) -> str:
    """What to say of a clip whose frames are two fields each; nothing, of another one."""
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
    if first is None or not first.interlaced_frame:
        return ""
    return "interlaced: what moves is seen twice in a frame; deinterlace it, say with ffmpeg -vf bwdif"


def inspect_clip(path: str | Path) -> ClipInfo:
    """Decode every frame once and measure the clip; ValueError if one is damaged."""
    line = _timeline(path)
    missing, height, width = set(line.pts.tolist()), 0, 0
    with _opened(path) as (container, stream):
        for frame in _rising(container.decode(stream), path):
            if not height:
                height, width = _upright(frame, stream, path).shape[-2:]
            missing.discard(frame.pts)
    if missing:
        raise ValueError(f"{path}: damaged: {len(missing)} of {len(line.pts)} frames; {REPLACE}")
    gaps = np.diff(line.seconds, append=line.end)
    return ClipInfo(height, width, len(line.pts), line.end, steady=bool(np.ptp(gaps) < 2e-3))


def write_video(path: str | Path, clip: torch.Tensor, fps: float, durable: bool = False) -> None:
    """(3, T, H, W), uint8 or float in [-1, 1] -> MP4 any browser plays: H.264, yuv420p, BT.709, faststart.

    durable: on disk, come what may, when this returns.
    """
    clip = clip.detach().cpu()
    clip = clip if clip.dtype == torch.uint8 else to_uint8(clip)
    height, width = clip.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"{path}: {width}x{height} is odd, and H.264 in yuv420p needs even sizes; crop one pixel"
        )
    write_whole(Path(path), lambda to: _encode_video(to, clip, fps), durable)


def _encode_video(path: Path, clip: torch.Tensor, fps: float) -> None:
    height, width = clip.shape[-2:]
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        coder = stream.codec_context
        coder.colorspace = coder.color_primaries = coder.color_trc = BT709
        coder.color_range = ColorRange.MPEG
        for index, image in enumerate(clip.unbind(1)):
            frame = _frame(image).reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _timeline(path: str | Path, until: float = math.inf) -> Timeline:
    """Read packets only, stopping once every frame shown up to `until` seconds has been met."""
    found = _existing(path).stat()
    return _packets(str(path), until, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=2048)  # or each random window would read the whole file once more
def _packets(path: str, until: float, *state: int) -> Timeline:
    shown, keys, untimed = [], [], 0
    first = after = math.inf
    clock, back = -math.inf, False
    with _opened(path) as (container, stream):
        unit, codec = stream.time_base, stream.codec_context.name
        for packet in container.demux(stream):
            if packet.pts is None:
                untimed += packet.size > 0  # the last packet is empty: it flushes the decoder
                continue
            if packet.is_keyframe:
                keys.append(packet.pts)
            if packet.is_discard or _is_hidden(packet, codec):  # cut away by an edit list, or never shown
                continue
            shown.append((packet.pts, packet.duration or 0))
            if packet.dts is not None:
                back |= packet.dts < clock
                clock = packet.dts
            first = min(first, packet.pts)
            if (packet.pts - first) * unit >= until:
                after = min(after, packet.pts)
            if packet.dts is not None and packet.dts >= after:  # what follows is shown at its dts or later
                break
    if untimed or not shown:
        raise ValueError(f"{path}: {untimed or 'all'} {UNTIMED}")
    stamps = np.array([stamp for stamp, _ in shown])
    ahead = np.argsort(stamps, kind="stable") - np.arange(len(stamps))  # of packets that are shown later
    if ahead.max() > REORDER:  # no decoder can wait so long: here a clock starts again
        raise ValueError(f"{path}: {OUT_OF_ORDER}")
    pts = np.unique(stamps)
    seconds = (pts - pts[0]) * float(unit)
    tail = max(shown)[1] * float(unit) or seconds[-1] / max(1, len(pts) - 1)
    return Timeline(pts, seconds, float(seconds[-1] + tail), keys, back or len(pts) < len(stamps))


def _is_hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet is a frame of VP8 that others are predicted from, never shown (RFC 6386, 9.1)."""
    return codec == "vp8" and packet.size > 0 and not memoryview(packet)[0] & 0x10


def _decode(
    path: str | Path, stamps: list[int], line: Timeline, height: int, width: int
) -> dict[int, torch.Tensor]:
    """The frames with these stamps, resized: from the keyframe before them, or else from the file's start.

    Frames that come as the stamps say are sure. Where one was passed over, some more are decoded: if it comes
    after all, the stamps are wrong, and so may be those of the frames that were taken.
    """
    key = max((pts for pts in line.keys if pts <= min(stamps)), default=None)
    for start in dict.fromkeys((None if line.doubtful else key, None)):
        missing, shown, place, doubt, more = set(stamps), {}, None, line.doubtful, 0
        with _opened(path) as (container, stream):
            if start is not None:
                with suppress(av.FFmpegError):  # no index: it is read from its start
                    container.seek(start, stream=stream)
            for frame in _rising(container.decode(stream), path):
                place = int(np.searchsorted(line.pts, frame.pts)) if place is None else place + 1
                doubt |= place < len(line.pts) and bool(line.pts[place] != frame.pts)
                if frame.pts in missing:
                    missing.discard(frame.pts)
                    shown[frame.pts] = resize(_upright(frame, stream, path), height, width)
                if not missing:
                    if not doubt or more == REORDER:
                        break
                    more += 1
        if not missing:
            return shown
    raise ValueError(f"{path}: {len(missing)} frames cannot be decoded; {REPLACE}")


def _rising(frames: Iterable[av.VideoFrame], path: str | Path) -> Iterator[av.VideoFrame]:
    """The frames before the first damaged one. ValueError unless their stamps rise."""
    last = -math.inf
    for frame in frames:
        if frame.is_corrupt:
            return
        if frame.pts is None:
            raise ValueError(f"{path}: some {UNTIMED}")
        if frame.pts <= last:
            raise ValueError(f"{path}: {OUT_OF_ORDER}")
        last = frame.pts
        yield frame


# Orientation and colour


def _upright(frame: av.VideoFrame, stream: av.VideoStream, path: str | Path) -> torch.Tensor:
    """Video frame -> uint8 (3, H, W), turned and mirrored as the container's display matrix says."""
    image = _rgb(frame, path, float(stream.sample_aspect_ratio or 1))
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError as error:  # newer data beside it, of a stereo film for example
        if not frame.rotation:
            return image
        raise ValueError(f"{path}: holds frame data unknown to PyAV ({error}); {REPLACE}") from error
    return image if matrix is None else turn_of_matrix(bytes(matrix))(image)


def _rgb(frame: av.VideoFrame, path: str | Path, aspect: float = 1.0) -> torch.Tensor:
    """Decoded frame, its pixels `aspect` times as wide as high -> uint8 (3, H, W), transparency on white."""
    if frame.color_trc in HDR:
        raise ValueError(f"{path}: is HDR ({HDR[frame.color_trc]}); tone-map it to BT.709 first")
    if frame.colorspace == UNSPECIFIED and (frame.width >= 1280 or frame.height > 576):
        frame.colorspace = BT709  # the players' convention for untagged high definition; below it BT.601
    width = round(frame.width * aspect)
    if not 0 < width * frame.height <= max(FRAME_PIXELS, frame.width * frame.height):
        raise ValueError(f"{path}: its pixels are {aspect:g} times as wide as high; {REPLACE}")
    clear = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    kind = "gbrap" if clear else "gbrp"
    frame = frame.reformat(width, format=kind, interpolation=EXACT, threads=1)
    g, b, r, *alpha = (_pixels(plane, width) for plane in frame.planes)
    image = torch.from_numpy(np.stack([r, g, b]))
    for cover in alpha:
        _lay_on_white(image, torch.from_numpy(cover))
    return image


def _lay_on_white(image: torch.Tensor, alpha: torch.Tensor) -> None:
    """uint8 (3, H, W) under alpha (H, W), in place; band by band, because floats are four times as large."""
    rows = max(1, 2**20 // image.shape[-1])
    for band, part in zip(image.split(rows, -2), alpha.split(rows), strict=True):
        cover = part.float() / 255
        band.copy_((band * cover + 255 * (1 - cover)).round_())


def _pixels(plane: av.video.plane.VideoPlane, width: int) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :width]


def _frame(image: torch.Tensor) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(image.cpu().permute(1, 2, 0).contiguous().numpy(), format="rgb24")


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        found = "is a folder; name a file in it" if path.is_dir() else "no such file; check the name"
        raise FileNotFoundError(f"{path}: {found}")
    return path


@contextmanager
def _decoding(path: str | Path, kind: str) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        reason = f"{path}: cannot be decoded as a {kind} ({error.strerror}); {REPLACE}"
        raise ValueError(reason) from error
    except (MemoryError, UnicodeError, IndexError) as error:  # IndexError: PyAV's own, of a lost stream
        reason = f"{path}: cannot be read as a {kind} ({error or 'too large for the memory'}); {REPLACE}"
        raise ValueError(reason) from error


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its video stream, decoding on as many threads as torch uses here, up to four."""
    with (
        _decoding(path, "video"),
        # Tags may be in any encoding; nothing here reads them.
        av.open(f"file:{_existing(path)}", metadata_errors="replace") as container,
    ):
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError(f"{path}: holds no video stream; {REPLACE}")
        coder = stream.codec_context
        if coder is None:
            raise ValueError(f"{path}: FFmpeg has no decoder for it; re-encode it, H.264 in MP4 for example")
        if coder.width * coder.height > FRAME_PIXELS:
            size = f"{coder.width}x{coder.height}"
            raise ValueError(f"{path}: frames of {size} are more than {FRAME_PIXELS:,} pixels; scale it down")
        coder.options = {"max_pixels": str(FRAME_PIXELS)}  # the size may change on the way
        # Each thread holds frames of its own, 30 MB of a 4K film; threads of a pool have a file each.
        alone = threading.current_thread() is threading.main_thread()
        stream.thread_type, coder.thread_count = "AUTO", min(4, torch.get_num_threads()) if alone else 1
        yield container, stream
