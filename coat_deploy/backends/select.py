"""Find a backend by the name of its target."""

import importlib
from typing import cast

from coat_deploy.errors import BackendMissing, UsageError, unknown_name
from coat_deploy.runner import Backend

TARGETS = ("eager", "onnxruntime", "openvino")
"""Every target, in the order of tables; each is a file of this folder."""

PRECISIONS = {
    "eager": ("fp32",),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16"),
}
"""What each target computes in; the first is its default."""


def backend(target: str) -> Backend:
    """Return the backend of `target`. Raises UsageError with the nearest name."""
    if target not in TARGETS:
        raise UsageError(unknown_name("target", target, TARGETS))
    return cast(Backend, importlib.import_module(f"coat_deploy.backends.{target}"))


def require(target: str) -> Backend:
    """Return the backend of `target`, installed. Raises BackendMissing with the command."""
    module = backend(target)
    command = module.missing()
    if command:
        raise BackendMissing(f"target {target}: its package is not installed. Run: {command}")
    return module
