"""Builds an engine of an ONNX graph: parsed, its types proven, profiles set, built.

Networks are strongly typed: every layer computes in the type that the graph gives it. Nothing is
left to flags, which TensorRT 11 no longer has, and which none of them had to obey.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coat_deploy.backends import cuda
from coat_deploy.backends.tensorrt_flavour import Flavour, Messages
from coat_deploy.cache import SUFFIX, compiled_folder, keep, read_kept
from coat_deploy.census import Asked, Census, EngineLayer
from coat_deploy.digest import sha256_bytes
from coat_deploy.engine import BuildOptions, Built, Profile
from coat_deploy.errors import CorruptArtifact, DeviceMissing, GraphError, RunnerError, UsageError

Tell = Callable[[str], None]

_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
"""What TensorRT calls the types of numbers that are computed with."""

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
"""How the parser tells of which node a layer is, in its metadata."""


def build(flavour: Flavour, graph: Path, options: BuildOptions, asked: Asked, tell: Tell) -> Built:
    """Build the engine of `graph`, its types proven before.

    Raises: GraphError for a graph that the parser refuses, or that computes otherwise than asked;
    CorruptArtifact for a file that is none; RunnerError when the builder fails, or lacks a GPU;
    UsageError for an option that the library does not have.
    """
    device = None
    if not flavour.ahead_of_time:
        reason = cuda.problem()
        if reason:
            raise DeviceMissing(
                f"{flavour.target}: {flavour.title} builds for the GPU at hand, and {reason}. "
                "Export on the machine that will serve it, or to tensorrt-rtx."
            )
        device = cuda.device()
    trt, messages = flavour.load(), Messages()
    logger = messages.logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    tell("parsing the graph")
    if not parser.parse(_read(graph)):
        raise _parse_error(flavour, graph, trt, parser)
    census = Census(tuple(_layers(network)))
    census.check(asked, f"{graph.name}: {flavour.title}")
    config = builder.create_builder_config()
    _set_options(flavour, trt, config, options)
    pixels = network.get_input(0)
    _fix_lengths(pixels, options.profiles)
    for profile in options.profiles:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(pixels.name, *profile.shapes())
        config.add_optimization_profile(shapes)
    monitor = _monitor(trt, tell)
    config.progress_monitor = monitor
    timed = _timings(flavour, trt, device)
    if timed:
        config.set_timing_cache(config.create_timing_cache(read_kept(timed) or b""), True)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise RunnerError(
            f"{graph.name}: {flavour.title} {trt.__version__} does not build it "
            f"({messages.first_error()})."
        )
    if timed:
        keep(timed, bytes(config.get_timing_cache().serialize()))
    gpu, capability = (device.name, device.compute_capability) if device else (None, None)
    return Built(bytes(plan), census, messages.text(), trt.__version__, gpu, capability)


def _read(graph: Path) -> bytes:
    try:
        return graph.read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"{graph}: cannot be read ({error.strerror}).") from error


def _timings(flavour: Flavour, trt: Any, device: "cuda.Device | None") -> Path | None:
    """Return where times of kernels are kept, by version and GPU; None where none are taken."""
    if device is None:
        return None
    name = sha256_bytes(json.dumps([trt.__version__, str(device)]).encode())
    folder = compiled_folder(flavour.target, {"timings": name})
    return folder / f"{name}{SUFFIX}" if folder else None


def _layers(network: Any) -> Iterator[EngineLayer]:
    """Yield the layers that are of a node and put out floating-point numbers."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        node = _NODE.search(layer.metadata)
        if not node or not layer.num_outputs:
            continue
        precision = _PRECISIONS.get(layer.get_output(0).dtype.name)
        if precision and layer.type.name != "CAST":
            yield EngineLayer(layer.name, layer.type.name, node[1], precision)


def _fix_lengths(tensor: Any, profiles: tuple[Profile, ...]) -> None:
    """Make lengths static that no profile leaves open: a static engine has better kernels."""
    known = zip(*(shape for profile in profiles for shape in profile.shapes()), strict=True)
    lengths = [values[0] if len(set(values)) == 1 else -1 for values in known]
    tensor.shape = tuple(
        old if old != -1 else new for old, new in zip(tensor.shape, lengths, strict=True)
    )


def _set_options(flavour: Flavour, trt: Any, config: Any, options: BuildOptions) -> None:
    flags = {
        "TF32": options.tf32,
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_weights,
        "VERSION_COMPATIBLE": options.version_compatible,
    }
    for name, wanted in flags.items():
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None and wanted:
            raise UsageError(f"{flavour.title} {trt.__version__} has no {name}. Leave it out.")
        if flag is not None:
            (config.set_flag if wanted else config.clear_flag)(flag)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.effort is not None:
        config.builder_optimization_level = options.effort
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        _set_capabilities(flavour, trt, config, options.compute_capabilities)


def _set_capabilities(flavour: Flavour, trt: Any, config: Any, asked: tuple[str, ...]) -> None:
    """Name the GPUs to build for. Raises UsageError for one that the library does not know."""
    if not flavour.ahead_of_time:
        raise UsageError(
            f"compute capability: {flavour.title} builds for the GPU at hand (got "
            f"{', '.join(asked)}). Leave it out."
        )
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in vars(trt.ComputeCapability).items()
        if name.startswith("SM")
    }
    config.num_compute_capabilities = len(asked)
    for i, capability in enumerate(asked):
        if capability not in known:
            raise UsageError(
                f"compute capability: {flavour.title} {trt.__version__} does not build for "
                f"{capability} (known: {', '.join(known)})."
            )
        config.set_compute_capability(known[capability], i)


def _parse_error(
    flavour: Flavour, graph: Path, trt: Any, parser: Any
) -> GraphError | CorruptArtifact:
    """Return our error for the parser's first."""
    subject = f"{graph.name}: {flavour.title} {trt.__version__}"
    if not parser.num_errors:
        return GraphError(f"{subject} does not parse it, and does not say why.")
    error = parser.get_error(0)
    reason = " ".join(error.desc().split())
    if error.code() == trt.ErrorCode.MODEL_DESERIALIZE_FAILED:
        return CorruptArtifact(f"{graph}: not a whole ONNX model ({reason}). Export it again.")
    node = error.node_name()
    where = f"at {node} ({error.node_operator()})" if node else "as a whole"
    return GraphError(f"{subject} does not take it {where}: {reason}")


def _monitor(trt: Any, tell: Tell) -> Any:
    """Return an object that the builder tells how far it is, and asks whether to go on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                tell(f"building: {phase.lower()}, {step + 1} of {self._steps.get(phase, '?')}")
            except KeyboardInterrupt:  # an exception may not cross the library
                self.interrupted = True
            return not self.interrupted

    return Monitor()
