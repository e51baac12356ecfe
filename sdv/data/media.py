"""Pictures and clips on disk <-> tensors, through PyAV. Knows pixels and timestamps, nothing of training.

What is read comes out upright (EXIF, container matrix), with square pixels, as 8-bit RGB. A file that cannot
be read raises one ValueError or FileNotFoundError that names it, the reason and the fix.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace, Interpolation

# swscale's quick path truncates: 1 to 1.5 levels of 255 too dark on average. This flag makes it round.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
CODECS = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
REPLACE = "replace the file, re-encode it, or remove its row"
UNSPECIFIED, BT709 = 2, 1  # AVColorSpace
HDR = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 [-1, 1]: x / 127.5 - 1, any shape."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place: 2.7 times as fast


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float [-1, 1] -> uint8 0..255, clamped and rounded: the inverse of `from_uint8`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# Pictures


def read_image(path: str | Path) -> torch.Tensor:
    """JPEG, PNG, WebP or BMP -> uint8 (3, H, W), turned upright by EXIF, transparency laid on white.

    Grey, palette, 16-bit and CMYK files become 8-bit RGB; colour profiles are not applied.
    """
    data = _existing(path).read_bytes()
    codec = next((name for magic, name in CODECS.items() if data.startswith(magic)), None)
    if codec is None:
        raise ValueError(f"{path}: not a JPEG, PNG, WebP or BMP picture; convert it to one of these")
    with _decoding(path, "picture"):
        decoder = av.CodecContext.create(codec, "r")
        decoder.options = {"err_detect": "crccheck+explode"}  # else a torn file comes back half grey
        frames = decoder.decode(av.Packet(data)) + decoder.decode(None)
        if not frames:
            raise ValueError(f"{path}: holds no picture; replace the file")
        return _turn(_rgb(frames[0], path), *_exif_turn(data))


def write_image(path: str | Path, image: torch.Tensor) -> None:
    """(3, H, W), uint8 or float in [-1, 1] -> 8-bit RGB PNG."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; give the file the ending .png")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    frame = _frame(image if image.dtype == torch.uint8 else to_uint8(image))
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "rgb24"
    encoder.time_base = Fraction(1)
    encoder.options = {"compression_level": "1"}  # a fourth of the time of the default, a photo as small
    Path(path).write_bytes(b"".join(bytes(packet) for packet in encoder.encode(frame) + encoder.encode(None)))


def fit(images: torch.Tensor, height: int, width: int, mode: str = "crop") -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32 (..., 3, height, width) in [-1, 1]: `resize`, then `from_uint8`."""
    return from_uint8(resize(images, height, width, mode))


def resize(
    images: torch.Tensor,
    height: int,
    width: int,
    mode: str = "crop",
    zoom: float = 1.0,
    at: tuple[float, float] = (0.5, 0.5),
) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> (..., 3, height, width) of uint8, antialiased bicubic, keeping the aspect.

    "crop": cover the target (`zoom` times over), then cut; `at` says where in what sticks out (0.5: centre).
    "pad": fit inside the target, centred on a white canvas.
    """
    if mode not in ("crop", "pad"):
        raise ValueError(f"mode {mode!r}: use 'crop' or 'pad'")
    crop = mode == "crop"
    bound = max if crop else min
    h, w = images.shape[-2:]
    scale = bound(height / h, width / w) * (zoom if crop else 1)
    size = bound(height, max(1, round(h * scale))), bound(width, max(1, round(w * scale)))
    lead = images.shape[:-2]
    if size != (h, w):
        images = F.interpolate(images.reshape(-1, 3, h, w), size=size, mode="bicubic", antialias=True)
        images = images.reshape(*lead, *size)
    top, left = (round(abs(a - b) * part) for a, b, part in zip(size, (height, width), at, strict=True))
    if crop:
        return images[..., top : top + height, left : left + width]
    canvas = images.new_full((*lead, height, width), 255)
    canvas[..., top : top + size[0], left : left + size[1]] = images
    return canvas


