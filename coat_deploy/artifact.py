"""An artifact: a file for a runtime, and where it came from; one entry of `manifest.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coat_deploy.errors import RepositoryError
from coat_deploy.spec import Size, format_size


@dataclass(frozen=True)
class Artifact:
    """A file for a runtime with its provenance; never edited in place.

    `size` is the fixed input (height, width), or None where both are dynamic; the batch is
    dynamic. `files` maps every file's name, in the model's version folder, to its SHA-256; the
    first is the one a runtime opens. `proof` is the name of its proof, which is one of `files`.
    `weights_sha256` and `spec_digest` bind it to its parents. `agreement` is what the validation
    at its export measured, or nothing.
    """

    name: str
    target: str
    precision: str
    form: str
    opset: int
    size: Size | None
    features: bool
    files: Mapping[str, str]
    proof: str
    weights_sha256: str
    spec_digest: str
    created: str
    tools: Mapping[str, str] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)

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
        """Return the manifest's entry."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entry: Any, subject: str) -> "Artifact":
        """Read a manifest's entry. Raises RepositoryError naming what is wrong with it."""
        fields = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(entry, dict) or not set(entry) <= fields:
            raise RepositoryError(
                f"{subject}: an entry is not an artifact of this version. Export again."
            )
        try:
            size = entry["size"]
            artifact = cls(**{**entry, "size": None if size is None else (size[0], size[1])})
            ok = bool(artifact.files) and artifact.proof in artifact.files
        except (TypeError, KeyError, IndexError):
            ok = False
        if not ok or any("/" in file or file.startswith(".") for file in artifact.files):
            raise RepositoryError(f"{subject}: an entry is damaged (got {entry!r}). Export again.")
        return artifact


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
    if form != "authored":
        parts.append(form)
    return "-".join(parts)
