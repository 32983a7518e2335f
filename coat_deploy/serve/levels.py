"""One artifact loaded several times: for one request at a time, and for as many as there are cores.

A request that comes alone is computed soonest by all threads, requests that come together are
computed quickest by one thread each (docs/decisions/0011-image-by-image.md). Which it is shows
only when they come, so a runner for each waits, opened and proven.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coat_deploy.backends.division import division
from coat_deploy.backends.select import computes_batches
from coat_deploy.machine import usable_threads
from coat_deploy.open import Source, open_source
from coat_deploy.runner import Closing, LoadOptions, Runner
from coat_deploy.serve.options import ServeOptions

MANY = 8
"""Threads from which on there is a level between one request and one a thread."""


@dataclass(frozen=True)
class Level:
    """A runner that takes so many requests at once."""

    streams: int
    runner: Runner


class Levels(Closing):
    """The runners of one artifact, for growing numbers of requests at once.

    `batch`: most images that one call takes; `first`: how many the first calls take, whose shapes
    are then ready. Closing it frees all of them; none may be running.
    """

    def __init__(self, levels: Sequence[Level], batch: int, first: Sequence[int] = (1,)) -> None:
        assert levels
        self.batch, self._first = batch, tuple(first)
        self._levels = tuple(sorted(levels, key=lambda level: level.streams))
        self.inputs, self.outputs = levels[0].runner.inputs, levels[0].runner.outputs

    @property
    def streams(self) -> int:
        """Most calls at once."""
        return self._levels[-1].streams

    def runner(self, at_work: int) -> Runner:
        """Return the runner to call while so many calls are under way, this one among them."""
        fits = (level for level in self._levels if level.streams >= at_work)
        return next(fits, self._levels[-1]).runner

    def close(self) -> None:
        """Free the runners."""
        with contextlib.ExitStack() as stack:
            for level in self._levels:
                stack.enter_context(level.runner)

    def warm_up(self, pixels: np.ndarray, runs: int) -> None:
        """Run each a few times with an image (1, 3, H, W): first runs allocate, and are slow."""
        for level in self._levels:
            for count in self._first:
                for _ in range(runs):
                    level.runner.run(np.repeat(pixels, count, axis=0))


def stream_counts(threads: int) -> list[int]:
    """Return for how many requests at once there is a runner, the threads divided among them.

    >>> stream_counts(2), stream_counts(64)
    ([1, 2], [1, 8, 64])
    """
    between = division(threads, int(threads**0.5)) if threads >= MANY else 1
    return sorted({1, between, threads})


def load_levels(source: Source, options: ServeOptions) -> Levels:
    """Open an artifact at every level; each replays the proof.

    Raises: as `open_source`.
    """
    threads = options.threads or usable_threads()
    whole = computes_batches(source.target, options.device)
    batch = _batch(source, options.batch) if whole else 1
    with contextlib.ExitStack() as stack:
        levels = []
        for streams in [1] if whole else stream_counts(threads):
            # Of a request alone, all is one call: else the proof's two images would open a session.
            how = LoadOptions(
                threads=threads,
                streams=streams,
                batch=batch,
                device=options.device,
                whole_batches=streams == 1,
            )
            levels.append(Level(streams, stack.enter_context(open_source(source, how))))
        stack.pop_all()  # they are the caller's now
    return Levels(levels, batch, _first(source, batch))


def _first(source: Source, most: int) -> list[int]:
    """Return batches to begin with: 1, 2, 4 and so on, and `most` itself.

    A GPU's first run of a shape may take onnxruntime seconds; batches between these are filled up.
    An engine's take none, and it may not be built for them all.
    """
    if source.artifact and source.artifact.engine:
        return [1]
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def _batch(source: Source, wanted: int) -> int:
    """Return the most images a step: an engine takes no more than it was built for."""
    engine = source.artifact.engine if source.artifact else None
    if engine is None:
        return wanted
    return min(wanted, max(profile.batch[2] for profile in engine.profiles))
