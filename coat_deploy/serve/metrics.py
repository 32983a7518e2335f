"""Metrics for Prometheus, of requests, queues and steps.

Numbers come from the batcher, whatever protocol carried a request. With several processes they are
kept in files of $PROMETHEUS_MULTIPROC_DIR, and any of them answers for all.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from coat_deploy.serve.statistics import Execution, Outcome

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PARTS = {
    "request": "Time of a request, from the queue to the answer.",
    "queue": "Time a request waited.",
    "input": "Time its images took to be decoded and prepared.",
    "compute": "Time the runtime computed for it.",
}
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class _OfModel:
    """The counters of a model's requests that are answered."""

    answered: Counter
    images: Counter
    seconds: tuple[Histogram, ...]
    batch: Histogram


class Metrics:
    """The listener that counts for Prometheus."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._models: dict[str, _OfModel] = {}
        own, model = self._registry, ["model"]
        self._requests = Counter(
            "coat_requests", "Requests of models, by what became of them.",
            ["model", "outcome"], registry=own,
        )  # fmt: skip
        self._images = Counter("coat_images", "Images answered.", model, registry=own)
        self._seconds = [
            Histogram(f"coat_{part}_seconds", text, model, registry=own, buckets=_SECONDS)
            for part, text in _PARTS.items()
        ]
        self._batch = Histogram(
            "coat_batch_images", "Images of a step.", model, registry=own, buckets=_IMAGES
        )
        self._http = Counter(
            "coat_http_responses", "Answers over HTTP, by status.", ["status"], registry=own
        )
        self._grpc = Counter(
            "coat_grpc_responses", "Answers over gRPC, by status.", ["status"], registry=own
        )
        self._in_flight = Gauge(
            "coat_in_flight_requests", "Requests under way.", registry=own,
            multiprocess_mode="livesum",
        )  # fmt: skip

    def executed(self, model: str, execution: Execution) -> None:
        """Count a step."""
        self._of(model).batch.observe(execution.images)

    def finished(self, model: str, outcome: Outcome) -> None:
        """Count a request."""
        if outcome.kind is not None:
            self._requests.labels(model, outcome.kind).inc()
            return
        mine = self._of(model)
        mine.answered.inc()
        mine.images.inc(outcome.images)
        times = (outcome.total_ns, outcome.queue_ns, outcome.input_ns, outcome.infer_ns)
        for histogram, ns in zip(mine.seconds, times, strict=True):
            histogram.observe(ns / 1e9)

    def _of(self, model: str) -> "_OfModel":
        """Return a model's own counters: to look each up costs more than to count."""
        mine = self._models.get(model)
        if mine is None:
            mine = self._models[model] = _OfModel(
                self._requests.labels(model, "ok"),
                self._images.labels(model),
                tuple(histogram.labels(model) for histogram in self._seconds),
                self._batch.labels(model),
            )
        return mine

    def begun(self) -> Callable[[int], None]:
        """Count a request over HTTP as under way; call the value with its status at its end."""
        self._in_flight.inc()

        def ended(status: int) -> None:
            self._in_flight.dec()
            self._http.labels(str(status)).inc()

        return ended

    def begun_call(self) -> Callable[[str], None]:
        """Count a call over gRPC as under way; call the value with its status at its end."""
        self._in_flight.inc()

        def ended(status: str) -> None:
            self._in_flight.dec()
            self._grpc.labels(status).inc()

        return ended

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        registry = self._registry
        if os.environ.get(DIRECTORY):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return prometheus_client.generate_latest(registry)
