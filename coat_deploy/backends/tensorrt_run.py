"""Runs an engine of any flavour of TensorRT on the first GPU.

Every shape that comes is given a lane: an execution context in the profile that takes it, buffers
on the device, and a CUDA graph of the whole network, which is what a call launches.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.backends import cuda
from coat_deploy.backends.pixels import accept
from coat_deploy.backends.tensorrt_flavour import Flavour, Messages
from coat_deploy.engine import EngineRecord, Profile
from coat_deploy.errors import CorruptArtifact, DeviceMissing, RunnerError, UsageError
from coat_deploy.runner import INPUT, Array, Closing, LoadOptions, Pixels, TensorSpec

MAX_LANES = 8
"""Shapes that are kept ready; the one not used for longest makes room."""

UNSUPPORTED = "does not support this compute capability"
"""What TensorRT for RTX 1.7 says on an H200: it is for GPUs of workstations."""

Shape = tuple[int, ...]


def load(flavour: Flavour, path: Path, options: LoadOptions) -> "TensorRtRunner":
    """Load an engine.

    Raises: RunnerError without a usable GPU, and for an engine that this version or GPU does not
    take; CorruptArtifact for a file that is no engine.
    """
    if options.taps:
        raise UsageError(f"{flavour.target}: an engine has no inner tensors to return.")
    reason = cuda.problem()
    if reason:  # a Runtime made without a GPU ends the process when it is used
        raise DeviceMissing(
            f"{path.name}: {flavour.title} needs an NVIDIA GPU, and {reason}. Run it where there "
            "is one; coat-deploy doctor tells more."
        )
    trt, messages = flavour.load(), Messages()
    runtime = trt.Runtime(messages.logger(trt))
    try:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    except OSError as error:
        raise CorruptArtifact(f"{path}: cannot be read ({error.strerror}).") from error
    if engine is None and any(UNSUPPORTED in error for error in messages.errors):
        gpu = cuda.device()
        raise RunnerError(
            f"{path.name}: {flavour.title} {trt.__version__} does not run on {gpu.name}, of "
            f"compute capability {gpu.compute_capability}. Export it there with --target tensorrt."
        )
    if engine is None:
        raise CorruptArtifact(
            f"{path}: {flavour.title} {trt.__version__} does not take it here "
            f"({messages.first_error()}). Export it again on this machine."
        )
    return TensorRtRunner(flavour, engine, options, messages, runtime)


def mismatch(flavour: Flavour, record: EngineRecord) -> str | None:
    """Return in what this machine differs from the one an engine is for, or None.

    Of the GPU its compute capability alone matters; without a GPU only the version is compared.
    """
    version, options = flavour.version(), record.options
    if record.flavour != flavour.target:
        return f"it is of {record.flavour}, not of {flavour.target}"
    if record.version != version and not options.get("version_compatible"):
        return f"it was built by {flavour.title} {record.version}, and {version} is installed"
    if cuda.problem():
        return None
    here, built_for = cuda.device(), list(options.get("compute_capabilities", ()))
    if record.compute_capability and not options.get("hardware_compatible"):
        built_for = [record.compute_capability]
    if built_for and here.compute_capability not in built_for:
        on = f" on {record.gpu}" if record.gpu else ""
        return (
            f"it was built{on} for compute capability {', '.join(built_for)}, and this GPU, "
            f"{here.name}, has {here.compute_capability}"
        )
    return None


class TensorRtRunner(Closing):
    """Runs batches within an engine's profiles.

    A larger batch is run in parts, a smaller one filled up with its last image. Inputs may be
    numpy arrays, or tensors on the GPU that offer `__cuda_array_interface__`, which are not
    copied to the host. Loaded for k streams, k threads may call it at once.
    """

    def __init__(
        self, flavour: Flavour, engine: Any, options: LoadOptions, messages: Messages, runtime: Any
    ) -> None:
        self.target = flavour.target
        self._trt, self._engine, self.messages = flavour.load(), engine, messages
        self._runtime = runtime  # the engine needs it as long as it lives
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = (self._spec(INPUT),)
        self.outputs = tuple(self._spec(name) for name in names if name != INPUT)
        self.profiles = tuple(map(self._profile, range(engine.num_optimization_profiles)))
        self._options = options
        self._idle: list[OrderedDict[Shape, Lane]] = [OrderedDict() for _ in range(options.streams)]
        self._free = threading.Semaphore(options.streams)
        self._choosing = threading.Lock()

    def close(self) -> None:
        """Free contexts, buffers and the engine."""
        for lanes in self._idle:
            for lane in lanes.values():
                lane.close()
            lanes.clear()
        del self._engine, self._runtime

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs by name, in host memory. Raises RunnerError."""
        pixels = self._accept(pixels)
        with self._free:
            with self._choosing:
                lanes = self._idle.pop()
            try:
                parts = [self._lane(lanes, part.shape).run(part) for part in self._parts(pixels)]
            finally:
                with self._choosing:
                    self._idle.append(lanes)
        columns = zip(*parts, strict=True)
        return {
            spec.name: np.concatenate(column)
            for spec, column in zip(self.outputs, columns, strict=True)
        }

    def bind(self, pixels: Pixels) -> Callable[[], object]:
        """Return a step that computes on the device, from a copy there to outputs there."""
        pixels = accept(pixels, self.inputs[0], self.target)
        lanes = [self._new_lane(part.shape) for part in self._parts(pixels)]
        for lane, part in zip(lanes, self._parts(pixels), strict=True):
            lane.put(part)

        def step() -> object:
            for lane in lanes:
                lane.launch()
            for lane in lanes:
                lane.stream.wait()
            return lanes

        return step

    def _accept(self, pixels: Any) -> Any:
        """Return images as they can be copied. Raises RunnerError for others."""
        there = getattr(pixels, "__cuda_array_interface__", None)
        if there is None:
            return accept(pixels, self.inputs[0], self.target)
        if there["typestr"] != "<f4" or there.get("strides") or there["shape"][1:2] != (3,):
            raise RunnerError(
                f"{self.target}: the tensor does not fit (got {there['typestr']} {there['shape']}, "
                f"strides {there.get('strides')}, expected float32 (B, 3, H, W), contiguous)."
            )
        return pixels

    def _parts(self, pixels: Any) -> list[Any]:
        """Return a batch in parts that profiles take, if only after filling them up."""
        sizes = [p for p in self.profiles if p.takes((p.batch[0], 3, *pixels.shape[2:]))]
        if not sizes:
            raise RunnerError(
                f"{self.target}: no profile takes images of {tuple(pixels.shape[2:])} (there: "
                f"{'; '.join(map(str, self.profiles))}). Export with a --size-range that does."
            )
        most = max(profile.batch[2] for profile in sizes)
        return [pixels[i : i + most] for i in range(0, len(pixels), most)]

    def _lane(self, lanes: "OrderedDict[Shape, Lane]", shape: Shape) -> "Lane":
        """Return the lane of a shape, made when it is first wanted."""
        if shape not in lanes:
            while len(lanes) >= MAX_LANES:
                lanes.popitem(last=False)[1].close()
            lanes[shape] = self._new_lane(shape)
        lanes.move_to_end(shape)
        return lanes[shape]

    def _new_lane(self, shape: Shape) -> "Lane":
        index, batch = self._choose(shape)
        return Lane(self._engine, index, (batch, *shape[1:]), self)

    def _choose(self, shape: Shape) -> tuple[int, int]:
        """Return the profile for a shape, and the batch to fill it up to.

        Of those that take it the one whose best batch is nearest; else the least batch above it.
        """
        found = []
        for i, profile in enumerate(self.profiles):
            batch = max(shape[0], profile.batch[0])
            if profile.takes((batch, *shape[1:])):
                found.append((batch - shape[0], abs(profile.batch[1] - batch), i, batch))
        assert found  # `_parts` has seen to it
        _, _, index, batch = min(found)
        return index, batch

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple("?" if d < 0 else d for d in self._engine.get_tensor_shape(name))
        dtype = self._trt.nptype(self._engine.get_tensor_dtype(name))
        return TensorSpec(name, np.dtype(dtype).name, ("?", *shape[1:]))

    def _profile(self, index: int) -> Profile:
        shapes = [tuple(s) for s in self._engine.get_tensor_profile_shape(INPUT, index)]
        (low, best, high) = shapes
        batch, _, height, width = zip(low, best, high, strict=True)
        return Profile(batch, height, width)


