"""onnxruntime on an NVIDIA GPU, by its CUDA or TensorRT provider, never by its CPU's in silence.

Asked for a GPU alone, onnxruntime may still hand out a session of the CPU with no more than a line
in its log. Three things are asked of it instead: to refuse nodes on the CPU, which providers a
session has, and which node it gave to which.
"""

import contextlib
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.backends import onnxruntime_tensorrt
from coat_deploy.backends.onnxruntime import open_session, read_spec
from coat_deploy.backends.pixels import accept
from coat_deploy.errors import DeviceMissing, RunnerError, UsageError
from coat_deploy.runner import Array, Closing, LoadOptions, Pixels

PROVIDER = "CUDAExecutionProvider"

_SHAPES = re.compile(r"(.*\.)?(size|count|joined_count|map_shape|token_shape|joined_shape)(_\d+)?")
"""What `graph/tokens.py` calls nodes of a few integers, which compute shapes where the image size
is open; they may be on the CPU."""

MAX_SHAPES = 8
"""Shapes that are kept ready, or as many as batches are filled up to; the one not used for longest
makes room."""


def load(path: Path, options: LoadOptions, *, captured: bool = True) -> "OnnxRuntimeCudaRunner":
    """Load an ONNX file on the first GPU, in float32 proper: without TF32, unless asked for.

    With TensorRT as the provider, CUDA takes the nodes that it leaves. captured: by a CUDA graph a
    shape, where the graph allows it.
    Raises: DeviceMissing where onnxruntime cannot use a GPU; RunnerError where it would compute
    anything but shapes on the CPU; BackendMissing without the TensorRT it was built for;
    CorruptArtifact.
    """
    if options.taps:
        raise UsageError("onnxruntime: inner tensors are to be had on the CPU alone.")
    if options.streams > 1:
        raise UsageError("onnxruntime: a GPU takes one request at a time. Leave streams out.")
    require_cuda()
    preload()
    if options.provider == "tensorrt":
        onnxruntime_tensorrt.require()
    captured = captured and options.provider != "tensorrt"  # whose engines do it, or not
    try:
        session = _open(path, options, strict=True, captured=captured)
        return OnnxRuntimeCudaRunner(session, captured=captured, most=options.batch)
    except RunnerError as error:
        if "fallback" not in str(error):
            raise
    # A graph of open size computes shapes on the CPU; that and nothing else is let through.
    session = _open(path, options, strict=False, captured=False)
    return OnnxRuntimeCudaRunner(session, captured=False, most=options.batch)


def require_cuda() -> None:
    """Raise DeviceMissing with what to install where this onnxruntime has no CUDA."""
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        raise DeviceMissing(
            f"onnxruntime {onnxruntime.__version__}: this package has no CUDA. Run: pip uninstall "
            'onnxruntime, then: pip install "coat-deploy[gpu]"'
        )


def preload() -> None:
    """Load CUDA's and cuDNN's libraries from their packages, where they are installed so.

    Then be silent but for errors that end a call: cuDNN's search for a kernel reports each that it
    tries in vain.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    if hasattr(onnxruntime, "preload_dlls"):
        # It prints what it does not find; what that comes to is told when a session is opened.
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()


def _providers(options: LoadOptions, captured: bool) -> list[tuple[str, dict[str, str]]]:
    """Return the providers of a session, the one that is asked for first."""
    cuda = {
        "device_id": "0",
        "use_tf32": "1" if options.precision == "tf32" else "0",
        "enable_cuda_graph": "1" if captured else "0",
    }
    if options.provider != "tensorrt":
        return [(PROVIDER, cuda)]
    tensorrt = (onnxruntime_tensorrt.PROVIDER, onnxruntime_tensorrt.settings(options))
    return [tensorrt, (PROVIDER, cuda)]


def _open(path: Path, options: LoadOptions, *, strict: bool, captured: bool) -> Any:
    """Return a session that computes on the GPU; strict: without a single node on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if strict:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    providers = _providers(options, captured)
    session = open_session(path, str(path), settings, providers)
    check_placement(path, session, [name for name, _ in providers])
    return session


def check_placement(path: Path, session: Any, wanted: Sequence[str] = (PROVIDER,)) -> None:
    """Hold a session against the providers that were asked for, the first of them before others.

    Raises: DeviceMissing for a session without the first, RunnerError for one that gives it no
    node, or that runs nodes elsewhere, with their names.
    """
    providers, parts = session.get_providers(), session.get_provider_graph_assignment_info()
    if not providers or providers[0] != wanted[0]:
        raise DeviceMissing(
            f"{path}: onnxruntime does not use the GPU by {wanted[0]} (it took "
            f"{', '.join(providers)}). coat-deploy doctor tells which libraries it did not find."
        )
    if not any(part.ep_name == wanted[0] and part.get_nodes() for part in parts):
        raise RunnerError(f"{path}: onnxruntime gives {wanted[0]} not a single node.")
    astray = [
        f"{node.name} ({node.op_type})"
        for part in parts
        if part.ep_name not in wanted
        for node in part.get_nodes()
        if not _SHAPES.fullmatch(node.name)
    ]
    if astray:
        rest = f", and {len(astray) - 3} more" if len(astray) > 3 else ""
        raise RunnerError(
            f"{path}: onnxruntime would compute {len(astray)} nodes on the CPU: "
            f"{', '.join(astray[:3])}{rest}. Export the model again for this version, or with a "
            "fixed --size."
        )


