"""Weights of a CoaT: read from anywhere, checked against the network, written as safetensors.

Sources, as given to `--weights`:

    random, random:SEED   drawn, see `random_weights.py`
    official              the authors' checkpoint of the architecture
    timm                  timm's conversion of it, from the Hugging Face Hub
    PATH                  .safetensors, or .pth, .pt, .bin without running what they pickle

Keys are those of the authors' checkpoints, which are timm's. A parameter that several blocks
share has one key for each of them.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.digest import sha256_file
from coat_deploy.errors import BackendMissing, UsageError, WeightsError
from coat_deploy.network.download import MAX_FILE_BYTES, Download, DownloadOptions, fetch_official
from coat_deploy.network.hub import fetch_hub
from coat_deploy.network.keys import expected_shapes, is_head, is_unused, shared_parameters
from coat_deploy.network.pickled import PICKLED_SUFFIXES, read_pickled
from coat_deploy.network.random_weights import Shape, random_tensors
from coat_deploy.network.variants import VARIANTS, get_variant
from coat_deploy.runner import Array
from coat_deploy.spec import ModelSpec, WeightsRecord

log = logging.getLogger(__name__)

SOURCES = "random, random:SEED, official, timm, or a .safetensors, .pth, .pt or .bin file"
MAX_NAMED_KEYS = 8
HEAD_SEED = 0

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Types of safetensors that can be weights; numpy has no bfloat16, so its bits are read."""


@dataclass(frozen=True)
class WeightsOptions(DownloadOptions):
    """How to load a checkpoint; `replace_head`: all but the classifier, which is drawn anew."""

    replace_head: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """Tensors that fit a network, float32, one for each of its keys; and where they came from."""

    tensors: dict[str, Array]
    record: WeightsRecord


def load_checkpoint(
    source: str, spec: ModelSpec, options: WeightsOptions | None = None
) -> Checkpoint:
    """Load weights for the network of `spec` from a source (see the head of this file).

    Raises: UsageError for an unknown source; DownloadError when a file cannot be had or is not
        the published one; WeightsError when it cannot be read or does not fit.
    """
    options = options or WeightsOptions()
    if source == "random" or source.startswith("random:"):
        seed = _seed(source)
        tensors = random_tensors(expected_shapes(spec), shared_parameters(spec), seed)
        return Checkpoint(tensors, WeightsRecord(f"random:{seed}"))
    if source in ("official", "timm"):
        download = _published(source, spec, options)
        path, record = download.path, WeightsRecord(source, download.url, download.sha256)
    else:
        path = _local(source)
        record = WeightsRecord(source, None, sha256_file(path))
    read = read_safetensors if path.suffix == ".safetensors" else read_pickled
    tensors = fit(read(path), spec, replace_head=options.replace_head, subject=str(path))
    return Checkpoint(tensors, record)


def _seed(source: str) -> int:
    """Return N of "random:N"; 0 of "random"."""
    text = source.partition(":")[2] if ":" in source else "0"
    if not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"weights '{source}': no seed (got '{text}'). Write random:0, for example."
        )
    return int(text)


def _published(source: str, spec: ModelSpec, options: WeightsOptions) -> Download:
    """Return the published file of an architecture."""
    published = get_variant(spec.architecture).published
    if published is None:
        raise UsageError(
            f"weights '{source}': nobody published weights of {spec.architecture}. "
            "Give --weights random or a file."
        )
    if source == "official":
        return fetch_official(published, options)
    return fetch_hub(f"timm/{spec.architecture}.in1k", options)


def _local(source: str) -> Path:
    """Return the path that `source` is."""
    path = Path(source).expanduser()
    if path.suffix not in (".safetensors", *PICKLED_SUFFIXES):
        raise UsageError(f"weights '{source}': unknown source (known: {SOURCES}).")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file. Give {SOURCES}.")
    return path


def read_safetensors(path: Path) -> dict[str, Array]:
    """Read a .safetensors file as float32, without PyTorch.

    Raises: WeightsError when the file is unreadable, too large, damaged, or holds other than
        floating-point tensors; BackendMissing without the package safetensors.
    """
    safetensors = _safetensors()
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise WeightsError(f"{path}: larger than {MAX_FILE_BYTES} bytes, so no CoaT.")
        entries = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path}: damaged or no safetensors file ({error}). Fetch or write it again."
        ) from error
    return {key: _decoded(path, key, entry) for key, entry in entries}


def to_safetensors(checkpoint: Checkpoint) -> bytes:
    """Return the file of a checkpoint: the same bytes for the same tensors.

    What blocks share is written once for each of them, so that timm opens the file strictly.
    """
    _safetensors()
    from safetensors.numpy import save

    tensors = {key: np.ascontiguousarray(value) for key, value in checkpoint.tensors.items()}
    return save(tensors, metadata={"format": "pt"})


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise BackendMissing(
            'weights: package safetensors is not installed. Run: pip install "coat-deploy[torch]".'
        ) from error
    return safetensors


