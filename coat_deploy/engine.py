"""An engine: what a runtime that builds ahead of time is asked for, and what it built for whom.

An engine runs where it was built for and nowhere else: `EngineRecord` is what the manifest keeps
of it, so that a machine that differs can say in what.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from coat_deploy.census import Asked, Census
from coat_deploy.errors import RepositoryError, UsageError
from coat_deploy.runner import Backend
from coat_deploy.spec import MAX_SIDE, Size

MAX_BATCH = 65536
"""Largest batch that an engine is built for: a typing error beyond it."""

Range = tuple[int, int, int]
"""The least, the best and the most that a length may be."""


@dataclass(frozen=True)
class Profile:
    """The shapes (B, 3, H, W) that an engine takes with one set of kernels, fastest at the best.

    Raises: UsageError for a length that cannot be, or a range that does not ascend.
    """

    batch: Range
    height: Range
    width: Range

    def __post_init__(self) -> None:
        for name, most in (("batch", MAX_BATCH), ("height", MAX_SIDE), ("width", MAX_SIDE)):
            low, best, high = getattr(self, name)
            if not 1 <= low <= best <= high <= most:
                raise UsageError(
                    f"profile: the {name} cannot be (got {low}, {best}, {high}, expected "
                    f"1 <= least <= best <= most <= {most})."
                )

    @classmethod
    def of(cls, batch: Range, size: Size) -> "Profile":
        """Return the profile of images of one size."""
        height, width = size
        return cls(batch, (height,) * 3, (width,) * 3)

    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Return the least, the best and the largest shape."""
        return tuple((self.batch[i], 3, self.height[i], self.width[i]) for i in range(3))

    def takes(self, shape: Sequence[int]) -> bool:
        """Return whether images (B, 3, H, W) of `shape` are within it."""
        lengths = zip((self.batch, self.height, self.width), (shape[0], *shape[2:]), strict=True)
        return all(least <= length <= most for (least, _, most), length in lengths)

    def __str__(self) -> str:
        parts = (f"{_show(r)} {n}" for n, r in (("high", self.height), ("wide", self.width)))
        return f"batch {_show(self.batch)}, {', '.join(parts)}"


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    `profiles`: shapes it takes; none before they are settled. `tf32`: whether float32 products may
    be of TF32. `workspace_mib`: device memory that kernels may use for themselves. `effort`: 0 to
    5, how long to search for kernels. None leaves either to the builder.
    `compute_capabilities`: GPUs to build for without one at hand ("8.9"), for TensorRT for RTX;
    none is all that it knows. `hardware_compatible`: run on GPUs of other compute capabilities,
    somewhat slower. `version_compatible`: run on later versions. `refit`: weights can be replaced.
    `strip_weights`: they have to be.
    """

    profiles: tuple[Profile, ...] = ()
    tf32: bool = False
    workspace_mib: int | None = None
    effort: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    refit: bool = False
    strip_weights: bool = False

    def __post_init__(self) -> None:
        if self.effort is not None and not 0 <= self.effort <= 5:
            raise UsageError(f"effort: cannot be (got {self.effort}, expected 0 to 5).")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"workspace: too small (got {self.workspace_mib} MiB, expected 1).")

    def to_json(self) -> dict[str, Any]:
        """Return what was asked for besides defaults and profiles."""
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "profiles" and getattr(self, f.name) != f.default
        }
        return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}


@dataclass(frozen=True)
class EngineOptions:
    """What a user asks of an engine before the image size is known.

    `batches`: a range, or several, a profile each. `sides`: the range of height and width where
    the size is open; None is from the smallest that the network takes to twice the nominal one.
    """

    batches: tuple[Range, ...] = ((1, 8, 64),)
    sides: Range | None = None
    how: BuildOptions = field(default_factory=BuildOptions)

    def settle(self, nominal: Size, least_side: int | None, tf32: bool) -> BuildOptions:
        """Return how to build for images of the `nominal` size, or of any from `least_side` on.

        Raises: UsageError for ranges that cannot be.
        """
        if least_side is None:
            if self.sides:
                raise UsageError("size range: the size is fixed. Ask for --size dynamic with it.")
            profiles = tuple(Profile.of(batch, nominal) for batch in self.batches)
        else:
            height, width = (self.sides or (least_side, side, 2 * side) for side in nominal)
            profiles = tuple(Profile(batch, height, width) for batch in self.batches)
        return dataclasses.replace(self.how, profiles=profiles, tf32=tf32)


@dataclass(frozen=True)
class EngineRecord:
    """What an engine is of and for; one entry of the manifest.

    `flavour` and `version` of the library that built it. `gpu` and `compute_capability` of the
    device it was built on; None where it was built without one. `graph_sha256` of the graph it
    was built from. `options` as of `BuildOptions.to_json`. `census` as of `Census.to_json`.
    """

    flavour: str
    version: str
    gpu: str | None
    compute_capability: str | None
    graph_sha256: str
    profiles: tuple[Profile, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    census: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entry: Any, subject: str) -> "EngineRecord":
        """Read what `to_json` wrote, which may be a stranger's. Raises RepositoryError."""
        try:
            fields = {f.name: entry[f.name] for f in dataclasses.fields(cls)}
            profiles = tuple(
                Profile(*(_range(p[n]) for n in ("batch", "height", "width")))
                for p in fields["profiles"]
            )
            texts = (fields["flavour"], fields["version"], fields["graph_sha256"])
            maybe = (fields["gpu"], fields["compute_capability"])
            sound = (
                all(isinstance(text, str) for text in texts)
                and all(text is None or isinstance(text, str) for text in maybe)
                and all(isinstance(fields[name], dict) for name in ("options", "census"))
                and profiles
            )
        except (TypeError, ValueError, KeyError, IndexError, UsageError):
            sound = False
        if not sound:
            raise RepositoryError(
                f"{subject}: an artifact's 'engine' is damaged (got {entry!r:.100}). "
                "Remove the file and export again."
            )
        return cls(**{**fields, "profiles": profiles})


@dataclass(frozen=True)
class Built:
    """An engine as its builder hands it out.

    `plan`: its bytes. `version` of the library; `gpu` and `compute_capability` of the device that
    it was built on, None without one. `log`: what the builder said.
    """

    plan: bytes
    census: Census
    log: str
    version: str
    gpu: str | None = None
    compute_capability: str | None = None


class EngineBackend(Backend, Protocol):
    """A backend whose artifacts are built of a graph, for one kind of machine."""

    def build(
        self, graph: Path, options: BuildOptions, asked: Asked, tell: Callable[[str], None]
    ) -> Built:
        """Build the engine of a graph. Raises: GraphError, CorruptArtifact, RunnerError."""
        ...

    def unable(self) -> str | None:
        """Return why this machine can run no engine at all, or None."""
        ...

    def mismatch(self, record: EngineRecord) -> str | None:
        """Return in what this machine differs from the one an engine is for, or None."""
        ...


def _range(value: Any) -> Range:
    least, best, most = (_whole(v) for v in value)
    return least, best, most


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(value)
    return value


def _show(lengths: Range) -> str:
    least, best, most = lengths
    return str(best) if least == most else f"{least} to {most} (best {best})"
