"""Images: every format and mode comes out as the RGB it shows, and the network's input is timm's.

What is expected of a decoder is computed with numpy from the pixels that went into the file;
what is expected of the geometry comes from timm's evaluation transform.
"""

import io
import os
import random
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coat_deploy.errors import ImageError
from coat_deploy.image_files import find_images
from coat_deploy.images import (
    ImageLimits,
    decode,
    load,
    preprocess,
    resize_and_crop,
    to_rgb,
)
from coat_deploy.spec import Preprocess


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def scene(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture without any symmetry, so that JPEG keeps it and no turn hides."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png(rows: bytes, size: tuple[int, int], depth: int, colour: int, transparent: bytes = b""):
    """A PNG written by hand, for depths that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def png16(values: np.ndarray, colour: int, transparent: bytes = b"") -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(rows, (values.shape[1], values.shape[0]), 16, colour, transparent)


# Formats and modes


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_lossless_formats_keep_every_pixel(tmp_path, file_format, options):
    path = tmp_path / "a.img"
    path.write_bytes(encode(scene(), file_format, **options))
    image = decode(path)
    assert image.mode == "RGB"
    assert np.array_equal(pixels(image), pixels(scene()))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("TIFF", {"compression": "jpeg", "quality": 95}),
    ],
)
def test_lossy_formats_stay_near(file_format, options):
    image = decode(encode(scene(), file_format, **options))
    assert np.abs(pixels(image) - pixels(scene())).mean() < 5


def test_gif_and_tiff_give_their_first_frame():
    first, second = (Image.new("RGB", (9, 7), colour) for colour in ("red", "blue"))
    for file_format in ("GIF", "TIFF", "WEBP"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encode(first, file_format, save_all=True, append_images=[second], **options)
        assert decode(data).getpixel((4, 3)) == (255, 0, 0), file_format


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_one_bit_is_black_and_white(file_format):
    source = Image.new("1", (8, 8), 0)
    source.putpixel((3, 2), 1)
    image = decode(encode(source, file_format))
    assert image.getpixel((3, 2)) == (255, 255, 255)
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_is_repeated_over_the_channels(file_format):
    grey = scene().convert("L")
    image = decode(encode(grey, file_format))
    assert np.array_equal(pixels(image), np.repeat(pixels(grey)[..., None], 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF"])
def test_palette_gives_its_colours(file_format):
    source = Image.new("P", (8, 8), 1)
    source.putpalette([10, 20, 30, 200, 100, 50])
    source.putpixel((0, 0), 0)
    image = decode(encode(source, file_format))
    assert image.getpixel((0, 0)) == (10, 20, 30)
    assert image.getpixel((5, 5)) == (200, 100, 50)


@pytest.mark.parametrize(
    ("file_format", "transparency"), [("PNG", 0), ("PNG", b"\x00\xff"), ("GIF", 0)]
)
def test_transparent_palette_entry_is_white(file_format, transparency):
    source = Image.new("P", (8, 8), 1)
    source.putpalette([10, 20, 30, 200, 100, 50])
    source.putpixel((0, 0), 0)
    image = decode(encode(source, file_format, transparency=transparency))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((5, 5)) == (200, 100, 50)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (200, 100, 0, 128)), ("LA", (100, 128))])
def test_alpha_is_laid_on_white(file_format, mode, colour):
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    image = decode(encode(Image.new(mode, (8, 8), colour), file_format, **options))
    opaque = np.array(colour[:3] if mode == "RGBA" else colour[:1] * 3)
    expected = opaque * 128 / 255 + 255 * 127 / 255
    assert np.abs(np.array(image.getpixel((3, 3))) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_rarer_alpha_modes_are_laid_on_white(mode):
    clear = Image.new("LA", (8, 8), (0, 0)) if mode == "La" else Image.new("RGBA", (8, 8), 0)
    image = Image.new("PA", (8, 8), (0, 0)) if mode == "PA" else clear.convert(mode)
    assert to_rgb(image).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "key"), [("L", 9), ("RGB", (9, 9, 9))])
def test_transparent_key_colour_is_white(mode, key):
    source = Image.new(mode, (8, 8), 77 if mode == "L" else (77, 77, 77))
    source.putpixel((0, 0), key)
    image = decode(encode(source, "PNG", transparency=key))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((5, 5)) == (77, 77, 77)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_is_ink_on_white(file_format):
    options = {"quality": 100} if file_format == "JPEG" else {}
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), file_format, **options)
    assert np.abs(np.array(decode(data).getpixel((8, 8))) - [255, 0, 0]).max() <= 2


def test_adobe_cmyk_jpeg_is_stored_inverted_and_read_right():
    data = encode(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert max(decode(data).getpixel((8, 8))) <= 2


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_grey_tiff_of_16_bits_is_scaled_not_clipped(byte_order):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    image = decode(encode(Image.fromarray(values.astype(byte_order)), "TIFF"))
    assert np.array_equal(pixels(image)[..., 1], values >> 8)


def test_grey_png_of_16_bits_is_scaled_not_clipped():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    image = decode(png16(values, colour=0))
    assert np.array_equal(pixels(image)[..., 2], values >> 8)


def test_16_bits_give_the_same_as_grey_and_as_colour():
    values = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1021) ^ 0x55
    colour = np.repeat(values[..., None], 3, axis=2)
    grey_image, colour_image = decode(png16(values, 0)), decode(png16(colour, 2))
    assert np.array_equal(pixels(grey_image), pixels(colour_image))


def test_16_bit_copy_of_8_bits_gives_the_8_bits():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for scale in (256, 257):
        image = decode(png16(values * np.uint16(scale), colour=0))
        assert np.array_equal(pixels(image)[..., 0], values), scale


def test_16_bits_with_alpha_are_laid_on_white():
    values = np.zeros((8, 8, 4), np.uint16)
    values[0, 0] = (65535, 0, 0, 65535)
    image = decode(png16(values, colour=6))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((5, 5)) == (255, 255, 255)


def test_transparent_key_of_16_bit_grey_is_white():
    values = np.full((8, 8), 0x4000, np.uint16)
    values[0, 0] = 0x0102
    image = decode(png16(values, colour=0, transparent=b"\x01\x02"))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((5, 5)) == (64, 64, 64)


def test_tiff_of_12_bits_is_scaled_from_12_bits():
    packed = Image.frombytes("I;16", (8, 8), (b"\xab\xca\xbc" * 43)[:128])  # 0xABC, twice in 3
    bits = [struct.pack("<HHIHH", 258, 3, 1, count, 0) for count in (16, 12)]
    image = decode(encode(packed, "TIFF").replace(*bits))
    assert set(image.tobytes()) == {0xAB}


def test_tiff_of_16_bits_with_white_as_zero_is_inverted():
    source = Image.fromarray(np.full((8, 8), 0x4000, np.uint16))
    assert decode(encode(source, "TIFF", tiffinfo={262: 0})).getpixel((3, 3)) == (191,) * 3


def test_16_bit_png_of_older_pillow_is_scaled():
    image = Image.fromarray(np.full((8, 8), 0x8000, np.int32))
    image.format = "PNG"
    assert to_rgb(image).getpixel((3, 3)) == (128, 128, 128)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_without_a_known_range_are_refused(tmp_path, dtype):
    path = tmp_path / "elevation.tif"
    Image.fromarray(np.ones((8, 8), dtype)).save(path)
    with pytest.raises(ImageError, match=r"elevation\.tif: .*no known black and white.*8-bit RGB"):
        decode(path)


# Orientation

STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}
"""EXIF orientation: how an upright picture (rows, columns) is stored, by the standard's words:
6, for one, means that the first row is the right-hand side and the first column the top."""


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_undone_once(file_format, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(scene()))))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = decode(encode(stored, file_format, exif=exif, **options))
    assert np.array_equal(pixels(image), pixels(scene()))


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_jpeg_is_undone(orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(scene()))))
    exif = Image.Exif()
    exif[274] = orientation
    image = decode(encode(stored, "JPEG", exif=exif, quality=100, subsampling=0))
    assert np.abs(pixels(image) - pixels(scene())).max() <= 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x05"]
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # as a program sees it: Pillow only warns
def test_broken_metadata_does_not_spoil_an_image(exif):
    data = encode(scene(), "JPEG")
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert decode(broken).size == scene().size


@pytest.mark.parametrize("name", ["Landscape", "Portrait"])
def test_photograph_in_every_orientation_comes_out_upright(shared_data, name):
    folder = shared_data / "exif-orientation"
    upright = decode(folder / f"{name}_1.jpg")
    for orientation in (0, *range(2, 9)):
        turned = decode(folder / f"{name}_{orientation}.jpg")
        assert turned.size == upright.size
        # Each was compressed anew; averaging takes that noise away, not a wrong turn.
        difference = pixels(turned.reduce(8)) - pixels(upright.reduce(8))
        assert np.abs(difference).mean() < 2, orientation


# Bad files


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.jpg: cannot be read \(No such file"):
        decode(tmp_path / "gone.jpg")


def test_folder_is_refused(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        decode(tmp_path)


def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match=r"pipe\.jpg: is not a regular file"):
        decode(tmp_path / "pipe.jpg")


def test_unreadable_file_says_why(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(scene(), "PNG"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.png: cannot be read \(Permission denied\)"):
        decode(tmp_path / "a.png")


def test_path_that_cannot_be_is_refused():
    with pytest.raises(ImageError, match="cannot be read"):
        decode(Path("a\0.jpg"))


def test_empty_file_is_named(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty"):
        decode(tmp_path / "empty.png")


def test_text_with_an_image_suffix_shows_how_it_begins(tmp_path):
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>")
    with pytest.raises(ImageError, match=r"page\.jpg: not an image .*<!DOCTYPE.*expected JPEG"):
        decode(tmp_path / "page.jpg")


@pytest.mark.parametrize("file_format", ["PPM", "ICO", "TGA"])
def test_other_formats_that_pillow_knows_are_refused(file_format):
    with pytest.raises(ImageError, match="not an image of a format that is read"):
        decode(encode(scene(), file_format))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_image_names_the_file_and_format(tmp_path, file_format):
    data = encode(noise(40, 40), file_format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: len(data) // 2])
    message = rf"cut\.img: the {file_format} image is damaged, cut short .*\(.+\)\. Fetch"
    with pytest.raises(ImageError, match=message):
        decode(path)


def test_name_stands_for_bytes_in_errors():
    with pytest.raises(ImageError, match=r"^upload 3: not an image"):
        decode(b"none", name="upload 3")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on torn metadata
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
    ],
)
def test_damaged_bytes_give_an_image_or_an_image_error(file_format, options):
    exif = Image.Exif()
    exif[274] = 6
    data = encode(scene(), file_format, **options, **({"exif": exif} if options else {}))
    chance = random.Random(file_format)
    limits = ImageLimits(max_pixels=1 << 20)
    refused = 0
    for turn in range(150):
        damaged = bytearray(data if turn % 3 else data[: chance.randrange(len(data))])
        for _ in range(chance.randrange(1, 6) if turn % 3 else 0):
            # Mostly in the header, where the structure is.
            end = len(damaged) if chance.random() < 0.4 else min(len(damaged), 200)
            damaged[chance.randrange(end)] ^= 1 << chance.randrange(8)
        try:
            assert decode(bytes(damaged), limits=limits).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 0


# Limits


def test_file_size_is_checked_before_reading(tmp_path):
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # sparse
    with pytest.raises(ImageError, match=r"huge\.jpg: the file is too large \(got 8192\.0 MiB"):
        decode(path)


def test_size_of_bytes_is_checked():
    with pytest.raises(ImageError, match="too large"):
        decode(encode(scene(), "BMP"), limits=ImageLimits(max_bytes=100))


@pytest.mark.parametrize("side", [9_000, 10_000, 15_000, 60_000])
def test_decompression_bomb_is_refused_from_its_header(side):
    # The pixels are missing: whoever went as far as decoding would report a damaged file. At
    # 10,000 a side Pillow's own limit warns, and warnings are errors here; at 15,000 it raises.
    with pytest.raises(ImageError, match=rf"too many pixels \(got {side}x{side}, expected at mos"):
        decode(png(b"", (side, side), 8, 2))


def test_bomb_that_pillow_refuses_first_is_told_the_same_way():
    data = bytearray(encode(scene(), "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", 16383 | 16383 << 14)  # 14 bits each of width-1, height-1
    with pytest.raises(ImageError, match=r"too many pixels"):
        decode(bytes(data))


def test_limits_are_inclusive():
    limits = ImageLimits(max_pixels=64 * 4, min_side=4, max_aspect=16)
    assert decode(encode(noise(64, 4), "PNG"), limits=limits).size == (64, 4)


@pytest.mark.parametrize(
    ("size", "message"),
    [((1, 1), "too small"), ((3, 100), "too small"), ((4, 401), "too long and thin")],
)
def test_spacers_and_strips_are_refused(size, message):
    with pytest.raises(ImageError, match=rf"{message} \(got {size[0]}x{size[1]}"):
        decode(encode(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_strip_never_grows_to_gigabytes(mode):
    strip = Image.new("RGB", (1, 1_000_000))
    with pytest.raises(ImageError, match=r"^strip\.png: too long and thin \(got 1x1000000"):
        preprocess(strip, Preprocess((224, 224), crop_mode=mode), "strip.png")


# Geometry and normalisation

SIZES = [(37, 501), (224, 224), (225, 223), (1000, 50), (5, 7), (640, 427)]
RECIPES = [
    Preprocess((224, 224)),
    Preprocess((224, 224), crop_pct=0.875, interpolation="bilinear"),
    Preprocess((224, 224), crop_pct=1.0, interpolation="lanczos"),
    Preprocess((384, 384), crop_pct=1.0, crop_mode="squash"),
    Preprocess((64, 64), crop_pct=0.95, interpolation="nearest"),
    Preprocess((224, 320)),
    Preprocess((250, 190), crop_pct=0.93),
    Preprocess((224, 320), crop_pct=0.9, crop_mode="squash"),
    Preprocess((64, 64), crop_pct=1.0, crop_mode="border"),
    Preprocess((97, 64), crop_pct=0.9, crop_mode="border", mean=(0.5, 0.4, 0.3)),
    Preprocess((63, 63), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
]


def timm_pixels(timm: ModuleType, image: Image.Image, how: Preprocess) -> np.ndarray:
    transform = timm.data.create_transform(
        input_size=(3, *how.input_size),
        is_training=False,
        interpolation=how.interpolation,
        crop_pct=how.crop_pct,
        crop_mode=how.crop_mode,
        mean=how.mean,
        std=how.std,
    )
    return transform(image).numpy()


@pytest.mark.parametrize("how", RECIPES, ids=lambda p: f"{p.input_size}-{p.crop_mode}-{p.crop_pct}")
def test_input_is_that_of_timm_to_the_bit(timm, how):
    for size in SIZES:
        image = noise(*size)
        ours = preprocess(image, how)
        assert ours.dtype == np.float32
        assert np.array_equal(ours, timm_pixels(timm, image, how)), size


def test_photographs_give_the_input_of_timm_to_the_bit(timm, shared_data):
    paths = find_images([shared_data / "clothing-256-calibration"])[::50]
    paths.append(shared_data / "exif-orientation" / "Landscape_1.jpg")
    for how in (RECIPES[0], RECIPES[3], RECIPES[5], RECIPES[6], RECIPES[8]):
        for path in paths:
            theirs = timm_pixels(timm, Image.open(path).convert("RGB"), how)
            assert np.array_equal(load(path, how), theirs), (path.name, how)


def test_extreme_strip_in_border_mode_keeps_one_pixel():
    image = resize_and_crop(
        Image.new("RGB", (4, 2000), "red"), Preprocess((64, 64), crop_pct=1.0, crop_mode="border")
    )
    assert (np.asarray(image)[32] == (255, 0, 0)).all(axis=1).sum() == 1


def test_even_grey_gives_its_normalised_value():
    how = Preprocess((32, 48), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    array = preprocess(Image.new("L", (50, 40), 51), how)
    assert array.shape == (3, 32, 48)
    assert array.flags.c_contiguous
    expected = [0.2, -0.6, -3.2]
    assert np.allclose(array, np.array(expected)[:, None, None], rtol=0, atol=1e-6)


def test_load_takes_a_file_as_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(scene(), "PNG"))
    how = Preprocess((32, 32))
    assert np.array_equal(load(path, how), load(path.read_bytes(), how))


def test_load_names_the_file_that_cannot_be_resized(tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", (4, 4000)).save(path)
    with pytest.raises(ImageError, match=r"strip\.png: too long and thin"):
        load(path, Preprocess((4096, 4096)), ImageLimits(max_aspect=1e6))
