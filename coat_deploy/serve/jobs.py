"""A request on its way through a model: its images, and who waits for them."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coat_deploy.errors import RequestError
from coat_deploy.runner import Array, Pixels
from coat_deploy.spec import Size

Outputs = Mapping[str, Array]
MakePixels = Callable[[], Array]
"""Decodes and prepares an image, (3, H, W); called in a worker's thread. Raises ImageError."""


@dataclass(frozen=True, eq=False)
class Work:
    """What a request brings: pixels (B, 3, H, W), or for each image what makes them.

    `num_bytes` are held until it is computed. Only images of one `size`, (H, W), share a batch.
    """

    pixels: Pixels | Sequence[MakePixels]
    num_bytes: int
    size: Size

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.pixels)

    @property
    def encoded(self) -> bool:
        """Whether the pixels have to be made first."""
        return not isinstance(self.pixels, np.ndarray)


@dataclass(eq=False)
class Job:
    """A request in the queue of a model, or computed in parts.

    `taken` and `done` count images. `answer` belongs to the event loop; workers only reach it by
    `settle`. Times are `time.perf_counter_ns`, `deadline` is of `time.monotonic`.
    """

    work: Work
    deadline: float
    answer: "asyncio.Future[Outputs]"
    queued_at: int = field(default_factory=time.perf_counter_ns)
    begun_at: int = 0
    taken: int = 0
    done: int = 0
    dropped: bool = False
    input_ns: int = 0
    infer_ns: int = 0
    _parts: dict[int, Outputs] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Images that no worker has taken yet."""
        return self.work.images - self.taken

    def pixels(self, start: int, count: int) -> Pixels:
        """Return `count` of the images. Raises: ImageError for one that cannot be decoded."""
        pixels = self.work.pixels
        if isinstance(pixels, np.ndarray):
            return pixels if count == len(pixels) else pixels[start : start + count]
        made = [make() for make in pixels[start : start + count]]
        return made[0][np.newaxis] if count == 1 else np.stack(made)

    def add(self, start: int, count: int, outputs: Outputs, times_ns: tuple[int, int]) -> bool:
        """Keep the outputs of some images; return whether those were the last.

        `times_ns`: what it took to decode and to compute them. Of several threads, one at a time.
        """
        self._parts[start] = outputs
        self.input_ns += times_ns[0]
        self.infer_ns += times_ns[1]
        self.done += count
        return self.done == self.work.images

    def outputs(self) -> Outputs:
        """Return the outputs of all images, in order."""
        parts = [self._parts[start] for start in sorted(self._parts)]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def settle(
        self, result: Outputs | BaseException | None, then: Callable[[], object] | None = None
    ) -> None:
        """Hand the answer, or why there is none, to the event loop; from any thread.

        The loop calls `then` when whoever waits has gone on. None is no answer yet.
        """
        try:
            self.answer.get_loop().call_soon_threadsafe(self._settle, result, then)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            return

    def expire(self) -> None:
        """Give up; in the event loop's thread."""
        message = "the request was not computed in time. Try again later, or give it more time."
        self._settle(RequestError(message, "deadline"))

    def _settle(
        self, result: Outputs | BaseException | None, then: Callable[[], object] | None = None
    ) -> None:
        if result is not None and not self.answer.done():
            if isinstance(result, BaseException):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)
        if then:
            self.answer.get_loop().call_soon(then)
