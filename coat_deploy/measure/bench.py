"""Compare contenders fairly: interleaved, each in its own process, until the figures stand still.

Contenders of one batch, size and number of threads form a group. A group loads its contenders
and warms each up, then runs rounds: every contender, in an order shuffled anew, times one slice
of about `slice_ms`. Only one works at a time. What slows the machine for a while slows all of
them, and the ratio of medians, taken over rounds in pairs, hardly notices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.errors import RunnerError, UsageError, unknown_name
from coat_deploy.machine import Machine, describe
from coat_deploy.measure.latency import (
    MIN_ROUNDS,
    ColdWarm,
    Failure,
    Latency,
    Samples,
    Stopped,
    interval_over_rounds,
    percentiles,
    ratio_of_medians,
    round_medians,
)
from coat_deploy.measure.turns import Entrant, still_in, take_turns
from coat_deploy.measure.worker import Load, Opened, Reopened
from coat_deploy.runner import Pixels
from coat_deploy.spec import Size, format_size

MakePixels = Callable[[int, Size], Pixels]
"""(batch, size) to pixels (batch, 3, height, width)."""
Progress = Callable[[str, float], None]
"""(what is going on, share of the whole that is done)."""
Group = tuple[int, Size, int | None]

MAX_SLICE_ITERATIONS = 1000


@dataclass(frozen=True)
class Contender:
    """Something to measure. `name` is unique in its group.

    `load` is called in the contender's own process, so it must be picklable: a module's function,
    or a `functools.partial` of one. `file` (a file, or a folder) is evicted from the page cache
    before the first load. `threads` None is the runtime's default. `load` returns a runner that
    takes `streams` calls at once; more than one is for `throughput`. `peer` names another of the
    group, if there, that this one's median is held against besides the baseline's.
    """

    name: str
    target: str
    precision: str
    form: str
    batch: int
    size: Size
    load: Load
    threads: int | None = None
    device: str = "cpu"
    file: Path | None = None
    sha256: str | None = None
    streams: int = 1
    peer: str | None = None

    @property
    def group(self) -> Group:
        """Contenders that agree in this are compared."""
        return (self.batch, self.size, self.threads)

    @property
    def labels(self) -> dict[str, Any]:
        """What a result or a failure repeats of it."""
        names = ("name", "target", "precision", "form", "batch", "size", "threads", "device")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} threads"
        return f"{self.name} (batch {self.batch}, {format_size(self.size)}{threads})"


@dataclass(frozen=True)
class BenchOptions:
    """How long and how narrowly to measure.

    `warmup_iterations`, `warmup_s`: at least so many untimed runs and seconds a contender.
    `budget_s`: rounds of a group end after this, once `min_rounds` are done.
    `stability`: or as soon as each median's 95 % interval is within +- this share of it.
    `slice_ms`: time of a contender in a round, at least one iteration.
    `baseline`: name of the contender that ratios compare with.
    `timeout_s`: a contender that takes longer for one load or one slice has failed.
    `seed`: of the order within rounds and of the bootstrap.

    Raises: UsageError for values that cannot be.
    """

    warmup_iterations: int = 3
    warmup_s: float = 0.5
    budget_s: float = 20.0
    stability: float = 0.02
    min_rounds: int = 10
    slice_ms: float = 150.0
    baseline: str | None = None
    timeout_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"warmup_iterations": 0, "warmup_s": 0, "budget_s": 0, "stability": 0, "seed": 0}
        least["min_rounds"] = MIN_ROUNDS
        for name, limit in least.items():
            if not getattr(self, name) >= limit:
                raise UsageError(f"{name}: too small (got {getattr(self, name)}, least {limit}).")
        for name in ("slice_ms", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: must be above 0 (got {getattr(self, name)}).")


@dataclass(frozen=True)
class BenchReport:
    """All that one call of `bench` found out, in the order of the contenders."""

    results: tuple[Latency, ...]
    failures: tuple[Failure, ...]
    options: BenchOptions
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return results, failures, options and machine as JSON values."""
        return {
            "results": [latency.to_json() for latency in self.results],
            "failures": [failure.to_json() for failure in self.failures],
            "options": dataclasses.asdict(self.options),
            "machine": self.machine.to_json(),
        }


