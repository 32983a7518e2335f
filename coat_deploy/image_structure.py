"""What an image file is made of, looked at before a decoder takes the file's word for it.

Decoders are bounded by pixels. Two things are not: how often a file may have them go over all
pixels (each scan of a progressive JPEG, of which one has a dozen bytes), and how many parts without
pixels it may bring, each of which Pillow handles in Python. Here both are counted, in files of any
kind of damage: what cannot be read any further is left for the decoder to say.
"""

import re
import struct

from coat_deploy.errors import ImageError

MAX_SCANS = 100
"""Of a JPEG; libtiff takes as many. A photograph has about ten."""
MAX_SEGMENTS = 512
"""Before the pixels of a JPEG, of 64 KiB each at most: what is of 32 MiB is not of a photograph."""
MAX_CHUNKS = 1 << 16
"""Of a PNG; of 4 KiB each they are 256 MiB."""
MAX_PROFILES = 4
"""Of a PNG, which may have one; each is unpacked."""
MAX_BLOCKS = 1 << 16
"""Before the pixels of a GIF, blocks of comments among them, of 255 bytes each at most."""

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # not what is stuffed, nor a restart
_START, _END, _SCAN, _ALONE = 0xD8, 0xD9, 0xDA, 0x01
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}


def check_jpeg(data: bytes, name: str) -> None:
    """Raise ImageError for a JPEG of too many segments or scans."""
    at, segments, scans, components = 2, 0, 0, 0
    progressive = False
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == _END:
            return
        if marker in (_START, _ALONE):
            continue
        if marker in _FRAMES:
            components, progressive = _byte(data, at + 7), marker in _PROGRESSIVE
        if marker == _SCAN:
            scans += 1
            if scans == 1 and not progressive and _byte(data, at + 2) >= components:
                return  # all of the pixels, and a decoder stops there
        elif not scans:
            segments += 1
        if scans > MAX_SCANS:
            raise _too_many(name, "JPEG", "scans", MAX_SCANS)
        if segments > MAX_SEGMENTS:
            raise _too_many(name, "JPEG", "segments before its pixels", MAX_SEGMENTS)
        at += max(2, int.from_bytes(data[at : at + 2], "big"))


def check_png(data: bytes, name: str) -> None:
    """Raise ImageError for a PNG of too many chunks."""
    at, chunks, profiles = 8, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        chunks += 1
        profiles += kind == b"iCCP"
        if chunks > MAX_CHUNKS:
            raise _too_many(name, "PNG", "chunks", MAX_CHUNKS)
        if profiles > MAX_PROFILES:
            raise _too_many(name, "PNG", "colour profiles", MAX_PROFILES)
        at += length + 12


def check_gif(data: bytes, name: str) -> None:
    """Raise ImageError for a GIF of too many blocks before its first frame."""
    flags, blocks = _byte(data, 10), 0
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while _byte(data, at) == 0x21:  # an extension: a label, and blocks up to one of no bytes
        at, length = at + 2, 1
        while length:
            length = _byte(data, at)
            at += 1 + length
            blocks += 1
            if blocks > MAX_BLOCKS:
                raise _too_many(name, "GIF", "blocks before its pixels", MAX_BLOCKS)


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return the (width, height) of a WebP; None where there is none.

    Pillow makes the decoder, with room for all pixels three times, before it tells the size.
    """
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return (
            1 + int.from_bytes(data[24:27], "little"),
            1 + int.from_bytes(data[27:30], "little"),
        )
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _byte(data: bytes, at: int) -> int:
    """Return a byte; behind the end 0, which ends whatever is counted."""
    return data[at] if at < len(data) else 0


def _too_many(name: str, kind: str, what: str, most: int) -> ImageError:
    return ImageError(
        f"{name}: the {kind} image has too many {what} (expected at most {most}). Save it again."
    )
