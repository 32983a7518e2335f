"""Export: from a model's weights to an artifact that is proven, then put into the repository.

    config.json > weights > graph > file > proof > replay > validation > manifest

Everything is made and tried in a folder aside. What fails, at any step, leaves the model folder
as it was.
"""

import datetime
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto

from coat_deploy.artifact import Artifact, artifact_name
from coat_deploy.backends.select import PRECISIONS, require
from coat_deploy.digest import sha256_bytes
from coat_deploy.errors import BelowBar, UsageError, unknown_name
from coat_deploy.graph.author import DEFAULT_OPSET
from coat_deploy.graph.check import check_graph
from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.form import FORM_NAMES, FORMS, get_form
from coat_deploy.graph.metadata import add_metadata
from coat_deploy.graph.serialise import serialise
from coat_deploy.images import normalise
from coat_deploy.measure.agreement import Bar, get_bar
from coat_deploy.measure.proof import Proof, make_proof, probe_images, replay
from coat_deploy.measure.validate import Batch, Validation, batch_sizes_in_turn, validate
from coat_deploy.network.weights import (
    Checkpoint,
    WeightsOptions,
    load_checkpoint,
    read_safetensors,
    to_safetensors,
)
from coat_deploy.repository import VERSION, WEIGHTS, Model, Repository, Staging, read_labels
from coat_deploy.runner import Array, LoadOptions, Runner
from coat_deploy.spec import ModelSpec, Preprocess, Size, WeightsRecord
from coat_deploy.version import __version__

SYNTHETIC_IMAGES = 8
SYNTHETIC_BATCHES = (1, 2, 5)
SYNTHETIC_SEED = 1

Progress = Callable[[str], None]
MakeBatches = Callable[[Preprocess], Iterable[Batch]]


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    size: the fixed (H, W) of the graph; None takes the model's own. dynamic: H and W open.
    weights: where to take weights from; None takes those in the model folder, or where its
        config points to. rename: name of the model folder that is written.
    num_classes, labels: another classifier than the config's. replace_head: load a checkpoint of
        other classes all the same, with a new, random head.
    validate: hold the artifact against eager on images, not only on the proof's.
    """

    target: str = "onnxruntime"
    precision: str | None = None
    form: str = "authored"
    size: Size | None = None
    dynamic: bool = False
    features: bool = False
    opset: int = DEFAULT_OPSET
    weights: str | None = None
    rename: str | None = None
    num_classes: int | None = None
    labels: Sequence[str] = ()
    validate: bool = True
    bar: Bar | None = None
    threads: int | None = None
    loading: WeightsOptions = field(default_factory=WeightsOptions)


@dataclass(frozen=True)
class Exported:
    """A model with a new artifact, and what was measured before it was let in."""

    model: Model
    artifact: Artifact
    validation: Validation | None

    @property
    def path(self) -> Path:
        """The file a runtime opens."""
        return self.model.path(self.artifact)

    def to_json(self) -> dict[str, Any]:
        """Return the artifact's path, identity and agreement."""
        return {
            "artifact": str(self.path.resolve()),
            "model": self.model.name,
            "name": self.artifact.name,
            "target": self.artifact.target,
            "precision": self.artifact.precision,
            "form": self.artifact.form,
            "size": list(self.artifact.size) if self.artifact.size else None,
            "opset": self.artifact.opset,
            "sha256": self.artifact.sha256,
            "weights_sha256": self.artifact.weights_sha256,
            "bytes": self.path.stat().st_size,
            "agreement": dict(self.artifact.agreement),
        }


