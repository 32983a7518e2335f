"""The model repository: folders of models, the artifacts in them, and how they are written.

    MODELS/coat_tiny/
      config.json          the spec
      model.safetensors    the weights
      manifest.json        where the weights and every artifact came from
      1/                   the artifacts and their proofs

Everything is written aside and renamed, so that a full disk, a signal or a crash leaves what was
there before. Only this file writes into model folders.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coat_deploy.artifact import Artifact
from coat_deploy.digest import sha256_file
from coat_deploy.errors import (
    CorruptArtifact,
    RepositoryError,
    SpecError,
    StaleArtifact,
    UsageError,
    unknown_name,
)
from coat_deploy.spec import ModelSpec, Size, WeightsRecord, format_size

CONFIG, WEIGHTS, MANIFEST, VERSION = "config.json", "model.safetensors", "manifest.json", "1"
MODELS_VARIABLE = "COAT_MODELS"
MAX_JSON_BYTES = 16 << 20
"""Largest config or manifest that is read; a thousand long labels are 50 KB."""


@dataclass(frozen=True)
class ArtifactQuery:
    """Which artifact is wanted; None means the model's default, or any."""

    target: str
    precision: str | None = None
    size: Size | None = None
    form: str | None = None
    features: bool = False

    def matches(self, artifact: Artifact) -> bool:
        """Return whether an artifact is one of those meant."""
        return (
            artifact.target == self.target
            and self.precision in (None, artifact.precision)
            and self.form in (None, artifact.form)
            and artifact.features == self.features
            and (self.size is None or artifact.accepts(self.size))
        )


