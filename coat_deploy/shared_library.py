"""What a shared library needs of others, read from its file: nothing is loaded."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_HEADER = struct.Struct("<16s2HI3QI6H")
_SECTION = struct.Struct("<2I4Q2I2Q")
_ENTRY = struct.Struct("<2Q")
_DYNAMIC, _NEEDED = 6, 1
"""The type of section that lists what is needed, and the tag of such an entry."""


def needed(path: Path) -> tuple[str, ...]:
    """Return the libraries that a 64-bit ELF file needs, by name; none of any other file."""
    try:
        with path.open("rb") as file:
            return tuple(_needed(file))
    except (OSError, ValueError, struct.error):
        return ()


def _needed(file: BinaryIO) -> Iterator[str]:
    header = _HEADER.unpack(file.read(_HEADER.size))
    if header[0][:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        raise ValueError
    place, size, count = header[6], header[11], header[12]
    sections = [_SECTION.unpack(_at(file, place + i * size, _SECTION.size)) for i in range(count)]
    for _, kind, _, _, offset, length, link, *_ in sections:
        if kind != _DYNAMIC:
            continue
        names = _at(file, sections[link][4], sections[link][5])
        for tag, value in _ENTRY.iter_unpack(_at(file, offset, length)):
            if tag == _NEEDED:
                yield names[value : names.index(b"\0", value)].decode()


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
