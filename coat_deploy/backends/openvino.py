"""OpenVINO on the CPU, in float32 or bfloat16.

What it compiled may be kept (`LoadOptions.cache`) and is then loaded without reading the ONNX
file. We export and import the compiled model ourselves: OpenVINO's own cache (`CACHE_DIR`) reads
the file first, takes float32 and bfloat16 for one model and does not notice flipped bits.
"""

import importlib.metadata
import importlib.util
import json
import logging
import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.backends.pixels import accept
from coat_deploy.cache import SUFFIX, keep, read_kept
from coat_deploy.digest import sha256_bytes
from coat_deploy.errors import (
    CorruptArtifact,
    PrecisionMissing,
    RunnerError,
    UsageError,
    unknown_name,
)
from coat_deploy.runner import (
    FEATURES,
    INPUT,
    LOGITS,
    Array,
    Closing,
    LoadOptions,
    Pixels,
    TensorSpec,
)

_log = logging.getLogger(__name__)

_TYPES = {"fp32": "f32", "bf16": "bf16"}


def missing() -> str | None:
    """Return the command that installs what is lacking, or None."""
    found = importlib.util.find_spec("openvino") is not None
    return None if found else 'pip install "coat-deploy[openvino]"'


def version() -> str:
    """Return OpenVINO's version."""
    return importlib.metadata.version("openvino")


def load(path: Path, options: LoadOptions) -> "OpenVinoRunner":
    """Compile an ONNX file for the CPU, to compute in `options.precision`.

    With `options.cache` what was compiled before is taken, which the caller knows to be of this
    file. Taps are always compiled anew.
    Raises: CorruptArtifact for a file that is no whole ONNX model, RunnerError for one that
    OpenVINO does not take, PrecisionMissing on a CPU that would compute in another than asked.
    """
    import openvino

    if options.precision not in _TYPES:
        raise UsageError(unknown_name("OpenVINO precision", options.precision, _TYPES))
    wanted = _TYPES[options.precision]
    settings = {"INFERENCE_PRECISION_HINT": wanted, **_threading(options)}
    core = openvino.Core()
    kept = None
    if options.cache and not options.taps:
        kept = options.cache / _kept_name(core, settings)
    found = _import(core, kept, settings) if kept else None
    compiled, names = found or _compile(core, path, options.taps, settings)
    computed = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if computed != wanted:
        raise PrecisionMissing(
            f"{path}: this CPU does not compute in {options.precision} "
            f"(OpenVINO would use {computed}). Load it on one with AMX or AVX512-BF16, or use "
            "the fp32 artifact."
        )
    if kept and not found:
        _export(compiled, names, kept)
    return OpenVinoRunner(compiled, names, options.streams)


