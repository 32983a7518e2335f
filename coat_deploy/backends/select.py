"""Find a backend by the name of its target."""

import importlib
from typing import cast

from coat_deploy.engine import EngineBackend
from coat_deploy.errors import BackendMissing, UsageError, unknown_name
from coat_deploy.package import PackageBackend
from coat_deploy.runner import Backend

TARGETS = ("eager", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "aotinductor")
"""Every target, in the order of tables; each is a file of this folder."""

PRECISIONS = {
    "eager": ("fp32",),
    "onnxruntime": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16"),
    "tensorrt": ("fp32", "tf32", "fp16", "bf16"),
    "tensorrt-rtx": ("fp32", "tf32", "fp16", "bf16"),
    "aotinductor": ("fp32", "fp16", "bf16"),
}
"""What each target computes in; the first is its default."""

EAGER_PRECISIONS = (*PRECISIONS["eager"], "fp16", "bf16")
"""What a bench may have PyTorch compute in on a GPU, where it is a contender and no reference."""

ENGINES = ("tensorrt", "tensorrt-rtx")
"""Targets whose artifacts are engines, built of a graph for one kind of machine."""

PACKAGES = ("aotinductor",)
"""Targets whose artifacts PyTorch compiles of the network itself, for one kind of machine.

They run with PyTorch alone, so that one is used where it is named, and never served.
"""

CHOSEN = tuple(target for target in TARGETS if target not in PACKAGES)
"""Targets that may be chosen where none is named, the first wanted first."""

GPU_PRECISIONS = {"onnxruntime": ("fp16",), "aotinductor": ("fp16", "bf16")}
"""Precisions of a target that runs on either device which are for the GPU alone."""

ON_GPUS = ("eager", "onnxruntime", *ENGINES, *PACKAGES)
"""Targets that run on a GPU; those that are no engines do so where they are asked to."""

PROVIDED = ("onnxruntime",)
"""Targets with several providers on a GPU."""

STAND_IN = "onnxruntime"
"""What computes the graph of what is for a GPU on a CPU, where no GPU is at hand."""


def backend(target: str) -> Backend:
    """Return the backend of `target`. Raises UsageError with the nearest name."""
    if target not in TARGETS:
        raise UsageError(unknown_name("target", target, TARGETS))
    name = target.replace("-", "_")
    return cast(Backend, importlib.import_module(f"coat_deploy.backends.{name}"))


def engine_backend(target: str) -> EngineBackend:
    """Return the backend of a target of `ENGINES`, installed. Raises BackendMissing."""
    assert target in ENGINES
    return cast(EngineBackend, require(target))


def package_backend(target: str) -> PackageBackend:
    """Return the backend of a target of `PACKAGES`, installed. Raises BackendMissing."""
    assert target in PACKAGES
    return cast(PackageBackend, require(target))


def require(target: str) -> Backend:
    """Return the backend of `target`, installed. Raises BackendMissing with the command."""
    module = backend(target)
    command = module.missing()
    if command:
        raise BackendMissing(f"target {target}: its package is not installed. Run: {command}")
    return module


def check_provider(target: str, provider: str | None) -> None:
    """Raise UsageError for a provider of a target that has none to choose from."""
    if provider and target not in PROVIDED:
        raise UsageError(f"{target}: has no --provider, {PROVIDED[0]} alone has. Leave it out.")


def check_served(target: str | None) -> None:
    """Raise UsageError for a target that no server runs."""
    if target in ("eager", *PACKAGES):
        why = "" if target == "eager" else ": it takes PyTorch, which a server does without"
        raise UsageError(f"target {target}: is not served{why}. Export the model for a runtime.")


def for_gpu(target: str, precision: str | None) -> bool:
    """Return whether a target computes in `precision` on a GPU alone."""
    return target in ENGINES or precision in GPU_PRECISIONS.get(target, ())


def usable_precisions(target: str, device: str) -> tuple[str, ...]:
    """Return what a target computes in on a device."""
    gpu_only = () if device == "cuda" else GPU_PRECISIONS.get(target, ())
    return tuple(name for name in PRECISIONS[target] if name not in gpu_only)


def computes_batches(target: str, device: str) -> bool:
    """Return whether images are quickest in one batch; else as single requests, many at once."""
    return target in ENGINES or device != "cpu"


def unusable(target: str, precision: str | None = None, device: str = "cpu") -> str | None:
    """Return why `target` cannot run here, or None: a package or a GPU that is missing."""
    command = backend(target).missing()
    if command:
        return f"{target} is not installed here; run: {command}"
    if device != "cuda" and precision in GPU_PRECISIONS.get(target, ()):
        return f"{target} {precision} is for an NVIDIA GPU; run it there with --device cuda"
    reason = engine_backend(target).unable() if target in ENGINES else None
    return reason and f"{target} needs an NVIDIA GPU, and {reason}"
