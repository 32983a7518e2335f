"""The Open Inference Protocol over HTTP: what there is, and inference."""

import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coat_deploy.errors import RequestError
from coat_deploy.runner import INPUT
from coat_deploy.serve import binary, tensors_json
from coat_deploy.serve.body import Receiving, read_body
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.replies import JSON, OCTETS, json_bytes, json_reply, packed
from coat_deploy.serve.requests import BYTES, InferRequest, InferResponse, Tensor
from coat_deploy.serve.served import IMAGE
from coat_deploy.serve.tensors_json import InferDocument
from coat_deploy.serve.waiting import while_connected

EXTENSIONS = ("binary_tensor_data",)
_EMPTY = InferDocument("", (), (), frozenset(), True, None)


class ProtocolRoutes:
    """The routes under /v2."""

    def __init__(self, service: InferenceService, receiving: Receiving) -> None:
        self._service, self._receiving = service, receiving

    def routes(self) -> list[Route]:
        """Return the routes: inference first, then those of all models before those of one."""
        model = [("", self.metadata), ("/ready", self.model_ready), ("/config", self.config),
                 ("/stats", self.statistics)]  # fmt: skip
        places = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        found = [Route(f"{place}/infer", self.infer, methods=["POST"]) for place in places]
        found += [
            Route("/v2", self.server, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            Route("/v2/models/stats", self.all_statistics, methods=["GET"]),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", self.load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", self.unload, methods=["POST"]),
        ]
        for place in places:
            found += [Route(place + end, answer, methods=["GET"]) for end, answer in model]
        return found

    async def live(self, request: Request) -> Response:
        """Say that the server runs."""
        return json_reply({"live": True})

    async def ready(self, request: Request) -> Response:
        """Say whether requests may come."""
        ready = self._service.ready
        return json_reply({"ready": ready}, 200 if ready else 503)

    async def server(self, request: Request) -> Response:
        """Tell what the server is."""
        return json_reply(self._service.server_metadata(EXTENSIONS))

    async def metadata(self, request: Request) -> Response:
        """Tell what a model takes and gives."""
        return json_reply(self._service.model_metadata(*_model(request)))

    async def model_ready(self, request: Request) -> Response:
        """Say whether a model answers."""
        name, version = _model(request)
        ready = self._service.model_ready(name, version)
        return json_reply({"name": name, "ready": ready}, 200 if ready else 503)

    async def config(self, request: Request) -> Response:
        """Tell a model's configuration."""
        return json_reply(self._service.model_config(*_model(request)))

    async def statistics(self, request: Request) -> Response:
        """Tell what a model has done."""
        return json_reply({"model_stats": self._service.model_statistics(*_model(request))})

    async def all_statistics(self, request: Request) -> Response:
        """Tell what every model has done."""
        return json_reply({"model_stats": self._service.model_statistics()})

    async def index(self, request: Request) -> Response:
        """Tell which models there are."""
        document = await self._optional_document(request)
        ready_only = tensors_json.flag(document, "ready", "the body")
        entries = await self._service.index(ready_only or False)
        return json_reply([vars(entry) for entry in entries])

    async def load(self, request: Request) -> Response:
        """Load a model."""
        document = await self._optional_document(request)
        if tensors_json.parameters_of(document, "the body"):
            raise RequestError(
                "'parameters' of a load are not taken: models come from their folder."
            )
        await self._service.load(request.path_params["name"])
        return json_reply({})

    async def unload(self, request: Request) -> Response:
        """Stop serving a model."""
        tensors_json.parameters_of(await self._optional_document(request), "the body")
        await self._service.unload(request.path_params["name"])
        return json_reply({})

    async def infer(self, request: Request) -> Response:
        """Infer."""
        begin = time.monotonic()
        name, version = _model(request)
        self._service.check_room(name, version)
        length = binary.header_length(request.headers.get(binary.HEADER_LENGTH))
        with self._receiving.share() as share:
            body = await read_body(request, self._service.limits, share)
            if length == 0:
                raw = self._raw(request, name, version, body)
                document, asked = _EMPTY, InferRequest(name, (raw,), version)
            else:
                head, tail = binary.split(body, length)
                document = tensors_json.read_infer(
                    tensors_json.read_object(head, self._service.limits.json_bytes),
                    self._service.limits.batch,
                )
                inputs = binary.read_inputs(document, tail)
                asked = InferRequest(name, inputs, version, document.id, document.outputs)
            if document.timeout_us:
                asked = replace(asked, deadline=begin + document.timeout_us / 1e6)
            response = await while_connected(request, self._service.infer(asked))
        return _reply(request, document, response)

    def _raw(self, request: Request, name: str, version: str | None, body: memoryview) -> Tensor:
        """Return the one input that a body without JSON is: pixels, or an encoded image.

        It is pixels if it has their length, unless the client says that it is an image.
        """
        served = self._service.registry.get(name, version)
        called = request.headers.get("content-type", "").startswith("image/")
        if served.fixed_size and not called:
            pixels = binary.raw_images(body, INPUT, served.source.size)
            if pixels is not None:
                return pixels
        return Tensor(IMAGE, BYTES, (1,), [bytes(body)])

    async def _optional_document(self, request: Request) -> dict[str, Any]:
        limits = self._service.limits
        with self._receiving.share() as share:
            body = await read_body(request, limits, share)
            return tensors_json.read_object(body, limits.json_bytes) if len(body) else {}


def _model(request: Request) -> tuple[str, str | None]:
    return request.path_params["name"], request.path_params.get("version")


def _reply(request: Request, document: InferDocument, response: InferResponse) -> Response:
    outputs, tails = [], []
    for tensor in response.outputs:
        if document.wants_binary(tensor.name):
            tails.append(binary.tensor_bytes(tensor))
            head = tensors_json.write_head(tensor)
            outputs.append({**head, "parameters": {"binary_data_size": len(tails[-1])}})
        else:
            outputs.append(tensors_json.write_tensor(tensor))
    answer: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        answer["id"] = response.id
    content = json_bytes({**answer, "outputs": outputs})
    headers = {"content-type": OCTETS if tails else JSON}
    if tails:
        headers[binary.HEADER_LENGTH] = str(len(content))
    return Response(packed(request, b"".join([content, *tails]), headers), headers=headers)
