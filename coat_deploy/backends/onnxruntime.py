"""onnxruntime on the CPU; on a GPU `onnxruntime_cuda` takes over."""

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.backends.division import rounds
from coat_deploy.backends.file_stamp import FileStamp
from coat_deploy.backends.pixels import accept
from coat_deploy.errors import CorruptArtifact, PrecisionMissing, RunnerError
from coat_deploy.machine import usable_threads
from coat_deploy.runner import Array, Closing, LoadOptions, Pixels, Runner, TensorSpec

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


def load(path: Path, options: LoadOptions) -> Runner:
    """Load an ONNX file on the CPU, or on the GPU that `options.device` asks for.

    Raises: CorruptArtifact for a file that is no whole ONNX model, RunnerError for one that
    onnxruntime does not take; DeviceMissing where there is no GPU for it; PrecisionMissing for
    fp16 on the CPU.
    """
    if options.device == "cuda":
        from coat_deploy.backends import onnxruntime_cuda

        return onnxruntime_cuda.load(path, options)
    if options.precision == "fp16" and options.optimise:
        # onnxruntime has few kernels for it here, which add up in fp16: slower, and less exact.
        raise PrecisionMissing(
            f"{path}: fp16 is for an NVIDIA GPU. Run it with --device cuda, or export fp32."
        )
    return OnnxRuntimeRunner(Opener(path, options.taps, options.optimise), options)


@dataclass(frozen=True)
class Opener:
    """Opens sessions of one file."""

    path: Path
    taps: tuple[str, ...] = ()
    optimise: bool = True

    def open(self, threads: int | None) -> Any:
        """Return a session of a pool of so many threads, the caller's among them.

        Raises: CorruptArtifact, RunnerError, as `load`.
        """
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        # Its warnings are advice to graph authors; its errors come as exceptions too.
        settings.log_severity_level = 4
        if not self.optimise:
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads:
            settings.intra_op_num_threads = threads
        # Idle threads that spin after a run take the cores from whoever works next.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        source: str | bytes = str(self.path)
        if self.taps:
            from coat_deploy.graph.taps import expose

            source = expose(self.path, self.taps)
        return open_session(self.path, source, settings, ["CPUExecutionProvider"])


def open_session(path: Path, source: str | bytes, settings: Any, providers: Sequence[Any]) -> Any:
    """Return a session of `source`, which is the file at `path` or made of it.

    Raises: CorruptArtifact for a file that is no whole ONNX model, RunnerError for one that
    onnxruntime does not take.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(source, settings, providers=list(providers))
    except Exception as error:  # onnxruntime's classes are private and share no base
        reason = str(error).splitlines()[0]
        if type(error).__name__ in _CORRUPT:
            raise CorruptArtifact(
                f"{path}: not a whole ONNX model (onnxruntime: {reason}). Export it again."
            ) from error
        raise RunnerError(f"{path}: onnxruntime does not load it ({reason}).") from error


class OnnxRuntimeRunner(Closing):
    """Computes images one by one, as many at once as the threads can be divided among.

    A request runs in the thread that calls and in those of its session's pool, which concurrent
    requests share: k callers and a pool of k - 1 fewer are all the threads there are. So each
    division of the threads takes a session, made when a batch first wants it; in streams, the
    threads that call are the division. With `options.whole_batches` a batch is one request.
    A session keeps nothing between runs. Inputs and outputs are in host memory.
    Raises: as `load`.
    """

    target = "onnxruntime"

    def __init__(self, opener: Opener, options: LoadOptions) -> None:
        self._opener, self._options = opener, options
        self._stamp = FileStamp.of(opener.path)
        self._sessions: dict[int, Any] = {}
        self._opening = threading.Lock()
        self._callers = ThreadPoolExecutor(usable_threads(), thread_name_prefix="onnxruntime")
        requests = 1 if options.whole_batches else options.batch
        first = self._session(self._rounds(requests)[0][0])
        self.inputs = tuple(map(read_spec, first.get_inputs()))
        self.outputs = tuple(map(read_spec, first.get_outputs()))

    def close(self) -> None:
        """Free the sessions, and end the threads that call them."""
        self._callers.shutdown()
        del self._sessions

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs and taps by name. Raises RunnerError when onnxruntime refuses."""
        values = self.bind(pixels)()
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def bind(self, pixels: Pixels) -> Callable[[], Sequence[Array]]:
        """Return a step that runs `pixels`."""
        pixels = accept(pixels, self.inputs[0], self.target)
        size = len(pixels) if self._options.whole_batches else 1
        requests = [pixels[i : i + size] for i in range(0, len(pixels), size)]
        parts, done = [], 0
        for at_once, count in self._rounds(len(requests)):
            parts.append((self._session(at_once), at_once, requests[done : done + count]))
            done += count

        def step() -> Sequence[Array]:
            found = [values for part in parts for values in self._divided(*part)]
            if len(found) == 1:
                return found[0]
            return [np.concatenate(column) for column in zip(*found, strict=True)]

        return step

    def _divided(
        self, session: Any, at_once: int, requests: Sequence[Pixels]
    ) -> Sequence[Sequence[Array]]:
        """Return the outputs of each request. None is under way any more when one has failed."""
        found: list[Sequence[Array]] = [()] * len(requests)
        turns = iter(range(len(requests)))
        stopped = threading.Event()

        def work() -> None:
            try:
                while not stopped.is_set() and (i := next(turns, None)) is not None:
                    found[i] = self._request(session, requests[i])
            except BaseException:
                stopped.set()
                raise

        others = [self._callers.submit(work) for _ in range(at_once - 1)]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()
        return found

    def _request(self, session: Any, pixels: Pixels) -> Sequence[Array]:
        try:
            values: Sequence[Array] = session.run(None, {self.inputs[0].name: pixels})
        except Exception as error:  # onnxruntime's classes are private and share no base
            raise RunnerError(
                f"onnxruntime: {str(error).splitlines()[0]} (input {pixels.shape})."
            ) from error
        return values

    def _rounds(self, requests: int) -> list[tuple[int, int]]:
        """Return how many requests at once one caller sees to, and how many in all, in turn."""
        if self._options.streams > 1:
            return [(1, requests)]
        return rounds(self._options.threads or usable_threads(), requests)

    def _session(self, at_once: int) -> Any:
        """Return a session that is called from so many threads of each stream."""
        with self._opening:
            if at_once not in self._sessions:
                callers = at_once * self._options.streams
                threads = self._options.total_threads
                if callers > 1:
                    threads = (threads or usable_threads()) - callers + 1
                self._sessions[at_once] = self._opener.open(threads)
                self._stamp.check()
            return self._sessions[at_once]


def read_spec(value: Any) -> TensorSpec:
    """Return what a session says of an input or output."""
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    # A tapped tensor has dimensions without even a name.
    shape = tuple("?" if length is None else length for length in value.shape)
    return TensorSpec(value.name, _DTYPES.get(dtype, dtype), shape)
