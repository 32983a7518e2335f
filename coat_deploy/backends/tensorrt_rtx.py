"""TensorRT for RTX: engines for GPUs that need not be at hand."""

from functools import partial

from coat_deploy.backends import cuda, tensorrt_build, tensorrt_run
from coat_deploy.backends.tensorrt_flavour import TENSORRT_RTX

missing, version, unable = TENSORRT_RTX.missing, TENSORRT_RTX.version, cuda.problem
load = partial(tensorrt_run.load, TENSORRT_RTX)
build = partial(tensorrt_build.build, TENSORRT_RTX)
mismatch = partial(tensorrt_run.mismatch, TENSORRT_RTX)
