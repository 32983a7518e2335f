"""The one entry of all protocols: a request in, a response out, whatever carried them.

    request > model by name > images checked > queue > logits > values, classes or labels

Everything here runs in the event loop's thread and never blocks it; decoding and computing are the
batcher's workers'.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coat_deploy.backends.pixels import accept
from coat_deploy.errors import ImageError, RequestError, RunnerError, unknown_name
from coat_deploy.labels import ScoredLabel, top_classes
from coat_deploy.machine import usable_threads
from coat_deploy.runner import INPUT, LOGITS, Array
from coat_deploy.serve import served as describe
from coat_deploy.serve.batcher import Batcher
from coat_deploy.serve.jobs import Work
from coat_deploy.serve.options import ServeOptions
from coat_deploy.serve.registry import IndexEntry, Registry, Tell
from coat_deploy.serve.requests import (
    BYTES,
    FP32,
    InferRequest,
    InferResponse,
    RequestedOutput,
    Tensor,
)
from coat_deploy.serve.served import IMAGE, Served
from coat_deploy.serve.statistics import Listener
from coat_deploy.version import __version__

SERVER = "coat-deploy"
EXTENSIONS = ("classification", "model_configuration", "model_repository", "statistics")
"""The protocol's extensions that every protocol here speaks."""


