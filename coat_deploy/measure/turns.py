"""Turns: contenders measured round after round until their figures stand still.

In a round every contender has one turn, in an order shuffled anew, and only one works at a time.
What slows the machine for a while slows all of them, and a ratio taken over rounds in pairs
hardly notices.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from coat_deploy.errors import RunnerError
from coat_deploy.measure.latency import Samples, Stopped, is_stable
from coat_deploy.measure.worker import Worker

Tell = Callable[[int, float], None]
"""(rounds done, share of the budget spent)."""


class Entrant(ABC):
    """Somebody who takes turns: a process, what it has shown so far, and why it is out."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.worker = Worker(f"bench {name}", timeout_s)
        self.error: str | None = None

    def attempt(self, action: Callable[[], None]) -> None:
        """Do `action`; when it fails, note why and end the process."""
        try:
            action()
        except RunnerError as error:
            self.error = str(error)
            self.worker.close()

    @abstractmethod
    def measure(self) -> None:
        """Take one turn."""

    @abstractmethod
    def figures(self) -> Samples:
        """Return a figure for every turn taken, (rounds,)."""


AnyEntrant = TypeVar("AnyEntrant", bound=Entrant)


def still_in(entrants: Sequence[AnyEntrant]) -> list[AnyEntrant]:
    """Return those that have not failed."""
    return [entrant for entrant in entrants if entrant.error is None]


def take_turns(
    entrants: Sequence[Entrant],
    generator: np.random.Generator,
    tell: Tell,
    *,
    budget_s: float,
    stability: float,
    min_rounds: int,
) -> Stopped:
    """Measure in rounds, at least `min_rounds`, until it is decided or `budget_s` is spent.

    It is decided when the 95 % interval of everybody's median is within +- `stability` of it.
    """
    start = time.perf_counter()
    count = 0
    while live := still_in(entrants):
        for index in generator.permutation(len(live)):
            live[index].attempt(live[index].measure)
        count += 1
        share = (time.perf_counter() - start) / max(budget_s, 1e-9)
        tell(count, min(share, 1.0))
        if count < min_rounds:
            continue
        if all(is_stable(entrant.figures(), stability) for entrant in still_in(entrants)):
            return "stable"
        if share >= 1:
            return "budget"
    return "budget"  # nobody is left; no result will say so
