"""What is refused over gRPC: with which status, and a sentence."""

import threading
import time

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from coat_deploy.serve.options import Limits
from coat_deploy.serve.rpc.messages import RetryInfo, Status

NAME = "coat_lite_toy"
SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
WAIT_S = 30


def request(shape=(1, 3, 64, 64), raw=None, name="pixels", datatype="FP32", **fields):
    found = service_pb2.ModelInferRequest(**{"model_name": NAME, "id": "mine", **fields})
    found.inputs.add(name=name, datatype=datatype, shape=shape)
    size = 4 * int(np.prod([max(n, 0) for n in shape], dtype=object))
    found.raw_input_contents.append(bytes(size) if raw is None else raw)
    return found


def typed(field, values, datatype="FP32", shape=(2,)):
    found = service_pb2.ModelInferRequest(model_name=NAME)
    item = found.inputs.add(name="pixels", datatype=datatype, shape=shape)
    getattr(item.contents, field).extend(values)
    return found


def both():
    found = request()
    found.inputs[0].contents.fp32_contents.append(1)
    return found


def output(key="classification", **value):
    found = request()
    wanted = found.outputs.add(name="logits")
    for field, content in value.items():
        setattr(wanted.parameters[key], field, content)
    return found


def timeout(**value):
    found = request()
    for field, content in value.items():
        setattr(found.parameters["timeout"], field, content)
    return found


def shared_memory():
    found = request()
    found.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    return found


def two_outputs():
    found = request()
    found.outputs.add(name="logits")
    found.outputs.add(name="logits")
    return found


def refused(calling, address, content, path=INFER, **how):
    content = content if isinstance(content, bytes) else content.SerializeToString()
    with pytest.raises(grpc.RpcError) as error:
        calling(address, path, content, **how)
    return error.value.code().name, error.value.details()


INVALID = [
    (request(raw=b"abc"), "raw contents do not fit the shape (got 3 bytes, expected 49152"),
    (request(shape=(1, 3, 64, 65)), "do not fit"),
    (request(shape=(1, 3, -1, 64)), "none below 0"),
    (request(shape=(1,) * 9), "8 whole numbers at most"),
    (request(shape=(0, 3, 64, 64)), "do not fit"),
    (request(shape=(0, 1 << 62, 1 << 62)), "so large a shape"),
    (request(datatype="FP31"), "Did you mean"),
    (request(datatype="INT32"), "another datatype (got INT32, expected FP32)"),
    (request(datatype="FP16", raw=bytes(24576)), "another datatype (got FP16"),
    (request(name="pixel"), "Did you mean 'pixels'?"),
    (request(id="x" * 300), "'id': too long (got 300"),
    (request(name="image", datatype="BYTES", shape=(1,), raw=b"\x09\0\0\0abc"), "of BYTES"),
    (request(name="image", datatype="BYTES", shape=(1,), raw=b"\x03\0\0\0abc"), "not an image"),
    (service_pb2.ModelInferRequest(model_name=NAME), "takes one input (got 0"),
    (request(raw_input_contents=[b""]), "not one for each input (got 2 for 1"),
    (typed("fp32_contents", [1.0]), "got 1 elements, expected 2"),
    (typed("fp32_contents", [1.0, 2.0]), "do not fit"),
    (typed("fp32_contents", [], shape=(0, 3, 64, 64)), "do not fit"),
    (typed("int_contents", [1, 2]), "got int_contents, expected fp32_contents for FP32"),
    (typed("int_contents", [1, 2], "INT32"), "INT32 is taken as raw_input_contents alone"),
    (both(), "both 'contents' and 'raw_input_contents'"),
    (output(int64_param=6), "expected 0 to 5"),
    (output(int64_param=-1), "'classification' must be a whole number"),
    (output(string_param="3"), "got string_param"),
    (output(bool_param=True), "got bool_param"),
    (timeout(int64_param=-1), "'timeout' must be a whole number"),
    (timeout(double_param=1.5), "got double_param"),
    (two_outputs(), "names an output twice"),
    (b"\xff\xd8\xff\xe0 a JPEG file", "malformed at byte 0"),
    (b"\x0a\x02\xff\xfe", "is not a ModelInferRequest"),
    (b"\x2a\x00" * 2000, "too many parts"),
    (b"\x2a\x00" * 17, "'inputs': too many (got 17"),
    (b"\x2a\x02\x22", "is not a ModelInferRequest (malformed at byte 0)"),
]