def bench(
    contenders: Sequence[Contender],
    pixels: MakePixels,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure every contender; one that fails is reported and the others go on.

    `pixels` makes the input of a group, once. `progress` is called in this thread.
    Raises: UsageError for a baseline that is no contender or two contenders of one name in a
    group; RunnerError when all fail.
    """
    options = options or BenchOptions()
    groups = _groups(contenders, options)
    machine = describe()
    generator = np.random.default_rng(options.seed)
    outcomes: dict[Contender, Latency | Failure] = {}
    for number, ((batch, size, _), members) in enumerate(groups.items()):

        def report(message: str, done: float, number: int = number) -> None:
            if progress is not None:
                progress(message, (number + done) / len(groups))

        race = _Race(options, generator, report)
        outcomes |= race.run(members, pixels(batch, size))
    found = [outcomes[contender] for contender in contenders]
    failures = tuple(item for item in found if isinstance(item, Failure))
    if len(failures) == len(found):
        reasons = "; ".join(f"{c}: {f.error}" for c, f in zip(contenders, failures, strict=True))
        raise RunnerError(f"bench: every contender failed. {reasons}")
    results = tuple(item for item in found if isinstance(item, Latency))
    return BenchReport(results, failures, options, machine)


def _groups(
    contenders: Sequence[Contender], options: BenchOptions
) -> dict[Group, tuple[Contender, ...]]:
    if not contenders:
        raise UsageError("bench: no contenders. Name at least one target.")
    names = sorted({contender.name for contender in contenders})
    if options.baseline is not None and options.baseline not in names:
        raise UsageError(f"bench: {unknown_name('baseline', options.baseline, names)}")
    groups: dict[Group, tuple[Contender, ...]] = {}
    for contender in contenders:
        group = groups.get(contender.group, ())
        if any(contender.name == other.name for other in group):
            raise UsageError(f"bench: two contenders are called {contender}. Name each once.")
        groups[contender.group] = (*group, contender)
    return groups


class _Entry(Entrant):
    """A contender of the running group."""

    def __init__(self, contender: Contender, timeout_s: float) -> None:
        super().__init__(contender.name, timeout_s)
        self.contender = contender
        self.rounds: list[Samples] = []
        self.iterations = 1
        self.opened: Opened | None = None
        self.reopened: Reopened | None = None

    def start(self, pixels: Pixels, options: BenchOptions) -> None:
        self.opened = self.worker.open(self.contender.load, pixels, self.contender.file)
        step_ms = self.worker.warm_up(options.warmup_iterations, options.warmup_s)
        # The same number every round: slices cut by the clock would count fast rounds more.
        wanted = options.slice_ms / max(step_ms, 1e-6)
        self.iterations = min(max(round(wanted), 1), MAX_SLICE_ITERATIONS)

    def measure(self) -> None:
        self.rounds.append(self.worker.time(self.iterations))

    def figures(self) -> Samples:
        return round_medians(self.rounds)

    def finish(self) -> None:
        self.reopened = self.worker.reopen()
        self.worker.close()

    def latency(self, stopped: Stopped) -> Latency:
        """Return the result, without ratios yet."""
        assert self.opened is not None and self.reopened is not None
        samples = np.concatenate(self.rounds)
        quantiles = percentiles(samples)
        interval = interval_over_rounds(self.rounds)
        return Latency(
            **self.contender.labels,
            sha256=self.contender.sha256,
            p50_ms=quantiles.p50,
            p90_ms=quantiles.p90,
            p99_ms=quantiles.p99,
            median_interval_ms=(interval.low, interval.high),
            images_per_second=self.contender.batch / quantiles.p50 * 1e3,
            ratio=None,
            ratio_interval=None,
            baseline=None,
            load_ms=ColdWarm(self.opened.load_ms, self.reopened.load_ms),
            first_run_ms=ColdWarm(self.opened.first_run_ms, self.reopened.first_run_ms),
            file_evicted=self.opened.file_evicted,
            peak_memory_mib=self.reopened.peak_memory_mib,
            peak_memory_source=self.reopened.peak_memory_source,
            memory_before_load_mib=self.opened.memory_before_mib,
            iterations=len(samples),
            rounds=len(self.rounds),
            stopped=stopped,
        )


@dataclass(frozen=True)
class _Race:
    """One group: start everybody, run rounds until it is decided, finish and compare."""

    options: BenchOptions
    generator: np.random.Generator
    progress: Progress

    def run(
        self, contenders: Sequence[Contender], pixels: Pixels
    ) -> dict[Contender, Latency | Failure]:
        entries: list[_Entry] = []
        try:
            for contender in contenders:
                self.progress(f"{contender}: load and warm-up", 0.0)
                entry = _Entry(contender, self.options.timeout_s)
                entries.append(entry)
                entry.attempt(functools.partial(entry.start, pixels, self.options))
            stopped = self._rounds(entries)
            for entry in still_in(entries):
                self.progress(f"{entry.contender}: warm start", 1.0)
                entry.attempt(entry.finish)
            return self._outcomes(entries, stopped)
        finally:
            for entry in entries:
                entry.worker.close()

    def _rounds(self, entries: Sequence[_Entry]) -> Stopped:
        batch, size, _ = entries[0].contender.group
        where = f"batch {batch}, {format_size(size)}"
        return take_turns(
            entries,
            self.generator,
            lambda count, share: self.progress(f"{where}: round {count}", share),
            budget_s=self.options.budget_s,
            stability=self.options.stability,
            min_rounds=self.options.min_rounds,
        )

    def _outcomes(
        self, entries: Sequence[_Entry], stopped: Stopped
    ) -> dict[Contender, Latency | Failure]:
        live = {entry.contender.name: entry for entry in still_in(entries)}
        baseline = live.get(self.options.baseline or "")
        outcomes: dict[Contender, Latency | Failure] = {}
        for entry in entries:
            if entry.error is not None:
                outcomes[entry.contender] = Failure(**entry.contender.labels, error=entry.error)
                continue
            latency = entry.latency(stopped)
            if baseline is not None:
                latency = dataclasses.replace(
                    latency,
                    baseline=baseline.contender.name,
                    **self._ratio(baseline, entry, "ratio"),
                )
            if (peer := live.get(entry.contender.peer or "")) is not None:
                latency = dataclasses.replace(
                    latency,
                    peer=peer.contender.name,
                    **self._ratio(peer, entry, "peer_ratio"),
                )
            outcomes[entry.contender] = latency
        return outcomes

    def _ratio(self, above: _Entry, below: _Entry, name: str) -> dict[str, Any]:
        """Return the fields of a ratio that is called `name`."""
        ratio = ratio_of_medians(above.rounds, below.rounds, self.generator)
        return {name: ratio.value, f"{name}_interval": (ratio.interval.low, ratio.interval.high)}
