"""Who goes first where the event loop and what computes want the same cores.

Requests are taken in, refused and counted in microseconds, and an image takes milliseconds: while
all cores compute, a server whose threads are all alike says after tens of milliseconds that its
queue is full, or that it is well.
"""

import contextlib
import os
import sys
import threading

NICENESS = 5
"""How much nicer threads that compute are, of the 19 that Linux knows: they get a third of a core
that the event loop wants too, and all of what it does not want."""


def step_back() -> None:
    """Let this thread, and every one that it starts, come after the event loop's.

    Only Linux counts niceness by thread; elsewhere all are alike.
    """
    if sys.platform != "linux":
        return
    me = threading.get_native_id()
    with contextlib.suppress(OSError):  # a sandbox that forbids it
        os.setpriority(os.PRIO_PROCESS, me, os.getpriority(os.PRIO_PROCESS, me) + NICENESS)