class InferenceService:
    """Models that answer. Made and filled by `start` before the event loop runs."""

    def __init__(self, options: ServeOptions, listeners: Sequence[Listener] = ()) -> None:
        self.options, self.limits = options, options.limits
        self.batcher = Batcher(options.threads or usable_threads(), options.limits)
        self.registry = Registry(options, self.batcher, listeners)
        self.draining = False

    def start(self, tell: Tell = lambda message: None) -> None:
        """Load all models. Raises what keeps one from being served."""
        try:
            self.registry.load_all(tell)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers and free the models; what still waits is answered by an error."""
        self.registry.close()
        self.batcher.close()

    def drain(self) -> None:
        """Say from now on that the server is not ready; requests are still answered."""
        self.draining = True

    # -- what there is ----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests may come."""
        return not self.draining and self.registry.ready

    def server_metadata(self, extensions: Sequence[str] = ()) -> dict[str, Any]:
        """Return the server's metadata; `extensions` are those of the protocol that asks."""
        known = sorted([*EXTENSIONS, *extensions])
        return {"name": SERVER, "version": __version__, "extensions": known}

    def model_ready(self, name: str, version: str | None = None) -> bool:
        """Return whether a model answers. Raises RequestError for one that is not known."""
        try:
            self.registry.get(name, version)
        except RequestError as error:
            if error.kind == "unavailable":
                return False
            raise
        return True

    def model_metadata(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return a model's metadata. Raises RequestError, as all that take a name."""
        return describe.metadata(self.registry.get(name, version))

    def model_config(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return a model's configuration, in the words of Triton."""
        return describe.config(self.registry.get(name, version), self.limits.batch)

    def model_statistics(
        self, name: str | None = None, version: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the statistics of a model, or of all."""
        models = [self.registry.get(name, version)] if name else self.registry.served()
        return [
            {"name": model.name, "version": model.version, **model.statistics.to_json()}
            for model in models
        ]

    def cards(self) -> list[dict[str, Any]]:
        """Return what people want to know of every model."""
        return [describe.card(model) for model in self.registry.served()]

    async def index(self, ready_only: bool = False) -> list[IndexEntry]:
        """Return the repository's index."""
        entries = await self.registry.index()
        return [entry for entry in entries if entry.state == "READY" or not ready_only]

    async def load(self, name: str) -> None:
        """Load a model, or load it again. Raises RequestError."""
        await self.registry.load(name)

    async def unload(self, name: str) -> None:
        """Stop serving a model. Raises RequestError."""
        await self.registry.unload(name)

    # -- what it answers --------------------------------------------------------------------------

    def check_room(self, name: str, version: str | None = None) -> None:
        """Raise RequestError for a request that would be refused, before its body is read."""
        self.batcher.check_room(self.registry.get(name, version).lane)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer a request to infer. Raises RequestError."""
        served = self.registry.get(request.model, request.version)
        wanted = request.outputs or tuple(
            RequestedOutput(spec.name) for spec in served.levels.outputs
        )
        for output in wanted:
            _check_output(served, output)
        work = self._work(served, request.inputs)
        outputs = await self._run(served, work, request.deadline)
        _check_finite(served, work, outputs)
        tensors = tuple(_output(served, output, outputs[output.name]) for output in wanted)
        return InferResponse(served.name, served.version, request.id, tensors)

    async def classify(
        self,
        image: bytes,
        name: str,
        top: int = 5,
        version: str | None = None,
        deadline: float | None = None,
    ) -> list[ScoredLabel]:
        """Return the likeliest labels of an encoded image, as `predict` does.

        Raises: RequestError.
        """
        served = self.registry.get(name, version)
        outputs = await self._run(served, self._encoded(served, [image]), deadline)
        try:
            return served.processing.postprocess(outputs[LOGITS][0], top)
        except RunnerError as error:
            raise _not_finite(served) from error

    async def _run(self, served: Served, work: Work, deadline: float | None) -> Mapping[str, Array]:
        latest = time.monotonic() + self.limits.deadline_s
        try:
            return await self.batcher.run(
                served.lane, work, latest if deadline is None else min(deadline, latest)
            )
        except ImageError as error:
            raise RequestError(str(error)) from error

    def _work(self, served: Served, inputs: Sequence[Tensor]) -> Work:
        names = [tensor.name for tensor in inputs]
        if len(names) != 1:
            raise RequestError(
                f"model {served.name}: takes one input (got {len(names)}: "
                f"{', '.join(names[:8]):.200}). Send '{INPUT}', or '{IMAGE}' with encoded images."
            )
        tensor = inputs[0]
        if tensor.name not in (INPUT, IMAGE):
            raise RequestError(
                f"model {served.name}: {unknown_name('input', tensor.name[:100], (INPUT, IMAGE))}"
            )
        expected = FP32 if tensor.name == INPUT else BYTES
        if tensor.datatype != expected:
            raise RequestError(
                f"input '{tensor.name}': of another datatype (got {tensor.datatype:.20}, expected "
                f"{expected}). Convert it first."
            )
        if tensor.name == IMAGE:
            return self._encoded(served, [bytes(item) for item in tensor.data])
        assert isinstance(tensor.data, np.ndarray)
        return self._pixels(served, tensor.data)

    def _pixels(self, served: Served, pixels: Array) -> Work:
        try:
            pixels = accept(pixels, served.levels.inputs[0], f"model {served.name}")
        except RunnerError as error:
            raise RequestError(str(error)) from error
        self._check_batch(len(pixels))
        side = max(pixels.shape[2:])
        if not served.fixed_size and side > self.limits.side:
            raise RequestError(
                f"input '{INPUT}': too large (got sides of {side} pixels, expected at most "
                f"{self.limits.side}). Scale the images down.",
                "too_large",
            )
        height, width = pixels.shape[2:]
        return Work(pixels, pixels.nbytes, (height, width))

    def _encoded(self, served: Served, images: Sequence[bytes]) -> Work:
        self._check_batch(len(images))
        preprocess, limits = served.processing.preprocess, self.limits.images
        names = ["image"] if len(images) == 1 else [f"image {i}" for i in range(len(images))]
        makers: list[Callable[[], Array]] = [
            functools.partial(preprocess, image, name, limits)
            for image, name in zip(images, names, strict=True)
        ]
        return Work(makers, sum(map(len, images)), served.source.size)

    def _check_batch(self, images: int) -> None:
        if not 1 <= images <= self.limits.batch:
            raise RequestError(
                f"batch: {'too many' if images else 'no'} images (got {images}, expected 1 to "
                f"{self.limits.batch}). Divide them among requests.",
                "too_large" if images else "invalid",
            )


def _check_output(served: Served, output: RequestedOutput) -> None:
    specs = {spec.name: spec for spec in served.levels.outputs}
    if output.name not in specs:
        raise RequestError(
            f"model {served.name}: {unknown_name('output', output.name[:100], specs)}"
        )
    if not 0 <= output.classes <= len(served.labels):
        raise RequestError(
            f"output '{output.name}': so many classes are not there (got {output.classes}, "
            f"expected 0 to {len(served.labels)})."
        )


def _check_finite(served: Served, work: Work, outputs: Mapping[str, Array]) -> None:
    """Raise RequestError for outputs that mean nothing: of such pixels, or of the artifact."""
    if all(math.isfinite(float(value.sum())) for value in outputs.values()):
        return
    if all(np.isfinite(value).all() for value in outputs.values()):
        return
    if isinstance(work.pixels, np.ndarray) and not np.isfinite(work.pixels).all():
        raise RequestError(f"input '{INPUT}': holds NaN or infinity. Check how it is prepared.")
    if isinstance(work.pixels, np.ndarray) and float(np.abs(work.pixels).max()) > 1e6:
        raise RequestError(f"input '{INPUT}': holds values far from any pixel. Normalise it first.")
    raise _not_finite(served)


def _not_finite(served: Served) -> RequestError:
    return RequestError(
        f"model {served.name}: computed NaN or infinity. Serve it in a wider precision.", "internal"
    )


def _output(served: Served, wanted: RequestedOutput, values: Array) -> Tensor:
    if not wanted.classes:
        return Tensor(wanted.name, FP32, values.shape, values)
    rows = [_classes(served, row, wanted.classes) for row in values]
    flat = [item for row in rows for item in row]
    return Tensor(wanted.name, BYTES, (len(rows), wanted.classes), flat)


def _classes(served: Served, row: Array, count: int) -> list[bytes]:
    """Return `score:index:label` of the likeliest classes, the protocol's form."""
    return [f"{row[i]:f}:{i}:{served.labels[i]}".encode() for i in top_classes(row, count)]