@dataclass(frozen=True)
class Model:
    """A folder: a spec, weights, artifacts. Knows no runtime."""

    folder: Path

    @property
    def name(self) -> str:
        """Name of the model, that of its folder."""
        return self.folder.name

    @property
    def weights_path(self) -> Path:
        """Path of the weights, whether they are there or not."""
        return self.folder / WEIGHTS

    @cached_property
    def spec(self) -> ModelSpec:
        """The `config.json`. Raises SpecError."""
        path = self.folder / CONFIG
        return ModelSpec.from_json(_read_json(path, SpecError), str(path))

    @cached_property
    def _manifest(self) -> Mapping[str, Any]:
        path = self.folder / MANIFEST
        if not path.exists():
            return {}
        manifest = _read_json(path, RepositoryError)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("artifacts"), list):
            raise RepositoryError(f"{path}: not a manifest. Remove it and export again.")
        return manifest

    @cached_property
    def artifacts(self) -> tuple[Artifact, ...]:
        """Every artifact, in the order of export. Raises RepositoryError."""
        subject = str(self.folder / MANIFEST)
        entries = self._manifest.get("artifacts", ())
        return tuple(Artifact.from_json(entry, subject) for entry in entries)

    @property
    def weights_record(self) -> WeightsRecord | None:
        """Where the weights in the folder came from, if they were put there by an export."""
        record = self._manifest.get("weights")
        return WeightsRecord(**record) if record else None

    def path(self, artifact: Artifact) -> Path:
        """Return the file of an artifact that a runtime opens."""
        return self.folder / VERSION / artifact.file

    def proof_path(self, artifact: Artifact) -> Path:
        """Return the file of an artifact's proof."""
        return self.folder / VERSION / artifact.proof

    def find(self, query: ArtifactQuery) -> Artifact:
        """Return the artifact meant: of the model's own size first, authored first.

        Raises: RepositoryError listing what is there and the command that exports the missing.
        """
        found = [artifact for artifact in self.artifacts if query.matches(artifact)]
        if not found:
            raise RepositoryError(self._missing(query))
        wanted = query.size or self.spec.preprocess.input_size

        def rank(artifact: Artifact) -> tuple[bool, bool, bool]:
            return artifact.size != wanted, artifact.size is not None, artifact.form != "authored"

        return min(found, key=rank)

    def _missing(self, query: ArtifactQuery) -> str:
        words = [query.target, query.precision, query.form]
        command = ["coat-deploy export", self.name, "--target", query.target]
        for flag, value in (("--precision", query.precision), ("--form", query.form)):
            command += [flag, value] if value else []
        if query.size and query.size != self.spec.preprocess.input_size:
            words.append(format_size(query.size))
            command += ["--size", format_size(query.size)]
        if query.features:
            words.append("features")
            command.append("--features")
        there = ", ".join(artifact.name for artifact in self.artifacts) or "none"
        return (
            f"{self.folder}: no artifact for {' '.join(filter(None, words))} (there: {there}). "
            f"Run: {' '.join(command)} --models {self.folder.parent}"
        )

    def check_parents(self, artifact: Artifact) -> None:
        """Raise StaleArtifact when the weights or the config changed after the export."""
        weights = sha256_file(self.weights_path) if self.weights_path.exists() else "nothing"
        parents = [
            ("config.json", artifact.spec_digest, self.spec.digest()),
            (WEIGHTS, artifact.weights_sha256, weights),
        ]
        for name, exported, present in parents:
            if exported != present:
                raise StaleArtifact(
                    f"{self.folder}: {artifact.name} was exported from another {name} "
                    f"(got {present[:12]}, expected {exported[:12]}). "
                    f"Run: coat-deploy export {self.name} --target {artifact.target} "
                    f"--models {self.folder.parent}"
                )

    def check_files(self, artifact: Artifact) -> None:
        """Raise CorruptArtifact when a file of an artifact is missing or not as exported."""
        for name, exported in artifact.files.items():
            path = self.folder / VERSION / name
            if not path.is_file():
                raise CorruptArtifact(f"{path}: the file is missing. {self._again(artifact)}")
            present = sha256_file(path)
            if present != exported:
                raise CorruptArtifact(
                    f"{path}: the file is not the one that was exported "
                    f"(got sha256 {present[:12]}, expected {exported[:12]}). "
                    f"{self._again(artifact)}"
                )

    def _again(self, artifact: Artifact) -> str:
        return f"Export again: coat-deploy export {self.name} --target {artifact.target}"

    def write_report(self, artifact: Artifact, suffix: str, content: str) -> Path:
        """Write a report beside an artifact, whole or not at all, and return its path."""
        place = self.folder / VERSION / f"{artifact.name}.{suffix}"
        with self.staging() as staging, _writing(place):
            os.replace(staging.write(place.name, content.encode()), place)
        return place

    @contextlib.contextmanager
    def staging(self) -> Iterator["Staging"]:
        """Open a folder aside to build a new state in; it is gone afterwards, moved or not."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.folder))
        try:
            yield Staging(self, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Staging:
    """A model folder in the making, beside the one it will be moved into."""

    target: Model
    folder: Path

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the model folder ("model.safetensors", "1/x.onnx") aside."""
        path = self.folder / name
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return path

    def write_spec(self, spec: ModelSpec) -> None:
        """Write the config.json aside."""
        self.write(CONFIG, _dump(spec.to_json()))

    def weights_sha256(self) -> str:
        """Return the digest of the weights here."""
        return sha256_file(self.folder / WEIGHTS)

    def link_weights(self) -> None:
        """Let the weights that are in the target folder appear here as well."""
        with _writing(self.folder):
            (self.folder / WEIGHTS).symlink_to(self.target.weights_path.resolve())

    def commit(self, artifact: Artifact | None, weights: WeightsRecord | None) -> Model:
        """Move everything into place, the manifest last, and return the model as it is now.

        An artifact replaces one of the same name; `weights` None keeps the record there is.
        """
        folder = self.target.folder
        with _writing(folder), _locked(folder):
            current = Model(folder)
            kept = [a for a in current.artifacts if artifact is None or a.name != artifact.name]
            record = weights or current.weights_record
            manifest = {
                "weights": record.to_json() if record else None,
                "artifacts": [a.to_json() for a in (*kept, *((artifact,) if artifact else ()))],
            }
            self.write(MANIFEST, _dump(manifest))
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            files = [path for path in files if not path.is_symlink()]
            for path in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
                place = folder / path.relative_to(self.folder)
                place.parent.mkdir(exist_ok=True)
                os.replace(path, place)
        return Model(folder)