def test_what_is_malformed_is_the_clients_to_mend(listening, calling):
    address = listening().address
    for content, words in INVALID:
        code, message = refused(calling, address, content)
        assert (code, words in message) == ("INVALID_ARGUMENT", True), (words, code, message)
        assert message.endswith((".", "?")) and len(message) < 500
    assert calling(address, INFER, request().SerializeToString())


def test_other_methods_refuse_what_is_no_message(listening, calling):
    address = listening().address
    for method in ("ServerLive", "ModelReady", "ModelConfig", "RepositoryIndex"):
        code, message = refused(calling, address, b"\x0b\x00", f"{SERVICE}/{method}")
        assert code == "INVALID_ARGUMENT" and f"is not a {method}Request" in message


def test_names_that_are_not_there(listening, calling):
    address = listening().address
    for content in (request(model_name="no_such"), request(model_version="2")):
        assert refused(calling, address, content)[0] == "NOT_FOUND"
    for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        name = service_pb2.ModelReadyRequest(name="no_such")
        assert refused(calling, address, name, f"{SERVICE}/{method}")[0] == "NOT_FOUND"
    code, message = refused(calling, address, request(outputs=[{"name": "logit"}]))
    assert code == "INVALID_ARGUMENT" and "Did you mean 'logits'?" in message


def test_what_is_not_spoken(listening, calling):
    address = listening().address
    assert refused(calling, address, shared_memory())[0] == "UNIMPLEMENTED"
    assert refused(calling, address, b"", f"{SERVICE}/TraceSetting")[0] == "UNIMPLEMENTED"
    content = service_pb2.RepositoryIndexRequest(repository_name="other")
    assert refused(calling, address, content, f"{SERVICE}/RepositoryIndex") == (
        "INVALID_ARGUMENT",
        "repository 'other': there is but one, without a name.",
    )


def test_what_is_larger_than_a_body_may_be(listening, calling):
    address = listening(limits=Limits(body_bytes=60_000, json_bytes=1000, batch=1)).address
    assert calling(address, INFER, request().SerializeToString())
    code, message = refused(calling, address, request((2, 3, 64, 64)))
    assert code == "RESOURCE_EXHAUSTED" and "larger than max" in message
    packed = {"compression": grpc.Compression.Gzip}  # a bomb: a thousandth of what it becomes
    code, message = refused(calling, address, request((1000, 3, 64, 64)), **packed)
    assert code == "RESOURCE_EXHAUSTED" and "larger than max" in message
    code, message = refused(calling, address, typed("fp32_contents", [0] * 2000, shape=(2000,)))
    assert code == "INVALID_ARGUMENT" and "Send tensors as raw_input_contents" in message
    many = request((2,), b"\0\0\0\0" * 2, "image", "BYTES")
    code, message = refused(calling, address, many)
    assert code == "INVALID_ARGUMENT" and "too many images (got 2, expected 1 to 1)" in message
    assert calling(address, INFER, request().SerializeToString())


class Held:
    """Keeps a model's runners busy until it is left."""

    def __init__(self, server):
        self.batcher = server.service.batcher
        self.lane = server.service.registry.get(NAME).lane

    def __enter__(self):
        for _ in range(self.lane.levels.streams):
            assert self.lane.turn.acquire(timeout=WAIT_S)
        return self

    def __exit__(self, *error):
        self.lane.turn.release(self.lane.levels.streams)

    def wait_for(self, condition):
        until = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.002)


def begun(address, content, **how):
    """A call in the background, and its channel."""
    channel = grpc.insecure_channel(address)
    call = channel.unary_unary(INFER).future(content.SerializeToString(), timeout=WAIT_S, **how)
    return channel, call


