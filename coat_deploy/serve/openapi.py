"""The OpenAPI document of what is answered over HTTP, and the route that tells it.

One operation a route, one schema a body, one sentence a refusal; statuses are those of
`replies.py`. A test holds it against the routes of the application, and the application's answers
against it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coat_deploy.errors import RequestErrorKind
from coat_deploy.serve import binary, metrics
from coat_deploy.serve.body import ENCODINGS
from coat_deploy.serve.connection import HEAD_TOO_LARGE
from coat_deploy.serve.image_routes import MAX_TOP, TOP
from coat_deploy.serve.replies import JSON, OCTETS, STATUS, json_reply
from coat_deploy.serve.schemas import SCHEMAS, Schema, array, ref
from coat_deploy.version import __version__

PATH = "/openapi.json"

_DESCRIPTION = """\
Models that answer in the Open Inference Protocol (KServe v2) with Triton's extensions, and for
encoded images.

Whatever is refused is told by a sentence in `error`. What does not reach an operation is refused in
the same form: a head that is no HTTP (400), a path or a method that is not there (404, 405).
Answers have an `x-request-id`, that of the request where it has one.
"""
_REFUSALS: Mapping[RequestErrorKind, str] = {
    "invalid": "Malformed, or not what the model takes.",
    "unauthenticated": "The server wants a token, and it was not shown.",
    "forbidden": "Switched off on this server.",
    "not_found": "No such model or version, or no page.",
    "slow": "The request did not come whole in time.",
    "too_large": "Too many bytes, pixels or images.",
    "unsupported": "A content type or encoding that is not read.",
    "internal": "The server failed; its log says why.",
    "unavailable": "The queue is full, the model is coming or going, or the server ends.",
    "deadline": "Not computed in time.",
}
"""Refusals that are answered. "overloaded" has the status of "unavailable"."""

_ALWAYS: tuple[RequestErrorKind, ...] = ("slow", "internal")
_TOKEN: tuple[RequestErrorKind, ...] = ("unauthenticated",)
_MODEL: tuple[RequestErrorKind, ...] = (*_TOKEN, "not_found", "unavailable")
_BODY: tuple[RequestErrorKind, ...] = (
    *_TOKEN, "invalid", "too_large", "unsupported", "unavailable",
)  # fmt: skip
_MANAGE: tuple[RequestErrorKind, ...] = (*_BODY, "forbidden", "not_found")
_COMPUTE: tuple[RequestErrorKind, ...] = (*_BODY, "not_found", "deadline")

_LENGTH_HEADER = "Inference-Header-Content-Length"
_LENGTH_RULES: Schema = {"type": "integer", "minimum": 0, "maximum": binary.MAX_HEADER_LENGTH}
_OCTETS: Schema = {"type": "string", "format": "binary"}
_GREY = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQ"
    "tTEKkQAAAABJRU5ErkJggg=="
)
"""A PNG of 8x8 pixels in base64."""
_EXAMPLES: Mapping[str, Any] = {
    "InferRequest": {
        "id": "one",
        "parameters": {"timeout": 10_000_000, "binary_data_output": False},
        "inputs": [
            {
                "name": "image",
                "datatype": "BYTES",
                "shape": [1],
                "parameters": {"content_type": "base64"},
                "data": [_GREY],
            }
        ],
        "outputs": [{"name": "logits", "parameters": {"classification": 3, "binary_data": False}}],
    },
    "ImageRequest": {"inputs": _GREY, "parameters": {"top_k": 3}},
    "IndexRequest": {"ready": True},
    "LoadRequest": {"parameters": {}},
    "UnloadRequest": {"parameters": {}},
}

Operation = dict[str, Any]


def document() -> dict[str, Any]:
    """Return the document, OpenAPI 3.1; the same for every server of this version."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "coat-deploy",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "images", "description": "An image in, labels out."},
            {"name": "inference", "description": "The Open Inference Protocol."},
            {"name": "repository", "description": "Which models are served."},
            {"name": "operation", "description": "Health, figures, and what there is."},
        ],
        "security": [{}, {"token": []}],
        "paths": _paths(),
        "components": {
            "schemas": dict(SCHEMAS),
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "responses": _refusals(),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Of a server that was started with a token.",
                }
            },
        },
    }


def routes() -> list[Route]:
    """Return the route of the document."""
    told = document()

    async def show(request: Request) -> Response:
        return json_reply(told)

    return [Route(PATH, show, methods=["GET"])]