@dataclass(frozen=True)
class Repository:
    """Folders in which models are sought by name, in order; the first takes what is written."""

    roots: tuple[Path, ...]

    @classmethod
    def open(cls, models: Path | None = None) -> "Repository":
        """Return the repository of `models`, $COAT_MODELS, ./models and the published configs."""
        variable = os.environ.get(MODELS_VARIABLE)
        roots = [models, Path(variable) if variable else None, Path("models")]
        unique = dict.fromkeys(root for root in roots if root is not None)
        return cls((*unique, published_configs()))

    @property
    def writable(self) -> Path:
        """The folder that new models are written to."""
        return self.roots[0]

    def find(self, name: str) -> Model:
        """Return the model `name`; with a slash in it, the folder.

        Raises: UsageError with the nearest name.
        """
        if "/" in name or os.sep in name:
            folder = Path(name)
            if not (folder / CONFIG).is_file():
                raise UsageError(f"{name}: no model folder (it holds no {CONFIG}). Check the path.")
            return Model(folder.resolve())
        for root in self.roots:
            if _is_name(name) and (root / name / CONFIG).is_file():
                return Model(root / name)
        known = [model.name for model in self.models()]
        raise UsageError(f"{unknown_name('model', name, known)} Looked in: {self._places()}.")

    def _places(self) -> str:
        return ", ".join(str(root) for root in self.roots[:-1]) + ", the published configs"

    def models(self) -> Sequence[Model]:
        """Return every model by name; of one name the first found."""
        found: dict[str, Model] = {}
        for root in self.roots:
            for config in sorted(root.glob(f"*/{CONFIG}")):
                found.setdefault(config.parent.name, Model(config.parent))
        return [found[name] for name in sorted(found)]

    def home(self, model: Model) -> Model:
        """Return where `model` is to be written: its own folder, unless it is elsewhere's.

        A model found behind the first root is written to the first root, config included.
        """
        inside = any(model.folder.parent == root for root in self.roots[1:])
        if model.folder.parent == self.writable or not inside:
            return model
        return Model(self.writable / model.name)


def published_configs() -> Path:
    """Return the folder of the published configs, as installed or in a checkout."""
    installed = Path(__file__).with_name("published")
    # An editable install does not map models/ into the package.
    return installed if installed.is_dir() else Path(__file__).parents[1] / "models"


def read_labels(spec: ModelSpec) -> tuple[str, ...]:
    """Return one label a class: the config's, those of its label set, or "class 0", ..."""
    if spec.label_names:
        return spec.label_names
    if spec.label_set is not None:
        path = published_configs() / f"{spec.label_set}.txt"
        if not _is_name(spec.label_set) or not path.is_file():
            raise SpecError(
                f"label set '{spec.label_set}': not known. Write 'label_names' instead."
            )
        labels = tuple(path.read_text(encoding="utf-8").splitlines())
        if len(labels) == spec.num_classes:
            return labels
    return tuple(f"class {i}" for i in range(spec.num_classes))


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and Path(name).name == name


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _read_json(path: Path, error: type[RepositoryError] | type[SpecError]) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path}: too large ({path.stat().st_size} bytes). Is it the right file?")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}). Check the path.") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: is not JSON ({reason}). Restore or rewrite it.") from reason


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failed write (no permission, no space) into one clear line."""
    try:
        yield
    except OSError as reason:
        raise RepositoryError(
            f"{path}: cannot be written ({reason.strerror}); what was there is unchanged. "
            "Free space or choose another folder with --models."
        ) from reason


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against another process that commits to it at the same time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
