"""What an artifact is: its files, inputs and outputs, what it computes in, where it came from."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coat_deploy.artifact import Artifact
from coat_deploy.errors import BackendMissing, UsageError, unknown_name
from coat_deploy.model import VERSION, Model
from coat_deploy.network.variants import get_variant
from coat_deploy.repository import Repository
from coat_deploy.runner import FEATURES, INPUT, LOGITS


@dataclass(frozen=True)
class Inspection:
    """An artifact of a model, described without loading it into its runtime.

    `census`: layers by precision, kind and stage, as of `census.Census.to_json`: of an engine as
    its builder reported them, of a graph its nodes; None of a package, which is machine code.
    """

    model: Model
    artifact: Artifact
    census: dict[str, Any] | None

    @property
    def files(self) -> dict[str, int]:
        """Every file's size in bytes; a file that is missing is not among them."""
        folder = self.model.folder / VERSION
        paths = {name: folder / name for name in self.artifact.files}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Shape of every input; a length that is open is a word."""
        return {INPUT: [self._batch, 3, *self._size]}

    @property
    def outputs(self) -> dict[str, list[int | str]]:
        """Shape of every output."""
        spec = self.model.spec
        if not self.artifact.features:
            return {LOGITS: [self._batch, spec.num_classes]}
        widths = get_variant(spec.architecture).channels
        return {
            name: [self._batch, width, *(_part(length, 4 << i) for length in self._size)]
            for i, (name, width) in enumerate(zip(FEATURES, widths, strict=True))
        }

    @property
    def _batch(self) -> int | str:
        engine = self.artifact.engine
        batches = {n for p in engine.profiles for n in p.batch} if engine else set()
        return batches.pop() if len(batches) == 1 else "batch"

    @property
    def _size(self) -> tuple[int | str, int | str]:
        return self.artifact.size or ("height", "width")

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        entry = self.artifact.to_json()
        engine = entry.pop("engine", None)
        if engine:
            del engine["census"]
        record = self.model.weights_record
        return entry | {
            "model": self.model.name,
            "architecture": self.model.spec.architecture,
            "path": str(self.model.path(self.artifact).resolve()),
            "bytes": self.files,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "weights": record.to_json() if record else None,
            "engine": engine,
            "package": self.artifact.package.to_json() if self.artifact.package else None,
            "census": self.census,
        }


def find_artifact(repository: Repository, text: str) -> tuple[Model, Artifact]:
    """Return what "MODEL/ARTIFACT", an artifact's file, or a model with one artifact means.

    Raises: UsageError listing what is there; RepositoryError, SpecError for the model's folder.
    """
    path = Path(text)
    if path.is_file():
        model, name = Model(path.resolve().parent.parent), path.name
        found = [artifact for artifact in model.artifacts if name in artifact.files]
        if not found:
            raise UsageError(f"{text}: of no artifact of {model.folder} ({_there(model)}).")
        return model, found[0]
    folder, slash, name = text.rpartition("/")
    if slash and not path.is_dir():
        model = repository.find(folder)
        by_name = {artifact.name: artifact for artifact in model.artifacts}
        if name not in by_name:
            raise UsageError(f"{model.folder}: {unknown_name('artifact', name, by_name)}")
        return model, by_name[name]
    model = repository.find(text)
    if len(model.artifacts) != 1:
        raise UsageError(
            f"{text}: which artifact? ({_there(model)}). Say {model.name}/ARTIFACT, or its file."
        )
    return model, model.artifacts[0]


def inspect(model: Model, artifact: Artifact) -> Inspection:
    """Describe an artifact, whose files must be those that were exported.

    Raises: CorruptArtifact; BackendMissing where a graph cannot be read for lack of onnx.
    """
    model.check_files(artifact)
    if artifact.engine:
        return Inspection(model, artifact, dict(artifact.engine.census))
    if artifact.package:
        return Inspection(model, artifact, None)
    if importlib.util.find_spec("onnx") is None:
        raise BackendMissing(
            "inspect: reading a graph takes onnx, which is not installed. "
            'Run: pip install "coat-deploy[torch]"'
        )
    from coat_deploy.graph.precision import read_census

    return Inspection(model, artifact, read_census(model.path(artifact)).to_json())


def _there(model: Model) -> str:
    return "there: " + (", ".join(artifact.name for artifact in model.artifacts) or "none")


def _part(length: int | str, stride: int) -> int | str:
    return length // stride if isinstance(length, int) else f"{length}/{stride}"
