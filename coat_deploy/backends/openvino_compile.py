"""OpenVINO's compiled models: made from an ONNX file, or taken from where they were kept.

A model is compiled for a known number of images (docs/decisions/0010-known-shapes.md).

What it compiled may be kept (`LoadOptions.cache`) and is then loaded without reading the ONNX
file. We export and import the compiled model ourselves: OpenVINO's own cache (`CACHE_DIR`) reads
the file first, takes float32 and bfloat16 for one model and does not notice flipped bits.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.cache import SUFFIX, keep, read_kept
from coat_deploy.digest import sha256_bytes
from coat_deploy.errors import CorruptArtifact, PrecisionMissing, RunnerError
from coat_deploy.runner import FEATURES, INPUT, LOGITS, TensorSpec

_log = logging.getLogger(__name__)

TYPES = {"fp32": "f32", "bf16": "bf16"}
"""What OpenVINO calls our precisions."""


@dataclass(frozen=True)
class Compiled:
    """A compiled model that takes `batch` images, with the ports of its file, which take any."""

    model: Any
    batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Compiler:
    """Compiles one ONNX file for the CPU, for any number of streams and images.

    `threads`: of all streams together; None leaves them to OpenVINO, for one stream. `cache`: a
    folder of this file's content alone, where to keep what was compiled. With `taps` nothing is
    kept. `optimise`: as in `LoadOptions`.
    """

    path: Path
    precision: str
    threads: int | None
    taps: tuple[str, ...] = ()
    cache: Path | None = None
    optimise: bool = True

    def compile(self, streams: int, batch: int = 1) -> Compiled:
        """Return the model, its threads divided among `streams` requests at once.

        batch: images of a request. The model takes one where more would not be safe, which is
            where the size is open, or OpenVINO errs.
        Raises: CorruptArtifact for a file that is no whole ONNX model, RunnerError for one that
        OpenVINO does not take, PrecisionMissing on a CPU that would compute in another precision.
        """
        settings = self._settings(streams)
        kept = None
        if self.cache and not self.taps:
            kept = self.cache / self._kept_name(settings, batch)
        found = self._import(kept, settings) if kept else None
        compiled = found or self._compile(settings, batch)
        self._check_precision(compiled.model)
        if kept and not found:
            _export(compiled, kept)
        return compiled

    def _settings(self, streams: int) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": TYPES[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if streams > 1:
            # The hint alone would let OpenVINO choose the number of streams.
            settings |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": streams}
        if self.threads:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        if not self.optimise:
            settings["SNIPPETS_MODE"] = "DISABLE"
        return settings

    def _compile(self, settings: Mapping[str, Any], batch: int) -> Compiled:
        model = _read(self.path)
        try:
            model.add_outputs(list(self.taps))
            inputs = (_spec(model.inputs[0], INPUT),)
            # Named now: compiling joins equal tensors, and an output then bears their names too.
            outputs = tuple(_spec(port, _name(port, self.taps)) for port in model.outputs)
            _set_batch(model, batch)
            if batch > 1 and not _takes_batches(model):
                batch = 1
                _set_batch(model, batch)
        except RuntimeError as error:
            raise RunnerError(f"{self.path}: {reason(error)}") from error
        if self._computes_fp32() and _has_small_ffn(model):
            settings = {**settings, "SNIPPETS_MODE": "DISABLE"}
        try:
            compiled = _core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise RunnerError(
                f"{self.path}: OpenVINO does not compile it ({reason(error)})."
            ) from error
        return Compiled(compiled, batch, inputs, outputs)

    def _computes_fp32(self) -> bool:
        """Return whether OpenVINO will compute in float32, asked to or for lack of bfloat16."""
        return self.precision == "fp32" or "BF16" not in _core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        )

    def _check_precision(self, model: Any) -> None:
        computed = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if computed != TYPES[self.precision]:
            raise PrecisionMissing(
                f"{self.path}: this CPU does not compute in {self.precision} "
                f"(OpenVINO would use {computed}). Load it on one with AMX or AVX512-BF16, or use "
                "the fp32 artifact."
            )

    def _kept_name(self, settings: Mapping[str, Any], batch: int) -> str:
        """Return a name of all that a compiled model depends on besides its file."""
        import openvino

        cpu = [
            _core().get_property("CPU", name)
            for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES", "RANGE_FOR_STREAMS")
        ]
        parts = [_KEPT_FORMAT, openvino.get_version(), cpu, settings, batch]
        key = json.dumps(parts, sort_keys=True)
        return f"{sha256_bytes(key.encode())}{SUFFIX}"

    def _import(self, kept: Path, settings: Mapping[str, Any]) -> Compiled | None:
        """Return the compiled model in `kept`, None without one."""
        content = read_kept(kept)
        if content is None:
            return None
        head, _, content = content.partition(b"\n")
        try:
            batch, *ports = json.loads(head)
            inputs, outputs = map(_ports_from_json, ports)
            model = _core().import_model(content, "CPU", settings)
            return Compiled(model, batch, inputs, outputs)
        except (RuntimeError, ValueError, TypeError) as error:
            _log.info("%s: OpenVINO does not take it (%s); compiling anew", kept, reason(error))
            return None


@cache
def _core() -> Any:
    """Return OpenVINO's core, one for the whole process and until its end.

    For matrix units (AMX) it gives the thread that compiles a stack for signals, and frees it with
    itself: the next Ctrl-C would then be written into memory of somebody else, or nobody.
    """
    import openvino

    return openvino.Core()


_KEPT_FORMAT = 2
"""Raised when what is kept, or how a file is compiled, changes."""


def _export(compiled: Compiled, kept: Path) -> None:
    """Keep a compiled model, where OpenVINO can hand it out."""
    try:
        content = compiled.model.export_model().getbuffer()
    except RuntimeError as error:
        _log.info("%s: OpenVINO does not hand it out (%s)", kept, reason(error))
        return
    ports = [[dataclasses.asdict(p) for p in ps] for ps in (compiled.inputs, compiled.outputs)]
    keep(kept, json.dumps([compiled.batch, *ports]).encode(), b"\n", content)


def _ports_from_json(ports: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(**{**port, "shape": tuple(port["shape"])}) for port in ports)


def _read(path: Path) -> Any:
    """Return OpenVINO's model of an ONNX file.

    By the ONNX frontend alone: `Core.read_model` would offer a broken file to all others too,
    which write to standard error what they think of it.
    Raises: CorruptArtifact.
    """
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    try:
        model = frontend.convert(frontend.load(str(path)))
        problem = None if model.outputs else "it holds no graph"
    except Exception as error:  # a frontend's errors and the core's share no base
        problem = reason(error)
    if problem:
        raise CorruptArtifact(
            f"{path}: not a whole ONNX model (OpenVINO: {problem}). Export it again."
        )
    return model


def _set_batch(model: Any, batch: int) -> None:
    model.reshape([batch, *list(model.inputs[0].get_partial_shape())[1:]])


def _takes_batches(model: Any) -> bool:
    """Return whether OpenVINO 2026.4 computes every image of a batch right.

    In bfloat16 it does not, in batches of three and more, where a convolution of stride 2 makes a
    map one column wide of one of three. A model with such a map, or one whose width is not known,
    is given one image at a time, in float32 too.
    """
    return all(
        op.get_output_partial_shape(0).is_static and op.get_output_shape(0)[-1] > 1
        for op in model.get_ops()
        if op.get_type_name() in ("Convolution", "GroupConvolution")
    )


_SNIPPET_HIDDEN, _SNIPPET_ROWS = 256, 16
"""The largest linear, GELU, linear that OpenVINO makes one "snippet" of, or crashes over."""


def _has_small_ffn(model: Any) -> bool:
    """Return whether OpenVINO 2026.4 would crash when it compiles the model in float32.

    It does (SIGSEGV) where it makes one "snippet" of linear, GELU, linear and a residual sum of
    two, all of up to 16 rows and 256 hidden units; it leaves larger ones as they are.
    """
    return any(
        op.get_type_name() == "Gelu"
        and op.get_output_partial_shape(0).is_static
        and op.get_output_shape(0)[-1] <= _SNIPPET_HIDDEN
        and np.prod(op.get_output_shape(0)[:-1]) <= _SNIPPET_ROWS
        for op in model.get_ops()
    )


def _name(port: Any, taps: tuple[str, ...]) -> str:
    """Return what we call an output; its tensor may have aliases."""
    names = port.get_names()
    known = (LOGITS, *FEATURES, *taps)
    return next((name for name in known if name in names), port.get_any_name())


def _spec(port: Any, name: str) -> TensorSpec:
    shape = tuple("?" if d.is_dynamic else d.get_length() for d in port.get_partial_shape())
    return TensorSpec(name, np.dtype(port.get_element_type().to_dtype()).name, shape)


def reason(error: Exception) -> str:
    """Return the last line of OpenVINO's stack of places, which says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
