"""A model: a folder with a spec, weights and artifacts, and how it is changed.

    coat_tiny/
      config.json          the spec
      model.safetensors    the weights
      manifest.json        where the weights and every artifact came from
      1/                   the artifacts and their proofs

A new state is made aside and moved in as one (see `transaction`), so that a full disk, a signal
or a crash leaves what was there before. Only this file writes into model folders.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from coat_deploy.artifact import NETWORK, Artifact
from coat_deploy.digest import sha256_file
from coat_deploy.errors import (
    CorruptArtifact,
    RepositoryError,
    SpecError,
    StaleArtifact,
    unknown_name,
)
from coat_deploy.json_files import json_bytes, read_json
from coat_deploy.network.variants import VARIANTS
from coat_deploy.spec import ModelSpec, Size, WeightsRecord, format_size
from coat_deploy.transaction import aside, locked, move_in, settle, write_file, writing

CONFIG, WEIGHTS, MANIFEST, VERSION = "config.json", "model.safetensors", "manifest.json", "1"


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
    """A folder: a spec, weights, artifacts. Knows no runtime.

    `written_to` is the repository that exports of it go to, where that is not the one it is in.
    """

    folder: Path
    written_to: Path | None = field(default=None, compare=False)

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
        settle(self.folder)
        path = self.folder / CONFIG
        spec = ModelSpec.from_json(read_json(path, SpecError), str(path))
        if spec.architecture not in VARIANTS:
            message = unknown_name("architecture", spec.architecture, VARIANTS)
            raise SpecError(f"{path}: {message}")
        return spec

    @cached_property
    def _manifest(self) -> Mapping[str, Any]:
        settle(self.folder)
        path = self.folder / MANIFEST
        if not os.path.lexists(path):
            return {}
        manifest = read_json(path, RepositoryError)
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
        """Where the weights in the folder came from, if they were put there by an export.

        Raises: RepositoryError.
        """
        path = self.folder / MANIFEST
        try:
            return WeightsRecord.from_json(self._manifest.get("weights"), str(path))
        except SpecError as error:
            raise RepositoryError(f"{error} Remove the file and export again.") from error

    def path(self, artifact: Artifact) -> Path:
        """Return the file of an artifact that a runtime opens."""
        return self.folder / VERSION / artifact.file

    def proof_path(self, artifact: Artifact) -> Path:
        """Return the file of an artifact's proof."""
        return self.folder / VERSION / artifact.proof

    def find(self, query: ArtifactQuery) -> Artifact:
        """Return the artifact meant: of the model's own size, in fp32 and authored, if it can be.

        Raises: RepositoryError listing what is there and the command that exports the missing.
        """
        found = [artifact for artifact in self.artifacts if query.matches(artifact)]
        wanted = query.size or self.spec.preprocess.input_size

        def rank(artifact: Artifact) -> tuple[bool, ...]:
            return (
                artifact.size != wanted,
                artifact.size is not None,  # a dynamic one takes the wanted size as well
                artifact.precision != "fp32",
                artifact.form != "authored",
            )

        if not found:
            raise RepositoryError(self._missing(query))
        return min(found, key=rank)

    def _missing(self, query: ArtifactQuery) -> str:
        size = format_size(query.size) if query.size else None
        words = [query.target, query.precision, query.form, size, query.features and "features"]
        there = ", ".join(artifact.name for artifact in self.artifacts) or "none"
        return (
            f"{self.folder}: no artifact for {' '.join(word for word in words if word)} "
            f"(there: {there}). Run: {self.export_command(query)}"
        )

    def export_command(self, wanted: ArtifactQuery | Artifact) -> str:
        """Return the command line that exports `wanted`, quoted for a shell."""
        words = ["coat-deploy", "export", self.name, "--target", wanted.target]
        if wanted.precision:
            words += ["--precision", wanted.precision]
        if wanted.form not in (None, "authored", NETWORK):
            words += ["--form", str(wanted.form)]
        if wanted.size is None and isinstance(wanted, Artifact):
            words += ["--size", "dynamic"]
        elif wanted.size and wanted.size != self.spec.preprocess.input_size:
            words += ["--size", format_size(wanted.size)]
        if wanted.features:
            words.append("--features")
        if isinstance(wanted, Artifact) and wanted.engine:
            for profile in wanted.engine.profiles:
                words += ["--batch", ",".join(map(str, profile.batch))]
        if isinstance(wanted, Artifact) and wanted.package and wanted.package.device != "cpu":
            words += ["--device", wanted.package.device]
        return shlex.join([*words, "--models", str(self.written_to or self.folder.parent)])

    def check_parents(self, artifact: Artifact) -> None:
        """Raise StaleArtifact when the weights or the config changed after the export.

        Weights that are not there cannot have changed: an artifact may travel without them.
        """
        parents = [(CONFIG, artifact.spec_digest, self.spec.digest())]
        if self.weights_path.exists():
            parents.append((WEIGHTS, artifact.weights_sha256, sha256_file(self.weights_path)))
        for name, exported, present in parents:
            if exported != present:
                raise StaleArtifact(
                    f"{self.folder}: {artifact.name} was exported from another {name} "
                    f"(got {present[:12]}, expected {exported[:12]}). Restore the file, or "
                    f"export again if it is meant to be new. Run: {self.export_command(artifact)}"
                )

    def check_files(self, artifact: Artifact) -> None:
        """Raise CorruptArtifact when a file of an artifact is missing or not as exported."""
        for name, exported in artifact.files.items():
            path = self.folder / VERSION / name
            present = sha256_file(path) if path.is_file() else None
            if present != exported:
                what = "is missing"
                if present:
                    got = f"got sha256 {present[:12]}, expected {exported[:12]}"
                    what = f"is not the one that was exported ({got})"
                raise CorruptArtifact(
                    f"{path}: the file {what}. Run: {self.export_command(artifact)}"
                )

    def write_report(self, artifact: Artifact, suffix: str, content: str) -> Path:
        """Write a report beside an artifact, whole or not at all, and return its path.

        Raises: RepositoryError when it cannot be written.
        """
        place = self.folder / VERSION / f"{artifact.name}.{suffix}"
        with self.staging() as staging, writing(place):
            os.replace(staging.write(place.name, content.encode()), place)
        return place

    @contextlib.contextmanager
    def staging(self) -> Iterator["Staging"]:
        """Open a folder aside to build a new state in; it is gone afterwards, moved or not.

        Raises: RepositoryError when the model folder cannot be written.
        """
        with aside(self.folder) as place:
            yield Staging(self, place)