def export(
    repository: Repository,
    name: str,
    options: ExportOptions,
    batches: MakeBatches | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Export the model `name` and return it with its new artifact.

    `batches` makes the images to validate on, for the artifact's preprocessing; without it
    synthetic ones are used. `progress` is told of every step.
    Raises: BelowBar when the artifact does not agree with eager, or any other CoatDeployError;
    the model folder is then unchanged.
    """
    precision = _precision(options)
    require(options.target)
    require("eager")
    source = repository.find(name)
    home = repository.home(source)
    if options.rename:
        home = Model(repository.writable / options.rename)
    spec = _spec(source.spec, options)
    tell = progress or (lambda step: None)
    with home.staging() as staging:
        tell("reading weights")
        record = _stage_weights(staging, source, spec, options)
        staging.write_spec(spec)
        maker = _Maker(staging, spec, options, precision)
        tell("writing the graph" if options.form == "authored" else "tracing the graph")
        files = maker.write_graph()
        tell("proving it against eager")
        artifact, validation = maker.prove(files, batches, tell)
        model = staging.commit(artifact, record)
    return Exported(model, artifact, validation)


def _precision(options: ExportOptions) -> str:
    """Return the precision to export. Raises UsageError for what the target cannot take."""
    if options.target not in FORMS:
        raise UsageError(unknown_name("target to export to", options.target, FORMS))
    if options.form not in FORM_NAMES:
        raise UsageError(unknown_name("form", options.form, FORM_NAMES))
    known = PRECISIONS[options.target]
    precision = options.precision or known[0]
    if precision not in known:
        raise UsageError(unknown_name(f"precision for {options.target}", precision, known))
    return precision


def _spec(spec: ModelSpec, options: ExportOptions) -> ModelSpec:
    """Return the spec to write: the model's, with the classifier that the options ask for."""
    if options.num_classes is None and not options.labels:
        return spec
    count = options.num_classes or len(options.labels)
    if options.labels and len(options.labels) != count:
        raise UsageError(
            f"labels: {len(options.labels)} names for {count} classes. Give one name a class."
        )
    same = count == spec.num_classes and not options.labels
    return replace(
        spec,
        num_classes=count,
        label_names=tuple(options.labels) or (spec.label_names if same else ()),
        label_set=spec.label_set if same else None,
    )


def _stage_weights(
    staging: Staging, source: Model, spec: ModelSpec, options: ExportOptions
) -> WeightsRecord | None:
    """Put weights beside the graph to come; return where they are from, if they are new."""
    origin = options.weights
    if origin is None and source.weights_path.exists():
        if source.folder == staging.target.folder:
            staging.link_weights()
            return None
        # The file may be of another model: it is fitted like any checkpoint.
        origin = str(source.weights_path)
    if origin is None:
        origin = spec.weights.source if spec.weights else None
    if origin is None:
        raise UsageError(
            f"{source.folder}: no weights (expected {WEIGHTS} there). "
            "Say where they are: --weights PATH, timm, official or random:SEED."
        )
    checkpoint: Checkpoint = load_checkpoint(origin, spec, options.loading)
    staging.write(WEIGHTS, to_safetensors(checkpoint))
    known = source.weights_record
    moved = options.weights is None and known is not None
    return known if moved else checkpoint.record


@dataclass(frozen=True)
class _Maker:
    """Makes and tries one artifact in a staging folder."""

    staging: Staging
    spec: ModelSpec
    options: ExportOptions
    precision: str

    @property
    def size(self) -> Size | None:
        if self.options.dynamic:
            return None
        return self.options.size or self.spec.preprocess.input_size

    @property
    def nominal(self) -> Size:
        """A size the artifact takes."""
        return self.size or self.options.size or self.spec.preprocess.input_size

    @property
    def name(self) -> str:
        default, o = self.spec.preprocess.input_size, self.options
        return artifact_name(o.target, self.precision, self.size, default, o.form, o.features)

    def write_graph(self) -> dict[str, str]:
        """Write the graph's files aside; return their digests."""
        weights = read_safetensors(self.staging.folder / WEIGHTS)
        graph = self._graph(weights)
        choices = {
            "target": self.options.target,
            "precision": self.precision,
            "form": self.options.form,
        }
        labels = read_labels(self.spec)
        add_metadata(graph, self.spec, labels, self.staging.weights_sha256(), **choices)
        check_graph(graph)
        files = serialise(graph, f"{self.name}.onnx")
        for file, content in files.items():
            self.staging.write(f"{VERSION}/{file}", content)
        return {file: sha256_bytes(content) for file, content in files.items()}

    def _graph(self, weights: dict[str, Array]) -> ModelProto:
        options = GraphOptions(self.size, self.options.features, self.options.opset)
        if self.options.form == "authored":
            return author_graph(self.spec, weights, get_form(self.options.target), options)
        from coat_deploy.graph.traced import trace_graph

        return trace_graph(self.spec, weights, options)

    def prove(
        self, files: dict[str, str], batches: MakeBatches | None, tell: Progress
    ) -> tuple[Artifact, Validation | None]:
        """Make the proof, replay it and validate; return the artifact as it may be committed.

        Raises: BelowBar.
        """
        path = self.staging.folder / VERSION / next(iter(files))
        bar = self.options.bar or get_bar(self.precision)
        load = LoadOptions(threads=self.options.threads, features=self.options.features)
        validation = None
        with require("eager").load(self.staging.folder, load) as reference:
            sha256 = next(iter(files.values()))
            how = self.spec.preprocess
            proof = make_proof(reference, how, self.nominal, sha256, bar).to_bytes()
            self.staging.write(f"{VERSION}/{self.name}.proof.npz", proof)
            load = replace(load, precision=self.precision)
            with require(self.options.target).load(path, load) as candidate:
                self._replay(proof, candidate)
                if self.options.validate:
                    tell("validating")
                    validation = self._validate(reference, candidate, bar, batches)
        return self._artifact(files, proof, validation, batches is not None), validation

    def _replay(self, proof: bytes, candidate: Runner) -> None:
        replay(Proof.from_bytes(proof), candidate, self.name)

    def _validate(
        self, reference: Runner, candidate: Runner, bar: Bar, batches: MakeBatches | None
    ) -> Validation:
        how = self.spec.preprocess.at(self.nominal)
        images = batches(how) if batches else synthetic_batches(how)
        validation = validate(reference, candidate, images, bar)
        if not validation.passed:
            raise BelowBar(
                f"{self.name}: not exported, it does not agree with eager: "
                f"{' '.join(validation.failures)}"
            )
        return validation

    def _artifact(
        self, files: dict[str, str], proof: bytes, validation: Validation | None, real: bool
    ) -> Artifact:
        agreement: dict[str, Any] = {}
        if validation:
            source = "images" if real else "synthetic"
            agreement = {"source": source, "images": validation.images}
            agreement |= validation.agreement.to_json()
        target = self.options.target
        return Artifact(
            name=self.name,
            target=target,
            precision=self.precision,
            form=self.options.form,
            opset=self.options.opset,
            size=self.size,
            features=self.options.features,
            files={**files, f"{self.name}.proof.npz": sha256_bytes(proof)},
            proof=f"{self.name}.proof.npz",
            weights_sha256=self.staging.weights_sha256(),
            spec_digest=self.spec.digest(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            tools={
                "coat-deploy": __version__,
                "onnx": importlib.metadata.version("onnx"),
                "torch": require("eager").version(),
                target: require(target).version(),
            },
            agreement=agreement,
        )


def synthetic_batches(how: Preprocess) -> list[Batch]:
    """Return synthetic images in batches of several sizes, for when there are no photographs."""
    pixels = normalise(
        probe_images(how.input_size, SYNTHETIC_IMAGES, SYNTHETIC_SEED), how.mean, how.std
    )
    return [
        Batch(pixels[part.start : part.stop], tuple(f"synthetic {i}" for i in part))
        for part in batch_sizes_in_turn(SYNTHETIC_IMAGES, SYNTHETIC_BATCHES)
    ]
