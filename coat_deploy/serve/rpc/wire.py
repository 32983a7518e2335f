"""Tensors taken out of a request before protobuf reads it.

A ModelInferRequest is mostly `raw_input_contents`. They are found by walking over the message's own
fields, so that they are not copied twice, and a message of a million tiny parts is refused before
each of them becomes an object.
"""

from coat_deploy.errors import RequestError

RAW_CONTENTS = 7
"""Number of the field `raw_input_contents`."""
MAX_FIELDS = 1024
"""Most fields of a request, each element of a repeated one counted."""
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


def split(content: bytes) -> tuple[bytes, list[memoryview]]:
    """Return a request without its raw contents, and these. Raises RequestError."""
    view, start = memoryview(content), 0
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    while start < len(content):
        if len(rest) + len(raw) == MAX_FIELDS:
            raise RequestError(
                f"the message has too many parts (expected at most {MAX_FIELDS}).", "too_large"
            )
        tag, data = _varint(content, start)
        field, kind = tag >> 3, tag & 7
        if kind == _LENGTH:
            length, data = _varint(content, data)
            end = data + length
        elif kind == _VARINT:
            _, end = _varint(content, data)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            end = data + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise _malformed(start)
        if end > len(content) or not field:
            raise _malformed(start)
        if field == RAW_CONTENTS and kind == _LENGTH:
            raw.append(view[data:end])
        else:
            rest.append(view[start:end])
        start = end
    return b"".join(rest), raw


def _varint(content: bytes, start: int) -> tuple[int, int]:
    """Return the number at `start`, and where it ends."""
    number = 0
    for i, byte in enumerate(content[start : start + _LONGEST_VARINT]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return number, start + i + 1
    raise _malformed(start)


def _malformed(start: int) -> RequestError:
    return RequestError(f"the message is not a ModelInferRequest (malformed at byte {start}).")