@dataclass(frozen=True)
class Staging:
    """A model folder in the making, beside the one it will be moved into."""

    target: Model
    folder: Path
    _names: list[str] = field(default_factory=list)

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the model folder ("model.safetensors", "1/x.onnx") aside."""
        write_file(self.folder / name, data)
        self._names.append(name)
        return self.folder / name

    def withdraw(self, name: str) -> None:
        """Take a file that was written aside out again: it will not be moved in."""
        self._names[:] = [other for other in self._names if other != name]
        with writing(self.folder):
            (self.folder / name).unlink(missing_ok=True)

    def write_spec(self, spec: ModelSpec) -> None:
        """Write the config.json aside; one that says the same already will stay in its place."""
        self.write(CONFIG, json_bytes(spec.to_json()))
        with contextlib.suppress(SpecError):
            if Model(self.target.folder).spec == spec:
                self._names.remove(CONFIG)

    def weights_sha256(self) -> str:
        """Return the digest of the weights here."""
        return sha256_file(self.folder / WEIGHTS)

    def link_weights(self) -> None:
        """Let the weights of the target folder appear here, whatever happens to them there."""
        present = self.target.weights_path.resolve()
        with writing(self.folder):
            try:
                os.link(present, self.folder / WEIGHTS)
            except OSError:  # on another file system, or one without hard links
                (self.folder / WEIGHTS).symlink_to(present)

    def commit(self, artifact: Artifact | None, weights: WeightsRecord | None) -> Model:
        """Move everything into place, or nothing, and return the model as it is now.

        An artifact replaces one of the same name; `weights` None keeps the record there is.
        Raises: RepositoryError; the folder is then as it was.
        """
        folder = self.target.folder
        with writing(folder), locked(folder):
            current = Model(folder)
            old = [a for a in current.artifacts if artifact and a.name == artifact.name]
            entries = [a for a in current.artifacts if a not in old]
            entries += [artifact] if artifact else []
            record = weights or current.weights_record
            manifest = {
                "weights": record.to_json() if record else None,
                "artifacts": [entry.to_json() for entry in entries],
            }
            self.write(MANIFEST, json_bytes(manifest))
            move_in(self.folder, folder, list(dict.fromkeys(self._names)))
            if artifact and any(entry.sha256 != artifact.sha256 for entry in old):
                _remove_leftovers(folder / VERSION, artifact)
        return Model(folder)


def _remove_leftovers(folder: Path, artifact: Artifact) -> None:
    """Remove the reports on an artifact that was replaced, and files that it alone had."""
    for path in folder.glob(f"{artifact.name}.*"):
        if path.name not in artifact.files:
            with contextlib.suppress(OSError):
                path.unlink()