class Lane:
    """One shape: a context in its profile, buffers on the device, and the network as a graph."""

    def __init__(self, engine: Any, profile: int, shape: Shape, owner: "TensorRtRunner") -> None:
        self._owner = owner
        with contextlib.ExitStack() as held:
            self.stream = cuda.Stream()
            held.callback(self.stream.close)
            self._context = engine.create_execution_context()
            if self._context is None:
                raise RunnerError(
                    f"{owner.target}: no execution context ({owner.messages.first_error()}). "
                    "Take a smaller batch, or fewer streams."
                )
            self._context.set_optimization_profile_async(profile, self.stream.handle)
            self._context.set_input_shape(INPUT, shape)
            specs = {INPUT: np.dtype(np.float32)}
            specs |= {spec.name: np.dtype(spec.dtype) for spec in owner.outputs}
            self._buffers = {}
            for name, dtype in specs.items():
                there = shape if name == INPUT else tuple(self._context.get_tensor_shape(name))
                self._buffers[name] = cuda.Buffer(there, dtype)
                held.callback(self._buffers[name].close)
                self._context.set_tensor_address(name, self._buffers[name].address)
            self._enqueue()  # a first run outside of the graph, in which everything is set up
            self.stream.wait()
            self._graph = self._capture()
            if self._graph:
                held.callback(self._graph.close)
            self._held = held.pop_all()

    def run(self, pixels: Any) -> Sequence[Array]:
        """Return the outputs of up to as many images as the lane takes."""
        self.put(pixels)
        self.launch()
        return [
            self._buffers[spec.name].get(
                (len(pixels), *self._buffers[spec.name].shape[1:]), self.stream
            )
            for spec in self._owner.outputs
        ]

    def put(self, pixels: Any) -> None:
        """Copy images in; what they leave over is filled up with the last."""
        buffer = self._buffers[INPUT]
        there = getattr(pixels, "__cuda_array_interface__", None)
        if there is not None:
            count = int(np.prod(there["shape"])) * buffer.dtype.itemsize
            buffer.put_device(there["data"][0], count, self.stream)
            return
        filler = np.repeat(pixels[-1:], buffer.shape[0] - len(pixels), axis=0)
        buffer.put(np.concatenate([pixels, filler]) if len(filler) else pixels, self.stream)

    def launch(self) -> None:
        """Put the network on the stream."""
        if self._graph:
            self._graph.launch(self.stream)
        else:
            self._enqueue()

    def close(self) -> None:
        """Free everything."""
        self.stream.wait()
        del self._context
        self._held.close()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.stream.handle):
            reason = self._owner.messages.first_error()
            raise RunnerError(f"{self._owner.target}: the engine failed ({reason}).")

    def _capture(self) -> "cuda.Graph | None":
        """Return the network as a graph; None for an engine that says it cannot be one."""
        probe = getattr(self._context, "is_stream_capturable", None)  # TensorRT for RTX alone
        capturable = probe is None or probe(self.stream.handle)
        return self.stream.capture(self._enqueue) if capturable else None
