"""Export: from a model's weights to an artifact that is proven, then put into the repository.

    config.json > weights > candidate > manifest

Everything is made and tried in a folder aside. What fails, at any step, leaves the model folder
as it was.
"""

import contextlib
import datetime
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coat_deploy.artifact import NETWORK, Artifact
from coat_deploy.backends.select import (
    ENGINES,
    PACKAGES,
    PRECISIONS,
    package_backend,
    require,
    usable_precisions,
)
from coat_deploy.best import BEST, BEST_OF, find_lowering
from coat_deploy.candidate import Candidate, MakeBatches, Recipe
from coat_deploy.engine import BuildOptions, EngineOptions, EngineRecord
from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.graph.author import DEFAULT_OPSET, check_opset
from coat_deploy.graph.coat import check_size
from coat_deploy.graph.form import FORM_NAMES, FORMS, TRACED_PRECISIONS, get_form
from coat_deploy.graph.precision import ISLANDS, MIN_OPSETS, Lowering
from coat_deploy.measure.bar import Bar, get_bar
from coat_deploy.measure.validate import Validation
from coat_deploy.model import WEIGHTS, Model, Staging
from coat_deploy.network.variants import get_variant
from coat_deploy.network.weights import WeightsOptions, load_checkpoint, to_safetensors
from coat_deploy.package import PackageRecord
from coat_deploy.repository import Repository
from coat_deploy.spec import ModelSpec, Size, WeightsRecord
from coat_deploy.version import __version__

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    size: the fixed (H, W) of the graph; None takes the model's own. dynamic: H and W open.
    weights: where to take weights from; None takes those in the model folder, or where its
        config points to. loading: how, with a new head for example.
    rename: name of the model folder that is written.
    num_classes, labels: another classifier than the config's.
    validate: hold the artifact against eager on images, not only on the proof's.
    bar: how close it must be; None takes the precision's.
    opset: of ONNX; None is `DEFAULT_OPSET`, or the first that has the precision's types.
    device: where it is proven and timed, "cpu" or "cuda", for targets that run on either; what a
        package is compiled for.
    build: for targets that are engines. keep_fp32, islands: paths of modules, and operators, that
        stay float32 in a graph of lower precision; islands None are the default ones.
    """

    target: str = "onnxruntime"
    precision: str | None = None
    form: str = "authored"
    size: Size | None = None
    dynamic: bool = False
    features: bool = False
    opset: int | None = None
    device: str = "cpu"
    build: EngineOptions = field(default_factory=EngineOptions)
    keep_fp32: tuple[str, ...] = ()
    islands: tuple[str, ...] | None = None
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

    @property
    def weights_source(self) -> str | None:
        """Where the weights are from, as `--weights` takes it; None where nobody wrote it down."""
        record = self.model.weights_record
        return record.source if record else None

    @property
    def stale(self) -> tuple[str, ...]:
        """Names of the model's artifacts that were made of other weights, or another config."""
        now = (self.artifact.weights_sha256, self.artifact.spec_digest)
        artifacts = self.model.artifacts
        return tuple(a.name for a in artifacts if (a.weights_sha256, a.spec_digest) != now)

    def to_json(self) -> dict[str, Any]:
        """Return the artifact's path, identity and agreement."""
        engine = self.artifact.engine.to_json() if self.artifact.engine else {}
        census = engine.pop("census", None)
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
            "weights": self.weights_source,
            "weights_sha256": self.artifact.weights_sha256,
            "bytes": self.path.stat().st_size,
            "agreement": dict(self.artifact.agreement),
            "choice": dict(self.artifact.choice) or None,
            "engine": engine or None,
            "census": census,
            "package": self.artifact.package.to_json() if self.artifact.package else None,
        }


@dataclass(frozen=True)
class Prepared:
    """A folder aside with the spec and the weights; `record`: where from, if they are new."""

    staging: Staging
    spec: ModelSpec
    record: WeightsRecord | None

    def commit(self, artifact: Artifact, validation: Validation | None) -> Exported:
        """Move everything into the model's folder, or nothing. Raises RepositoryError."""
        return Exported(self.staging.commit(artifact, self.record), artifact, validation)


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
    source = repository.find(name)
    spec = written_spec(source.spec, options)
    recipe = settle_recipe(spec, options)
    tell = progress or (lambda step: None)
    with prepare(repository, source, spec, options, tell) as prepared:
        return prepared.commit(*attempt(prepared, recipe, options, batches, tell))


@contextlib.contextmanager
def prepare(
    repository: Repository, source: Model, spec: ModelSpec, options: ExportOptions, tell: Progress
) -> Iterator[Prepared]:
    """Open a folder aside with `spec` and the weights in it; it is gone afterwards.

    Raises: any CoatDeployError; BackendMissing before any work.
    """
    require(options.target)
    require("eager")
    if options.target in PACKAGES:
        package_backend(options.target).require_compiler(options.device)
    home = repository.home(source) if options.rename is None else repository.new(options.rename)
    _ = home.artifacts  # a manifest that cannot be read is told now, not after the work
    with home.staging() as staging:
        tell("reading weights")
        record = _stage_weights(staging, source, spec, options)
        staging.write_spec(spec)
        yield Prepared(staging, spec, record)


