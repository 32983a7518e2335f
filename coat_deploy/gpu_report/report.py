"""The report: what is done in which order, within the budget, and what came of it."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coat_deploy.errors import BackendMissing, DeviceMissing, UsageError
from coat_deploy.gpu_report.apart import Told, Work, run_apart
from coat_deploy.gpu_report.budget import Budget
from coat_deploy.gpu_report.fused_ways import fused_ways
from coat_deploy.gpu_report.numerics import check_numbers, make_references
from coat_deploy.gpu_report.options import ReportOptions
from coat_deploy.gpu_report.placement import check_placement
from coat_deploy.gpu_report.runtime_ways import not_there, runtime_ways
from coat_deploy.gpu_report.timed import time_way
from coat_deploy.gpu_report.torch_ways import no_torch, torch_ways
from coat_deploy.gpu_report.way import Place, Way
from coat_deploy.machine import Machine, describe

Progress = Callable[[str], None]

KIND = "gpu-report"
"""Tells a record of this from others."""

CHECK_LEAST_S, CHECK_MOST_S = 12.0, 60.0
"""What checking a way's numbers takes at least, a start and one network, and may take at most."""

CHECKS_SHARE = 0.45
"""What of the budget all checks may take: the rest is for timing."""

DRY_RUN_S = 0.1
"""Seconds of timing a batch in a dry run."""


