"""Answers over HTTP: JSON, errors with their status, packed where the client takes it."""

import gzip
import zlib
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from coat_deploy.errors import RequestError, RequestErrorKind

STATUS: Mapping[RequestErrorKind, int] = {
    "invalid": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "slow": 408,
    "too_large": 413,
    "unsupported": 415,
    "cancelled": 499,  # nobody reads it but the log
    "internal": 500,
    "overloaded": 503,
    "unavailable": 503,
    "deadline": 504,
}
JSON = "application/json"
OCTETS = "application/octet-stream"
WORTH_PACKING = 1024
"""Shorter answers are sent as they are."""


def json_bytes(document: Any) -> bytes:
    """Return a document as compact JSON; NaN and infinity, which JSON has no word for, as null.

    Arrays of numpy are written flat or nested as they are, float32 by no more digits than it has.
    """
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def json_reply(
    document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer in JSON."""
    return Response(json_bytes(document), status, headers, JSON)


def error_reply(error: RequestError) -> Response:
    """Return the answer to a request that is refused."""
    reply = json_reply({"error": str(error)}, STATUS[error.kind])
    if error.retry_after_s is not None:
        reply.headers["retry-after"] = str(error.retry_after_s)
    if error.kind == "unauthenticated":
        reply.headers["www-authenticate"] = "Bearer"
    if error.kind in ("slow", "cancelled"):
        reply.headers["connection"] = "close"  # the rest of the body may never come
    return reply


def packed(request: Request, content: bytes, headers: dict[str, str]) -> bytes:
    """Return content as the client likes it packed, and say so in `headers`."""
    if len(content) < WORTH_PACKING or "accept-encoding" not in request.headers:
        return content
    headers["vary"] = "accept-encoding"
    accepted = _accepted(request.headers["accept-encoding"])
    if "gzip" in accepted:
        headers["content-encoding"] = "gzip"
        return gzip.compress(content, 1, mtime=0)
    if "deflate" in accepted:
        headers["content-encoding"] = "deflate"
        return zlib.compress(content, 1)
    return content


def _accepted(header: str) -> set[str]:
    """Return the encodings of a header that are not refused by a quality of 0."""
    found = set()
    for part in header.lower().split(","):
        name, _, quality = part.partition(";")
        if quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            found.add(name.strip())
    return found
