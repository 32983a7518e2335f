"""onnxruntime's TensorRT provider: the TensorRT that it was built for, found, or why it was not.

The provider is linked against one major version of TensorRT. With another installed it does not
load, and onnxruntime goes on without it, with no more than a line in its log.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coat_deploy.errors import BackendMissing
from coat_deploy.runner import LoadOptions
from coat_deploy.shared_library import needed

PROVIDER = "TensorrtExecutionProvider"

LIBRARY = "libonnxruntime_providers_tensorrt.so"

_LINKED = re.compile(r"libnvinfer\.so\.(\d+)")
_WHEELS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_LIBRARIES = "tensorrt_libs"
"""The package that NVIDIA's wheels keep the libraries in."""


def require() -> None:
    """Load the TensorRT that the installed onnxruntime was built for.

    Raises: BackendMissing with the command that installs it.
    """
    import onnxruntime

    subject = f"onnxruntime {onnxruntime.__version__}"
    wanted = needed(Path(onnxruntime.__file__).parent / "capi" / LIBRARY)
    major = linked(wanted)
    if major is None:
        raise BackendMissing(
            f"{subject}: this package has no TensorRT provider. Run: pip uninstall --yes "
            'onnxruntime && pip install "coat-deploy[gpu]"'
        )
    command = f'pip install "tensorrt>={major},<{major + 1}"'
    there = installed()
    if there is not None and there.split(".")[0] != str(major):
        raise BackendMissing(
            f"{subject}: its TensorRT provider takes TensorRT {major}, and {there} is installed. "
            f"Run: {command}, or use --target tensorrt."
        )
    for name in (f"libnvinfer.so.{major}", f"libnvonnxparser.so.{major}"):
        if not _load(name):
            raise BackendMissing(
                f"{subject}: its TensorRT provider needs {name}, which is not found. Run: {command}"
            )


def linked(libraries: Sequence[str]) -> int | None:
    """Return the major version of TensorRT among the libraries that something needs, or None."""
    found = filter(None, map(_LINKED.fullmatch, libraries))
    return next((int(match[1]) for match in found), None)


def installed() -> str | None:
    """Return the version of the TensorRT that is installed as a wheel, or None."""
    for name in _WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def settings(options: LoadOptions) -> dict[str, str]:
    """Return what the provider is told."""
    given = {"device_id": "0", "trt_fp16_enable": "1" if options.precision == "fp16" else "0"}
    if options.cache:
        kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(options.cache)}
        given |= kept | {"trt_timing_cache_enable": "1"}
    return given


def _load(name: str) -> bool:
    """Load a library, from where wheels keep it or where the system does; tell whether it did."""
    places: list[Any] = [name]
    package = importlib.util.find_spec(_LIBRARIES)
    if package is not None:
        folders = package.submodule_search_locations or []
        places = [*(path for f in folders if (path := Path(f) / name).is_file()), name]
    for place in places:
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(place), mode=ctypes.RTLD_GLOBAL)
            return True
    return False
