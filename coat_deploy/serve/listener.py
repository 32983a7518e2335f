"""The socket that HTTP listens on: bound, and closed with nobody left in its queue.

A kernel completes connections by itself, and resets those that wait to be taken when their listener
closes: to a client that is a request lost, not one refused. So first new ones are kept from
beginning, and those that are there are taken.
"""

import asyncio
import contextlib
import ctypes
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence

from coat_deploy.errors import ServerError
from coat_deploy.serve.options import ListenOptions

SO_ATTACH_FILTER = 26
"""Of Linux; Python has no name for it."""
STEP_S = 0.001

_LOAD_BYTE, _JUMP_IF_SET, _RETURN = 0x30, 0x45, 0x06  # BPF_LD+B+ABS, BPF_JMP+JSET+K, BPF_RET+K
_TCP_FLAGS, _SYN, _ACK = 13, 0x02, 0x10
_NO_BEGINNINGS = (
    (_LOAD_BYTE, 0, 0, _TCP_FLAGS),
    (_JUMP_IF_SET, 1, 0, _ACK),
    (_JUMP_IF_SET, 1, 0, _SYN),
    (_RETURN, 0, 0, 0xFFFFFFFF),
    (_RETURN, 0, 0, 0),
)
"""A filter of packets that drops what begins a connection, SYN without ACK, and passes the rest."""


def bind(listen: ListenOptions) -> socket.socket:
    """Return a socket at the address. Raises ServerError when it cannot be had."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((listen.host, listen.port))
    except (OSError, OverflowError) as error:
        place.close()
        reason = getattr(error, "strerror", None) or error
        raise ServerError(
            f"{listen.host}:{listen.port}: cannot listen there ({reason}). "
            "Choose another --port or --host."
        ) from error
    place.setblocking(False)
    return place


def turn_away(places: Sequence[socket.socket]) -> None:
    """Let no connection begin any more; those that have begun still come.

    Who tries is not answered, and tries again in a second, when the socket is closed and says no.
    Shared sockets turn away for all processes. Where the system knows no such filter, on others
    than Linux, connections begin until the socket is closed.
    """
    if sys.platform != "linux":
        return
    code = b"".join(struct.pack("HBBI", *step) for step in _NO_BEGINNINGS)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(_NO_BEGINNINGS), ctypes.addressof(held))
    for place in places:
        with contextlib.suppress(OSError):
            place.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


async def emptied(places: Sequence[socket.socket], timeout_s: float) -> None:
    """Wait until the event loop has taken all connections that wait, or for a time."""
    waiting = select.poll()
    for place in places:
        waiting.register(place, select.POLLIN)
    until = time.monotonic() + timeout_s
    while waiting.poll(0) and time.monotonic() < until:
        await asyncio.sleep(STEP_S)
