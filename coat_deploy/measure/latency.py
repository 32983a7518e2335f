"""The statistics of repeated timings, the result they add up to and its record: no clocks.

A *round* gives one slice of timings a contender. Timings of one slice share the machine's mood
of that moment (clock, neighbours, temperature), so rounds and not single timings count as
independent: the interval of the median is taken over the medians of the rounds, and the ratio
of two contenders resamples whole rounds, both sides of a round together.
"""

import dataclasses
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import RepositoryError
from coat_deploy.machine import Machine
from coat_deploy.spec import Size

Samples = npt.NDArray[np.float64]
"""(n,) float64; timings in ms wherever a unit matters."""

Stopped = Literal["stable", "budget"]
"""Why a measurement ended: every interval was narrow, or the time was spent."""

MIN_ROUNDS = 6
"""Fewest samples whose extremes enclose the median with 95 % confidence: 1 - 2^-5 = 0.969."""


@dataclass(frozen=True)
class Interval:
    """An interval and the confidence with which it holds the true value."""

    low: float
    high: float
    confidence: float

    def relative_half_width(self, centre: float) -> float:
        """Return half the width as a share of `centre`; infinite for a centre of 0."""
        return (self.high - self.low) / 2 / centre if centre else math.inf


@dataclass(frozen=True)
class Percentiles:
    """Median, 90th and 99th percentile, in the unit of the samples."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Ratio:
    """Baseline's median divided by a contender's: above 1 the contender is faster."""

    value: float
    interval: Interval


def percentiles(samples: Samples) -> Percentiles:
    """Return the percentiles of `samples` (n,), n >= 1, interpolated between neighbours."""
    p50, p90, p99 = np.percentile(samples, (50, 90, 99))
    return Percentiles(float(p50), float(p90), float(p99))


def median_interval(samples: Samples, confidence: float = 0.95) -> Interval:
    """Return an interval of the median that assumes nothing about the distribution.

    The number of samples below the true median is binomial (n, 1/2), so the k-th smallest and
    k-th largest sample enclose it with probability 1 - 2 P(Binomial <= k - 1); k is the largest
    that keeps `confidence`. `Interval.confidence` is the exact probability: higher than asked,
    or lower when n is too small for it (n < 6 for 95 %), where the extremes are returned.

    Source: Conover, Practical Nonparametric Statistics, section 3.2.
    """
    count = len(samples)
    assert count > 0
    rank, achieved = _median_rank(count, confidence)
    ordered = np.sort(samples)
    return Interval(float(ordered[rank - 1]), float(ordered[count - rank]), achieved)


def _median_rank(count: int, confidence: float) -> tuple[int, float]:
    """Return k of `median_interval` and the probability that its interval holds the median."""
    # log C(n, i) = sum of log((n - j + 1) / j); in logarithms, since 2^-n underflows at n = 1075.
    i = np.arange(1, count // 2 + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((count - i + 1) / i))])
    below = np.cumsum(np.exp(log_choose - count * math.log(2)))  # P(Binomial <= i)
    # Sums of exact tails land within rounding of a confidence such as 1 - 2^-4.
    rank = int(np.count_nonzero(below <= (1 - confidence) / 2 + 1e-12))
    rank = min(max(rank, 1), (count + 1) // 2)
    return rank, max(0.0, float(1 - 2 * below[rank - 1]))


def is_stable(samples: Samples, relative_width: float, confidence: float = 0.95) -> bool:
    """Tell whether the median's interval is within +- `relative_width` of the median.

    False while there are too few samples for `confidence`. Asked after every round it is a
    sequential rule, whose coverage approaches `confidence` as `relative_width` shrinks.

    Source: Chow and Robbins, Annals of Mathematical Statistics 36 (1965).
    """
    interval = median_interval(samples, confidence)
    if interval.confidence < confidence:
        return False
    return interval.relative_half_width(float(np.median(samples))) <= relative_width


def round_medians(rounds: Sequence[Samples]) -> Samples:
    """Return the median of every round, (rounds,)."""
    return np.array([np.median(samples) for samples in rounds])


def interval_over_rounds(rounds: Sequence[Samples], confidence: float = 0.95) -> Interval:
    """Return the median's interval with rounds as the independent samples.

    Widened, where it must be, to hold the median of all timings together, which is the figure
    the interval is printed beside; that can only raise its confidence.
    """
    interval = median_interval(round_medians(rounds), confidence)
    median = float(np.median(np.concatenate(rounds)))
    return Interval(min(interval.low, median), max(interval.high, median), interval.confidence)


def ratio_of_medians(
    baseline: Sequence[Samples],
    contender: Sequence[Samples],
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Ratio:
    """Return baseline's median over contender's, with a paired percentile bootstrap interval.

    Both are lists of rounds, measured in the same rounds: entry i of one ran next to entry i of
    the other. Every resample draws rounds with replacement, the same ones for both, and takes
    the medians of all their timings; what slowed a round slowed both sides and cancels.
    """
    assert len(baseline) == len(contender) > 0
    above, below = _Pool.of(baseline), _Pool.of(contender)
    draws = generator.integers(len(baseline), size=(resamples, len(baseline)))
    ratios = np.empty(resamples)
    for i, draw in enumerate(draws):
        times = np.bincount(draw, minlength=len(baseline))
        ratios[i] = above.median(times) / below.median(times)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    once = np.ones(len(baseline), np.int64)
    value = above.median(once) / below.median(once)
    return Ratio(value, Interval(float(low), float(high), confidence))


@dataclass(frozen=True)
class _Pool:
    """All timings of a contender, sorted once, so that a resample costs a sum and no sort."""

    values: Samples
    rounds: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rounds: Sequence[Samples]) -> "_Pool":
        values = np.concatenate(rounds)
        numbers = np.repeat(np.arange(len(rounds)), [len(samples) for samples in rounds])
        order = np.argsort(values, kind="stable")
        return cls(values[order], numbers[order])

    def median(self, times: npt.NDArray[np.int64]) -> float:
        """Return the median of the pool in which round i is repeated `times[i]` times."""
        ends = np.cumsum(times[self.rounds])
        middle = ((ends[-1] - 1) // 2, ends[-1] // 2)
        return float(self.values[np.searchsorted(ends, middle, side="right")].mean())


@dataclass(frozen=True)
class ColdWarm:
    """Milliseconds in a fresh process with the file evicted, and of a second load there.

    Either is a whole load: no contender finds what its runtime compiled before.
    """

    cold: float
    warm: float


@dataclass(frozen=True)
class Latency:
    """What the bench measured of one contender.

    Times in ms a batch; `images_per_second` is batch / p50. `device`: "cpu", or "cuda" for the
    machine's first GPU. `load_ms.cold` includes importing the runtime, `first_run_ms` binding the
    input. Memory is resident memory of the contender's
    process, `peak_memory_source` says how it was read; `memory_before_load_mib` is what Python
    and numpy took of it. `file_evicted` is False where "cold" had the file in memory all the
    same, None where there was no file. `ratio` is the baseline's p50 over this one's: above 1 is
    faster; None without a baseline, or where it failed. `peer_ratio` is the same over the
    contender's own `peer`. `limit_ms` is the least time this machine could take, `limit_share`
    what share of p50 that is (`limits.py`); None where it was not measured.
    """

    name: str
    target: str
    precision: str
    form: str
    batch: int
    size: Size
    threads: int | None
    sha256: str | None
    p50_ms: float
    p90_ms: float
    p99_ms: float
    median_interval_ms: tuple[float, float]
    images_per_second: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    baseline: str | None
    load_ms: ColdWarm
    first_run_ms: ColdWarm
    file_evicted: bool | None
    peak_memory_mib: float | None
    peak_memory_source: str | None
    memory_before_load_mib: float | None
    iterations: int
    rounds: int
    stopped: Stopped
    device: str = "cpu"
    peer: str | None = None
    peer_ratio: float | None = None
    peer_ratio_interval: tuple[float, float] | None = None
    limit_ms: float | None = None
    limit_share: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; intervals and size are lists of two."""
        document = dataclasses.asdict(self)
        pairs = {key: list(value) for key, value in document.items() if isinstance(value, tuple)}
        return document | pairs


