"""TensorRT for RTX: engines for GPUs that need not be at hand."""

from pathlib import Path

from coat_deploy.backends import cuda, tensorrt_build, tensorrt_run
from coat_deploy.backends.tensorrt_flavour import TENSORRT_RTX
from coat_deploy.backends.tensorrt_run import TensorRtRunner
from coat_deploy.census import Asked
from coat_deploy.engine import BuildOptions, Built, EngineRecord
from coat_deploy.runner import LoadOptions

missing, version, unable = TENSORRT_RTX.missing, TENSORRT_RTX.version, cuda.problem


def load(path: Path, options: LoadOptions) -> TensorRtRunner:
    """Load an engine. Raises: RunnerError, CorruptArtifact, UsageError."""
    return tensorrt_run.load(TENSORRT_RTX, path, options)


def build(graph: Path, options: BuildOptions, asked: Asked, tell: tensorrt_build.Tell) -> Built:
    """Build the engine of a graph. Raises: GraphError, CorruptArtifact, RunnerError, UsageError."""
    return tensorrt_build.build(TENSORRT_RTX, graph, options, asked, tell)


def mismatch(record: EngineRecord) -> str | None:
    """Return in what this machine differs from the one an engine is for, or None."""
    return tensorrt_run.mismatch(TENSORRT_RTX, record)