_PARAMETERS: Mapping[str, Any] = {
    "name": {
        "name": "name", "in": "path", "required": True, "description": "Name of a model.",
        "schema": {"type": "string", "minLength": 1},
    },
    "version": {
        "name": "version", "in": "path", "required": True,
        "description": "Version of the model; there is one, 1.",
        "schema": {"type": "string", "minLength": 1, "examples": ["1"]},
    },
    "top_k": {
        "name": "top_k", "in": "query", "description": "How many labels; all if there are fewer.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TOP, "default": TOP},
    },
    "header_length": {
        "name": _LENGTH_HEADER, "in": "header",
        "description": "Bytes of JSON in front of binary tensors. 0: the body is the one input. "
        "Absent: the whole body is JSON.",
        "schema": _LENGTH_RULES,
    },
    "encoding": {
        "name": "Content-Encoding", "in": "header", "description": "How the body is packed.",
        "schema": {"type": "string", "enum": list(ENCODINGS)},
    },
}  # fmt: skip

_HEADERS: Mapping[str, Any] = {
    "request_id": {
        "description": "The id of the request in the server's log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    "retry_after": {
        "description": "Seconds after which another try may do better.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "authenticate": {
        "description": "The scheme that is expected.",
        "required": True,
        "schema": {"type": "string", "const": "Bearer"},
    },
    "header_length": {
        "description": "Bytes of JSON in front of binary outputs; absent where all is JSON.",
        "schema": _LENGTH_RULES,
    },
    "timing": {
        "description": "The time that it took, in ms: `classify;dur=MS`.",
        "schema": {"type": "string"},
    },
}


def _paths() -> dict[str, Any]:
    """Return the paths, in the order of the routes."""
    return {
        "/models": {
            "get": _get("modelCards", "images", "Cards of all models",
                        array(ref("ModelCard")), _TOKEN),
        },
        "/models/{name}": {
            "parameters": [_parameter("name")],
            "post": {
                **_describe("classifyImage", "images", "The likeliest classes of an image"),
                "parameters": [_parameter("top_k"), _parameter("encoding")],
                "description": "A JPEG, PNG, WebP, BMP, GIF or TIFF file as it is: its first bytes "
                "tell its format, and any content type but those of JSON and of forms will do.",
                "requestBody": _body({OCTETS: _OCTETS, JSON: "ImageRequest"}),
                "responses": _responses(
                    {JSON: array(ref("Label"))}, _COMPUTE, headers={"server-timing": "timing"}
                ),
            },
        },
        "/v2": {"get": _get("serverMetadata", "operation", "What the server is",
                            ref("ServerMetadata"), _TOKEN)},
        "/v2/health/live": {
            "get": {**_get("serverLive", "operation", "The server runs", ref("Live"), ()),
                    "security": []},
        },
        "/v2/health/ready": {
            "get": {
                **_get("serverReady", "operation", "Whether all models answer", ref("Ready"), (),
                       not_ready=ref("Ready")),
                "security": [],
            },
        },
        "/v2/models/stats": {
            "get": _get("allStatistics", "operation", "What every model has done",
                        ref("Statistics"), _TOKEN),
        },
        "/v2/repository/index": {
            "post": {
                **_describe("repositoryIndex", "repository", "Which models there are"),
                "parameters": [_parameter("encoding")],
                "requestBody": _body({JSON: "IndexRequest"}, required=False),
                "responses": _responses({JSON: array(ref("IndexEntry"))}, _BODY),
            },
        },
        "/v2/repository/models/{name}/load": _manage("Load", "Load a model, or load it again"),
        "/v2/repository/models/{name}/unload": _manage("Unload", "Stop serving a model"),
        **_model_paths("/v2/models/{name}", "model", ("name",)),
        **_model_paths(
            "/v2/models/{name}/versions/{version}", "modelVersion", ("name", "version")
        ),
        "/": {
            "get": {
                **_describe("page", "operation", "A page to try it"),
                "security": [],
                "responses": _responses({"text/html": {"type": "string"}}, ("not_found",)),
            },
        },
        "/metrics": {
            "get": {
                **_describe("metrics", "operation", "Figures for Prometheus"),
                "responses": _responses({metrics.CONTENT_TYPE: {"type": "string"}}, _TOKEN),
            },
        },
        PATH: {
            "get": {**_get("openapi", "operation", "This document", {"type": "object"}, ()),
                    "security": []},
        },
    }  # fmt: skip