@dataclass
class Report:
    """All that was found. Rows are JSON objects; `skipped` and `failed` hold `what` and `why`."""

    options: ReportOptions
    machine: Machine
    checks: list[dict[str, Any]] = field(default_factory=list)
    numerics: list[dict[str, Any]] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing failed that was begun, and every check and bar was kept."""
        kept = all(row["passed"] for row in self.checks)
        return kept and not self.failed and not any(row.get("failures") for row in self.numerics)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        names = ("checks", "numerics", "bench", "skipped", "failed", "seconds")
        return {
            "kind": KIND,
            "sound": self.sound,
            **{name: getattr(self, name) for name in names},
            "options": dataclasses.asdict(self.options),
            "machine": self.machine.to_json(),
        }


def report(options: ReportOptions, progress: Progress | None = None) -> Report:
    """Check and time every way that this machine has, as far as the budget goes.

    Raises: BackendMissing without PyTorch, which the references are from; DeviceMissing without a
    GPU, unless a dry run is asked for; UsageError where no way has a name that is asked for.
    """
    if reason := no_torch(options.device):
        raise BackendMissing(f'gpu-report: {reason}. Run: pip install "coat-deploy[torch]"')
    if options.device == "cuda":
        require_gpu()
    with tempfile.TemporaryDirectory() as folder:
        return _Run(options, Path(folder), progress or (lambda step: None)).report()


def require_gpu() -> None:
    """Raise DeviceMissing unless PyTorch can use a GPU; asked in a process, as it may end it."""
    told = run_apart(_tell_gpu, (), 120)
    if not told.findings:
        reason = told.error or "PyTorch finds no NVIDIA GPU"
        raise DeviceMissing(
            f"gpu-report: {reason}. Run it where there is one, or with --device cpu to see it run."
        )


def _tell_gpu(tell: Any) -> None:
    import torch

    if torch.cuda.is_available():
        tell({"gpu": torch.cuda.get_device_name(0)})


class _Run:
    """A report in the making."""

    def __init__(self, options: ReportOptions, folder: Path, progress: Progress) -> None:
        self.options, self.progress = options, progress
        self.budget = Budget(options.budget_s)
        self.checks = Budget(options.budget_s * CHECKS_SHARE)
        self.place = Place(options.device, folder, options.batches)
        self.found = Report(options, describe())

    def report(self) -> Report:
        first, others = torch_ways()[:2], torch_ways()[2:]
        every = [*first, *fused_ways(), *others, *runtime_ways()]
        wanted = [way for way in every if self.options.wants(way.name, way.precision)]
        for name in self.options.ways:
            if not any(self.options.is_called(name, way.name, way.precision) for way in every):
                known = ", ".join(way.name for way in every)
                raise UsageError(f"ways: none is called {name} (known: {known}).")
        ways = self._there(wanted)
        self._check([way for way in ways if way.checked])
        self._bench(ways)
        self.found.seconds = round(self.options.budget_s - self.budget.left(), 1)
        return self.found

    def _there(self, ways: Sequence[Way]) -> list[Way]:
        """Return the ways that this machine has; say of the others why not."""
        there = []
        for way in ways:
            if reason := way.missing(self.options.device):
                self._skip(way.name, reason)
            else:
                there.append(way)
        return there

    def _check(self, ways: Sequence[Way]) -> None:
        """Check placement and numbers."""
        if not (self.options.variants and ways):
            return
        self._placement()
        variants, place = self.options.variants, dataclasses.replace(self.place, batches=(4,))
        told = self._run("references", make_references, (variants, place), self.checks)
        have = [row["variant"] for row in told.findings] if told else []
        self._miss("references", told, [v for v in variants if v not in have])
        for way in ways if have else ():
            what = f"numbers of {way.name}"
            told = self._run(what, check_numbers, (way, tuple(have), place), self.checks)
            if told is None:
                continue
            rows = [row for row in told.findings if "error" not in row]
            self.found.numerics += rows
            for row in told.findings:
                if "error" in row:
                    self._fail(f"{what}, {row['variant']}", row["error"])
            done = [row["variant"] for row in told.findings]
            self._miss(what, told, [v for v in have if v not in done])

    def _placement(self) -> None:
        what = "onnxruntime's guards"
        if self.options.device == "cpu":
            self._skip(what, "they are a GPU's")
        elif reason := not_there("onnxruntime", "fp32", "cuda"):
            self._skip(what, reason)
        elif told := self._run(what, check_placement, (self.place,), self.checks):
            self.found.checks += told.findings
            self._miss(what, told, [])

    def _bench(self, ways: Sequence[Way]) -> None:
        """Time every way, the most wanted first."""
        seconds = DRY_RUN_S if self.options.device == "cpu" else self.options.seconds
        for variant in self.options.bench:
            for way in ways:
                what = f"{way.name}, {variant}"
                arguments = (way, variant, self.place, seconds)
                told = self._run(what, time_way, arguments, self.budget, way.least_s, way.most_s)
                if told is None:
                    continue
                self.found.bench += [row for row in told.findings if "error" not in row]
                for row in told.findings:
                    if "error" in row:
                        self._fail(f"{what}, batch {row['batch']}", row["error"])
                done = [row["batch"] for row in told.findings]
                left = [f"batch {n}" for n in self.place.batches if n not in done]
                self._miss(what, told, left)

    def _run(
        self,
        what: str,
        work: Work,
        arguments: Sequence[Any],
        budget: Budget,
        least_s: float = CHECK_LEAST_S,
        most_s: float = CHECK_MOST_S,
    ) -> Told | None:
        """Do something apart, if the budget has time left for it."""
        if self.options.device == "cpu":
            least_s = min(least_s, 1.0)  # toys
        seconds, reason = budget.allot(least_s, most_s)
        if reason:
            self._skip(what, reason)
            return None
        self.progress(what)
        return run_apart(work, arguments, seconds)

    def _miss(self, what: str, told: Told | None, left: Sequence[str]) -> None:
        """Note how a process ended, if not by itself, and what it did not come to."""
        if told and told.error:
            rest = f"; not reached: {', '.join(left)}" if left else ""
            self._fail(what, f"{told.error}{rest}")

    def _skip(self, what: str, why: str) -> None:
        self.found.skipped.append({"what": what, "why": why})

    def _fail(self, what: str, why: str) -> None:
        self.found.failed.append({"what": what, "why": why})