def attempt(
    prepared: Prepared,
    recipe: Recipe,
    options: ExportOptions,
    batches: MakeBatches | None,
    tell: Progress,
) -> tuple[Artifact, Validation | None]:
    """Make a candidate and hold it against eager; return the artifact as it may be committed.

    Raises: BelowBar, or any other CoatDeployError; what was made of it stays aside.
    """
    candidate = Candidate(prepared.staging, prepared.spec, recipe, options.device)
    if options.precision == BEST:
        candidate = replace(candidate, recipe=_best(candidate, options, batches, tell))
        recipe = candidate.recipe
    if recipe.target in PACKAGES:
        tell("compiling the network, for minutes")
        files, package = candidate.compile()
        return _try(candidate, files, package, options, batches, tell)
    tell("writing the graph" if recipe.form == "authored" else "tracing the graph")
    written, record = candidate.write_graph(), None
    files = written.files
    if recipe.build:
        files, record = candidate.build(written, tell)
    return _try(candidate, files, record, options, batches, tell)


def _best(
    candidate: Candidate, options: ExportOptions, batches: MakeBatches | None, tell: Progress
) -> Recipe:
    """Return the recipe with the blocks in float32 that it takes."""
    bar = options.bar or get_bar(candidate.recipe.precision)
    with candidate.load_reference(options.threads) as reference:
        lowering = find_lowering(candidate, reference, bar, batches, options.threads, tell)
    return replace(candidate.recipe, lowering=lowering)


def written_spec(spec: ModelSpec, options: ExportOptions) -> ModelSpec:
    """Return the spec to write: the model's, with the classifier that the options ask for.

    Raises: UsageError for labels of another number than classes.
    """
    count, labels = options.num_classes, options.labels
    if labels and count not in (None, len(labels)):
        raise UsageError(f"labels: {len(labels)} names for {count} classes. Give one name a class.")
    if labels:
        return spec.with_classes(len(labels), labels)
    return spec if count is None else spec.with_classes(count)


def settle_recipe(spec: ModelSpec, options: ExportOptions) -> Recipe:
    """Return what to make. Raises UsageError, GraphError for what cannot be, before any work."""
    known = precisions(options.target)
    if options.form not in FORM_NAMES:
        raise UsageError(unknown_name("form", options.form, FORM_NAMES))
    precision = options.precision or known[0]
    if precision == BEST and options.target in ENGINES and not options.keep_fp32:
        precision = BEST_OF
    if precision not in known:
        raise UsageError(unknown_name(f"precision for {options.target}", precision, known))
    if options.form == "traced" and precision not in TRACED_PRECISIONS:
        raise UsageError(
            f"precision {precision}: written into the graph, which the traced form cannot do "
            f"(expected one of {', '.join(TRACED_PRECISIONS)}). Leave --form out."
        )
    if options.target in PACKAGES:
        return _settle_package(spec, options, precision)
    lowering = _settle_types(options, precision)
    opset = options.opset or max(DEFAULT_OPSET, MIN_OPSETS.get(lowering.precision, 0))
    check_opset(opset)
    nominal = options.size or spec.preprocess.input_size
    check_size(get_variant(spec.architecture), nominal)
    return Recipe(
        target=options.target,
        precision=precision,
        form=options.form,
        size=None if options.dynamic else nominal,
        nominal=nominal,
        features=options.features,
        opset=opset,
        lowering=lowering,
        build=_settle_build(spec, options, precision, nominal),
    )


def _settle_package(spec: ModelSpec, options: ExportOptions, precision: str) -> Recipe:
    """Return what to compile. Raises UsageError, GraphError."""
    target = options.target
    if precision not in usable_precisions(target, options.device):
        raise UsageError(
            f"{target} {precision}: is compiled for NVIDIA GPUs alone. Take fp32, or add "
            "--device cuda where there is one."
        )
    if options.dynamic:
        raise UsageError(
            f"{target}: is compiled for images of one size. Say which with --size, or leave it out."
        )
    of_graphs = (options.opset, options.islands, options.keep_fp32 or None)
    if options.form == "traced" or any(given is not None for given in of_graphs):
        raise UsageError(
            f"{target}: is compiled of the network, without an ONNX graph. Leave --form, --opset, "
            "--keep-fp32 and --islands out."
        )
    if options.build != EngineOptions():
        raise UsageError(
            f"{target}: takes any batch, and is no engine. Leave the options of engines out."
        )
    size = options.size or spec.preprocess.input_size
    check_size(get_variant(spec.architecture), size)
    return Recipe(
        target=target,
        precision=precision,
        form=NETWORK,
        size=size,
        nominal=size,
        features=options.features,
        opset=None,
    )


