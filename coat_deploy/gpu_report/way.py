"""A way to run a network on the device: PyTorch in one of its modes, or a runtime."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coat_deploy.gpu_report.timing import Step
from coat_deploy.runner import Array, Pixels


@dataclass(frozen=True)
class Place:
    """Where a way is opened: the device, a folder for files, and the batches that will come."""

    device: str
    folder: Path
    batches: tuple[int, ...]


class Opened(Protocol):
    """A network that was opened, for as long as its process lives."""

    def logits(self, pixels: Pixels) -> Array:
        """Return the logits of images, float32."""
        ...

    def bind(self, inputs: Sequence[Pixels]) -> Step:
        """Return a step on inputs of one shape that take turns."""
        ...

    def memory_mib(self) -> float | None:
        """Return the most device memory that was held so far, where that is known."""
        ...


@dataclass(frozen=True)
class Way:
    """One row of the report.

    `missing` says why it cannot be opened on a device, before a process is started. `open` takes a
    variant and a place; it is called in a process of the way's own, so it is a module's function
    or a `functools.partial` of one. `checked`: its numbers are held against float64's, and not
    those of another way alone. `least_s` and `most_s`: what timing it takes at least, and may take
    at most, compiling included. `relative_limit`: of its distance from float64; None leaves it to
    the bar of its precision.
    """

    name: str
    precision: str
    open: Callable[[str, Place], Opened]
    missing: Callable[[str], str | None]
    checked: bool = True
    least_s: float = 15.0
    most_s: float = 45.0
    relative_limit: float | None = None