class OnnxRuntimeCudaRunner(Closing):
    """Runs whole batches; inputs and outputs stay on the device while it computes.

    captured: the network is captured as a CUDA graph for every shape, and replayed. most: batches
    up to this are filled up to 1, 2, 4 and so on, or to it. A shape's first run takes seconds, most
    of which cuDNN spends compiling windows: 3 to 7 s for coat_lite_tiny in fp16 on an H200.
    """

    target = "onnxruntime"

    def __init__(self, session: Any, *, captured: bool, most: int = 1) -> None:
        self._session, self._captured, self._most = session, captured, most
        self.inputs = tuple(map(read_spec, session.get_inputs()))
        self.outputs = tuple(map(read_spec, session.get_outputs()))
        self._bound: OrderedDict[tuple[int, ...], Bound] = OrderedDict()
        self._graphs = 0

    def close(self) -> None:
        """Free the session and what it holds on the device."""
        self._bound.clear()
        del self._session

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs by name, in host memory. Raises RunnerError."""
        pixels = accept(pixels, self.inputs[0], self.target)
        shape = (self._filled(len(pixels)), *pixels.shape[1:])
        bound = self._bound.get(shape) or self._new(shape)
        self._bound[shape] = bound
        self._bound.move_to_end(shape)
        while len(self._bound) > max(MAX_SHAPES, self._most.bit_length() + 1):
            self._bound.popitem(last=False)
        bound.put(pixels)
        bound.compute()
        outputs = (output[: len(pixels)] for output in bound.get())
        return dict(zip((spec.name for spec in self.outputs), outputs, strict=True))

    def _filled(self, count: int) -> int:
        """Return how many images a batch of so many is filled up to."""
        return count if count > self._most else min(1 << (count - 1).bit_length(), self._most)

    def bind(self, pixels: Pixels) -> Callable[[], object]:
        """Return a step that computes on the device, from a copy there to outputs there."""
        pixels = accept(pixels, self.inputs[0], self.target)
        bound = self._new(pixels.shape)
        bound.put(pixels)

        def step() -> object:
            bound.compute()
            return bound

        return step

    def _new(self, shape: tuple[int, ...]) -> "Bound":
        """Return memory for a shape, and a number of its own for its CUDA graph."""
        self._graphs += 1
        graph = self._graphs if self._captured else None
        names = [spec.name for spec in self.outputs]
        return Bound(self._session, self.inputs[0].name, names, shape, graph)


class Bound:
    """A shape's memory on the device, bound to the session."""

    def __init__(
        self,
        session: Any,
        name: str,
        outputs: Sequence[str],
        shape: tuple[int, ...],
        graph: int | None,
    ) -> None:
        import onnxruntime

        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._session, self._count = session, shape[0]
        self._input = make(list(shape), np.float32, "cuda", 0)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(name, self._input)
        for output in outputs:
            self._binding.bind_output(output, "cuda")
        self._run_options = _run_options("-1")  # outside of graphs
        if graph is None:
            return
        self.compute()  # says what shapes the outputs have, which a graph needs to know
        shapes = [value.shape() for value in self._binding.get_outputs()]
        self._binding.clear_binding_outputs()
        for output, there in zip(outputs, shapes, strict=True):
            value = make(there, np.float32, "cuda", 0)
            self._binding.bind_ortvalue_output(output, value)
        self._run_options = _run_options(str(graph))
        self.compute()  # captures it

    def put(self, pixels: Pixels) -> None:
        """Copy images in, with black ones after them where there are fewer than it takes."""
        lacking = self._count - len(pixels)
        if lacking:
            black = np.zeros((lacking, *pixels.shape[1:]), np.float32)
            pixels = np.concatenate([pixels, black])
        self._input.update_inplace(pixels)

    def compute(self) -> None:
        """Compute, and return when it is done. Raises RunnerError."""
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
        except Exception as error:  # onnxruntime's classes are private and share no base
            reason = str(error).splitlines()[0]
            hint = " Take a smaller batch." if "alloc" in reason.lower() else ""
            raise RunnerError(f"onnxruntime on CUDA: {reason}.{hint}") from error

    def get(self) -> list[Array]:
        """Return the outputs, copied to the host."""
        return [np.asarray(value.numpy(), np.float32) for value in self._binding.get_outputs()]


def _run_options(graph: str) -> Any:
    """Return options of a run that captures or replays a CUDA graph, by its number."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options
