import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from coat_deploy.errors import ImageError
from coat_deploy.image_structure import (
    MAX_BLOCKS,
    MAX_CHUNKS,
    MAX_PROFILES,
    MAX_SCANS,
    MAX_SEGMENTS,
    webp_size,
)
from coat_deploy.images import ImageLimits, decode

PICTURE = Image.linear_gradient("L").convert("RGB")


def saved(kind, image=PICTURE, **how):
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()


def same(content, plain):
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(decode(plain)))


def refused(content, words):
    with pytest.raises(ImageError, match=words):
        decode(content)


def progressive(scans):
    """A JPEG of so many scans, the last of them again and again."""
    content = saved("JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (scans - content.count(b"\xff\xda")) + b"\xff\xd9"


def test_scans_of_a_jpeg_are_counted():
    assert decode(progressive(MAX_SCANS)).size == PICTURE.size
    refused(progressive(MAX_SCANS + 1), "too many scans .expected at most 100")


def test_what_stands_behind_a_jpeg_is_no_part_of_it():
    for content in (saved("JPEG"), saved("JPEG", progressive=True)):
        same(content + b"\xff\xda" * 10_000, content)  # as in the video of a moving photograph


def test_segments_of_a_jpeg_are_counted():
    content = saved("JPEG")
    comment = b"\xff\xfe\x00\x05abc"
    same(content[:2] + comment * (MAX_SEGMENTS - 20) + content[2:], content)
    refused(content[:2] + comment * MAX_SEGMENTS + content[2:], "too many segments")


def chunk(kind, content=b""):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def with_chunks(chunks):
    content = saved("PNG")
    return content[:33] + chunks + content[33:]


def test_chunks_of_a_png_are_counted():
    same(with_chunks(chunk(b"prIv") * 1000), saved("PNG"))
    refused(with_chunks(chunk(b"prIv") * MAX_CHUNKS), "too many chunks")


def test_colour_profiles_of_a_png_are_counted():
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000)))
    same(with_chunks(profile * MAX_PROFILES), saved("PNG"))
    refused(with_chunks(profile * (MAX_PROFILES + 1)), "too many colour profiles")


@pytest.mark.parametrize("comment", [b"\x21\xfe\x01a\x00", b"\x21\xfe" + b"\x01a" * 999 + b"\0"])
def test_blocks_of_a_gif_are_counted(comment):
    content = saved("GIF")
    start = 13 + 3 * 256
    same(content[:start] + comment * 10 + content[start:], content)
    many = comment * (MAX_BLOCKS // comment.count(b"\x01a") + 1)
    refused(content[:start] + many + content[start:], "too many blocks before its pixels")


@pytest.mark.parametrize("how", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}, {"quality": 1}])
@pytest.mark.parametrize("size", [(7, 300), (256, 256), (1023, 5)])
def test_the_size_of_a_webp_is_read_without_a_decoder(how, size):
    assert webp_size(saved("WEBP", PICTURE.resize(size), **how)) == size


def test_a_webp_of_too_many_pixels_gets_no_decoder(monkeypatch):
    content = saved("WEBP")

    def never(*_):
        raise AssertionError("Pillow made room for all pixels")

    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.__init__", never)
    with pytest.raises(ImageError, match="too many pixels .got 256x256"):
        decode(content, limits=ImageLimits(max_pixels=256 * 255))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_file_may_be_cut_anywhere(kind):
    content = saved(
        kind, PICTURE.resize((16, 16)), **({"progressive": 1} if kind == "JPEG" else {})
    )
    for end in range(len(content)):
        try:
            image = decode(content[:end])
        except ImageError:
            continue
        assert image.size == (16, 16)  # but for what is behind the pixels
