"""A line of JSON a request, written by a thread of its own: a slow reader stalls no request."""

import json
import queue
import sys
import threading
import time
from typing import Any, TextIO

GATHER_S = 0.1
"""How long lines are gathered: a thread that wakes for every answer is in the way of the next."""
MOST_WAITING = 10_000
"""Lines that wait to be written; more are left out, and how many is said."""


class AccessLog:
    """Writes lines to a stream in the order they come."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._left_out = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="access log", daemon=True)
        self._thread.start()

    def add(self, **entry: Any) -> None:
        """Log a request; returns at once."""
        if self._lines.qsize() >= MOST_WAITING:
            self._left_out += 1
            return
        self._lines.put({"time": round(time.time(), 3), **entry})

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is left, if the reader takes it in time."""
        self._closing.set()
        self._lines.put(None)
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while True:
            entries = [self._lines.get()]
            self._closing.wait(GATHER_S)
            while not self._lines.empty():
                entries.append(self._lines.get())
            text = "".join(json.dumps(entry) + "\n" for entry in entries if entry)
            if self._left_out:
                left_out, self._left_out = self._left_out, 0
                text += json.dumps({"time": round(time.time(), 3), "left_out": left_out}) + "\n"
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):  # the reader is gone, or the stream closed
                return
            if None in entries:
                return
