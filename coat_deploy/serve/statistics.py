"""What a model has done since it was loaded, counted as the protocol's statistics are.

queue > input (decode, gather) > infer > output (divide among the requests)
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

RECENT = 512
"""Requests whose latency is remembered."""


@dataclass(frozen=True)
class Execution:
    """One step of a model: so many images of these requests at once, times in ns."""

    images: int
    input_ns: int
    infer_ns: int
    output_ns: int


@dataclass(frozen=True)
class Outcome:
    """What became of a request that was given to a model.

    `kind` is None for one that was answered, else that of its RequestError. Times in ns; what it
    did not come to is 0.
    """

    images: int
    kind: str | None
    total_ns: int
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


class Listener(Protocol):
    """Whoever wants to know; called from any thread, and to be quick."""

    def executed(self, model: str, execution: Execution) -> None:
        """Hear of a step."""
        ...

    def finished(self, model: str, outcome: Outcome) -> None:
        """Hear of a request."""
        ...


@dataclass
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one more."""
        self.count += 1
        self.ns += ns

    def to_json(self) -> dict[str, int]:
        """Return the protocol's StatisticDuration."""
        return {"count": self.count, "ns": self.ns}


@dataclass
class _Batch:
    input: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)


class Statistics:
    """Counts of one model; as a document, those of Triton's ModelStatistics."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts = {
            name: Duration()
            for name in (
                "success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
                "cache_hit", "cache_miss",
            )
        }  # fmt: skip
        self._batches: dict[int, _Batch] = {}
        self._images = self._executions = self._last_ms = 0
        self._recent_ns: deque[int] = deque(maxlen=RECENT)

    def executed(self, execution: Execution) -> None:
        """Count a step."""
        with self._lock:
            self._executions += 1
            batch = self._batches.setdefault(execution.images, _Batch())
            batch.input.add(execution.input_ns)
            batch.infer.add(execution.infer_ns)
            batch.output.add(execution.output_ns)

    def finished(self, outcome: Outcome) -> None:
        """Count a request."""
        with self._lock:
            if outcome.kind is not None:
                self._parts["fail"].add(outcome.total_ns)
                return
            self._images += outcome.images
            self._last_ms = time.time_ns() // 1_000_000
            self._recent_ns.append(outcome.total_ns)
            self._parts["success"].add(outcome.total_ns)
            self._parts["queue"].add(outcome.queue_ns)
            self._parts["compute_input"].add(outcome.input_ns)
            self._parts["compute_infer"].add(outcome.infer_ns)
            self._parts["compute_output"].add(outcome.output_ns)

    def latencies_ms(self, quantiles: Sequence[float]) -> list[float] | None:
        """Return quantiles of the latest requests' times in ms; None before the first."""
        with self._lock:
            recent = list(self._recent_ns)
        if not recent:
            return None
        return [float(value) / 1e6 for value in np.quantile(recent, quantiles)]

    def to_json(self) -> dict[str, Any]:
        """Return the counts, in the protocol's words."""
        with self._lock:
            return {
                "last_inference": self._last_ms,
                "inference_count": self._images,
                "execution_count": self._executions,
                "inference_stats": {name: part.to_json() for name, part in self._parts.items()},
                "batch_stats": [
                    {
                        "batch_size": size,
                        "compute_input": batch.input.to_json(),
                        "compute_infer": batch.infer.to_json(),
                        "compute_output": batch.output.to_json(),
                    }
                    for size, batch in sorted(self._batches.items())
                ],
            }