def _settle_types(options: ExportOptions, precision: str) -> Lowering:
    """Return what the graph's nodes shall compute in. Raises UsageError."""
    types = get_form(options.target, precision).types
    if types == "fp32" and (options.keep_fp32 or options.islands is not None):
        raise UsageError(
            f"{options.target} {precision}: its graph is float32 altogether. Leave --keep-fp32 and "
            "--islands out, or export to fp16 of onnxruntime, or fp16 or bf16 of tensorrt or "
            "tensorrt-rtx."
        )
    islands = ISLANDS if options.islands is None else options.islands
    return Lowering(types, islands, options.keep_fp32)


def _settle_build(
    spec: ModelSpec, options: ExportOptions, precision: str, nominal: Size
) -> BuildOptions | None:
    """Return how to build an engine; None for other targets. Raises UsageError."""
    given = options.build
    if options.target not in ENGINES:
        if given != EngineOptions():
            raise UsageError(
                f"{options.target}: takes any batch, and is not built. Leave the options of "
                "engines out, or export to tensorrt or tensorrt-rtx."
            )
        return None
    least = get_variant(spec.architecture).min_side if options.dynamic else None
    return given.settle(nominal, least, tf32=precision == "tf32")


def precisions(target: str) -> tuple[str, ...]:
    """Return what can be exported for `target`, the most exact first. Raises UsageError."""
    known = (*FORMS, *PACKAGES)
    if target not in known:
        raise UsageError(unknown_name("target to export to", target, known))
    return PRECISIONS[target]


def _stage_weights(
    staging: Staging, source: Model, spec: ModelSpec, options: ExportOptions
) -> WeightsRecord | None:
    """Put weights beside the graph to come; return where they are from, if they are new."""
    origin, there = options.weights, source.weights_path.is_file()
    if origin is None and there:
        at_home = os.path.samefile(source.folder, staging.target.folder)
        same_head = spec.num_classes == source.spec.num_classes and not options.loading.replace_head
        if at_home and same_head:
            staging.link_weights()
            return None
        # The file may be of another model: it is fitted like any checkpoint.
        origin = str(source.weights_path)
    elif origin is None and source.spec.weights:
        origin = source.spec.weights.source
    if origin is None:
        raise UsageError(
            f"{source.folder}: no weights (expected {WEIGHTS} there). "
            "Say where they are: --weights PATH, timm, official or random:SEED."
        )
    checkpoint = load_checkpoint(origin, spec, options.loading)
    staging.write(WEIGHTS, to_safetensors(checkpoint))
    moved = options.weights is None and there
    return (source.weights_record if moved else None) or checkpoint.record


def _try(
    candidate: Candidate,
    files: dict[str, str],
    record: EngineRecord | PackageRecord | None,
    options: ExportOptions,
    batches: MakeBatches | None,
    tell: Progress,
) -> tuple[Artifact, Validation | None]:
    sha256 = next(iter(files.values()))
    bar = options.bar or get_bar(candidate.recipe.precision)
    validation = None
    tell("proving it against eager")
    with (
        candidate.load_reference(options.threads) as reference,
        candidate.load(files, options.threads) as runner,
    ):
        proof = candidate.prove(reference, runner, sha256, bar)
        if options.validate:
            tell("validating")
            validation = candidate.validate(reference, runner, bar, batches)
    agreement: dict[str, Any] = {}
    if validation:
        agreement = {"source": "images" if batches else "synthetic", "images": validation.images}
        agreement |= validation.agreement.to_json()
        if candidate.stand_in:
            agreement["computed_by"] = candidate.stand_in
    artifact = _artifact(candidate, {**files, candidate.proof_name: proof}, record, agreement)
    return artifact, validation


def _artifact(
    candidate: Candidate,
    files: dict[str, str],
    record: EngineRecord | PackageRecord | None,
    agreement: dict[str, Any],
) -> Artifact:
    recipe = candidate.recipe
    package = record if isinstance(record, PackageRecord) else None
    return Artifact(
        name=candidate.name,
        target=recipe.target,
        precision=recipe.precision,
        form=recipe.form,
        opset=recipe.opset,
        size=recipe.size,
        features=recipe.features,
        files=files,
        proof=candidate.proof_name,
        weights_sha256=candidate.weights_sha256,
        spec_digest=candidate.spec.digest(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tools={
            "coat-deploy": __version__,
            **({} if package else {"onnx": importlib.metadata.version("onnx")}),
            "torch": require("eager").version(),
            recipe.target: require(recipe.target).version(),
        },
        agreement=agreement,
        engine=record if isinstance(record, EngineRecord) else None,
        package=package,
    )