def _threading(options: LoadOptions) -> dict[str, Any]:
    """Return the properties for threads and streams; OpenVINO divides threads among streams."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if options.streams > 1:
        # The hint alone would let OpenVINO choose the number of streams.
        settings = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": options.streams}
    if options.total_threads:
        settings["INFERENCE_NUM_THREADS"] = options.total_threads
    return settings


def _compile(
    core: Any, path: Path, taps: tuple[str, ...], settings: dict[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    """Return the compiled model of an ONNX file and the names of its outputs."""
    model = _read(path)
    try:
        model.add_outputs(list(taps))
    except RuntimeError as error:
        raise RunnerError(f"{path}: {_reason(error)}") from error
    # Named now: compiling joins equal tensors, and an output then bears their names too.
    names = tuple(_name(port, taps) for port in model.outputs)
    try:
        return core.compile_model(model, "CPU", settings), names
    except RuntimeError as error:
        raise RunnerError(f"{path}: OpenVINO does not compile it ({_reason(error)}).") from error


def _kept_name(core: Any, settings: dict[str, Any]) -> str:
    """Return a name of all that a compiled model depends on besides its file."""
    import openvino

    cpu = [
        core.get_property("CPU", name)
        for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES", "RANGE_FOR_STREAMS")
    ]
    key = json.dumps([openvino.get_version(), cpu, settings], sort_keys=True)
    return f"{sha256_bytes(key.encode())}{SUFFIX}"


def _import(core: Any, kept: Path, settings: dict[str, Any]) -> tuple[Any, tuple[str, ...]] | None:
    """Return the compiled model in `kept` and the names of its outputs, None without one."""
    content = read_kept(kept)
    if content is None:
        return None
    head, _, content = content.partition(b"\n")
    try:
        return core.import_model(content, "CPU", settings), tuple(json.loads(head))
    except (RuntimeError, ValueError) as error:
        _log.info("%s: OpenVINO does not take it (%s); compiling anew", kept, _reason(error))
        return None


def _export(compiled: Any, names: tuple[str, ...], kept: Path) -> None:
    """Keep a compiled model, where OpenVINO can hand it out."""
    try:
        content = compiled.export_model().getbuffer()
    except RuntimeError as error:
        _log.info("%s: OpenVINO does not hand it out (%s)", kept, _reason(error))
        return
    keep(kept, json.dumps(names).encode(), b"\n", content)


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
        reason = None if model.outputs else "it holds no graph"
    except Exception as error:  # a frontend's errors and the core's share no base
        reason = _reason(error)
    if reason:
        raise CorruptArtifact(
            f"{path}: not a whole ONNX model (OpenVINO: {reason}). Export it again."
        )
    return model


class OpenVinoRunner(Closing):
    """Runs requests of a compiled model; inputs and outputs are in host memory.

    `names` are those of the outputs, in order. There is a request for each of the `streams`.
    """

    target = "openvino"

    def __init__(self, compiled: Any, names: tuple[str, ...], streams: int = 1) -> None:
        self._compiled = compiled
        self._streams = streams
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._idle.put(compiled.create_infer_request())
        self.inputs = (_spec(compiled.inputs[0], INPUT),)
        self.outputs = tuple(map(_spec, compiled.outputs, names))

    def close(self) -> None:
        """Free the requests and the compiled model."""
        del self._idle, self._compiled

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs and taps by name. Raises RunnerError when OpenVINO refuses."""
        pixels = accept(pixels, self.inputs[0], self.target)
        request = self._idle.get()
        try:
            self._step(request, pixels)()
            outputs = [request.get_output_tensor(i).data for i in range(len(self.outputs))]
            named = zip(self.outputs, outputs, strict=True)
            return {spec.name: np.array(value, np.float32) for spec, value in named}
        except RuntimeError as error:
            raise RunnerError(f"openvino: {_reason(error)} (input {pixels.shape}).") from error
        finally:
            self._idle.put(request)

    def bind(self, pixels: Pixels) -> Callable[[], object]:
        """Return a step that runs `pixels`, in a request of its own."""
        pixels = accept(pixels, self.inputs[0], self.target)
        return self._step(self._compiled.create_infer_request(), pixels)

    def _step(self, request: Any, pixels: Pixels) -> Callable[[], Any]:
        """Return a function that runs `request` and hands its outputs back."""
        if self._streams == 1:
            return lambda: request.infer([pixels], share_inputs=True, share_outputs=True)

        def step() -> Any:
            # Queued, it is taken up by whichever stream is free. A synchronous call computes in
            # the thread that calls, and two of those may be given one and the same stream.
            request.start_async([pixels], share_inputs=True)
            request.wait()
            return request.results

        return step


def _name(port: Any, taps: tuple[str, ...]) -> str:
    """Return what we call an output; its tensor may have aliases."""
    names = port.get_names()
    known = (LOGITS, *FEATURES, *taps)
    return next((name for name in known if name in names), port.get_any_name())


def _spec(port: Any, name: str) -> TensorSpec:
    shape = tuple("?" if d.is_dynamic else d.get_length() for d in port.get_partial_shape())
    return TensorSpec(name, np.dtype(port.get_element_type().to_dtype()).name, shape)


def _reason(error: Exception) -> str:
    """Return the last line of OpenVINO's stack of places, which says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
