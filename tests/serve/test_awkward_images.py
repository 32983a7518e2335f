"""Files that are hardly images: labels as `predict` gives them, or a sentence that says why not."""

import io
import json
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from coat_deploy import images
from coat_deploy.errors import ImageError
from coat_deploy.images import decode, load
from coat_deploy.measure.proof import probe_images
from coat_deploy.serve.binary import HEADER_LENGTH

NAME = "coat_lite_toy"

# Of broken metadata Pillow warns; an image is not spoilt by it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL[.].*")


def saved(kind, image, **how):
    content = io.BytesIO()
    image.copy().save(content, kind, **how)  # what is saved keeps settings for the next time
    return content.getvalue()


def picture(mode="RGB"):
    (pixels,) = probe_images((90, 120), 1)
    return Image.fromarray(pixels.transpose(1, 2, 0)).convert(mode)


PICTURE, BLUE = picture(), Image.new("RGB", (120, 90), "blue")
JPEG, PNG, GREY = saved("JPEG", PICTURE), saved("PNG", PICTURE), saved("PNG", picture("L"))


def chunk(kind, content=b""):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width, height, depth, colour, rows, *chunks):
    """A PNG of samples that Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = b"".join(b"\0" + row for row in rows)
    parts = (chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep(mode):
    """The picture in 16 bits, whose lower 8 mean nothing."""
    pixels = np.asarray(picture(mode)).astype(">u2") << 8 | 0x5A
    rows = [row.tobytes() for row in pixels.astype(">u2")]
    return png(120, 90, 16, 2 if mode == "RGB" else 0, rows)


def segment(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def in_front(content, jpeg=JPEG):
    return jpeg[:2] + content + jpeg[2:]


def exif(orientation):
    found = Image.Exif()
    found[274] = orientation
    return found.tobytes()


def ycck():
    """The picture's negative as CMYK, said to be YCCK."""
    content = saved("JPEG", picture("CMYK"), quality=95)
    start = content.index(b"Adobe") + 11
    return content[:start] + b"\x02" + content[start + 1 :]


def palette(transparent):
    image = PICTURE.quantize(16)
    return saved("PNG", image, transparency=0) if transparent else saved("PNG", image)


