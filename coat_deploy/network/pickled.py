"""Read PyTorch's .pth files as data: nothing that they pickle is ever run."""

import argparse
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coat_deploy.errors import BackendMissing, WeightsError
from coat_deploy.network.download import MAX_FILE_BYTES
from coat_deploy.runner import Array

log = logging.getLogger(__name__)

PICKLED_SUFFIXES = (".pth", ".pt", ".bin")

_WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
"""Where training scripts put the weights, the first that is there: the authors' evaluation
reads "model", timm's scripts write "state_dict"; averaged weights are the last resort."""

_PREFIXES = ("module.", "_orig_mod.")
"""What PyTorch's data parallelism and its compiler put before every key."""


def read_pickled(path: Path) -> dict[str, Array]:
    """Read a PyTorch checkpoint as float32 arrays, the authors' {"model": ...} files included.

    Raises: WeightsError when the file is unreadable, too large, damaged, or holds anything but
        tensors; BackendMissing without PyTorch.
    """
    try:
        import torch
    except ImportError as error:
        raise BackendMissing(
            f'{path}: needs PyTorch to be read. Run: pip install "coat-deploy[torch]".'
        ) from error
    _check_size(path)
    try:
        # The authors' and timm's training scripts keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            document = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file makes torch.load raise whatever its pickle, zip and tensor code do.
    except Exception as error:
        raise _unreadable(path, error) from error
    return _arrays(path, _state_dict(path, document))


def _check_size(path: Path) -> None:
    """Refuse what would not fit in memory, packed or unpacked."""
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: cannot be read ({error}).") from error
    if size > MAX_FILE_BYTES:
        raise WeightsError(f"{path}: larger than {MAX_FILE_BYTES} bytes, so no CoaT.")


def _unreadable(path: Path, error: Exception) -> WeightsError:
    """Return the error for a file that `torch.load` refused."""
    foreign = re.search(r"GLOBAL ([\w.]+)|Unsupported class (\S+)", str(error))
    if foreign:
        name = foreign[1] or foreign[2]
        return WeightsError(
            f"{path}: refused, as it holds more than tensors ({name}). "
            "Save its state_dict alone, or as .safetensors."
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return WeightsError(
        f"{path}: damaged or no PyTorch checkpoint ({lines[0]}). Fetch or save it again."
    )


def _state_dict(path: Path, document: Any) -> Mapping[str, Any]:
    """Return the weights of what a training script saved."""
    if isinstance(document, Mapping):
        found = [key for key in _WRAPPERS if isinstance(document.get(key), Mapping)]
        if found:
            if found[1:]:
                log.warning("%s: holds %s; taking '%s'", path, " and ".join(found), found[0])
            document = document[found[0]]
    if not isinstance(document, Mapping) or not all(isinstance(key, str) for key in document):
        raise WeightsError(
            f"{path}: no state_dict (got {type(document).__name__}, expected names of tensors)."
        )
    for prefix in _PREFIXES:
        if document and all(key.startswith(prefix) for key in document):
            document = {key.removeprefix(prefix): value for key, value in document.items()}
    return document


def _arrays(path: Path, state: Mapping[str, Any]) -> dict[str, Array]:
    """Return tensors as float32 arrays."""
    import torch

    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise WeightsError(f"{path}: {key} is no tensor (got {type(value).__name__}).")
        if not value.is_floating_point():
            raise WeightsError(f"{path}: tensor {key} is no weight (got type {value.dtype}).")
    # A tensor may claim any shape over a few stored bytes.
    if 4 * sum(value.numel() for value in state.values()) > MAX_FILE_BYTES:
        raise WeightsError(f"{path}: larger than {MAX_FILE_BYTES} bytes unpacked, so no CoaT.")
    kinds = {str(value.dtype) for value in state.values()} - {"torch.float32"}
    if kinds:
        log.info("%s: converted from %s to float32", path, ", ".join(sorted(kinds)))
    return {key: value.detach().float().contiguous().numpy() for key, value in state.items()}
