"""The methods of inference.GRPCInferenceService."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from coat_deploy.errors import RequestError
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.rpc.calls import Answer, Call, StreamAnswer
from coat_deploy.serve.rpc.messages import PROTOCOL, StreamReply
from coat_deploy.serve.rpc.tensors import read_infer, write_infer

WINDOW = 16
"""Requests of a stream that are under way at once."""

Describe = Callable[[Any], Awaitable[Mapping[str, Any]]]
"""Answers a message by a document, as over HTTP."""


class Protocol:
    """Answers by a service."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def answers(self) -> dict[str, Answer]:
        """Return what answers the methods with one message."""
        return {
            "ServerLive": _described("ServerLive", self.live),
            "ServerReady": _described("ServerReady", self.ready),
            "ServerMetadata": _described("ServerMetadata", self.server),
            "ModelReady": _described("ModelReady", self.model_ready),
            "ModelMetadata": _described("ModelMetadata", self.metadata),
            "ModelConfig": _described("ModelConfig", self.config),
            "ModelStatistics": _described("ModelStatistics", self.statistics),
            "RepositoryIndex": _described("RepositoryIndex", self.index),
            "RepositoryModelLoad": _described("RepositoryModelLoad", self.load),
            "RepositoryModelUnload": _described("RepositoryModelUnload", self.unload),
            "ModelInfer": self.infer,
        }

    def streams(self) -> dict[str, StreamAnswer]:
        """Return what answers the methods with streams."""
        return {"ModelStreamInfer": self.stream_infer}

    async def live(self, asked: Any) -> Mapping[str, Any]:
        """Say that the server runs."""
        return {"live": True}

    async def ready(self, asked: Any) -> Mapping[str, Any]:
        """Say whether requests may come."""
        return {"ready": self._service.ready}

    async def server(self, asked: Any) -> Mapping[str, Any]:
        """Tell what the server is."""
        return self._service.server_metadata()

    async def model_ready(self, asked: Any) -> Mapping[str, Any]:
        """Say whether a model answers."""
        return {"ready": self._service.model_ready(asked.name, asked.version)}

    async def metadata(self, asked: Any) -> Mapping[str, Any]:
        """Tell what a model takes and gives."""
        return self._service.model_metadata(asked.name, asked.version)

    async def config(self, asked: Any) -> Mapping[str, Any]:
        """Tell a model's configuration."""
        return {"config": self._service.model_config(asked.name, asked.version)}

    async def statistics(self, asked: Any) -> Mapping[str, Any]:
        """Tell what a model, or each, has done."""
        return {"model_stats": self._service.model_statistics(asked.name, asked.version)}

    async def index(self, asked: Any) -> Mapping[str, Any]:
        """Tell which models there are."""
        _check_repository(asked)
        return {"models": [vars(entry) for entry in await self._service.index(asked.ready)]}

    async def load(self, asked: Any) -> Mapping[str, Any]:
        """Load a model."""
        _check_repository(asked)
        if asked.parameters:
            raise RequestError(
                "'parameters' of a load are not taken: models come from their folder."
            )
        await self._service.load(asked.model_name)
        return {}

    async def unload(self, asked: Any) -> Mapping[str, Any]:
        """Stop serving a model."""
        _check_repository(asked)
        await self._service.unload(asked.model_name)
        return {}

    async def infer(self, content: bytes, call: Call) -> bytes:
        """Infer."""
        request, typed = read_infer(content, self._service.limits, call.deadline)
        response = await self._service.infer(request)
        return bytes(write_infer(response, typed).SerializeToString())

    async def stream_infer(
        self, contents: AsyncIterator[bytes], call: Call
    ) -> AsyncIterator[bytes]:
        """Infer for every message of a stream; answers come in their order, errors among them."""
        begun: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        room = asyncio.Semaphore(WINDOW)

        async def read() -> None:
            try:
                async for content in contents:
                    begun.put_nowait(asyncio.create_task(self._stream_answer(content, call)))
                    del content
                    await room.acquire()
            finally:
                begun.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (answer := await begun.get()) is not None:
                yield await answer
                room.release()
            await reader  # raises what ended it
        finally:
            reader.cancel()
            while not begun.empty():
                if (answer := begun.get_nowait()) is not None:
                    answer.cancel()

    async def _stream_answer(self, content: bytes, call: Call) -> bytes:
        reply, asked_id = StreamReply(), ""
        try:
            with call.receiving.share() as share:
                share.add(len(content))
                request, typed = read_infer(content, self._service.limits, call.deadline)
                asked_id = request.id
                response = await self._service.infer(request)
                reply.infer_response.CopyFrom(write_infer(response, typed))
        except RequestError as error:
            reply.error_message = str(error)
            reply.infer_response.id = asked_id
        reply.infer_response.parameters["triton_final_response"].bool_param = True
        return bytes(reply.SerializeToString())


def _described(method: str, describe: Describe) -> Answer:
    """Return what answers a method's message by the message of a document."""
    asked_class = GetMessageClass(PROTOCOL.methods_by_name[method].input_type)
    reply_class = GetMessageClass(PROTOCOL.methods_by_name[method].output_type)

    async def answer(content: bytes, call: Call) -> bytes:
        try:
            asked = asked_class.FromString(content)
        except DecodeError as error:
            name = asked_class.DESCRIPTOR.name
            raise RequestError(f"the message is not a {name} ({error!s:.100}).") from error
        return bytes(ParseDict(await describe(asked), reply_class()).SerializeToString())

    return answer


def _check_repository(asked: Any) -> None:
    if asked.repository_name:
        raise RequestError(
            f"repository '{asked.repository_name:.100}': there is but one, without a name."
        )
