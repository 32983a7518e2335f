"""What Triton is to serve: an artifact, or engines for several GPUs, and how; settled and checked.

Everything that Triton would refuse when it loads the repository is refused here, in one line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coat_deploy.artifact import Artifact
from coat_deploy.engine import Profile
from coat_deploy.errors import CorruptArtifact, SpecError, UsageError, unknown_name
from coat_deploy.inspection import Inspection
from coat_deploy.model import Model
from coat_deploy.repository import read_labels
from coat_deploy.runner import INPUT
from coat_deploy.spec import Size

TARGETS = ("onnxruntime", "tensorrt")
"""Targets whose artifacts Triton has a backend for that runs them as they are."""

ACCELERATORS = ("cpu", "openvino", "cuda", "tensorrt")
"""What computes a graph within Triton's onnxruntime; `cpu` is onnxruntime itself."""

ON_GPU = ("cuda", "tensorrt")
PREPROCESS, IMAGE = "preprocess", "image"
"""Behind the model's name: what decodes images, and the ensemble that takes them."""

MAX_BATCHES = {"cpu": 8, "openvino": 8, "cuda": 64, "tensorrt": 64}
MOST = 65536

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class TritonOptions:
    """How Triton is to serve a model.

    `name` it goes by, None for its own. `accelerator` of a graph, one of `ACCELERATORS`.
    `max_batch`: most images in a step; None is the engine's, or by the accelerator.
    `instances`: steps at once, on every GPU or on the CPU. `threads` of each on a CPU; None is
    one a core. `delay_us`: how long a request may wait for others to share its step.
    `max_queue`: waiting requests above which one is refused. `decoders`: processes that decode
    images; 0 leaves the models that take images out.
    """

    name: str | None = None
    accelerator: str = "cpu"
    max_batch: int | None = None
    instances: int = 1
    threads: int | None = None
    delay_us: int = 0
    max_queue: int = 256
    decoders: int = 2

    def __post_init__(self) -> None:
        if self.accelerator not in ACCELERATORS:
            raise UsageError(unknown_name("accelerator", self.accelerator, ACCELERATORS))
        ranges = {"max_batch": 1, "instances": 1, "threads": 1, "delay_us": 0, "decoders": 0}
        for field, least in {**ranges, "max_queue": 1}.items():
            value = getattr(self, field)
            if value is not None and not least <= value <= 1_000_000:
                raise UsageError(
                    f"{field.replace('_', '-')}: must be {least} or more (got {value})."
                )


@dataclass(frozen=True)
class Source:
    """An artifact and the model folder that it lies in."""

    model: Model
    artifact: Artifact

    @property
    def capability(self) -> str | None:
        """Compute capability that an engine is for; None for a graph, or an engine of any."""
        engine = self.artifact.engine
        if engine is None or engine.options.get("hardware_compatible"):
            return None
        return engine.compute_capability


@dataclass(frozen=True)
class Plan:
    """What is served: the first of `sources`, the others being its engines for other GPUs."""

    sources: tuple[Source, ...]
    options: TritonOptions

    @property
    def model(self) -> Model:
        """The model served."""
        return self.sources[0].model

    @property
    def artifact(self) -> Artifact:
        """The artifact served; of several engines the first."""
        return self.sources[0].artifact

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.model.name if self.options.name is None else self.options.name

    @property
    def folders(self) -> tuple[str, str, str]:
        """The network; what decodes; the ensemble of both; each a folder of the repository."""
        return (self.name, f"{self.name}_{PREPROCESS}", f"{self.name}_{IMAGE}")

    @property
    def names(self) -> tuple[str, ...]:
        """Those of `folders` that are written."""
        return self.folders if self.options.decoders else (self.name,)

    @property
    def on_gpu(self) -> bool:
        """Whether it is computed on a GPU."""
        return bool(self.profiles) or self.options.accelerator in ON_GPU

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Profiles of the engine; none for a graph."""
        return self.artifact.engine.profiles if self.artifact.engine else ()

    @property
    def max_batch(self) -> int:
        """Most images in a step."""
        if self.options.max_batch:
            return self.options.max_batch
        if self.profiles:
            return max(profile.batch[2] for profile in self.profiles)
        # Its ranges are of a whole step, and it was validated image by image.
        return 1 if self.artifact.precision == "int8" else MAX_BATCHES[self.options.accelerator]

    @property
    def best_batches(self) -> list[int]:
        """Batches that the engine is fastest at."""
        best = {profile.batch[1] for profile in self.profiles}
        return sorted(batch for batch in best if batch <= self.max_batch)

    @property
    def nominal(self) -> Size:
        """Size that images are prepared to."""
        return self.artifact.size or self.model.spec.preprocess.input_size

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """A label a class; none for feature maps."""
        return () if self.artifact.features else read_labels(self.model.spec)

    @property
    def input_shape(self) -> list[int]:
        """Shape of an image as the network takes it; an open length is -1."""
        return _shape(self._inspection.inputs[INPUT])

    @property
    def output_shapes(self) -> Mapping[str, list[int]]:
        """Shape of every output for one image."""
        return {name: _shape(shape) for name, shape in self._inspection.outputs.items()}

    @property
    def _inspection(self) -> Inspection:
        return Inspection(self.model, self.artifact, {})


def settle(sources: Sequence[Source], options: TritonOptions) -> Plan:
    """Return the plan for an artifact, or for engines of one network for different GPUs.

    Raises: UsageError for what Triton cannot do, SpecError for labels that no file can hold,
    CorruptArtifact and StaleArtifact for files that are not what was exported.
    """
    plan = Plan(tuple(sources), options)
    check_target(plan.artifact.target)
    _check_name(plan.name)
    if plan.artifact.engine is None:
        _check_graph(plan)
    else:
        _check_engines(plan)
    _check_labels(plan)
    for source in sources:
        source.model.check_parents(source.artifact)
        source.model.check_files(source.artifact)
    return plan


def check_target(target: str) -> None:
    """Raise UsageError for a target whose artifacts no backend of Triton's runs as they are."""
    if target not in TARGETS:
        raise UsageError(
            f"target {target}: Triton has no backend for it (known: {', '.join(TARGETS)}). "
            f"{_INSTEAD.get(target, '')}".rstrip()
        )


