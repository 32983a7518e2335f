"""Signals that ask a training to end: it saves first."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from coat_deploy.cli import console

SAME_SIGNAL_S = 1.0
"""A signal so soon after another is the same one: launchers hand on to their processes what the
terminal or the cluster has sent to these as well."""


class Stop:
    """Tells whether a signal asked us to end, for the loop to save first; a second ends at once.

    Signals are taken over with the first question, after the first step: before it there is
    nothing to save, and they end the command as any other. `received` is the first one's number.
    """

    def __init__(self, told: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.received: int | None = None
        self._told, self._clock = told, clock
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether to save and leave."""
        if not self._before:
            self._before = {s: signal.getsignal(s) for s in console.SIGNALS}
            for number, handler in self._before.items():
                if handler != signal.SIG_IGN:
                    signal.signal(number, self._note)
        return self.received is not None

    def close(self) -> None:
        """Hand the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = self._clock()
        if self.received is None:
            self.received, self._since = number, now
            if self._told:
                with contextlib.suppress(RuntimeError):  # in the middle of another line
                    console.note("saving; once more to stop at once.")
        elif now - self._since >= SAME_SIGNAL_S:
            self.close()
            signal.raise_signal(number)


@contextlib.contextmanager
def stopping_on_signals(told: bool = True) -> Iterator[Stop]:
    """Let the first signal be noted while the body runs; `told`: say on stderr that it was."""
    stop = Stop(told)
    try:
        yield stop
    finally:
        stop.close()