def _model_paths(place: str, prefix: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the paths of a model, or of a version of it."""
    shared = {"parameters": [_parameter(name) for name in names]}
    return {
        f"{place}/infer": {
            **shared,
            "post": {
                **_describe(f"{prefix}Infer", "inference", "Infer"),
                "description": "A body of JSON; or JSON with binary tensors behind it, or the one "
                f"input alone, with `{_LENGTH_HEADER}`.",
                "parameters": [_parameter("header_length"), _parameter("encoding")],
                "requestBody": _body({JSON: "InferRequest", OCTETS: _OCTETS}),
                "responses": _responses(
                    {JSON: ref("InferResponse"), OCTETS: _OCTETS},
                    _COMPUTE,
                    headers={_LENGTH_HEADER: "header_length"},
                ),
            },
        },
        place: {
            **shared,
            "get": _get(f"{prefix}Metadata", "inference", "What a model takes and gives",
                        ref("ModelMetadata"), _MODEL),
        },
        f"{place}/ready": {
            **shared,
            "get": _get(f"{prefix}Ready", "operation", "Whether a model answers",
                        ref("ModelReady"), (*_TOKEN, "not_found"), not_ready=ref("ModelReady")),
        },
        f"{place}/config": {
            **shared,
            "get": _get(f"{prefix}Config", "inference", "A model's configuration",
                        ref("ModelConfig"), _MODEL),
        },
        f"{place}/stats": {
            **shared,
            "get": _get(f"{prefix}Statistics", "operation", "What a model has done",
                        ref("Statistics"), _MODEL),
        },
    }  # fmt: skip


def _manage(what: str, summary: str) -> dict[str, Any]:
    return {
        "parameters": [_parameter("name")],
        "post": {
            **_describe(f"repositoryModel{what}", "repository", summary),
            "parameters": [_parameter("encoding")],
            "requestBody": _body({JSON: f"{what}Request"}, required=False),
            "responses": _responses({JSON: ref("Done")}, _MANAGE),
        },
    }


def _describe(operation: str, tag: str, summary: str) -> Operation:
    return {"operationId": operation, "tags": [tag], "summary": summary}


def _get(
    operation: str,
    tag: str,
    summary: str,
    answer: Schema,
    refusals: Sequence[RequestErrorKind],
    not_ready: Schema | None = None,
) -> Operation:
    """Return an operation without a body; `not_ready` is what it answers with 503."""
    responses = _responses({JSON: answer}, refusals)
    if not_ready:
        responses[str(STATUS["unavailable"])] = _response("Not ready.", {JSON: not_ready})
    return {**_describe(operation, tag, summary), "responses": dict(sorted(responses.items()))}


def _parameter(name: str) -> Schema:
    return {"$ref": f"#/components/parameters/{name}"}


def _body(content: Mapping[str, str | Schema], required: bool = True) -> dict[str, Any]:
    """Return a request's body by content type: a schema, or the name of one with an example."""
    kinds = {
        kind: {"schema": ref(schema), "example": _EXAMPLES[schema]}
        if isinstance(schema, str)
        else {"schema": schema}
        for kind, schema in content.items()
    }
    return {"required": required, "content": kinds}


def _responses(
    content: Mapping[str, Schema],
    refusals: Sequence[RequestErrorKind],
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what is answered by status: `content`, or the refusals."""
    found = {"200": _response("Done.", content, headers)}
    statuses = [str(STATUS[kind]) for kind in (*_ALWAYS, *refusals)] + [HEAD_TOO_LARGE]
    return {
        **found,
        **{status: {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)},
    }


def _response(
    description: str, content: Mapping[str, Schema], headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    named = {"x-request-id": "request_id", **(headers or {})}
    return {
        "description": description,
        "headers": {k: {"$ref": f"#/components/headers/{v}"} for k, v in named.items()},
        "content": {kind: {"schema": schema} for kind, schema in content.items()},
    }


def _refusals() -> dict[str, Any]:
    """Return the refusals by status."""
    error = {JSON: ref("Error")}
    more = {"unauthenticated": {"www-authenticate": "authenticate"},
            "unavailable": {"retry-after": "retry_after"}}  # fmt: skip
    found = {
        str(STATUS[kind]): _response(description, error, more.get(kind))
        for kind, description in _REFUSALS.items()
    }
    found[HEAD_TOO_LARGE] = _response("The head of the request is too large.", error)
    for early in (HEAD_TOO_LARGE, str(STATUS["slow"])):
        # The connection may have refused the head, before there was a request with an id.
        del found[early]["headers"]["x-request-id"]
    return dict(sorted(found.items()))