_INSTEAD = {
    "openvino": "Take --target onnxruntime --accelerator openvino.",
    "tensorrt-rtx": "Take --target tensorrt, built on a GPU like the one that serves it.",
}


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"name '{name}': Triton does not serve it (expected up to 100 letters, digits, '_', "
            "'-' and '.', the first a letter or digit). Choose another with --as."
        )


def _check_graph(plan: Plan) -> None:
    artifact, options = plan.artifact, plan.options
    if artifact.target == "tensorrt":
        raise CorruptArtifact(
            f"{plan.model.path(artifact)}: the manifest does not say what this engine is for. "
            f"Run: {plan.model.export_command(artifact)}"
        )
    if len(plan.sources) > 1:
        raise UsageError("--also: is for engines. Leave it out, or take --target tensorrt.")
    if plan.on_gpu and options.threads:
        raise UsageError("threads: are of the CPU. Leave them out, or take --accelerator cpu.")
    if artifact.precision == "int8" and (options.accelerator != "cpu" or plan.max_batch > 1):
        raise UsageError(
            f"{artifact.name}: was validated image by image on the CPU (got accelerator "
            f"{options.accelerator}, batches up to {plan.max_batch}). Take --accelerator cpu "
            "--max-batch 1, or --precision fp32."
        )
    if options.accelerator == "tensorrt" and artifact.size is None:
        raise UsageError(
            f"{artifact.name}: TensorRT would build an engine for every new image size, while "
            "requests wait. Export a fixed --size, or take --accelerator cuda."
        )


def _check_engines(plan: Plan) -> None:
    _check_profiles(plan)
    if plan.options.accelerator != "cpu":
        raise UsageError("--accelerator: is for graphs; an engine has its own. Leave it out.")
    if plan.options.threads:
        raise UsageError("threads: are of the CPU. Leave them out for an engine.")
    first, found = plan.sources[0], dict[str | None, Source]()
    for source in plan.sources:
        same = _identity(source.artifact) == _identity(first.artifact)
        if not same or source.artifact.target != "tensorrt":
            raise UsageError(
                f"{source.model.folder}: its {source.artifact.name} is not an engine of the same "
                f"network as that of {first.model.folder} (other weights, config, size, precision, "
                "profiles, or version of TensorRT). Export it from the same model, alike."
            )
        if source.capability in found:
            there = source.capability or "any"
            raise UsageError(
                f"{source.model.folder}: a second engine for GPUs of compute capability {there}. "
                f"Leave it out, or that of {found[source.capability].model.folder}."
            )
        found[source.capability] = source


def _check_profiles(plan: Plan) -> None:
    least = min(profile.batch[0] for profile in plan.profiles)
    most = max(profile.batch[2] for profile in plan.profiles)
    if least > 1:
        raise UsageError(
            f"{plan.artifact.name}: takes no single image (got batches from {least} on), which "
            f"Triton may have to give it. Export it with --batch 1,{least},{most}."
        )
    if plan.max_batch > most:
        raise UsageError(
            f"--max-batch: the engine takes less (got {plan.max_batch}, expected {most} at most)."
        )


def _identity(artifact: Artifact) -> tuple[object, ...]:
    engine = artifact.engine
    return (
        *(artifact.weights_sha256, artifact.spec_digest, artifact.size, artifact.features),
        *(artifact.precision, engine and engine.profiles, engine and engine.version),
    )


def _check_labels(plan: Plan) -> None:
    if not plan.artifact.features and not plan.model.spec.num_classes:
        raise UsageError(f"{plan.model.folder}: has no classifier (num_classes is 0).")
    for index, label in enumerate(plan.labels):
        if not label.strip() or len(label.splitlines()) > 1:
            raise SpecError(
                f"{plan.model.folder}: label {index} cannot be a line of labels.txt (got "
                f"{label!r:.60}). Rename it in config.json, and export again."
            )


def _shape(shape: Sequence[int | str]) -> list[int]:
    return [length if isinstance(length, int) else -1 for length in shape[1:]]
