"""Bodies of requests: read with limits on size and time, unpacked with limits on what comes out."""

import asyncio
import zlib
from typing import Self

from starlette.requests import Request

from coat_deploy.errors import RequestError
from coat_deploy.serve.options import Limits
from coat_deploy.serve.waiting import in_time

_IN_THE_LOOP = 64 << 10
"""Packed bodies up to so many bytes are unpacked at once, larger ones in a thread."""

_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_RAW_DEFLATE = -15
ENCODINGS = ("identity", *_WINDOW)
"""What a body may be packed in."""


class Receiving:
    """Bytes of bodies that are held at the moment, of all requests together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    def share(self) -> "Share":
        """Return one request's share, to be entered; it is given back in the end."""
        return Share(self)

    def take(self, num_bytes: int) -> None:
        """Hold more. Raises RequestError when it is too much."""
        if self._held + num_bytes > self._limits.receiving_bytes:
            raise RequestError(
                f"the server holds {self._held >> 20} MiB of other requests. Try again.",
                "overloaded",
                1,
            )
        self._held += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Hold less."""
        self._held -= num_bytes


class Share:
    """What one request holds of the room for bodies."""

    def __init__(self, receiving: Receiving) -> None:
        self._receiving = receiving
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._receiving.give_back(self.num_bytes)

    def add(self, num_bytes: int) -> None:
        """Hold more. Raises RequestError when it is too much."""
        self._receiving.take(num_bytes)
        self.num_bytes += num_bytes


async def read_body(request: Request, limits: Limits, share: Share) -> memoryview:
    """Return a request's body, unpacked.

    Raises: RequestError for one that is too large, too slow or not packed as it says.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ENCODINGS:
        raise RequestError(
            f"content-encoding '{encoding:.40}': is not read (expected gzip or deflate).",
            "unsupported",
        )
    check_length(request, limits)
    parts: list[bytes] = []
    try:
        await in_time(limits.deadline_s, _receive(request, limits, share, parts))
    except TimeoutError:
        raise RequestError(
            f"the body did not come in {limits.deadline_s:g} s (got {sum(map(len, parts))} bytes). "
            "Send it faster.",
            "slow",
        ) from None
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    if encoding in _WINDOW:
        body = await _unpacked(body, encoding, limits, share)
    return memoryview(body)


def check_length(request: Request, limits: Limits) -> None:
    """Raise RequestError for a body that says beforehand that it is too large."""
    length = request.headers.get("content-length", "0")
    # The HTTP parser has checked that it is a number.
    if len(length) > 18 or int(length or 0) > limits.body_bytes:
        raise _too_large(length, limits)


async def _receive(request: Request, limits: Limits, share: Share, parts: list[bytes]) -> None:
    """Append the parts of a body as they come, to its end."""
    length, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client is gone.", "cancelled")
        if part := message.get("body", b""):
            length += len(part)
            if length > limits.body_bytes:
                raise _too_large(f"more than {limits.body_bytes}", limits)
            share.add(len(part))
            parts.append(part)
        more = message.get("more_body", False)


async def _unpacked(packed: bytes, encoding: str, limits: Limits, share: Share) -> bytes:
    if len(packed) <= _IN_THE_LOOP:
        unpacked = _unpack(packed, encoding, limits)
    else:
        unpacked = await asyncio.to_thread(_unpack, packed, encoding, limits)
    share.add(len(unpacked))
    return unpacked


def _unpack(packed: bytes, encoding: str, limits: Limits) -> bytes:
    """Return what was packed, and stop as soon as it is too much."""
    window = _WINDOW[encoding]
    # "deflate" is zlib's format, but some clients send the bare stream.
    if encoding == "deflate" and packed and (packed[0] & 0x0F) != 8:
        window = _RAW_DEFLATE
    unpacker = zlib.decompressobj(window)
    try:
        content = unpacker.decompress(packed, limits.body_bytes + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not {encoding} ({error}). Pack it again.") from error
    if len(content) > limits.body_bytes:
        raise _too_large(f"more than {limits.body_bytes} unpacked", limits)
    if not unpacker.eof or unpacker.unused_data:
        what = "is cut short" if not unpacker.eof else "goes on behind its end"
        raise RequestError(f"the {encoding} body {what}. Send it whole.")
    return content


def _too_large(length: object, limits: Limits) -> RequestError:
    return RequestError(
        f"the body is too large (got {length} bytes, expected at most {limits.body_bytes}). "
        "Send fewer images, or encoded ones.",
        "too_large",
    )