def _decoded(path: Path, key: str, entry: Mapping[str, Any]) -> Array:
    """Return one tensor of a safetensors file as a writable float32 array."""
    if entry["dtype"] not in _FLOATS:
        raise WeightsError(
            f"{path}: tensor {key} is no weight (got type {entry['dtype']}, "
            f"expected one of {', '.join(_FLOATS)})."
        )
    raw = np.frombuffer(entry["data"], dtype=_FLOATS[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    elif entry["dtype"] != "F32":
        log.debug("%s: %s converted from %s to float32", path, key, entry["dtype"])
    with np.errstate(over="ignore"):  # what overflows is refused by name, as not finite
        values = raw.astype(np.float32, copy=False)
    return values if values.flags.writeable else values.copy()


def fit(
    tensors: Mapping[str, Array],
    spec: ModelSpec,
    replace_head: bool = False,
    *,
    subject: str = "checkpoint",
) -> dict[str, Array]:
    """Return the tensors of the network of `spec`, in its order; `subject` names them in errors.

    replace_head: leave the checkpoint's classifier out and draw another.

    Raises: WeightsError naming the missing, unexpected and wrongly shaped keys; a tensor with
        NaN or Inf; a parameter that is shared, but differs between its keys.
    """
    shapes = expected_shapes(spec)
    kept = {key: value for key, value in tensors.items() if not is_unused(key, spec)}
    if replace_head:
        head = {key: shape for key, shape in shapes.items() if is_head(key)}
        kept = {key: value for key, value in kept.items() if not is_head(key)}
        kept |= random_tensors(head, (), HEAD_SEED)
    for key, value in kept.items():
        if not np.isfinite(value).all():
            raise WeightsError(f"{subject}: tensor {key} holds NaN or Inf. Take another one.")
    groups = shared_parameters(spec)
    _fill_shared(kept, groups, subject)
    wrong, faults = _faults(kept, shapes, groups)
    if wrong:
        raise WeightsError(
            f"{subject}: does not fit {spec.architecture} with {spec.num_classes} classes: "
            f"{faults}. {_hint(wrong, tensors, spec)}"
        )
    if replace_head:
        log.warning("%s: head drawn at random for %d classes", subject, spec.num_classes)
    return {key: kept[key] for key in shapes}


def _fill_shared(
    tensors: dict[str, Array], groups: Iterable[tuple[str, ...]], subject: str
) -> None:
    """Give every key of a shared parameter what one of them holds."""
    for group in groups:
        present = [key for key in group if key in tensors]
        for key in present[1:]:
            if not np.array_equal(tensors[key], tensors[present[0]]):
                raise WeightsError(
                    f"{subject}: {key} and {present[0]} differ, but are one parameter of the "
                    "network. The checkpoint is of another network."
                )
        if present:
            tensors.update(dict.fromkeys(group, tensors[present[0]]))


def _faults(
    tensors: Mapping[str, Array], shapes: Mapping[str, Shape], groups: Iterable[tuple[str, ...]]
) -> tuple[list[str], str]:
    """Return the keys or shapes that are not the network's, and a text that lists them."""
    repeats = {key for group in groups for key in group[1:]}
    missing = [key for key in shapes if key not in tensors and key not in repeats]
    unexpected = [key for key in tensors if key not in shapes]
    misshapen = [key for key in shapes if key in tensors and tensors[key].shape != shapes[key]]
    faults = [
        _list("missing", [f"{key} {shapes[key]}" for key in missing]),
        _list("unexpected", [f"{key} {tensors[key].shape}" for key in unexpected]),
        _list(
            "wrongly shaped",
            [f"{key} (got {tensors[key].shape}, expected {shapes[key]})" for key in misshapen],
        ),
    ]
    return [*missing, *unexpected, *misshapen], "; ".join(filter(None, faults))


def _list(kind: str, keys: list[str]) -> str:
    """Return the count and the first keys of a kind of fault; nothing if there is none."""
    more = ", ..." if len(keys) > MAX_NAMED_KEYS else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:MAX_NAMED_KEYS])}{more}" if keys else ""


def _hint(wrong: list[str], tensors: Mapping[str, Array], spec: ModelSpec) -> str:
    """Return the way on: another head, or the architectures that the checkpoint does fit."""
    if all(map(is_head, wrong)):
        found = next((len(value) for key, value in tensors.items() if key == "head.bias"), 0)
        keep = f"It has {found} classes: to keep them, add --num-classes {found}. " if found else ""
        return f"{keep}To load all but the head and draw that at random, add --replace-head."
    fitting = []
    for name in VARIANTS:
        shapes = expected_shapes(ModelSpec(name, 0, 0, spec.preprocess))
        if all(key in tensors and tensors[key].shape == shape for key, shape in shapes.items()):
            fitting.append(name)
    if fitting:
        return f"It fits {' and '.join(fitting)}."
    return "Check the architecture and model_args in config.json."