@dataclass(frozen=True)
class Failure:
    """A contender that could not be measured, and why in one line."""

    name: str
    target: str
    precision: str
    form: str
    batch: int
    size: Size
    threads: int | None
    error: str
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; the size is a list of two."""
        return dataclasses.asdict(self) | {"size": list(self.size)}


class Result(Protocol):
    """Something measured that is kept as a record."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        ...


def record_lines(
    results: Sequence[Result],
    machine: Machine,
    *,
    command: str,
    date: datetime,
    context: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return one line of JSON a result, complete in itself: when, where, how, what.

    `date` carries its time zone. `context` adds what the bench cannot know: the model, its
    weights, the commit, the options.
    """
    assert date.tzinfo is not None
    shared: dict[str, Any] = {"date": date.isoformat(timespec="seconds"), "command": command}
    shared |= context or {}
    where = {"machine": machine.to_json()}
    return [json.dumps(shared | result.to_json() | where) for result in results]


def append_records(path: Path, lines: Sequence[str]) -> None:
    """Append `lines` to a file, made where absent, in one write: all of them or none.

    Several processes may append to one file at a time.
    Raises: RepositoryError when the file cannot be written or the disk is full.
    """
    text = "".join(f"{line}\n" for line in lines).encode()
    try:
        number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(number, text)
            if written < len(text):  # the disk is full: half a line would spoil the file
                os.ftruncate(number, os.lseek(number, 0, os.SEEK_CUR) - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(number)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RepositoryError(
            f"{path}: records were not written ({reason}). Choose a file that can be written."
        ) from None
