"""onnxruntime on the CPU."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coat_deploy.backends.pixels import accept
from coat_deploy.errors import CorruptArtifact, RunnerError
from coat_deploy.runner import Array, Closing, LoadOptions, Pixels, TensorSpec

_CORRUPT = ("InvalidProtobuf", "InvalidArgument", "InvalidGraph", "NoSuchFile", "NoModel")
"""What onnxruntime calls the errors of a file that is broken, not of one it cannot run."""

_DTYPES = {"float": "float32", "double": "float64"}
"""ONNX's names of types that numpy calls otherwise."""


def missing() -> str | None:
    """Return the command that installs what is lacking, or None."""
    found = importlib.util.find_spec("onnxruntime") is not None
    return None if found else 'pip install "coat-deploy[cpu]"'


def version() -> str:
    """Return onnxruntime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def load(path: Path, options: LoadOptions) -> "OnnxRuntimeRunner":
    """Load an ONNX file on the CPU.

    Raises: CorruptArtifact for a file that is no whole ONNX model, RunnerError for one that
    onnxruntime does not take.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    # Its warnings are advice to graph authors; its errors come as exceptions too.
    settings.log_severity_level = 4
    if options.total_threads:
        # A request runs in the thread that calls and in those of the session's pool, which has
        # one less than this number, and which concurrent requests share: k callers and the pool
        # are all the threads there are.
        settings.intra_op_num_threads = options.total_threads - options.streams + 1
    # Idle threads that spin after a run take the cores from whoever works next.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    source: str | bytes = str(path)
    if options.taps:
        from coat_deploy.graph.taps import expose

        source = expose(path, options.taps)
    try:
        session = onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes are private and share no base
        reason = str(error).splitlines()[0]
        if type(error).__name__ in _CORRUPT:
            raise CorruptArtifact(
                f"{path}: not a whole ONNX model (onnxruntime: {reason}). Export it again."
            ) from error
        raise RunnerError(f"{path}: onnxruntime does not load it ({reason}).") from error
    return OnnxRuntimeRunner(session)


class OnnxRuntimeRunner(Closing):
    """Runs a session; inputs and outputs are in host memory.

    A session keeps nothing between runs, so streams are just concurrent calls of it: weights and
    what was prepared of them are in memory once.
    """

    target = "onnxruntime"

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(map(_spec, session.get_inputs()))
        self.outputs = tuple(map(_spec, session.get_outputs()))

    def close(self) -> None:
        """Free the session."""
        del self._session

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs and taps by name. Raises RunnerError when onnxruntime refuses."""
        pixels = accept(pixels, self.inputs[0], self.target)
        try:
            outputs = self._session.run(None, {self.inputs[0].name: pixels})
        except Exception as error:  # onnxruntime's classes are private and share no base
            raise RunnerError(
                f"onnxruntime: {str(error).splitlines()[0]} (input {pixels.shape})."
            ) from error
        return {spec.name: value for spec, value in zip(self.outputs, outputs, strict=True)}

    def bind(self, pixels: Pixels) -> Callable[[], object]:
        """Return a step that runs `pixels`."""
        pixels = accept(pixels, self.inputs[0], self.target)
        run, feed = self._session.run, {self.inputs[0].name: pixels}
        return lambda: run(None, feed)


def _spec(value: Any) -> TensorSpec:
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    # A tapped tensor has dimensions without even a name.
    shape = tuple("?" if length is None else length for length in value.shape)
    return TensorSpec(value.name, _DTYPES.get(dtype, dtype), shape)
