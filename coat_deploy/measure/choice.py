"""Which of several precisions to take, and why: the figures of each, and a verdict on it.

The most exact one that passes is kept, unless another is faster by more than the noise: a gain
that might not be there is not worth a digit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coat_deploy.machine import Machine
from coat_deploy.measure.latency import Latency
from coat_deploy.spec import Size

Verdict = Literal["chosen", "not chosen", "ruled out"]

_AGREEMENT = ("max_abs_difference", "centred_cosine", "top1_agreement")
_LATENCY = ("p50_ms", "median_interval_ms", "ratio", "ratio_interval")


@dataclass(frozen=True)
class Considered:
    """A precision, what became of it and why.

    `agreement`: figures of `Agreement.to_json`; empty where it was ruled out.
    `latency`: None where it was not measured.
    """

    precision: str
    verdict: Verdict
    reason: str
    agreement: Mapping[str, Any]
    latency: Latency | None

    def to_json(self) -> dict[str, Any]:
        """Return verdict and figures; one that was not measured is null."""
        latency = self.latency.to_json() if self.latency else {}
        return {
            "precision": self.precision,
            "verdict": self.verdict,
            "reason": self.reason,
            **{name: self.agreement.get(name) for name in _AGREEMENT},
            **{name: latency.get(name) for name in _LATENCY},
        }


@dataclass(frozen=True)
class Choice:
    """What was chosen, among what, on which machine.

    `margin`: least ratio at which another than the most exact is taken. Ratios are over the most
    exact one that passes; `batch` images of `size` were timed, on `threads`, None being the
    runtime's default.
    """

    considered: tuple[Considered, ...]
    margin: float
    batch: int
    size: Size
    threads: int | None
    machine: Machine

    @property
    def chosen(self) -> Considered:
        """The one that was taken."""
        return next(one for one in self.considered if one.verdict == "chosen")

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; the size is a list of two."""
        return {
            "precision": self.chosen.precision,
            "why": self.chosen.reason,
            "margin": self.margin,
            "batch": self.batch,
            "size": list(self.size),
            "threads": self.threads,
            "considered": [one.to_json() for one in self.considered],
            "machine": self.machine.to_json(),
        }


def decide(
    precisions: Sequence[str],
    agreements: Mapping[str, Mapping[str, Any]],
    ruled_out: Mapping[str, str],
    latencies: Mapping[str, Latency],
    margin: float,
) -> tuple[Considered, ...]:
    """Return a verdict on each of `precisions`, the most exact first.

    `agreements` are of those that pass, at least one; `ruled_out` says why the others do not. A
    latency's ratio is over the first that passes; there may be none where only one does.
    """
    passed = [precision for precision in precisions if precision in agreements]
    exact = passed[0]
    clear = {p: found for p, found in latencies.items() if _lower_end(found) > margin}
    chosen = max(clear, key=lambda p: clear[p].ratio or 0.0, default=exact)
    considered = []
    for precision in precisions:
        verdict: Verdict = "chosen" if precision == chosen else "not chosen"
        latency = latencies.get(precision)
        if precision in ruled_out:
            verdict, reason = "ruled out", ruled_out[precision]
        elif latency is None:
            reason = "the only one that passes"
        else:
            reason = _reason(precision, chosen, exact, latency, margin)
        figures = agreements.get(precision, {})
        considered.append(Considered(precision, verdict, reason, figures, latency))
    return tuple(considered)


def _lower_end(latency: Latency) -> float:
    return latency.ratio_interval[0] if latency.ratio_interval else 0.0


def _reason(precision: str, chosen: str, exact: str, latency: Latency, margin: float) -> str:
    """Return why one of several that pass is chosen, or not."""
    if precision == chosen == exact:
        return f"the most exact that passes; none is faster beyond doubt (by {margin:g}x)"
    if precision == exact:
        return f"slower than {chosen}"
    assert latency.ratio is not None and latency.ratio_interval is not None
    low, high = latency.ratio_interval
    speed = f"{latency.ratio:.2f}x as fast as {exact} (95% interval {low:.2f} to {high:.2f})"
    if precision == chosen:
        return f"the fastest that passes: {speed}"
    if low > margin:
        return f"{speed}, slower than {chosen}"
    return f"{speed}: not beyond doubt above {margin:g}x"
