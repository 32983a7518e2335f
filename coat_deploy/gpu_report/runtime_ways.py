"""The runtimes that take graphs: onnxruntime and the flavours of TensorRT, by our backends."""

import functools
import importlib.util
import itertools
from collections.abc import Sequence

from coat_deploy.backends import onnxruntime_cuda
from coat_deploy.backends.select import ENGINES, backend, engine_backend, for_gpu, require
from coat_deploy.engine import BuildOptions, Profile
from coat_deploy.errors import CoatDeployError
from coat_deploy.gpu_report.networks import spec_of, write_graph
from coat_deploy.gpu_report.timing import Step
from coat_deploy.gpu_report.way import Opened, Place, Way
from coat_deploy.runner import LOGITS, Array, LoadOptions, Pixels, Runner


class RunnerOpened:
    """A runner; its steps return when they are done."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def logits(self, pixels: Pixels) -> Array:
        """Return the logits of images, float32."""
        return self._runner.run(pixels)[LOGITS]

    def bind(self, inputs: Sequence[Pixels]) -> Step:
        """Return a step on inputs that lie on the device and take turns."""
        turns = itertools.cycle([self._runner.bind(pixels) for pixels in inputs])
        return Step(lambda: next(turns)(), lambda: None)

    def memory_mib(self) -> float | None:
        """Return None: runtimes do not tell."""
        return None


def open_onnxruntime(captured: bool, precision: str, variant: str, place: Place) -> Opened:
    """Open a graph in onnxruntime, on a GPU with or without CUDA graphs."""
    graph = write_graph(variant, "onnxruntime", precision, place.folder)
    options = LoadOptions(precision=precision, device=place.device, batch=max(place.batches))
    if place.device == "cuda":
        return RunnerOpened(onnxruntime_cuda.load(graph.path, options, captured=captured))
    return RunnerOpened(require("onnxruntime").load(graph.path, options))


def open_engine(target: str, precision: str, variant: str, place: Place) -> Opened:
    """Build an engine, its layers held against what was asked, and run it."""
    graph = write_graph(variant, target, precision, place.folder)
    size = spec_of(variant).preprocess.input_size
    profiles = tuple(Profile.of((batch,) * 3, size) for batch in sorted(set(place.batches)))
    options = BuildOptions(profiles=profiles, tf32=precision == "tf32")
    built = engine_backend(target).build(graph.path, options, graph.asked, lambda step: None)
    path = graph.path.with_suffix(".engine")
    path.write_bytes(built.plan)
    return RunnerOpened(require(target).load(path, LoadOptions(precision=precision)))


def no_graphs(target: str, precision: str, device: str) -> str | None:
    """Return why a runtime cannot do without CUDA graphs there, or None."""
    return "a CPU has no CUDA graphs" if device == "cpu" else not_there(target, precision, device)


def not_there(target: str, precision: str, device: str) -> str | None:
    """Return why a runtime cannot compute there in a precision, or None."""
    if importlib.util.find_spec("onnx") is None:
        return "onnx is not installed, which graphs are written with"
    if command := backend(target).missing():
        return f"{target} is not installed; {command}"
    if device == "cpu":
        if for_gpu(target, precision):
            return f"{target} {precision} is for a GPU"
        return None
    return engine_backend(target).unable() if target in ENGINES else _no_cuda()


def _no_cuda() -> str | None:
    """Return why onnxruntime has no CUDA, or None."""
    try:
        onnxruntime_cuda.require_cuda()
    except CoatDeployError as error:
        return str(error)
    return None


def runtime_ways() -> list[Way]:
    """Return the runtimes' ways, the most wanted first."""
    ways = []
    for precision in ("fp16", "fp32"):
        for captured in (True, False):
            name = "onnxruntime" if captured else "onnxruntime without CUDA graphs"
            opened = functools.partial(open_onnxruntime, captured, precision)
            reason = not_there if captured else no_graphs
            missing = functools.partial(reason, "onnxruntime", precision)
            ways.append(Way(f"{name} {precision}", precision, opened, missing, checked=captured))
    for precision in ("fp16", "bf16", "fp32", "tf32"):
        for target in ENGINES:
            opened = functools.partial(open_engine, target, precision)
            missing = functools.partial(not_there, target, precision)
            ways.append(
                Way(f"{target} {precision}", precision, opened, missing, least_s=30.0, most_s=120.0)
            )
    return ways