# Clips


class Timeline(NamedTuple):
    """When each frame is shown, in presentation order, known without decoding one of them."""

    pts: np.ndarray  # (n,) integer stamps of the container
    seconds: np.ndarray  # (n,) the same, counted from the first frame
    end: float  # seconds at which the last frame leaves the screen
    keys: list[int]  # stamps of the keyframes


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
    shown = _decode(path, chosen, line.keys, height, width)
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


def inspect_clip(path: str | Path) -> ClipInfo:
    """Decode every frame once and measure the clip; ValueError if one is damaged."""
    line = _timeline(path)
    missing, height, width = set(line.pts.tolist()), 0, 0
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                break
            if not height:
                height, width = _upright(frame, stream, path).shape[-2:]
            missing.discard(frame.pts)
    if missing:
        raise ValueError(f"{path}: damaged: {len(missing)} of {len(line.pts)} frames; {REPLACE}")
    gaps = np.diff(line.seconds, append=line.end)
    return ClipInfo(height, width, len(line.pts), line.end, steady=bool(np.ptp(gaps) < 2e-3))


def write_video(path: str | Path, clip: torch.Tensor, fps: float) -> None:
    """(3, T, H, W), uint8 or float in [-1, 1] -> MP4 any browser plays: H.264, yuv420p, BT.709, faststart."""
    clip = clip.detach().cpu()
    clip = clip if clip.dtype == torch.uint8 else to_uint8(clip)
    height, width = clip.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"{path}: {width}x{height} is odd, and H.264 in yuv420p needs even sizes; crop one pixel"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
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
    shown, keys, untimed = [], [], 0
    first = after = math.inf
    with _opened(path) as (container, stream):
        unit = stream.time_base
        for packet in container.demux(stream):
            if packet.pts is None:
                untimed += packet.size > 0  # the last packet is empty: it flushes the decoder
                continue
            if packet.is_keyframe:
                keys.append(packet.pts)
            if packet.is_discard:  # cut away by the container's edit list
                continue
            shown.append((packet.pts, packet.duration or 0))
            first = min(first, packet.pts)
            if (packet.pts - first) * unit >= until:
                after = min(after, packet.pts)
            if packet.dts is not None and packet.dts >= after:  # what follows is shown at its dts or later
                break
    if untimed or not shown:
        raise ValueError(f"{path}: {untimed or 'all'} frames carry no timestamp; re-encode it to MP4")
    shown.sort()
    pts = np.array([stamp for stamp, _ in shown])
    seconds = (pts - pts[0]) * float(unit)
    tail = shown[-1][1] * float(unit) or seconds[-1] / max(1, len(pts) - 1)
    return Timeline(pts, seconds, float(seconds[-1] + tail), keys)


def _decode(
    path: str | Path, stamps: list[int], keys: list[int], height: int, width: int
) -> dict[int, torch.Tensor]:
    """The frames with these stamps, resized: from the keyframe before them, or else from the file's start."""
    key = max((pts for pts in keys if pts <= min(stamps)), default=None)
    for start in dict.fromkeys((key, None)):
        missing, shown = set(stamps), {}
        with _opened(path) as (container, stream):
            if start is not None:
                container.seek(start, stream=stream)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    break
                if frame.pts in missing:
                    missing.discard(frame.pts)
                    shown[frame.pts] = resize(_upright(frame, stream, path), height, width)
                if not missing:
                    return shown
    raise ValueError(f"{path}: {len(missing)} frames cannot be decoded; {REPLACE}")


# Orientation and colour


def _upright(frame: av.VideoFrame, stream: av.VideoStream, path: str | Path) -> torch.Tensor:
    """Video frame -> uint8 (3, H, W), turned and mirrored as the container's display matrix says."""
    image = _rgb(frame, path, float(stream.sample_aspect_ratio or 1))
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError as error:
        raise ValueError(f"{path}: holds frame data unknown to PyAV ({error}); {REPLACE}") from error
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    swap = abs(b) > abs(a)
    return _turn(image, swap, (b if swap else d) < 0, (c if swap else a) < 0)


