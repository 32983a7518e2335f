"""Write a repository for Triton: whole, or not at all, and over nothing that is another's.

DIR/NAME/             config.pbtxt, labels.txt, coat-deploy.json, 1/model.onnx
DIR/NAME_preprocess/  config.pbtxt, 1/model.py and what it imports, warmup/image
DIR/NAME_image/       config.pbtxt, 1/
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coat_deploy.digest import sha256_bytes
from coat_deploy.errors import CorruptArtifact
from coat_deploy.model import VERSION
from coat_deploy.transaction import aside, locked, move_in, write_file, writing
from coat_deploy.triton.config import CONFIG, GRAPH, LABELS, engine_files, network_config
from coat_deploy.triton.image_models import ensemble_config, preprocess_config, preprocess_files
from coat_deploy.triton.plan import Plan, Source
from coat_deploy.triton.written import RECORD, check_root, own_files, record_bytes
from coat_deploy.version import __version__

_KEEP = ".keep"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Written:
    """A repository that was written: its folder, and every file below it with its digest."""

    plan: Plan
    out: Path
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return where it is, what is served, and every file."""
        plan = self.plan
        return {
            "repository": str(self.out.resolve()),
            "model": plan.model.name,
            "artifacts": [str(s.model.path(s.artifact).resolve()) for s in plan.sources],
            "accelerator": None if plan.profiles else plan.options.accelerator,
            "max_batch": plan.max_batch,
            "models": list(plan.names),
            "files": dict(self.files),
        }


def write_repository(plan: Plan, out: Path) -> Written:
    """Write the plan's models into the repository `out`, in place of those it wrote before.

    Raises: UsageError for files there that are another's; RepositoryError when it cannot be
    written, and CorruptArtifact for an artifact that changes meanwhile; then nothing changed.
    """
    check_root(out)
    own_files(out, plan.folders)
    with aside(out) as staging:
        files = _copy_artifacts(plan, staging)
        for name, content in _texts(plan).items():
            write_file(staging / name, content)
            files[name] = sha256_bytes(content)
        about = {"coat-deploy": __version__, **_origin(plan)}
        record = f"{plan.name}/{RECORD}"
        write_file(staging / record, record_bytes(about, files))
        with writing(out), locked(out):
            old = own_files(out, plan.folders)
            move_in(staging, out, [record, *files])
            _remove(out, [name for name in old if name not in files and name != record])
    return Written(plan, out, files)


def _texts(plan: Plan) -> dict[str, bytes]:
    """Return all files but the artifact's, by their names below the repository."""
    texts = {f"{plan.name}/{CONFIG}": network_config(plan).encode()}
    if plan.labels:
        labels = "".join(f"{label}\n" for label in plan.labels)
        texts[f"{plan.name}/{LABELS}"] = labels.encode()
    if plan.options.decoders:
        _, decoding, ensemble = plan.folders
        texts[f"{decoding}/{CONFIG}"] = preprocess_config(plan).encode()
        texts |= {f"{decoding}/{name}": data for name, data in preprocess_files().items()}
        texts[f"{ensemble}/{CONFIG}"] = ensemble_config(plan).encode()
        texts[f"{ensemble}/{VERSION}/{_KEEP}"] = (
            b""  # Triton wants a version; copies drop empty folders
        )
        if plan.labels:
            texts[f"{ensemble}/{LABELS}"] = texts[f"{plan.name}/{LABELS}"]
    return texts


def _origin(plan: Plan) -> dict[str, Any]:
    artifact = plan.artifact
    return {
        "model": plan.model.name,
        "artifact": artifact.name,
        "artifact_sha256": [source.artifact.sha256 for source in plan.sources],
        "weights_sha256": artifact.weights_sha256,
        "agreement": dict(artifact.agreement),
    }


def _copy_artifacts(plan: Plan, staging: Path) -> dict[str, str]:
    """Copy every file that the server opens; return their digests, which were verified."""
    engines = engine_files(plan) if plan.profiles else {GRAPH: plan.sources[0]}
    copied = {}
    for file, source in engines.items():
        for name, there in _needed(source, file).items():
            place = f"{plan.name}/{VERSION}/{there}"
            copied[place] = source.artifact.files[name]
            _copy(source, name, staging / place)
    return copied


def _needed(source: Source, file: str) -> dict[str, str]:
    """Return the artifact's files that a server opens, with what they are called there.

    Weights that lie beside a graph keep their name, by which the graph refers to them.
    """
    artifact = source.artifact
    beside = (name for name in artifact.files if name.startswith(f"{artifact.file}."))
    return {artifact.file: file, **{name: name for name in beside}}


def _copy(source: Source, name: str, place: Path) -> None:
    """Copy a file, and verify what was copied. Raises RepositoryError, CorruptArtifact."""
    path = source.model.folder / VERSION / name
    digest = hashlib.sha256()
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, place.open("wb") as writer:
            while chunk := reader.read(_CHUNK):
                digest.update(chunk)
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
    if digest.hexdigest() != source.artifact.files[name]:
        raise CorruptArtifact(
            f"{path}: changed while it was copied. Run: "
            f"{source.model.export_command(source.artifact)}"
        )


def _remove(out: Path, names: Sequence[str]) -> None:
    """Remove files that are written no more, and the folders that they leave empty."""
    for name in names:
        path = out / name
        with contextlib.suppress(OSError):
            path.unlink()
            shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
            for folder in path.parents:
                if folder == out:
                    break
                folder.rmdir()
