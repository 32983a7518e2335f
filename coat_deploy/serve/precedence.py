"""Who goes first where the event loop and what computes want the same cores.

Requests are taken in, refused and counted in microseconds, and an image takes milliseconds: while
all cores compute, a server whose threads are all alike says after tens of milliseconds that its
queue is full, or that it is well.
"""

import contextlib
import os
import sys

NICENESS = 5
"""How much nicer threads that compute are, of the 19 that Linux knows: they get a quarter of a core
that the event loop wants too (weights 335 and 1024), and all of what it does not want."""


def step_back() -> None:
    """Let this thread, and every one that it starts, come after the event loop's.

    Only Linux counts niceness by thread; elsewhere it is the process's, and all stay alike.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox that forbids it
            os.nice(NICENESS)