def _turn(image: torch.Tensor, swap: bool, flip_rows: bool, flip_columns: bool) -> torch.Tensor:
    """Transpose, then mirror: the eight ways a picture can lie."""
    image = image.transpose(-2, -1) if swap else image
    return image.flip([dim for dim, flip in ((-2, flip_rows), (-1, flip_columns)) if flip]).contiguous()


def _exif_turn(data: bytes) -> tuple[bool, bool, bool]:
    """(swap, flip_rows, flip_columns) for `_turn`, from a picture's EXIF orientation; else all False."""
    tiff = _exif(data)
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return False, False, False

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    directory = number(4, 4)
    entries = range(directory + 2, directory + 2 + 12 * number(directory, 2), 12)
    value = next((number(at + 8, 2) for at in entries if number(at, 2) == 0x0112), 1)
    orientation = value if 1 <= value <= 8 else 1
    quarter = (orientation - 1) % 4
    return orientation > 4, quarter in (2, 3), quarter in (1, 2)


def _exif(data: bytes) -> bytes:
    """The TIFF block of a JPEG (APP1 segment), PNG (eXIf chunk) or WebP (EXIF chunk) file, or b""."""
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:
            if data[at + 1] == 0xFF:  # a fill byte
                at += 1
                continue
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                return data[at + 10 : at + 2 + size]
            at += 2 + size
        return b""
    png = data.startswith(b"\x89PNG")
    at = 8 if png else 12
    while at + 8 <= len(data):  # PNG: size, name, body, checksum; RIFF: name, size, body, pad to even
        size = int.from_bytes(data[at : at + 4] if png else data[at + 4 : at + 8], "big" if png else "little")
        if data[at + 4 : at + 8] == b"eXIf" or data[at : at + 4] == b"EXIF":
            return data[at + 8 : at + 8 + size]
        at += 12 + size if png else 8 + size + size % 2
    return b""


def _rgb(frame: av.VideoFrame, path: str | Path, aspect: float = 1.0) -> torch.Tensor:
    """Decoded frame, its pixels `aspect` times as wide as high -> uint8 (3, H, W), transparency on white."""
    if frame.color_trc in HDR:
        raise ValueError(f"{path}: is HDR ({HDR[frame.color_trc]}); tone-map it to BT.709 first")
    if frame.colorspace == UNSPECIFIED and (frame.width >= 1280 or frame.height > 576):
        frame.colorspace = BT709  # the players' convention for untagged high definition; below it BT.601
    clear = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    kind = "gbrap" if clear else "gbrp"
    frame = frame.reformat(round(frame.width * aspect), format=kind, interpolation=EXACT, threads=1)
    g, b, r, *alpha = (_pixels(plane, frame.width) for plane in frame.planes)
    image = torch.from_numpy(np.stack([r, g, b]))
    if not alpha:
        return image
    cover = torch.from_numpy(alpha[0].copy()).float() / 255
    return (image * cover + 255 * (1 - cover)).round().to(torch.uint8)


def _pixels(plane: av.video.plane.VideoPlane, width: int) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :width]


def _frame(image: torch.Tensor) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(image.cpu().permute(1, 2, 0).contiguous().numpy(), format="rgb24")


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the name in its row")
    return path


@contextmanager
def _decoding(path: str | Path, kind: str) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        reason = f"{path}: cannot be decoded as a {kind} ({error.strerror}); {REPLACE}"
        raise ValueError(reason) from error


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its video stream, decoding on as many threads as torch uses here: one in a worker."""
    with _decoding(path, "video"), av.open(f"file:{_existing(path)}") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError(f"{path}: holds no video stream; {REPLACE}")
        stream.thread_type, stream.codec_context.thread_count = "AUTO", torch.get_num_threads()
        yield container, stream