def test_a_full_queue_says_when_to_come_again(listening, calling):
    server = listening(threads=1, limits=Limits(queue=1))
    calls = []
    with Held(server) as held:
        calls.append(begun(server.address, request()))
        held.wait_for(lambda: held.lane.running == 1)
        calls.append(begun(server.address, request()))
        held.wait_for(lambda: len(held.lane.waiting) == 1)
        with pytest.raises(grpc.RpcError) as error:
            calling(server.address, INFER, request().SerializeToString())
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "its queue is full" in error.value.details()
    trailing = dict(error.value.trailing_metadata())
    seconds = int(trailing["grpc-retry-pushback-ms"]) // 1000
    status = Status.FromString(trailing["grpc-status-details-bin"])
    info = RetryInfo.FromString(status.details[0].value)
    assert status.details[0].type_url == "type.googleapis.com/google.rpc.RetryInfo"
    assert status.code == 8 and info.retry_delay.seconds == seconds >= 1
    for channel, call in calls:  # those that were let in are answered
        assert service_pb2.ModelInferResponse.FromString(call.result(WAIT_S)).id == "mine"
        channel.close()


def test_what_is_not_computed_in_time_is_late(listening, calling):
    server = listening()
    late = timeout(int64_param=1)
    with Held(server):
        code, message = refused(calling, server.address, late)
        assert code == "DEADLINE_EXCEEDED" and "not computed in time" in message
        code, _ = refused(calling, server.address, request(), timeout=0.2)
        assert code == "DEADLINE_EXCEEDED"
    assert calling(server.address, INFER, timeout(int64_param=0).SerializeToString())


def test_a_calls_own_deadline_is_that_of_the_work(listening):
    server = listening()
    deadlines = []
    infer = server.service.infer

    async def noting(asked):
        deadlines.append(asked.deadline - time.monotonic())
        return await infer(asked)

    server.service.infer = noting
    for how, content in (({}, request()), ({}, timeout(int64_param=3_000_000))):
        channel, call = begun(server.address, content, **how)
        call.result(WAIT_S)
        channel.close()
    # On the wire gRPC rounds a deadline of half a minute up to the next tenth of a second.
    assert WAIT_S - 20 < deadlines[0] <= WAIT_S + 0.1 and deadlines[1] <= 3


def test_a_call_that_is_cancelled_leaves_the_queue(listening, calling):
    server = listening(threads=1)
    with Held(server) as held:
        first, kept = begun(server.address, request())
        held.wait_for(lambda: held.lane.running == 1)
        second, left = begun(server.address, request())
        held.wait_for(lambda: len(held.lane.waiting) == 1)
        left.cancel()
        held.wait_for(lambda: not held.lane.waiting)
    assert kept.result(WAIT_S)
    first.close(), second.close()
    assert calling(server.address, INFER, request().SerializeToString())


def test_a_message_that_never_comes_is_not_waited_for_longer_than_a_body(listening):
    server = listening(limits=Limits(deadline_s=0.3))
    never = threading.Event()

    def silent():
        never.wait(WAIT_S)
        yield b""

    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.stream_unary(INFER)(silent(), timeout=WAIT_S)
        never.set()
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not come in 0.3 s" in error.value.details()


def test_a_call_without_a_message_is_refused(listening):
    address = listening().address
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as error:
        channel.stream_unary(INFER)(iter(()), timeout=WAIT_S)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_failure_of_ours_tells_the_client_nothing(listening, calling, caplog):
    server = listening()

    async def fail(asked):
        raise KeyError("a secret")

    server.service.infer = fail
    code, message = refused(calling, server.address, request())
    assert (code, message) == ("INTERNAL", "the server failed. Its log says why.")
    assert "a secret" in caplog.text


def test_a_server_that_holds_too_much_takes_no_more(listening, calling):
    server = listening(limits=Limits(receiving_bytes=60_000))
    with Held(server) as held:
        channel, call = begun(server.address, request())
        held.wait_for(lambda: held.lane.running == 1)
        code, message = refused(calling, server.address, request())
        assert code == "RESOURCE_EXHAUSTED" and "of other requests" in message
    assert call.result(WAIT_S)
    channel.close()
    assert calling(server.address, INFER, request().SerializeToString())
