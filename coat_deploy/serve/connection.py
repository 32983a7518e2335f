"""Connections as uvicorn reads them, with limits on a request's head, and bodies in one piece.

uvicorn's fast parser takes heads of any length, for any time; it answers what it cannot parse in
plain text; it wakes the application for every part of a body, which it copies twice; and it sends
the head of an answer alone, so that a client wakes twice.
"""

import asyncio
from typing import Any, Self

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coat_deploy.serve.options import Limits
from coat_deploy.serve.replies import json_bytes

HEAD_TOO_LARGE = "431"
_HEAD = (
    "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n"
    "connection: close\r\n\r\n"
)


WORTH_WAKING = 4 << 20
"""Bytes of a body that are gathered before the application sees any of them."""


class Parts:
    """Parts of a body as they came, joined once; in place of uvicorn's bytearray."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def __iadd__(self, part: bytes) -> Self:
        self._parts.append(part)
        self._length += len(part)
        return self

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


class Joining(asyncio.Transport):
    """A transport that sends the head of an answer with the body, where that comes at once.

    It has what uvicorn asks of one while it answers, and no more.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport, self._loop = transport, loop
        self._head = b""

    def is_closing(self) -> bool:
        """Return whether it is closing or closed."""
        return self._transport.is_closing()

    def write(self, data: Any) -> None:
        """Send `data`; of a head not before the body, or all else that is to do now, is done."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        """Close it when all is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)


class Connection(HttpToolsProtocol):
    """A connection whose requests have to come with a head of some size, in some time."""

    limits = Limits()

    @property
    def expecting(self) -> bool:
        """Whether the head of a request is under way, or the first has not come yet."""
        return self._in_head

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request's head."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head, self._refused = True, False
        self._late: asyncio.TimerHandle | None = self._alarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless it is too much of a head."""
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_head:
            return
        if self._head_bytes > self.limits.header_bytes:
            self._refuse(
                f"{HEAD_TOO_LARGE} Request Header Fields Too Large", "the head is too large."
            )
        elif self._late is None:  # of a later request, begun and not whole
            self._late = self._alarm()

    def on_message_begin(self) -> None:
        """Begin to count: the head of a later request begins when its first byte is there."""
        super().on_message_begin()
        if not self._in_head:
            self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Stop counting."""
        self._in_head = False
        self._in_time()
        super().on_headers_complete()
        self.cycle.body = Parts()  # type: ignore[assignment]
        if self.scope["method"] != "HEAD":  # whose head would wait for a body that never comes
            self.cycle.transport = Joining(self.transport, self.loop)

    def on_body(self, body: bytes) -> None:
        """Gather a body; the application wakes when it is whole, or much of it is there."""
        if self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > WORTH_WAKING:
            self.flow.pause_reading()
            self.cycle.message_event.set()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse("400 Bad Request", "the request is not HTTP as it should be.")

    def _alarm(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self.limits.header_s, self._too_late)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self._refuse("408 Request Timeout", "the head of the request did not come in time.")

    def _refuse(self, status: str, message: str) -> None:
        """Answer what cannot be read, behind the answer that a whole request before it is owed."""
        self._refused = True
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body or cycle.response_started:
                cycle.keep_alive = False
                return
            cycle.disconnected = True  # its body will never be whole
            cycle.message_event.set()
        content = json_bytes({"error": message})
        head = _HEAD.format(status=status, length=len(content))
        self.transport.write(head.encode() + content)
        self.transport.close()


def connections(limits: Limits) -> type[asyncio.Protocol]:
    """Return the class of connections with these limits, for uvicorn to make."""
    return type("LimitedConnection", (Connection,), {"limits": limits})
