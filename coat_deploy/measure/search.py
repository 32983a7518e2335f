"""Configurations of a target, streams and batches: which are tried, and what each achieves."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coat_deploy.errors import UsageError
from coat_deploy.measure.bench import BenchOptions, Contender, MakePixels, Progress
from coat_deploy.measure.latency import Samples, Stopped, percentiles
from coat_deploy.measure.streams import Flow
from coat_deploy.measure.turns import Entrant, take_turns
from coat_deploy.runner import Pixels

BATCHES = (1, 2, 4, 8, 16, 32)
GPU_BATCHES = (1, 8, 32, 64, 128, 256)

SEARCH_SHARE = 0.8
"""What of the progress is the search; the rest is the turns of the finalists."""


@dataclass(frozen=True)
class ThroughputOptions:
    """How to search, and how the finalists are measured.

    `batches`: those tried, ascending.
    `search_s`: seconds that count for a configuration in the search.
    `drop`: batches grow no further after two in a row so far below the best of their streams.
    `finalists`: at most so many of a target are measured again ...
    `margin`: ... of those within this share of its best.
    `turns`: warm-up, rounds, budget, baseline, timeout and seed, as for a bench.

    Raises: UsageError for values that cannot be.
    """

    batches: tuple[int, ...] = BATCHES
    search_s: float = 1.0
    drop: float = 0.05
    finalists: int = 3
    margin: float = 0.15
    turns: BenchOptions = field(default_factory=BenchOptions)

    def __post_init__(self) -> None:
        ascending = tuple(sorted({*self.batches}))
        if not self.batches or self.batches != ascending or self.batches[0] < 1:
            raise UsageError(f"batches: must be ascending, from 1 (got {self.batches}).")
        if self.finalists < 1:
            raise UsageError(f"finalists: must be 1 or more (got {self.finalists}).")
        for name in ("drop", "margin", "search_s"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name}: too small (got {getattr(self, name)}, least 0).")

    def to_json(self) -> dict[str, Any]:
        """Return all options in one object of JSON values."""
        own = {key: value for key, value in vars(self).items() if key != "turns"}
        return dataclasses.asdict(self.turns) | own | {"batches": list(self.batches)}


@dataclass(frozen=True)
class Tried:
    """A configuration that was tried: rate and time of a request, or why it failed.

    `final_images_per_second` is the median over the finalists' rounds; None for those that did
    not get so far.
    """

    streams: int
    threads_per_stream: int
    batch: int
    images_per_second: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    final_images_per_second: float | None = None
    error: str | None = None


def stream_counts(threads: int) -> list[int]:
    """Return the numbers of streams that share `threads` evenly, ascending.

    >>> stream_counts(6)
    [1, 2, 3, 6]
    """
    return [count for count in range(1, threads + 1) if threads % count == 0]


def worth_growing(rates: Sequence[float], drop: float) -> bool:
    """Tell whether a larger batch may still win: not after two in a row below the best by `drop`.

    >>> worth_growing([100, 90], 0.05), worth_growing([100, 90, 80], 0.05)
    (True, False)
    """
    return len(rates) < 2 or max(rates[-2:]) >= (1 - drop) * max(rates)


class Setup(Entrant):
    """A configuration at work: `contender` with its streams and batch, and a flow a turn."""

    def __init__(self, contender: Contender, options: ThroughputOptions) -> None:
        super().__init__(contender.name, options.turns.timeout_s)
        self.contender = contender
        self.flows: list[Flow] = []
        self._options = options.turns

    def start(self, pixels: Pixels) -> None:
        """Load it, and warm it up with all its streams."""
        self.worker.open(self.contender.load, pixels, None, self.contender.streams)
        self.worker.flow(self._options.warmup_s, self._options.warmup_iterations)

    def measure(self) -> None:
        """Take a turn of a round."""
        self.flow(self._options.slice_ms / 1e3)

    def flow(self, seconds: float) -> None:
        """Keep all streams busy for so long, and note what came of it."""
        self.flows.append(self.worker.flow(seconds))

    def figures(self) -> Samples:
        """Return the images a second of every turn, (rounds,)."""
        rates = [flow.requests_per_second for flow in self.flows]
        return self.contender.batch * np.array(rates)

    def latencies_ms(self) -> Samples:
        """Return the times of all requests of all turns, (n,)."""
        return np.concatenate([flow.latencies_ms for flow in self.flows])


@dataclass(frozen=True)
class Search:
    """Tries configurations one by one, and lets the best take turns."""

    options: ThroughputOptions
    pixels: MakePixels
    progress: Progress

    def grow(self, contender: Contender, done: float) -> Iterator[tuple[Contender, Tried]]:
        """Try growing batches of a target with its number of streams, while it is worth it.

        `done` is the share of the search that is done so far.
        """
        rates: list[float] = []
        for batch in self.options.batches:
            candidate = dataclasses.replace(contender, batch=batch)
            streams = f"{contender.streams} stream{'s'[: contender.streams > 1]}"
            self.progress(f"{contender.name}: {streams}, batch {batch}", SEARCH_SHARE * done)
            tried = self._try(candidate)
            yield candidate, tried
            if tried.images_per_second is None:  # a larger batch needs more of everything
                return
            rates.append(tried.images_per_second)
            if not worth_growing(rates, self.options.drop):
                return

    def _try(self, contender: Contender) -> Tried:
        setup = Setup(contender, self.options)
        try:
            setup.attempt(functools.partial(setup.start, self._pixels(contender)))
            if setup.error is None:
                setup.attempt(functools.partial(setup.flow, self.options.search_s))
        finally:
            setup.worker.close()
        assert contender.threads is not None
        tried = Tried(contender.streams, contender.threads // contender.streams, contender.batch)
        if setup.error is not None:
            return dataclasses.replace(tried, error=setup.error)
        (rate,) = setup.figures()
        quantiles = percentiles(setup.latencies_ms())
        return dataclasses.replace(
            tried, images_per_second=float(rate), p50_ms=quantiles.p50, p99_ms=quantiles.p99
        )

    def final(self, finalists: Sequence[Contender]) -> tuple[list[Setup], Stopped]:
        """Let the finalists of all targets take turns; return them with their flows, and ended."""
        turns = self.options.turns

        def tell(what: str, share: float) -> None:
            self.progress(f"finalists: {what}", SEARCH_SHARE + (1 - SEARCH_SHARE) * share)

        setups: list[Setup] = []
        try:
            for contender in finalists:
                tell(f"load and warm-up of {contender.name}", 0.0)
                setup = Setup(contender, self.options)
                setups.append(setup)
                setup.attempt(functools.partial(setup.start, self._pixels(contender)))
            stopped = take_turns(
                setups,
                np.random.default_rng(turns.seed),
                lambda count, share: tell(f"round {count}", share),
                budget_s=turns.budget_s,
                stability=turns.stability,
                min_rounds=turns.min_rounds,
            )
        finally:
            for setup in setups:
                setup.worker.close()
        return setups, stopped

    def _pixels(self, contender: Contender) -> Pixels:
        return self.pixels(contender.batch, contender.size)