def on_white(content):
    """What a transparent image shows on a white page."""
    with Image.open(io.BytesIO(content)) as image:
        canvas = Image.new("RGBA", image.size, "white")
        return saved("PNG", Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB"))


def plain(content):
    """What Pillow shows of the first frame."""
    with Image.open(io.BytesIO(content)) as image:
        return saved("PNG", image.convert("RGB"))


def frames(kind, **how):
    others = [BLUE.copy()]
    return saved(kind, PICTURE, save_all=True, append_images=others, **how)


GIF, WEBP = frames("GIF"), frames("WEBP", lossless=True)
CMYK, YCCK = saved("JPEG", picture("CMYK")), ycck()
ALPHA = PICTURE.copy()
ALPHA.putalpha(picture("L"))
IMAGES = {
    "CMYK": (CMYK, plain(CMYK)),
    "YCCK": (YCCK, plain(YCCK)),
    "grey of 16 bits": (deep("L"), GREY),
    "RGB of 16 bits": (deep("RGB"), PNG),
    "palette": (palette(False), plain(palette(False))),
    "palette with transparency": (palette(True), on_white(palette(True))),
    "alpha": (saved("PNG", ALPHA), on_white(saved("PNG", ALPHA))),
    "one bit": (saved("PNG", picture("1")), plain(saved("PNG", picture("1")))),
    "one bit, TIFF": (
        saved("TIFF", picture("1"), compression="group4"),
        plain(saved("PNG", picture("1"))),
    ),
    "animated GIF": (GIF, plain(GIF)),
    "animated PNG": (frames("PNG"), PNG),
    "animated WebP": (WEBP, PNG),
    "several photographs": (frames("MPO"), JPEG),
    "several pages": (frames("TIFF"), PNG),
    "orientation": (
        saved("PNG", PICTURE, exif=exif(6)),
        saved("PNG", PICTURE.transpose(Image.Transpose.ROTATE_270)),
    ),
    "orientation out of range": (saved("JPEG", PICTURE, exif=exif(9)), JPEG),
    "orientation of no use": (saved("JPEG", PICTURE, exif=exif(0)), JPEG),
    "EXIF of rubbish": (in_front(segment(0xE1, b"Exif\0\0" + b"rubbish" * 9)), JPEG),
    "EXIF that loops": (
        in_front(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\1\0\0\0\x08\0\0\0")),
        JPEG,
    ),
    "EXIF of nothing": (in_front(segment(0xE1, b"Exif\0\0")), JPEG),
    "colour profile of rubbish": (saved("JPEG", PICTURE, icc_profile=b"rubbish"), JPEG),
    "colour profile of rubbish, PNG": (saved("PNG", PICTURE, icc_profile=b"rubbish"), PNG),
    "a ZIP behind it": (JPEG + b"PK\x03\x04" + bytes(500) + b"PK\x05\x06" + bytes(18), JPEG),
    "PDF in a comment": (in_front(segment(0xFE, b"%PDF-1.7 trailer %%EOF")), JPEG),
    "HTML in a comment": (in_front(segment(0xFE, b"<script>alert(1)</script>")), JPEG),
    "a photograph behind it": (PNG + JPEG, PNG),
}
"""Each file, and a plain one that has the same pixels."""


def cut(content, share):
    return content[: round(share * len(content))]


def header_only(kind, width, height):
    """A file that says how large it is, and has next to no pixels."""
    if kind == "PNG":
        return png(width, height, 1, 0, [b"\0"])
    if kind == "GIF":
        frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\x01\0\0;"
        return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame
    if kind == "WEBP":
        bits = (width - 1) | (height - 1) << 14
        body = b"VP8L" + struct.pack("<IBI", 5, 0x2F, bits) + b"\0"
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    if kind == "BMP":
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head
    frame = segment(0xC0, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\0")
    return b"\xff\xd8" + frame + segment(0xDA, b"\x01\x01\0\0\x3f\0") + b"\xff\xd9"


def broken_tiff(tag, value):
    """A TIFF with another value in its directory."""
    content = bytearray(saved("TIFF", PICTURE))
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", content, entry)[0] == tag:
            content[entry + 4 : entry + 12] = struct.pack("<II", 1, value)
    return bytes(content)


DAMAGED = "damaged, cut short or of an unknown kind"
NO_IMAGE = "not an image of a format that is read"
RIFF = b"RIFF" + struct.pack("<I", 40)
REFUSED = {
    **{f"{s:.0%} of a JPEG": (cut(JPEG, s), DAMAGED) for s in (0.01, 0.1, 0.5, 0.9)},
    **{f"{s:.0%} of a PNG": (cut(PNG, s), DAMAGED) for s in (0.01, 0.1, 0.5, 0.9)},
    **{f"half a {k}": (cut(saved(k, PICTURE), 0.5), DAMAGED) for k in ("GIF", "WEBP", "TIFF")},
    "half a BMP": (cut(saved("BMP", PICTURE), 0.5), DAMAGED),
    "wrong check sum": (PNG[:29] + bytes(4) + PNG[33:], DAMAGED),
    "RIFF of sound": (RIFF + b"WAVEfmt " + bytes(28), DAMAGED),
    "GIF of a script": (b"GIF89a/*" + bytes(40) + b"*/=1;alert(1)", DAMAGED),
    "TIFF that loops": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", DAMAGED),
    "TIFF without end": (b"II*\0\xff\xff\xff\xff", DAMAGED),
    "TIFF of strips elsewhere": (broken_tiff(273, 1 << 31), DAMAGED),
    "TIFF of an unknown compression": (broken_tiff(259, 4242), DAMAGED),
    "floats": (saved("TIFF", picture("F")), "no known black and white"),
    "nothing": (b"", "is empty (0 bytes)"),
    "one byte": (b"\xff", NO_IMAGE),
    "zeros": (bytes(1000), NO_IMAGE),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", NO_IMAGE),
    "HTML": (b"<!doctype html><img src=x>", NO_IMAGE),
    "XML with an entity": (b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY x SYSTEM 'a'>]>", NO_IMAGE),
    "PDF": (saved("PDF", PICTURE), NO_IMAGE),
    "EPS": (saved("EPS", PICTURE), NO_IMAGE),
    "EPS for DOS": (b"\xc5\xd0\xd3\xc6" + bytes(26) + saved("EPS", PICTURE), NO_IMAGE),
    "WMF": (b"\xd7\xcd\xc6\x9a" + bytes(40), NO_IMAGE),
    "PPM": (saved("PPM", PICTURE), NO_IMAGE),
    "ICO": (saved("ICO", PICTURE), NO_IMAGE),
    "TGA": (saved("TGA", PICTURE), NO_IMAGE),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), NO_IMAGE),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), NO_IMAGE),
    "ZIP": (b"PK\x03\x04" + JPEG, NO_IMAGE),
    "1x1": (saved("PNG", Image.new("L", (1, 1))), "too small (got 1x1 pixels"),
    "1x5000": (saved("PNG", Image.new("L", (1, 5000))), "too small (got 1x5000 pixels"),
    "5x5000": (saved("PNG", Image.new("L", (5, 5000))), "too long and thin (got 5x5000"),
    "0x0 PNG": (header_only("PNG", 0, 0), ""),
    "0x0 GIF": (header_only("GIF", 0, 0), ""),
    "0x9 JPEG": (header_only("JPEG", 9, 0), ""),
    "negative BMP": (header_only("BMP", -9, 9), ""),
    **{
        f"a bomb, {kind}": (header_only(kind, 16_000, 16_000), "too many pixels")
        for kind in ("PNG", "GIF", "WEBP", "BMP", "JPEG")
    },
}
"""Each file, and words of the sentence that refuses it."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No other program is to be started for an image: Pillow would ask Ghostscript for EPS."""

    def never(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", never)


def labels(client, content, path=NAME, **how):
    answer = client.post(f"/models/{path}", content=content, **how)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(("content", "plain"), IMAGES.values(), ids=IMAGES)
def test_an_image_gets_the_labels_of_its_pixels(client, content, plain):
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(decode(plain)))
    assert labels(client, content) == labels(client, plain)


