"""What every runtime looks like from outside: load a file, get a Runner, feed it pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.machine import usable_threads

Pixels = npt.NDArray[np.float32]
"""(B, 3, H, W) float32, normalised."""
Array = npt.NDArray[np.float32]

DEVICES = ("cpu", "cuda")
PROVIDERS = ("cuda", "tensorrt")
"""What onnxruntime computes by on a GPU."""

LOGITS = "logits"
FEATURES = ("x1", "x2", "x3", "x4")
INPUT = "pixels"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an input or output; a dynamic dimension is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model or an artifact.

    `threads`: compute threads; None leaves the runtime's default (one a core).
    `streams`: requests that are computed at once. They share the threads, `stream_threads` each,
    and the runner may then be called from so many Python threads at a time.
    `batch`: images that runs will mostly bring, for a runtime that prepares for a number of them;
    others are taken too.
    `whole_batches`: onnxruntime only, a batch is one request, as it is for who calls onnxruntime by
    hand; else its images are divided among the threads.
    `optimise`: False computes node by node in just the types the graph has (onnxruntime), or
    without the code generator for chains of nodes (OpenVINO), which is slow, and simple.
    `device`: one of `DEVICES`, "cuda" being the first GPU, for targets that run on either.
    `provider`: onnxruntime on a GPU only, one of `PROVIDERS`; None is CUDA's.
    `precision`: what the runtime should compute in, where it decides (OpenVINO, eager).
    `compile`: eager only, `torch.compile`.
    `fused`: eager only, kernels that compute several steps at once, made for a GPU. In fp16 and
    bf16 weights and tokens are of that type throughout; without it PyTorch casts where it sees fit.
    `features`: eager only, the maps x1..x4 instead of logits.
    `taps`: names of inner tensors to return besides the outputs, for block by block comparison.
    `cache`: a folder of this file's content alone, where a runtime that compiles may keep what it
    compiled and find it again; None compiles anew and keeps nothing.
    """

    threads: int | None = None
    precision: str = "fp32"
    compile: bool = False
    fused: bool = False
    features: bool = False
    taps: tuple[str, ...] = ()
    cache: Path | None = None
    streams: int = 1
    batch: int = 1
    whole_batches: bool = False
    optimise: bool = True
    device: str = "cpu"
    provider: str | None = None

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UsageError(unknown_name("device", self.device, DEVICES))
        if self.provider not in (None, *PROVIDERS):
            raise UsageError(unknown_name("provider", str(self.provider), PROVIDERS))
        if self.provider and self.device != "cuda":
            raise UsageError(
                f"provider {self.provider}: is one of onnxruntime's on a GPU. Add --device cuda."
            )
        if self.streams < 1:
            raise UsageError(f"streams: too few (got {self.streams}, expected 1 or more).")
        if self.total_threads is not None and self.streams > self.total_threads:
            raise UsageError(
                f"streams: each needs a thread (got {self.streams} streams and "
                f"{self.total_threads} threads). Ask for fewer streams, or more threads."
            )

    @property
    def total_threads(self) -> int | None:
        """Threads of all streams together; None leaves them to the runtime, with one stream."""
        if self.threads is None and self.streams > 1:
            return usable_threads()
        return self.threads

    @property
    def stream_threads(self) -> int | None:
        """Threads of each stream; None leaves them to the runtime, with one stream."""
        total = self.total_threads
        return None if total is None else total // self.streams


class Closing(ABC):
    """A context manager that ends in `close`; the base of every runner."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Free what is held."""


class Runner(Protocol):
    """A loaded network. A context manager: leaving it frees what it holds.

    Loaded for k streams, `run` may be called, and steps of `bind` may run, in k threads at once.
    """

    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return every output (and tap) by name: `logits` (B, K), or `x1`..`x4` (B, C, h, w).

        Raises: RunnerError when the runtime refuses the shape or fails.
        """
        ...

    def bind(self, pixels: Pixels) -> Callable[[], object]:
        """Return a step that runs `pixels` and hands the result back, for timing.

        Every step has buffers of its own, so that several may run at once, a stream each; one
        step may not run in two threads.
        """
        ...


class Backend(Protocol):
    """A module `backends/<target>.py`.

    `load` takes the file of an artifact; for the eager target, the model's folder.
    """

    def missing(self) -> str | None:
        """Return the command that installs what this backend lacks, or None."""
        ...

    def version(self) -> str:
        """Return the runtime's version."""
        ...

    def load(self, path: Path, options: LoadOptions) -> Runner:
        """Load a file. Raises BackendMissing, CorruptArtifact or RunnerError."""
        ...
