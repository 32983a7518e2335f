"""OpenVINO on the CPU, in float32 or bfloat16.

A request has a known number of images, since OpenVINO is much quicker where it knows all shapes: as
many as runs mostly bring, or one (docs/decisions/0010-known-shapes.md).
"""

import importlib.metadata
import importlib.util
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.backends.division import rounds
from coat_deploy.backends.file_stamp import FileStamp
from coat_deploy.backends.openvino_compile import TYPES, Compiled, Compiler, reason
from coat_deploy.backends.pixels import accept
from coat_deploy.errors import RunnerError, UsageError, unknown_name
from coat_deploy.machine import usable_threads
from coat_deploy.runner import Array, Closing, LoadOptions, Pixels


def missing() -> str | None:
    """Return the command that installs what is lacking, or None."""
    found = importlib.util.find_spec("openvino") is not None
    return None if found else 'pip install "coat-deploy[openvino]"'


def version() -> str:
    """Return OpenVINO's version."""
    return importlib.metadata.version("openvino")


def load(path: Path, options: LoadOptions) -> "OpenVinoRunner":
    """Compile an ONNX file for the CPU, to compute in `options.precision`.

    With `options.cache` what was compiled before is taken, which the caller knows to be of this
    file. Taps are always compiled anew.
    Raises: CorruptArtifact for a file that is no whole ONNX model, RunnerError for one that
    OpenVINO does not take, PrecisionMissing on a CPU that would compute in another than asked.
    """
    if options.precision not in TYPES:
        raise UsageError(unknown_name("OpenVINO precision", options.precision, TYPES))
    if options.device != "cpu":
        raise UsageError("openvino: runs on the CPU here. Leave --device out.")
    compiler = Compiler(
        path,
        options.precision,
        options.total_threads,
        options.taps,
        options.cache,
        options.optimise,
    )
    return OpenVinoRunner(compiler, options)


class OpenVinoRunner(Closing):
    """Runs a batch in requests of `options.batch` images, and what is left over one by one.

    Images one by one are several requests at once: threads are divided among as many as there are
    images for, or `options.streams`. Each division takes a compiled model, made when a batch first
    wants it. Inputs and outputs are in host memory.
    Raises: as `load`.
    """

    target = "openvino"

    def __init__(self, compiler: Compiler, options: LoadOptions) -> None:
        self._compiler, self._options = compiler, options
        self._stamp = FileStamp.of(compiler.path)
        self._lanes: dict[int, Lanes] = {}
        self._adding = threading.Lock()
        self._whole: Lanes | None = None
        if options.batch > 1:
            compiled = compiler.compile(options.streams, options.batch)
            if compiled.batch > 1:
                self._whole = Lanes(compiled, options.streams, queued=options.streams > 1)
        first = (self._whole or self._one_by_one(self._rounds(options.batch)[0][0])).compiled
        self.inputs, self.outputs = first.inputs, first.outputs

    def close(self) -> None:
        """Free the requests and the compiled models."""
        del self._lanes, self._whole, self._compiler

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs and taps by name. Raises RunnerError when OpenVINO refuses."""
        pixels = accept(pixels, self.inputs[0], self.target)
        return self._run(self._divided(pixels))

    def bind(self, pixels: Pixels) -> Callable[[], Mapping[str, Array]]:
        """Return a step that runs `pixels`, in requests of its own."""
        pixels = accept(pixels, self.inputs[0], self.target)
        own = [(lanes.copy(len(part)), part) for lanes, part in self._divided(pixels)]
        return lambda: self._run(own)

    def _run(self, parts: Sequence[tuple["Lanes", Pixels]]) -> dict[str, Array]:
        found: list[Sequence[Array]] = []
        for lanes, pixels in parts:
            try:
                found += lanes.run(pixels)
            except RuntimeError as error:
                raise RunnerError(f"openvino: {reason(error)} (input {pixels.shape}).") from error
        columns = zip(*found, strict=True)
        return {
            spec.name: column[0] if len(column) == 1 else np.concatenate(column)
            for spec, column in zip(self.outputs, columns, strict=True)
        }

    def _divided(self, pixels: Pixels) -> list[tuple["Lanes", Pixels]]:
        """Return the parts of a batch, each with the requests that it goes through."""
        parts, done = [], 0
        if self._whole and len(pixels) >= self._options.batch:
            done = len(pixels) // self._options.batch * self._options.batch
            parts.append((self._whole, pixels[:done]))
        left = len(pixels) - done
        for at_once, images in self._rounds(left) if left else []:
            parts.append((self._one_by_one(at_once), pixels[done : done + images]))
            done += images
        return parts

    def _rounds(self, images: int) -> list[tuple[int, int]]:
        """Return how many requests at once, and for how many images."""
        if self._options.streams > 1:
            return [(self._options.streams, images)]
        return rounds(self._options.threads or usable_threads(), images)

    def _one_by_one(self, count: int) -> "Lanes":
        """Return so many requests of one image each, among which the threads are divided."""
        with self._adding:
            if count not in self._lanes:
                compiled = self._compiler.compile(count)
                self._stamp.check()
                self._lanes[count] = Lanes(compiled, count, queued=count > 1)
            return self._lanes[count]


class Lanes:
    """Some requests of one compiled model, which may be under way at once.

    queued: OpenVINO's streams take requests up as they come. A synchronous call computes in the
        thread that calls, and two of those may be given one and the same stream.
    """

    def __init__(self, compiled: Compiled, count: int, *, queued: bool) -> None:
        self.compiled, self.count, self.queued = compiled, count, queued
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(compiled.model.create_infer_request())

    def copy(self, images: int) -> "Lanes":
        """Return other requests of the model, as many as so many images can use."""
        used = -(-images // self.compiled.batch)
        return Lanes(self.compiled, min(self.count, used), queued=self.queued)

    def run(self, pixels: Pixels) -> Iterator[Sequence[Array]]:
        """Yield the outputs of each request, in order; several Python threads may do so at once."""
        batch = self.compiled.batch
        under_way: deque[Any] = deque()
        try:
            for i in range(0, len(pixels), batch):
                # Whoever holds a request finishes it before waiting for another's.
                if under_way and self._idle.empty():
                    yield self._finish(under_way.popleft())
                request = self._idle.get()
                images = [pixels[i : i + batch]]
                try:
                    if self.queued:
                        request.start_async(images, share_inputs=True)
                    else:
                        request.infer(images, share_inputs=True, share_outputs=True)
                except RuntimeError:
                    self._idle.put(request)
                    raise
                under_way.append(request)
            while under_way:
                yield self._finish(under_way.popleft())
        finally:
            for request in under_way:
                request.wait()
                self._idle.put(request)

    def _finish(self, request: Any) -> Sequence[Array]:
        try:
            if self.queued:
                request.wait()
            count = len(self.compiled.outputs)
            values = [request.get_output_tensor(i).data for i in range(count)]
            return [np.array(value, np.float32) for value in values]
        finally:
            self._idle.put(request)
