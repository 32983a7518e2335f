"""JSON Schemas of what travels over HTTP, by their names in the OpenAPI document.

They say what is accepted and what is answered; the sentences that tell a client of a broken rule
are those of the readers (`tensors_json.py`, `image_routes.py`). Limits and names come from there.
"""

from collections.abc import Mapping
from typing import Any, get_args

from coat_deploy.serve.image_routes import MAX_TOP, SOFTMAX
from coat_deploy.serve.registry import State
from coat_deploy.serve.requests import BYTES, DATATYPES
from coat_deploy.serve.tensors_json import MAX_DIMENSIONS, MAX_LENGTH, MAX_NAME, MAX_TENSORS

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """Return a reference to one of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema, **rules: Any) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": items, **rules}


def _or_null(schema: Schema) -> Schema:
    """Return the schema of what may be null instead, as if it was not there."""
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def _asked(
    required: Mapping[str, Schema] | None = None,
    optional: Mapping[str, Schema] | None = None,
    **rules: Any,
) -> Schema:
    """Return the schema of an object that a client makes; what is optional may be null."""
    nullable = {name: _or_null(schema) for name, schema in (optional or {}).items()}
    return _object({**(required or {}), **nullable}, *nullable, **rules)


def _object(properties: Mapping[str, Schema], *optional: str, **rules: Any) -> Schema:
    """Return the schema of an object; what is not named optional is required."""
    required = [name for name in properties if name not in optional]
    schema: Schema = {"type": "object", "properties": dict(properties)}
    return {**schema, **({"required": required} if required else {}), **rules}


def _answer(properties: Mapping[str, Schema], *optional: str) -> Schema:
    """Return the schema of an object that the server makes, and so nothing more is in it."""
    return _object(properties, *optional, additionalProperties=False)


_TEXT: Schema = {"type": "string"}
_NAME: Schema = {"type": "string", "maxLength": MAX_NAME}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_BYTES: Schema = {"type": "integer", "minimum": 0, "description": "Bytes of it behind the JSON."}
_MS: Schema = {"type": ["number", "null"], "description": "In ms; null before the first request."}
_DIMENSION: Schema = {"type": "integer", "minimum": -1, "description": "-1 for any length."}

_REQUESTS: Mapping[str, Schema] = {
    "InferRequest": _asked(
        {"inputs": array(ref("InferInput"), minItems=1, maxItems=MAX_TENSORS)},
        {
            "id": {**_NAME, "description": "Comes back in the answer."},
            "parameters": _asked(
                optional={
                    "timeout": {**_COUNT, "description": "Microseconds to answer in; 0 is none."},
                    "binary_data_output": {
                        **_FLAG,
                        "description": "Whether outputs are wanted behind the JSON.",
                    },
                }
            ),
            "outputs": array(ref("InferRequestedOutput"), maxItems=MAX_TENSORS),
        },
    ),
    "InferInput": _asked(
        {
            "name": {
                **_NAME,
                "description": "`pixels`, prepared by the client, or `image`, encoded images.",
            },
            "datatype": ref("Datatype"),
            "shape": array(
                {"type": "integer", "minimum": 0, "maximum": MAX_LENGTH}, maxItems=MAX_DIMENSIONS
            ),
        },
        {
            "parameters": _asked(
                optional={
                    "binary_data_size": _BYTES,
                    "content_type": {
                        **_NAME,
                        "description": "`base64`: so are the texts of `data`, of BYTES.",
                    },
                }
            ),
            "data": ref("TensorData"),
        },
    ),
    "InferRequestedOutput": _asked(
        {"name": _NAME},
        {
            "parameters": _asked(
                optional={
                    "binary_data": {
                        **_FLAG,
                        "description": "Whether it is wanted behind the JSON.",
                    },
                    "classification": {
                        **_COUNT,
                        "description": "So many of the likeliest classes instead of the values.",
                    },
                }
            )
        },
    ),
    # Rows of rows would be a schema that refers to itself, of which generators make nothing.
    "TensorData": array(
        {"description": "A number, a text, true or false; or a row of these, or of rows."},
        description="Elements in row-major order, flat or nested as the shape is.",
    ),
    "Datatype": {"type": "string", "enum": [*DATATYPES, BYTES]},
    "IndexRequest": _asked(
        optional={"ready": {**_FLAG, "description": "Whether only what is ready is listed."}}
    ),
    "LoadRequest": _asked(optional={"parameters": {"type": "object", "maxProperties": 0}}),
    "UnloadRequest": _asked(optional={"parameters": {"type": "object"}}),
    "ImageRequest": _asked(
        {"inputs": {**_TEXT, "description": "The image file in base64, or as a data URL."}},
        {
            "parameters": _asked(
                optional={
                    "top_k": {
                        "type": "integer",
                        "minimum": 1,
                        "maximum": MAX_TOP,
                        "description": "How many labels; else as the query says.",
                    },
                    "function_to_apply": {"enum": [SOFTMAX]},
                },
                additionalProperties=False,
            )
        },
    ),
}

_ANSWERS: Mapping[str, Schema] = {
    "Error": _answer(
        {"error": {**_TEXT, "minLength": 1, "description": "What was got, and what to do."}}
    ),
    "Live": _answer({"live": _FLAG}),
    "Ready": _answer({"ready": _FLAG}),
    "ModelReady": _answer({"name": _TEXT, "ready": _FLAG}),
    "ServerMetadata": _answer({"name": _TEXT, "version": _TEXT, "extensions": array(_TEXT)}),
    "ModelMetadata": _answer(
        {
            "name": _TEXT,
            "versions": array(_TEXT),
            "platform": _TEXT,
            "inputs": array(ref("TensorMetadata")),
            "outputs": array(ref("TensorMetadata")),
        }
    ),
    "TensorMetadata": _answer(
        {"name": _TEXT, "datatype": ref("Datatype"), "shape": array(_DIMENSION)}
    ),
    "ModelConfig": _object(
        {
            "name": _TEXT,
            "platform": _TEXT,
            "backend": _TEXT,
            "max_batch_size": _COUNT,
            "input": array(ref("ConfigTensor")),
            "output": array(ref("ConfigTensor")),
        },
        description="As Triton's ModelConfig, in JSON.",
    ),
    "ConfigTensor": _object({"name": _TEXT, "data_type": _TEXT, "dims": array(_DIMENSION)}),
    "Statistics": _answer({"model_stats": array(ref("ModelStatistics"))}),
    "ModelStatistics": _answer(
        {
            "name": _TEXT,
            "version": _TEXT,
            "last_inference": {**_COUNT, "description": "Milliseconds since 1970; 0 for none."},
            "inference_count": {**_COUNT, "description": "Images answered."},
            "execution_count": {**_COUNT, "description": "Steps of the runtime."},
            "inference_stats": {"type": "object", "additionalProperties": ref("Duration")},
            "batch_stats": array(
                _answer(
                    {
                        "batch_size": _COUNT,
                        "compute_input": ref("Duration"),
                        "compute_infer": ref("Duration"),
                        "compute_output": ref("Duration"),
                    }
                )
            ),
        }
    ),
    "Duration": _answer({"count": _COUNT, "ns": _COUNT}),
    "InferResponse": _answer(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _NAME,
            "outputs": array(ref("InferOutput")),
        },
        "id",
    ),
    "InferOutput": _answer(
        {
            "name": _TEXT,
            "datatype": ref("Datatype"),
            "shape": array(_COUNT),
            "data": array(
                {"type": ["number", "string", "null"]},
                description="Flat: numbers, null for what is none, or `score:index:label`.",
            ),
            "parameters": _answer({"binary_data_size": _BYTES}),
        },
        "data",
        "parameters",
    ),
    "IndexEntry": _answer(
        {
            "name": _TEXT,
            "version": _TEXT,
            "state": {"type": "string", "enum": list(get_args(State))},
            "reason": {**_TEXT, "description": "Why it is not ready."},
        }
    ),
    "Done": _answer({}),
    "Label": _answer({"label": _TEXT, "score": {"type": "number", "minimum": 0, "maximum": 1}}),
    "ModelCard": _answer(
        {
            "name": _TEXT,
            "version": _TEXT,
            "variant": _TEXT,
            "artifact": _TEXT,
            "target": _TEXT,
            "precision": _TEXT,
            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            "weights": {"type": ["string", "null"], "description": "Where they are from."},
            "size": array(_COUNT, minItems=2, maxItems=2, description="Height and width."),
            "fixed_size": {**_FLAG, "description": "Whether it takes no other size."},
            "classes": _COUNT,
            "agreement": {"type": "object", "description": "Figures of the artifact's proof."},
            "p50_ms": _MS,
            "p90_ms": _MS,
            "requests": {**_COUNT, "description": "Requests answered."},
        }
    ),
}

SCHEMAS: Mapping[str, Schema] = dict(sorted({**_REQUESTS, **_ANSWERS}.items()))
"""Every schema by name."""