@pytest.mark.parametrize("content", [content for content, _ in IMAGES.values()], ids=IMAGES)
def test_its_labels_are_those_of_the_pixels_that_predict_prepares(client, shared_service, content):
    pixels = load(content, shared_service.registry.get(NAME).processing.how)
    body = pixels.tobytes()
    answer = client.post(f"/v2/models/{NAME}/infer", content=body, headers={HEADER_LENGTH: "0"})
    length = int(answer.headers[HEADER_LENGTH])
    logits = np.frombuffer(answer.content[length:], np.float32).astype(np.float64)
    shares = np.exp(logits - logits.max())
    found = sorted(label["score"] for label in labels(client, content))
    assert found == pytest.approx(sorted(shares / shares.sum()), abs=1e-6)


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_refused_with_a_sentence(client, content, words):
    answer = client.post(f"/models/{NAME}", content=content)
    assert answer.status_code == 400, answer.text
    (sentence,) = answer.json().values()
    assert words in sentence and sentence.endswith(".") and "Traceback" not in sentence
    with pytest.raises(ImageError) as error:
        decode(content, "image")
    assert str(error.value) == sentence


@pytest.mark.parametrize("kind", ["image/jpeg", "image/svg+xml", "application/pdf", "text/html"])
def test_the_content_says_what_it_is(client, kind):
    found = labels(client, PNG, headers={"content-type": kind})
    assert found == labels(client, PNG)


def test_of_several_images_one_that_is_none_spoils_the_request_alone(client):
    """The other client's image, computed in the same moment, has its own labels."""
    good = labels(client, PNG)
    for content, _ in REFUSED.values():
        assert client.post(f"/models/{NAME}", content=content).status_code == 400
    assert labels(client, PNG) == good


def test_formats_are_those_that_are_named():
    formats = {plugin.format for _, plugin in images._FORMATS}
    assert formats == {"JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"}


def test_what_is_told_of_a_file_is_text(client):
    answer = client.post(f"/models/{NAME}", content=bytes(range(128, 256)))
    assert json.loads(answer.content)["error"].isascii()
