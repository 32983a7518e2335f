"""The messages that travel, in a pool of their own.

Protobuf's common pool takes one description of a name, and a client library in the same process, as
Triton's, may have registered the protocol's names there.
"""

import base64
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from coat_deploy.serve.rpc.descriptors import DESCRIPTORS


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(base64.b64decode(DESCRIPTORS)).file:
        pool.AddSerializedFile(file.SerializeToString())
    for known in (health_pb2, reflection_pb2):  # so that reflection can tell of them, too
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    return pool


POOL = _pool()
PROTOCOL = POOL.FindServiceByName("inference.GRPCInferenceService")
HEALTH = POOL.FindServiceByName("grpc.health.v1.Health")
REFLECTION = POOL.FindServiceByName("grpc.reflection.v1alpha.ServerReflection")


def message(name: str) -> Any:
    """Return the class of a message by its full name."""
    return GetMessageClass(POOL.FindMessageTypeByName(name))


InferContents = message("inference.InferTensorContents")
InferRequestMessage = message("inference.ModelInferRequest")
InferReply = message("inference.ModelInferResponse")
StreamReply = message("inference.ModelStreamInferResponse")
Status = message("google.rpc.Status")
RetryInfo = message("google.rpc.RetryInfo")
