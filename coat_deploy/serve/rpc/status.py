"""How a refused request is told over gRPC."""

import math
from collections.abc import Mapping

import grpc

from coat_deploy.errors import RequestError, RequestErrorKind
from coat_deploy.serve.rpc.messages import RetryInfo, Status

CODES: Mapping[RequestErrorKind, grpc.StatusCode] = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "too_large": grpc.StatusCode.INVALID_ARGUMENT,  # another try would do no better
    "unsupported": grpc.StatusCode.UNIMPLEMENTED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "slow": grpc.StatusCode.DEADLINE_EXCEEDED,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "cancelled": grpc.StatusCode.CANCELLED,
    "internal": grpc.StatusCode.INTERNAL,
}
DETAILS = "grpc-status-details-bin"
PUSHBACK = "grpc-retry-pushback-ms"
_ANY = "type.googleapis.com/"


def retry_metadata(error: RequestError) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata that say when to try again, if the error says so.

    `grpc-retry-pushback-ms` is obeyed by clients that retry by themselves, the details are read by
    those who know Google's RetryInfo.
    """
    if error.retry_after_s is None:
        return ()
    seconds = math.ceil(error.retry_after_s)
    info = RetryInfo()
    info.retry_delay.seconds = seconds
    code, _ = CODES[error.kind].value
    status = Status(code=code, message=str(error))
    status.details.add(
        type_url=_ANY + RetryInfo.DESCRIPTOR.full_name, value=info.SerializeToString()
    )
    return (PUSHBACK, str(seconds * 1000)), (DETAILS, status.SerializeToString())
