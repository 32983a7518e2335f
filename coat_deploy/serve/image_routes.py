"""Images in, labels out: what Hugging Face's clients send, and curl.

POST /models/MODEL   an image file, or {"inputs": "<base64>", "parameters": {"top_k": 5}}
answer               [{"label": "...", "score": 0.97}, ...]
"""

import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coat_deploy.errors import RequestError, unknown_name
from coat_deploy.serve.body import Receiving, read_body
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.options import Limits
from coat_deploy.serve.replies import JSON, json_reply
from coat_deploy.serve.tensors_json import decode_base64, read_object
from coat_deploy.serve.waiting import while_connected

TOP = 5
"""Labels of an answer, where the client does not say how many."""
MAX_TOP = 10**7 - 1
"""Beyond any model's; it has no more to say than all of its labels."""
PARAMETERS = ("top_k", "function_to_apply")
SOFTMAX = "softmax"


@dataclass(frozen=True)
class ImageRequest:
    """An encoded image, and how many labels are wanted."""

    image: bytes
    top: int = TOP


class ImageRoutes:
    """The routes under /models."""

    def __init__(self, service: InferenceService, receiving: Receiving) -> None:
        self._service, self._receiving = service, receiving

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/models/{name}", self.classify, methods=["POST"]),
            Route("/models", self.cards, methods=["GET"]),
        ]

    async def cards(self, request: Request) -> Response:
        """Tell what people want to know of every model."""
        return json_reply(self._service.cards())

    async def classify(self, request: Request) -> Response:
        """Name the likeliest classes of an image."""
        name = request.path_params["name"]
        deadline = time.monotonic() + self._service.limits.deadline_s
        self._service.check_room(name)
        with self._receiving.share() as share:
            body = await read_body(request, self._service.limits, share)
            asked = read_image_request(request, body, self._service.limits)
            begin = time.perf_counter()
            work = self._service.classify(asked.image, name, asked.top, deadline=deadline)
            labels = await while_connected(request, work)
            taken_ms = 1000 * (time.perf_counter() - begin)
            return json_reply(labels, headers={"server-timing": f"classify;dur={taken_ms:.2f}"})


def read_image_request(request: Request, body: memoryview, limits: Limits) -> ImageRequest:
    """Return what a body asks for. Raises RequestError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        raise RequestError(
            "content-type multipart: is not read. Send the image file itself as the body.",
            "unsupported",
        )
    top = TOP
    if request.scope["query_string"]:
        top = _count_of_text(request.query_params.get("top_k", str(TOP)))
    if kind != JSON:
        return ImageRequest(bytes(body), top)
    document = read_object(body, limits.json_bytes)
    inputs = document.get("inputs")
    if not isinstance(inputs, str):
        raise RequestError("'inputs' must be an image in base64.")
    if inputs.startswith("data:"):
        inputs = inputs.partition(",")[2]
    return ImageRequest(decode_base64(inputs), _top(document.get("parameters"), top))


def _top(parameters: Any, otherwise: int) -> int:
    """Return how many labels the parameters of a document want. Raises RequestError."""
    if parameters is None:
        return otherwise
    if not isinstance(parameters, dict):
        raise RequestError("'parameters' must be an object.")
    for key in parameters:
        if key not in PARAMETERS:
            raise RequestError(unknown_name("parameter", key[:100], PARAMETERS))
    function = parameters.get("function_to_apply")
    if function not in (None, SOFTMAX):
        raise RequestError(
            f"'function_to_apply': scores are those of {SOFTMAX} (got {function!r:.40}). "
            "Ask /v2/models/MODEL/infer for logits."
        )
    top = parameters.get("top_k")
    return otherwise if top is None else _count(top)


def _count_of_text(text: str) -> int:
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_TOP))
    return _count(int(text) if digits else text)


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOP:
        raise RequestError(
            f"'top_k' must be a whole number (got {value!r:.40}, expected 1 to {MAX_TOP})."
        )
    return value
