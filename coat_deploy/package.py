"""A package: what PyTorch compiled ahead of time of a network, and the machines it is valid for.

It holds machine code, for one version of PyTorch, one kind of device and the instructions of one
kind of processor. `PackageRecord` is what the manifest and the package itself keep of that, so
that a machine that differs can say in what.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coat_deploy.errors import RepositoryError
from coat_deploy.runner import DEVICES, Backend, LoadOptions
from coat_deploy.spec import Size


@dataclass(frozen=True)
class Host:
    """A machine as far as machine code depends on it.

    `torch`: version of PyTorch. `system`, `machine` as of Python's `sys.platform` and
    `platform.machine`. `cpu`: name of the processor; `instructions` that it has and compilers use.
    `gpu`, `compute_capability`: of the first GPU that PyTorch shows, None without one.
    """

    torch: str
    system: str
    machine: str
    cpu: str
    instructions: tuple[str, ...]
    gpu: str | None = None
    compute_capability: str | None = None


@dataclass(frozen=True)
class PackageRecord:
    """What a package was compiled on and for; one entry of the manifest.

    `device`: one of `runner.DEVICES`. `host`: the machine it was compiled on, its GPU only where
    the package is for one.
    """

    device: str
    host: Host

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, at one level."""
        values = {"device": self.device} | dataclasses.asdict(self.host)
        return values | {"instructions": list(self.host.instructions)}

    @classmethod
    def from_json(cls, entry: Any, subject: str) -> "PackageRecord":
        """Read what `to_json` wrote, which may be a stranger's. Raises RepositoryError."""
        names = {"device", *(f.name for f in dataclasses.fields(Host))}
        if not isinstance(entry, Mapping) or set(entry) != names or not _sound(entry):
            raise RepositoryError(
                f"{subject}: an artifact's 'package' is damaged (got {entry!r:.100}). "
                "Remove the file and export again."
            )
        host = {name: value for name, value in entry.items() if name != "device"}
        return cls(entry["device"], Host(**{**host, "instructions": tuple(host["instructions"])}))

    def mismatch(self, here: Host, device: str) -> str | None:
        """Return in what `here`, where it shall run on `device`, is not what it is for, or None.

        Instructions that a processor has besides do no harm, and another GPU of the same compute
        capability runs the same code.
        """
        made = self.host
        if device != self.device:
            return f"it was compiled for {self.device}, and --device is {device}"
        if made.torch != here.torch:
            return f"it was compiled by PyTorch {made.torch}, and {here.torch} is installed"
        if (made.system, made.machine) != (here.system, here.machine):
            theirs, ours = f"{made.system} {made.machine}", f"{here.system} {here.machine}"
            return f"it was compiled for {theirs}, and this is {ours}"
        if lacking := [name for name in made.instructions if name not in here.instructions]:
            return (
                f"it was compiled on {made.cpu} with {', '.join(lacking)}, which this processor, "
                f"{here.cpu}, does not have (it has {', '.join(here.instructions) or 'none'})"
            )
        if self.device == "cuda" and made.compute_capability != here.compute_capability:
            return (
                f"it was compiled on {made.gpu} for compute capability {made.compute_capability}, "
                f"and this GPU, {here.gpu}, has {here.compute_capability}"
            )
        return None


def _sound(entry: Mapping[str, Any]) -> bool:
    texts = [entry[name] for name in ("torch", "system", "machine", "cpu")]
    maybe = [entry[name] for name in ("gpu", "compute_capability")]
    instructions = entry["instructions"]
    return (
        entry["device"] in DEVICES
        and all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in maybe)
        and isinstance(instructions, list)
        and all(isinstance(name, str) for name in instructions)
    )


@dataclass(frozen=True)
class Package:
    """A package as its compiler hands it out: the bytes of the file, and what it is for."""

    content: bytes
    record: PackageRecord


class PackageBackend(Backend, Protocol):
    """A backend whose artifacts are compiled of the network itself, without a graph."""

    def require_compiler(self, device: str) -> None:
        """Raise BackendMissing, DeviceMissing unless this machine can compile for `device`."""
        ...

    def build(self, model: Path, size: Size, options: LoadOptions) -> Package:
        """Compile the network of a model's folder for images of one size, any number of them.

        Raises: WeightsError, BackendMissing, DeviceMissing; RunnerError when the compiler fails.
        """
        ...

    def mismatch(self, record: PackageRecord, device: str) -> str | None:
        """Return in what this machine differs from those a package is for, or None."""
        ...
