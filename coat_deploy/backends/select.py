"""Find a backend by the name of its target."""

import importlib
from typing import cast

from coat_deploy.engine import EngineBackend
from coat_deploy.errors import BackendMissing, UsageError, unknown_name
from coat_deploy.runner import Backend

TARGETS = ("eager", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
"""Every target, in the order of tables; each is a file of this folder."""

PRECISIONS = {
    "eager": ("fp32",),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16"),
    "tensorrt": ("fp32", "tf32", "fp16", "bf16"),
    "tensorrt-rtx": ("fp32", "tf32", "fp16", "bf16"),
}
"""What each target computes in; the first is its default."""

ENGINES = ("tensorrt", "tensorrt-rtx")
"""Targets whose artifacts are engines, built of a graph for one kind of machine."""

STAND_INS = {"fp32": "onnxruntime", "fp16": "onnxruntime", "bf16": "openvino"}
"""What computes an engine's graph on a CPU, by its types, where no GPU is at hand to run it."""


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


def require(target: str) -> Backend:
    """Return the backend of `target`, installed. Raises BackendMissing with the command."""
    module = backend(target)
    command = module.missing()
    if command:
        raise BackendMissing(f"target {target}: its package is not installed. Run: {command}")
    return module


def unusable(target: str) -> str | None:
    """Return why nothing of `target` can run here, or None: a package or a GPU that is missing."""
    command = backend(target).missing()
    if command:
        return f"{target} is not installed here; run: {command}"
    reason = engine_backend(target).unable() if target in ENGINES else None
    return reason and f"{target} needs an NVIDIA GPU, and {reason}"
