"""Every way in which a picture file can carry its orientation, against Pillow."""

import io
import zlib

import pytest

from helpers import blocks, chw, difference
from sdv.data import media


def tiff(orientation: int, order: str = "little", kind: int = 3) -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    value = number(orientation, 4) if kind == 4 else number(orientation, 2) + b"\0\0"
    entry = number(0x0112, 2) + number(kind, 2) + number(1, 4) + value
    magic = {"little": b"II*\0", "big": b"MM\0*"}[order]
    return magic + number(8, 4) + number(1, 2) + entry + number(0, 4)


def xmp(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
        % orientation
    )


def png_chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def segment(body: bytes) -> bytes:
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body


def raw_profile(data: bytes) -> bytes:
    lines = [data.hex()[i : i + 72] for i in range(0, 2 * len(data), 72)]
    return f"\nexif\n{len(data):8}\n".encode() + "\n".join(lines).encode() + b"\n"


def with_block(data: bytes, kind: str, block: bytes) -> bytes:
    """A picture of 48 x 32 with one more segment or chunk."""
    if kind == "JPEG":
        return data[:2] + block + data[2:]
    if kind == "PNG":
        return data[:33] + block + data[33:]
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (48, 32))
    head = riff_chunk(b"VP8X", bytes([0b1100, 0, 0, 0]) + sides)  # says that EXIF and XMP follow
    chunks = head + data[12:] + block
    return b"RIFF" + (len(chunks) + 4).to_bytes(4, "little") + b"WEBP" + chunks


XMP_JPEG, XMP_PNG = b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp\0\0\0\0\0"
CARRIERS = {
    "jpeg, long": ("JPEG", lambda n: segment(b"Exif\0\0" + tiff(n, "big", 4))),
    "jpeg, xmp": ("JPEG", lambda n: segment(XMP_JPEG + xmp(n))),
    "png, prefix": ("PNG", lambda n: png_chunk(b"eXIf", b"Exif\0\0" + tiff(n))),
    "png, text": ("PNG", lambda n: png_chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(tiff(n)))),
    "png, packed": (
        "PNG",
        lambda n: png_chunk(
            b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(tiff(n, "big")))
        ),
    ),
    "png, xmp": ("PNG", lambda n: png_chunk(b"iTXt", XMP_PNG + xmp(n))),
    "webp, prefix": ("WEBP", lambda n: riff_chunk(b"EXIF", b"Exif\0\0" + tiff(n))),
    "webp, xmp": ("WEBP", lambda n: riff_chunk(b"XMP ", xmp(n))),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_way_to_carry_an_orientation_equals_pillows(tmp_path, carrier, orientation):
    Image, ImageOps = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    kind, make = CARRIERS[carrier]
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    path = tmp_path / "a"
    Image.fromarray(blocks()).save(path, kind, **options)
    data = with_block(path.read_bytes(), kind, make(orientation))
    path.write_bytes(data)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert expected.size == ((32, 48) if orientation > 4 else (48, 32))
    assert difference(media.read_image(path), chw(expected)) <= (1.0 if kind == "JPEG" else 0.0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"garbage", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\xff"])
def test_a_picture_is_not_refused_for_what_is_written_beside_it(kind, exif):
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(blocks()).save(file, kind, **options)
    blocks_of = {
        "JPEG": segment(b"Exif\0\0" + exif),
        "PNG": png_chunk(b"eXIf", exif) + png_chunk(b"iCCP", b"x") + png_chunk(b"zTXt", exif),
        "WEBP": riff_chunk(b"EXIF", exif),
    }
    data = with_block(file.getvalue(), kind, blocks_of[kind])
    assert difference(media.decode_image(data, "a"), chw(blocks())) <= (1.0 if kind == "JPEG" else 0.0)
