"""Pictures and sizes, against Pillow."""

import numpy as np
import pytest
import torch

from helpers import GRID, MEDIA, blocks, chw, difference
from sdv.data import media

# Pictures


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_equals_pillows(tmp_path, kind, orientation):
    Image, ImageOps = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(blocks()).save(tmp_path / "a", kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a")).convert("RGB")
    assert difference(media.read_image(tmp_path / "a"), chw(expected)) <= (1.0 if kind == "JPEG" else 0.0)


@pytest.mark.parametrize("order", ["little", "big"])
def test_exif_is_found_after_fill_bytes_and_another_app1(tmp_path, order):
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(blocks()).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    magic = {"little": b"II*\0", "big": b"MM\0*"}[order]

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    def entry(tag: int, value: int) -> bytes:
        return number(tag, 2) + number(3, 2) + number(1, 4) + number(value, 2) + b"\0\0"

    tiff = magic + number(8, 4) + number(2, 2) + entry(0x0100, 48) + entry(0x0112, 6) + number(0, 4)
    exif = b"Exif\0\0" + tiff
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    segments = b"".join(b"\xff\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body for body in (xmp, exif))
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:2] + segments + data[2:])
    expected = chw(np.rot90(blocks(), -1))  # 6: turn a quarter clockwise to see it upright
    assert difference(media.read_image(tmp_path / "a.jpg"), expected) <= 1.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_modes_equal_pillows_on_white(tmp_path, mode):
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (33, 47, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        grey = np.asarray(picture.convert("L"))
        saved, picture = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)
    elif mode == "P":
        saved = picture = picture.convert("RGB").quantize(16)
        saved.info["transparency"] = bytes(range(0, 256, 16))  # an alpha for every colour of the palette
    else:
        saved = picture = picture.convert(mode)
    saved.save(tmp_path / "a.png")
    layer = picture.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    got = media.read_image(tmp_path / "a.png")
    assert got.dtype == torch.uint8
    assert (got.int() - chw(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_photos_equal_pillows(tmp_path, mode):
    Image, ImageOps = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    photo = ImageOps.exif_transpose(Image.open(MEDIA / "pairs" / "tiles.jpg"))
    photo.convert(mode).save(tmp_path / "a.jpg", quality=92)
    expected = chw(Image.open(tmp_path / "a.jpg").convert("RGB"))
    got = media.read_image(tmp_path / "a.jpg")
    # Pillow truncates where it turns CMYK into RGB; the other paths differ by rounding and chroma taps
    assert difference(got, expected) < (1.5 if mode == "CMYK" else 0.4)
    assert abs((got.double() - expected.double()).mean()) < (1.5 if mode == "CMYK" else 0.15)


def test_vendored_photo_is_turned_upright():
    Image, ImageOps = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    photo = Image.open(MEDIA / "pairs" / "tiles.jpg")
    assert photo.getexif()[0x0112] == 3
    got = media.read_image(MEDIA / "pairs" / "tiles.jpg")
    assert difference(got, chw(ImageOps.exif_transpose(photo))) < 0.4
    assert difference(got, chw(photo)) > 20


@pytest.mark.parametrize(
    "kind", ["text", "empty", "gif", "torn jpeg", "jpeg header", "torn png", "flipped bit"]
)
def test_damaged_pictures_are_refused(tmp_path, kind):
    photo = (MEDIA / "pairs" / "roots.jpg").read_bytes()
    media.write_image(tmp_path / "whole.png", chw(blocks()))
    png = (tmp_path / "whole.png").read_bytes()
    data = {
        "text": b"not a picture",
        "empty": b"",
        "gif": b"GIF89a" + bytes(30),
        "torn jpeg": photo[: len(photo) * 9 // 10],
        "jpeg header": photo[:300],
        "torn png": png[:-30],
        "flipped bit": png[:60] + bytes([png[60] ^ 1]) + png[61:],
    }
    (tmp_path / "bad.jpg").write_bytes(data[kind])
    with pytest.raises(ValueError, match=r"bad\.jpg: .*; (replace|convert)"):
        media.read_image(tmp_path / "bad.jpg")


def test_missing_files_are_refused(tmp_path):
    for read in (media.read_image, media.inspect_clip):
        with pytest.raises(FileNotFoundError, match="gone.* no such file; check"):
            read(tmp_path / "gone.mp4")


def test_png_round_trip_is_exact_and_ends_in_png(tmp_path):
    image = torch.randint(256, (3, 37, 51), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    media.write_image(tmp_path / "a.png", image)
    assert torch.equal(media.read_image(tmp_path / "a.png"), image)
    media.write_image(tmp_path / "b.png", media.from_uint8(image))
    assert torch.equal(media.read_image(tmp_path / "b.png"), image)
    with pytest.raises(ValueError, match=r"a\.jpg: .*\.png"):
        media.write_image(tmp_path / "a.jpg", image)


def test_values_span_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8)
    assert media.from_uint8(levels)[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(media.to_uint8(media.from_uint8(levels)), levels)
    assert media.to_uint8(torch.tensor([-3.0, 0.999, 7.0])).tolist() == [0, 255, 255]


# Sizes


@pytest.mark.parametrize("height, width", [(96, 144), (333, 200), (1000, 700)])
def test_crop_equals_pillows_resize_and_cut(height, width):
    Image = pytest.importorskip("PIL.Image")
    photo = Image.open(MEDIA / "pairs" / "fig_tree.jpg")
    scale = max(height / photo.height, width / photo.width)
    w, h = round(photo.width * scale), round(photo.height * scale)
    top, left = round((h - height) / 2), round((w - width) / 2)
    cut = photo.resize((w, h), Image.BICUBIC).crop((left, top, left + width, top + height))
    got = media.resize(chw(photo), height, width)
    assert difference(got, chw(cut)) < 0.01
    assert (got.int() - chw(cut).int()).abs().max() <= 2  # torch's weights have 16 bits, Pillow's 22
    assert torch.equal(media.fit(chw(photo), height, width), media.from_uint8(got))


def test_a_clip_is_resized_frame_by_frame():
    clip = torch.randint(256, (5, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    each = torch.stack([media.resize(frame, 16, 32) for frame in clip])
    assert torch.equal(media.resize(clip, 16, 32), each)


def test_pad_puts_the_whole_picture_on_white():
    red = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 100, 50)
    got = media.resize(red, 60, 80, mode="pad")
    assert (got[:, :, 25:55] == red[:, :1, :1]).all()  # 100 x 50 -> 60 x 30, centred in 80 columns
    assert (got[:, :, :25] == 255).all() and (got[:, :, 55:] == 255).all()


def test_zoom_and_place_choose_the_window():
    picture = chw(blocks(32))
    for at, colour in {
        (0, 0): GRID[0, 0],
        (0, 1): GRID[0, 2],
        (1, 0): GRID[1, 0],
        (1, 1): GRID[1, 2],
    }.items():
        corner = media.resize(picture, 20, 20, zoom=3, at=at)
        assert (corner == torch.from_numpy(colour)[:, None, None]).all()
