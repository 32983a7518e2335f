"""A model that is served: what answers for it, and how it is described to clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coat_deploy.backends.select import CHOSEN, PRECISIONS, check_served
from coat_deploy.errors import RepositoryError, SpecError, UsageError
from coat_deploy.model import VERSION, ArtifactQuery, Model
from coat_deploy.open import EAGER, Source, default_target, find_source
from coat_deploy.processing import Processing
from coat_deploy.runner import TensorSpec
from coat_deploy.serve.batcher import Lane
from coat_deploy.serve.levels import Levels, load_levels
from coat_deploy.serve.options import ServeOptions
from coat_deploy.serve.statistics import Execution, Listener, Outcome, Statistics

IMAGE = "image"
"""Name of the input that takes encoded images in place of pixels."""

_DATATYPES = {"float32": "FP32"}
_CONFIG_TYPES = {"FP32": "TYPE_FP32"}


@dataclass(frozen=True)
class _Counting:
    """Hands what a lane tells on to a model's statistics."""

    statistics: Statistics

    def executed(self, model: str, execution: Execution) -> None:
        self.statistics.executed(execution)

    def finished(self, model: str, outcome: Outcome) -> None:
        self.statistics.finished(outcome)


@dataclass(frozen=True, eq=False)
class Served:
    """A model's artifact, loaded; it never changes, a new version of it is another."""

    model: Model
    source: Source
    processing: Processing
    lane: Lane
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model.name

    @property
    def version(self) -> str:
        """The one version there is."""
        return VERSION

    @property
    def levels(self) -> Levels:
        """The runners."""
        return self.lane.levels

    @property
    def labels(self) -> tuple[str, ...]:
        """One label a class."""
        return self.processing.labels

    @property
    def fixed_size(self) -> bool:
        """Whether it takes images of one size."""
        artifact = self.source.artifact
        return artifact is not None and artifact.size is not None

    def same_as(self, source: Source) -> bool:
        """Return whether `source` would answer as this does. Raises: SpecError."""
        mine = (self.source.sha256, self.source.target, self.processing)
        return mine == (source.sha256, source.target, Processing.of(source))


def serve_model(model: Model, options: ServeOptions, listeners: Sequence[Listener] = ()) -> Served:
    """Open the artifact of a model that is meant, prove it on this machine and warm it up.

    Raises: as `find_served` and `open_source`.
    """
    source = find_served(model, options)
    processing = Processing.of(source)
    levels = load_levels(source, options)
    try:
        height, width = source.size
        levels.warm_up(np.zeros((1, 3, height, width), np.float32), options.warm_up)
    except BaseException:
        levels.close()
        raise
    statistics = Statistics()
    lane = Lane(model.name, levels, [_Counting(statistics), *listeners])
    return Served(model, source, processing, lane, statistics)


def find_served(model: Model, options: ServeOptions) -> Source:
    """Return what is served of a model: what was asked for, else what it has best.

    Best is what `export --precision auto` chose, if it did, else as `predict` chooses.
    Raises: UsageError, RepositoryError with the export that is needed.
    """
    check_served(options.target)
    if not model.spec.num_classes:
        raise UsageError(f"{model.folder}: has no classifier (num_classes is 0). Nothing to serve.")
    target, precision = options.target, options.precision
    if target is None:
        target = default_target(model, precision)
        chosen = [a for a in model.artifacts if a.target == target and a.choice and not a.features]
        if precision is None and chosen:
            precision = chosen[-1].precision
    if target == EAGER:  # nothing was exported; the target that could be is told how
        known = {t: PRECISIONS[t] for t in CHOSEN if t != EAGER}
        target = next((t for t in known if precision in (None, *known[t])), next(iter(known)))
    return find_source(model, ArtifactQuery(target, precision))


def can_serve(model: Model, options: ServeOptions) -> bool:
    """Return whether a model has an artifact that is meant, whole or not."""
    try:
        find_served(model, options)
    except (RepositoryError, SpecError, UsageError):
        return False
    return True


def metadata(served: Served) -> dict[str, Any]:
    """Return the protocol's metadata of a model."""
    return {
        "name": served.name,
        "versions": [served.version],
        "platform": f"{served.source.target}_{served.source.precision}",
        "inputs": [_tensor(spec) for spec in served.levels.inputs],
        "outputs": [_tensor(spec) for spec in served.levels.outputs],
    }


def config(served: Served, batch: int) -> dict[str, Any]:
    """Return a model's configuration in the words of Triton, which its clients ask for."""
    (pixels,) = metadata(served)["inputs"]
    outputs = metadata(served)["outputs"]
    return {
        "name": served.name,
        "platform": metadata(served)["platform"],
        "backend": served.source.target,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": batch,
        "input": [{**_configured(pixels), "format": "FORMAT_NCHW"}],
        "output": [{**_configured(tensor), "label_filename": "labels.txt"} for tensor in outputs],
        "instance_group": [
            {"name": served.name, "kind": "KIND_CPU", "count": served.levels.streams}
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
        "parameters": {
            "artifact": {"string_value": _artifact_name(served)},
            "sha256": {"string_value": served.source.sha256},
        },
    }


def card(served: Served) -> dict[str, Any]:
    """Return what people want to know of a model that is served."""
    spec, artifact = served.model.spec, served.source.artifact
    weights = served.model.weights_record or spec.weights
    quantiles = served.statistics.latencies_ms((0.5, 0.9))
    agreement: Mapping[str, Any] = artifact.agreement if artifact else {}
    return {
        "name": served.name,
        "version": served.version,
        "variant": spec.architecture,
        "artifact": _artifact_name(served),
        "target": served.source.target,
        "precision": served.source.precision,
        "sha256": served.source.sha256,
        "weights": weights.source if weights else None,
        "size": list(served.source.size),
        "fixed_size": served.fixed_size,
        "classes": spec.num_classes,
        "agreement": dict(agreement),
        "p50_ms": quantiles and quantiles[0],
        "p90_ms": quantiles and quantiles[1],
        "requests": served.statistics.to_json()["inference_stats"]["success"]["count"],
    }


def _artifact_name(served: Served) -> str:
    return served.source.artifact.name if served.source.artifact else EAGER


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if isinstance(length, str) else length for length in spec.shape]
    return {"name": spec.name, "datatype": _DATATYPES[spec.dtype], "shape": shape}


def _configured(tensor: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": tensor["name"],
        "data_type": _CONFIG_TYPES[tensor["datatype"]],
        "dims": tensor["shape"][1:],
    }
