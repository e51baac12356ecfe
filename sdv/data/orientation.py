"""Which way up a picture or a frame lies: EXIF, XMP and the display matrix of a container.

Sources: CIPA DC-008 (EXIF), XMP specification part 2 (tiff:Orientation), ISO 14496-12 8.3.2 (the matrix).
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

JPEG, PNG = b"\xff\xd8", b"\x89PNG"
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how their JPEG segments begin
PREFIX = re.compile(rb"\A(?:Exif\0\0)+")  # out of a JPEG, it stays on in some WebP
XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")
ORIENTATION = 0x0112  # the tag
NOTES = {b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tIME"}  # chunks that say nothing of the pixels
WIDTHS = {1: 1, 3: 2, 4: 4}  # bytes of a TIFF value: BYTE, SHORT, LONG
MOST_TEXT = 2**20  # bytes that a compressed text of a PNG may unpack to


class Turn(NamedTuple):
    """Transpose, then mirror: the eight ways a picture can lie."""

    swap: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = image.transpose(-2, -1) if self.swap else image
        flipped = [dim for dim, flip in ((-2, self.flip_rows), (-1, self.flip_columns)) if flip]
        return image.flip(flipped).contiguous()


def turn_of_matrix(matrix: bytes) -> Turn:
    """What a display matrix (nine int32) asks for: x' = ax + cy, y' = bx + dy."""
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    swap = abs(b) > abs(a)
    return Turn(swap, (b if swap else d) < 0, (c if swap else a) < 0)


def turn_of_picture(data: bytes) -> Turn:
    """What the orientation in a JPEG, PNG or WebP file asks for: of EXIF, else of XMP, else nothing."""
    blocks = list(_blocks(data))
    tiffs = (PREFIX.sub(b"", body) for kind, body in blocks if kind == "exif")
    found = next((value for tiff in tiffs if (value := _tiff_orientation(tiff))), None)
    if found is None:
        marks = (XMP_ORIENTATION.search(body) for kind, body in blocks if kind == "xmp")
        found = next((int(mark[1]) for mark in marks if mark), 1)
    orientation = found if 1 <= found <= 8 else 1
    quarter = (orientation - 1) % 4
    return Turn(orientation > 4, quarter in (2, 3), quarter in (1, 2))


def bare_png(data: bytes) -> bytes:
    """A PNG without its notes: FFmpeg, told to refuse damage, refuses a picture for the EXIF beside it."""
    kept, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in NOTES:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _tiff_orientation(tiff: bytes) -> int | None:
    """The value of the tag in the first directory of a TIFF block."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    directory = number(4, 4)
    for at in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(at, 2) == ORIENTATION:
            return number(at + 8, WIDTHS.get(number(at + 2, 2), 2))
    return None


def _blocks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """("exif" or "xmp", its bytes) of a picture file, in the order of the file."""
    if data.startswith(JPEG):
        for body in _app1_segments(data):
            if body.startswith(EXIF):
                yield "exif", body
            elif body.startswith(XMP):
                yield "xmp", body
        return
    for name, body in _chunks(data, data.startswith(PNG)):
        if name in (b"eXIf", b"EXIF"):
            yield "exif", body
        elif name == b"XMP ":
            yield "xmp", body
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            yield from _texts(name, body)


def _app1_segments(data: bytes) -> Iterator[bytes]:
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        if data[at + 1 : at + 2] == b"\xff":  # a fill byte
            at += 1
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1 : at + 2] == b"\xe1":
            yield data[at + 4 : at + 2 + size]
        at += 2 + size


def _chunks(data: bytes, png: bool) -> Iterator[tuple[bytes, bytes]]:
    """(name, body). PNG: size, name, body, checksum; RIFF: name, size, body, pad to even."""
    at = 8 if png else 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], data[at + 4 : at + 8]
        name, size = (size, int.from_bytes(name, "big")) if png else (name, int.from_bytes(size, "little"))
        yield name, data[at + 8 : at + 8 + size]
        at += 12 + size if png else 8 + size + size % 2


def _texts(name: bytes, body: bytes) -> Iterator[tuple[str, bytes]]:
    """EXIF in hexadecimal, as ImageMagick keeps it in a text of a PNG, or XMP."""
    keyword, _, text = body.partition(b"\0")
    packed = name == b"zTXt"
    if name == b"iTXt":  # a flag and a method of compression, language and translated keyword
        packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    elif packed:
        text = text[1:]
    if keyword not in (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp"):
        return
    try:
        text = zlib.decompressobj().decompress(text, MOST_TEXT) if packed else text
        if keyword == b"XML:com.adobe.xmp":
            yield "xmp", text
        else:  # a line with its name, a line with its size, then the bytes
            yield "exif", bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (zlib.error, ValueError):  # not what its keyword says: it says nothing of the picture then
        return
