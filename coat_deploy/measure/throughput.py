"""Find the most images per second: how many streams of requests at once, and in what batches.

Every target is tried with every number of streams and growing batches, a configuration at a time
and each in a process of its own. The best few of every target then take turns in rounds, as in a
bench, and the best of those is the target's result. It is the largest of a few close figures, so
it flatters by about as much as its interval says that they are uncertain.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coat_deploy.errors import RunnerError, UsageError, unknown_name
from coat_deploy.machine import Machine, describe
from coat_deploy.measure.bench import Contender, MakePixels, Progress
from coat_deploy.measure.latency import (
    Failure,
    Samples,
    Stopped,
    median_interval,
    percentiles,
    ratio_of_medians,
)
from coat_deploy.measure.search import Search, Setup, ThroughputOptions, Tried
from coat_deploy.measure.turns import still_in
from coat_deploy.spec import Size

KIND = "throughput"
"""Tells a record of this from one of a latency."""


@dataclass(frozen=True)
class Throughput:
    """The best configuration of a target, and all that were tried.

    `threads` are shared by `streams` requests of `batch` images at once. `images_per_second` is
    the median over rounds; `p50_ms` and `p99_ms` are times of a request, a whole batch, while all
    streams are busy. `ratio` is this rate over that of the baseline's best: above 1 is faster;
    None without a baseline, or where it failed.
    """

    name: str
    target: str
    precision: str
    form: str
    size: Size
    threads: int
    sha256: str | None
    streams: int
    threads_per_stream: int
    batch: int
    images_per_second: float
    images_per_second_interval: tuple[float, float]
    p50_ms: float
    p99_ms: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    baseline: str | None
    requests: int
    rounds: int
    stopped: Stopped
    tried: tuple[Tried, ...]
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and the kind of record, as JSON values; tuples become lists."""
        document = {"kind": KIND} | dataclasses.asdict(self)
        lists = {key: list(value) for key, value in document.items() if isinstance(value, tuple)}
        return document | lists


