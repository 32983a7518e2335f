"""TensorRT 10 and 11: engines for the GPU at hand."""

from functools import partial

from coat_deploy.backends import cuda, tensorrt_build, tensorrt_run
from coat_deploy.backends.tensorrt_flavour import TENSORRT

missing, version, unable = TENSORRT.missing, TENSORRT.version, cuda.problem
load = partial(tensorrt_run.load, TENSORRT)
build = partial(tensorrt_build.build, TENSORRT)
mismatch = partial(tensorrt_run.mismatch, TENSORRT)
