"""The time that a report may take, and what is left of it."""

import time

TO_FINISH_S = 3.0
"""Kept for writing what was found."""


class Budget:
    """Seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + max(seconds - TO_FINISH_S, 0.0)

    def left(self) -> float:
        """Return the seconds that are left, none below 0."""
        return max(self._end - time.monotonic(), 0.0)

    def allot(self, least: float, most: float) -> tuple[float, str | None]:
        """Return the seconds that something may take, or why it is not worth a start."""
        left = self.left()
        if left < least:
            return 0.0, f"{left:.0f} s of the budget are left, and it takes about {least:.0f}"
        return min(most, left), None