@dataclass(frozen=True)
class ThroughputReport:
    """All that one call of `throughput` found out, in the order of the targets."""

    results: tuple[Throughput, ...]
    failures: tuple[Failure, ...]
    options: ThroughputOptions
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return results, failures, options and machine as JSON values."""
        return {
            "results": [result.to_json() for result in self.results],
            "failures": [failure.to_json() for failure in self.failures],
            "options": self.options.to_json(),
            "machine": self.machine.to_json(),
        }


def throughput(
    contenders: Sequence[Contender],
    pixels: MakePixels,
    options: ThroughputOptions | None = None,
    progress: Progress | None = None,
) -> ThroughputReport:
    """Search every target's best configuration; one that fails is reported and the others go on.

    `contenders`: of every target one for each number of streams, all with the same number of
    threads; those of a name are one target. Their `batch` is replaced by those tried.
    Raises: UsageError for a baseline that is no contender or contenders that cannot be compared;
    RunnerError when all fail.
    """
    options = options or ThroughputOptions()
    names = _names(contenders, options)
    machine = describe()
    search = Search(options, functools.cache(pixels), progress or (lambda message, done: None))
    tried: dict[Contender, Tried] = {}
    for number, contender in enumerate(contenders):
        tried.update(search.grow(contender, number / len(contenders)))
    finalists = [candidate for name in names for candidate in _finalists(tried, name, options)]
    setups, stopped = search.final(finalists)
    comparison = _Comparison(options, tried, setups, stopped)
    found = [comparison.outcome(name) for name in names]
    failures = tuple(item for item in found if isinstance(item, Failure))
    if len(failures) == len(found):
        reasons = "; ".join(f"{failure.name}: {failure.error}" for failure in failures)
        raise RunnerError(f"bench: every contender failed. {reasons}")
    results = tuple(item for item in found if isinstance(item, Throughput))
    return ThroughputReport(results, failures, options, machine)


def _names(contenders: Sequence[Contender], options: ThroughputOptions) -> list[str]:
    """Return the targets in order. Raises UsageError for what cannot be compared."""
    if not contenders:
        raise UsageError("bench: no contenders. Name at least one target.")
    names = list(dict.fromkeys(contender.name for contender in contenders))
    baseline = options.turns.baseline
    if baseline is not None and baseline not in names:
        raise UsageError(f"bench: {unknown_name('baseline', baseline, names)}")
    if len({(contender.size, contender.threads) for contender in contenders}) > 1:
        raise UsageError("bench: throughputs of several sizes or threads cannot be compared.")
    for contender in contenders:
        if contender.threads is None or contender.streams > contender.threads:
            raise UsageError(
                f"bench: every stream of {contender.name} needs a thread (got {contender.streams} "
                f"streams and {contender.threads} threads). Ask for fewer streams."
            )
    return names


def _finalists(
    tried: Mapping[Contender, Tried], name: str, options: ThroughputOptions
) -> list[Contender]:
    """Return the best few configurations of a target, best first; none where all failed."""
    rates = {
        contender: outcome.images_per_second
        for contender, outcome in tried.items()
        if contender.name == name and outcome.images_per_second is not None
    }
    ranked = sorted(rates, key=lambda contender: rates[contender], reverse=True)
    near = [c for c in ranked if rates[c] >= (1 - options.margin) * rates[ranked[0]]]
    return near[: options.finalists]


@dataclass(frozen=True)
class _Comparison:
    """The finalists after their rounds, made into results."""

    options: ThroughputOptions
    tried: Mapping[Contender, Tried]
    setups: Sequence[Setup]
    stopped: Stopped

    def outcome(self, name: str) -> Throughput | Failure:
        """Return a target's best, or why it has none."""
        best = self._best(name)
        if best is None:
            return self._failure(name)
        rates, quantiles = best.figures(), percentiles(best.latencies_ms())
        interval, setting = median_interval(rates), self.tried[best.contender]
        result = Throughput(
            **best.contender.labels,
            sha256=best.contender.sha256,
            streams=setting.streams,
            threads_per_stream=setting.threads_per_stream,
            images_per_second=float(np.median(rates)),
            images_per_second_interval=(interval.low, interval.high),
            p50_ms=quantiles.p50,
            p99_ms=quantiles.p99,
            ratio=None,
            ratio_interval=None,
            baseline=None,
            requests=len(best.latencies_ms()),
            rounds=len(rates),
            stopped=self.stopped,
            tried=self._table(name),
        )
        return self._compared(result, rates)

    def _best(self, name: str) -> Setup | None:
        mine = [setup for setup in still_in(self.setups) if setup.contender.name == name]
        return max(mine, key=lambda setup: float(np.median(setup.figures())), default=None)

    def _compared(self, result: Throughput, rates: Samples) -> Throughput:
        name = self.options.turns.baseline
        baseline = None if name is None else self._best(name)
        if baseline is None:
            return result
        # Rates, not times: what is better stands above the line.
        above, below = rates[:, np.newaxis], baseline.figures()[:, np.newaxis]
        generator = np.random.default_rng(self.options.turns.seed)
        ratio = ratio_of_medians(list(above), list(below), generator)
        ends = (ratio.interval.low, ratio.interval.high)
        return dataclasses.replace(result, ratio=ratio.value, ratio_interval=ends, baseline=name)

    def _table(self, name: str) -> tuple[Tried, ...]:
        finals = {
            setup.contender: float(np.median(setup.figures())) for setup in still_in(self.setups)
        }
        return tuple(
            dataclasses.replace(outcome, final_images_per_second=finals.get(contender))
            for contender, outcome in self.tried.items()
            if contender.name == name
        )

    def _failure(self, name: str) -> Failure:
        """Return why a target has no result: what its first configuration died of."""
        errors = {c: outcome.error for c, outcome in self.tried.items() if outcome.error}
        errors |= {setup.contender: setup.error for setup in self.setups if setup.error}
        contender = next(contender for contender in errors if contender.name == name)
        return Failure(**contender.labels, error=errors[contender])
