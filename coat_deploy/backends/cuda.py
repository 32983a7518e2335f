"""The few things of CUDA that runners need, by NVIDIA's own bindings: devices, memory, graphs.

Nothing here imports them before it is called. All errors are RunnerErrors in one line.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import DeviceMissing, RunnerError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Device:
    """The GPU that is used: the first that CUDA shows this process."""

    name: str
    compute_capability: str
    driver_cuda: str


def problem() -> str | None:
    """Return why no GPU can be used here, or None. Safe without any driver."""
    if importlib.util.find_spec("cuda") is None:
        return "the package cuda-bindings is not installed"
    from cuda.bindings import runtime

    error, count = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaErrorInsufficientDriver:
        return "there is no NVIDIA driver, or one too old for this CUDA"
    if error == runtime.cudaError_t.cudaErrorNoDevice or not error and not count:
        return "the NVIDIA driver shows no GPU"
    return None if not error else f"CUDA does not start ({error.name})"


def device() -> Device:
    """Return the GPU that is used. Raises RunnerError where there is none."""
    reason = problem()
    if reason:
        raise DeviceMissing(f"cuda: {reason}.")
    from cuda.bindings import runtime

    properties = call(runtime.cudaGetDeviceProperties, 0)
    version = call(runtime.cudaDriverGetVersion)
    return Device(
        name=properties.name.split(b"\0")[0].decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        driver_cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of CUDA's runtime returns besides its error.

    Raises: RunnerError with the error's name; for memory that lacks, with how much there is.
    """
    error, *values = function(*arguments)
    if error:
        raise RunnerError(f"cuda: {function.__name__} failed ({error.name}).{_free(error)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _free(error: Any) -> str:
    if error.name != "cudaErrorMemoryAllocation":
        return ""
    from cuda.bindings import runtime

    failed, free, total = runtime.cudaMemGetInfo()
    return "" if failed else f" {free >> 20} of {total >> 20} MiB are free. Take a smaller batch."


class Stream:
    """A stream of work on the device."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime
        flags = runtime.cudaStreamNonBlocking
        self.handle = call(runtime.cudaStreamCreateWithFlags, flags)

    def wait(self) -> None:
        """Return when all work is done."""
        call(self._runtime.cudaStreamSynchronize, self.handle)

    def capture(self, work: Callable[[], None]) -> "Graph":
        """Return what `work` puts on this stream as a graph, without doing it."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(runtime.cudaStreamBeginCapture, self.handle, mode)
        try:
            work()
        finally:
            captured = call(runtime.cudaStreamEndCapture, self.handle)
        return Graph(captured)

    def close(self) -> None:
        """Free it; nothing may be under way."""
        call(self._runtime.cudaStreamDestroy, self.handle)


class Graph:
    """Work that was captured, launched as one."""

    def __init__(self, captured: Any) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime
        try:
            self._executable = call(runtime.cudaGraphInstantiate, captured, 0)
        finally:
            call(runtime.cudaGraphDestroy, captured)

    def launch(self, stream: Stream) -> None:
        """Put it on a stream."""
        call(self._runtime.cudaGraphLaunch, self._executable, stream.handle)

    def close(self) -> None:
        """Free it."""
        call(self._runtime.cudaGraphExecDestroy, self._executable)


class Buffer:
    """Device memory of a shape and dtype, with page-locked host memory beside it for copies."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.address = int(call(runtime.cudaMalloc, self.bytes))
        self._host: int | None = None

    def put(self, values: Array, stream: Stream) -> None:
        """Copy values in; the caller's array is free at once."""
        host = self._host_array(values.shape)
        np.copyto(host, values)
        self._copy(self.address, self._host, host.nbytes, "cudaMemcpyHostToDevice", stream)

    def put_device(self, address: int, count: int, stream: Stream) -> None:
        """Copy `count` bytes in from elsewhere on the device, when what writes them is done."""
        call(self._runtime.cudaDeviceSynchronize)  # it may be on a stream that nobody names
        self._copy(self.address, address, count, "cudaMemcpyDeviceToDevice", stream)

    def get(self, shape: tuple[int, ...], stream: Stream) -> Array:
        """Return the first values, as an array of `shape`; waits for the stream."""
        host = self._host_array(shape)
        self._copy(self._host, self.address, host.nbytes, "cudaMemcpyDeviceToHost", stream)
        stream.wait()
        return host.copy()

    def close(self) -> None:
        """Free it."""
        call(self._runtime.cudaFree, self.address)
        if self._host is not None:
            call(self._runtime.cudaFreeHost, self._host)
            self._host = None

    def _copy(self, to: int | None, source: int | None, count: int, kind: str, s: Stream) -> None:
        direction = getattr(self._runtime.cudaMemcpyKind, kind)
        call(self._runtime.cudaMemcpyAsync, to, source, count, direction, s.handle)

    def _host_array(self, shape: tuple[int, ...]) -> Array:
        import ctypes

        if self._host is None:
            self._host = int(call(self._runtime.cudaMallocHost, self.bytes))
        count = int(np.prod(shape)) * self.dtype.itemsize
        memory = (ctypes.c_byte * count).from_address(self._host)
        return np.ctypeslib.as_array(memory).view(self.dtype).reshape(shape)
