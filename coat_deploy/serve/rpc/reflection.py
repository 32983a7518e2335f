"""Reflection: what services there are, and their messages, for tools such as grpcurl."""

from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio

from coat_deploy.errors import RequestError
from coat_deploy.serve.rpc.calls import Call, StreamAnswer
from coat_deploy.serve.rpc.messages import HEALTH, POOL, PROTOCOL, REFLECTION


class Reflection:
    """Answers from the pool of the protocol's own messages."""

    def __init__(self) -> None:
        names = [service.full_name for service in (HEALTH, PROTOCOL, REFLECTION)]
        self._servicer = aio.ReflectionServicer(names, POOL)

    def streams(self) -> dict[str, StreamAnswer]:
        """Return what answers the one method."""
        return {"ServerReflectionInfo": self.tell}

    async def tell(self, contents: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        """Answer a tool's questions."""
        async for reply in self._servicer.ServerReflectionInfo(_read(contents), None):
            yield reply.SerializeToString()


async def _read(
    contents: AsyncIterator[bytes],
) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    async for content in contents:
        try:
            yield reflection_pb2.ServerReflectionRequest.FromString(content)
        except DecodeError as error:
            raise RequestError(
                f"the message is not a ServerReflectionRequest ({error!s:.100})."
            ) from error
