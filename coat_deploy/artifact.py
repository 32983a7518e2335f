"""An artifact: a file for a runtime, and where it came from; one entry of `manifest.json`."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coat_deploy.engine import EngineRecord
from coat_deploy.errors import RepositoryError
from coat_deploy.package import PackageRecord
from coat_deploy.spec import MAX_SIDE, Size, format_size

NETWORK = "network"
"""The form of what has no graph: PyTorch's own network."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Artifact:
    """A file for a runtime with its provenance; never edited in place.

    `size` is the fixed input (height, width), or None where both are dynamic; the batch is
    dynamic. `files` maps every file's name, in the model's version folder, to its SHA-256; the
    first is the one a runtime opens. `proof` is the name of its proof, which is one of `files`.
    `weights_sha256` and `spec_digest` bind it to its parents. `agreement` is what the validation
    at its export measured, or nothing. `choice` is why it has this precision, where the machine
    that exported it chose (`choose.Choice`), or nothing. `engine` is what an engine was built for,
    `package` what a package was compiled for; both None for a graph. A package has no `opset`.
    """

    name: str
    target: str
    precision: str
    form: str
    opset: int | None
    size: Size | None
    features: bool
    files: Mapping[str, str]
    proof: str
    weights_sha256: str
    spec_digest: str
    created: str
    tools: Mapping[str, str] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineRecord | None = None
    package: PackageRecord | None = None

    @property
    def file(self) -> str:
        """Name of the file a runtime opens."""
        return next(iter(self.files))

    @property
    def sha256(self) -> str:
        """Digest of the file a runtime opens."""
        return self.files[self.file]

    def accepts(self, size: Size) -> bool:
        """Return whether it takes images of `size`."""
        return self.size is None or self.size == size

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry; without what versions before did not know, if it can be."""
        entry = dataclasses.asdict(self)
        entry["package"] = self.package.to_json() if self.package else None
        return {key: v for key, v in entry.items() if v or key not in _DEFAULTS}

    @classmethod
    def from_json(cls, entry: Any, subject: str) -> "Artifact":
        """Read a manifest's entry, which may be a stranger's.

        Raises: RepositoryError naming what is wrong with it.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(entry, dict) or not set(entry) <= known:
            raise RepositoryError(
                f"{subject}: an entry is not an artifact of this version (got {entry!r:.100}). "
                "Remove the file and export again."
            )
        entry = _DEFAULTS | entry
        for key, holds in _FIELDS.items():
            if key not in entry or not holds(entry[key]):
                raise RepositoryError(
                    f"{subject}: an artifact's '{key}' is damaged (got {entry.get(key)!r:.100}). "
                    "Remove the file and export again."
                )
        if entry["engine"] is not None:
            entry["engine"] = EngineRecord.from_json(entry["engine"], subject)
        if entry["package"] is not None:
            entry["package"] = PackageRecord.from_json(entry["package"], subject)
        artifact = cls(**{**entry, "size": tuple(entry["size"]) if entry["size"] else None})
        if artifact.proof not in artifact.files or artifact.proof == artifact.file:
            raise RepositoryError(
                f"{subject}: artifact {artifact.name} has no proof among its files. "
                "Remove the file and export again."
            )
        return artifact


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_file_name(value: Any) -> bool:
    """Return whether it is the plain name of a file: no folder, nothing hidden."""
    return isinstance(value, str) and _FILE_NAME.fullmatch(value) is not None


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_size(value: Any) -> bool:
    if not isinstance(value, list | tuple):
        return value is None
    return len(value) == 2 and all(type(v) is int and 0 < v <= MAX_SIDE for v in value)


def _are_files(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(_is_file_name(name) and _is_sha256(digest) for name, digest in value.items())


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": _is_file_name,
    "target": _is_text,
    "precision": _is_text,
    "form": _is_text,
    "opset": lambda value: value is None or type(value) is int,
    "size": _is_size,
    "features": lambda value: isinstance(value, bool),
    "files": _are_files,
    "proof": _is_file_name,
    "weights_sha256": _is_sha256,
    "spec_digest": _is_sha256,
    "created": _is_text,
    "tools": lambda value: isinstance(value, dict),
    "agreement": lambda value: isinstance(value, dict),
    "choice": lambda value: isinstance(value, dict),
    "engine": lambda value: value is None or isinstance(value, dict),
    "package": lambda value: value is None or isinstance(value, dict),
}
"""What every field of an entry must hold."""

_DEFAULTS: dict[str, Any] = {"choice": {}, "engine": None, "package": None}
"""Fields that an entry of an earlier version does not have."""


def artifact_name(
    target: str, precision: str, size: Size | None, default: Size, form: str, features: bool
) -> str:
    """Return `<target>-<precision>`, and what differs from the model's plain artifact behind it.

    >>> artifact_name("onnxruntime", "fp32", (224, 320), (224, 224), "authored", False)
    'onnxruntime-fp32-224x320'
    """
    parts = [target, precision]
    if size is None:
        parts.append("dynamic")
    elif size != default:
        parts.append(format_size(size))
    if features:
        parts.append("features")
    if form not in ("authored", NETWORK):
        parts.append(form)
    return "-".join(parts)
