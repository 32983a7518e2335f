import queue

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

NAME = "coat_lite_toy"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
WAIT_S = 30


def request(seed, images=1, **fields):
    data = np.random.default_rng(seed).standard_normal((images, 3, 64, 64)).astype(np.float32)
    found = service_pb2.ModelInferRequest(model_name=NAME, id=str(seed), **fields)
    found.inputs.add(name="pixels", datatype="FP32", shape=data.shape)
    found.raw_input_contents.append(data.tobytes())
    return found


@pytest.fixture
def stream():
    """Send messages in a stream: address, messages; gives the replies."""
    channels = []

    def call(address, messages):
        channels.append(grpc.insecure_channel(address))
        replies = channels[-1].stream_stream(STREAM)(messages, timeout=WAIT_S)
        return map(service_pb2.ModelStreamInferResponse.FromString, replies)

    yield call
    for channel in channels:
        channel.close()


def test_answers_come_in_the_order_of_the_requests(listening, calling, stream):
    server = listening()
    asked = [request(seed, images=3 if seed == 0 else 1) for seed in range(40)]
    replies = list(stream(server.address, (item.SerializeToString() for item in asked)))
    assert [reply.infer_response.id for reply in replies] == [item.id for item in asked]
    for item, reply in zip(asked[:3], replies, strict=False):
        content = item.SerializeToString()
        alone = calling(server.address, "/inference.GRPCInferenceService/ModelInfer", content)
        expected = service_pb2.ModelInferResponse.FromString(alone).raw_output_contents[0]
        found = reply.infer_response.raw_output_contents[0]
        np.testing.assert_allclose(
            np.frombuffer(found, np.float32), np.frombuffer(expected, np.float32), atol=1e-5
        )


def test_an_error_is_an_answer_and_the_stream_goes_on(listening, stream):
    wrong = request(1)
    wrong.model_name = "no_such"
    messages = [request(0).SerializeToString(), wrong.SerializeToString(), b"\x0b",
                request(2).SerializeToString()]  # fmt: skip
    replies = list(stream(listening().address, iter(messages)))
    assert [bool(reply.error_message) for reply in replies] == [False, True, True, False]
    assert "is not served" in replies[1].error_message
    assert replies[1].infer_response.id == "1"
    assert "is not a ModelInferRequest" in replies[2].error_message


def test_tritons_client_streams(client):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    data = np.zeros((1, 3, 64, 64), np.float32)
    tensor = triton.InferInput("pixels", data.shape, "FP32")
    tensor.set_data_from_numpy(data)
    for i in range(3):
        client.async_stream_infer(NAME, [tensor], request_id=str(i))
    for i in range(3):
        result, error = answers.get(timeout=WAIT_S)
        assert error is None and result.get_response().id == str(i)
        assert result.as_numpy("logits").shape == (1, 5)
    client.stop_stream()


def test_a_server_that_ends_answers_what_a_stream_has_sent(listening, stream):
    server = listening()
    asked: queue.Queue = queue.Queue()
    replies = stream(server.address, iter(asked.get, None))
    for seed in range(3):
        asked.put(request(seed).SerializeToString())
    assert next(replies).infer_response.id == "0"
    ended = server.begin(server.server.stop(WAIT_S))
    found = []
    with pytest.raises(grpc.RpcError) as error:
        found.extend(reply.infer_response.id for reply in replies)
    ended.result(WAIT_S)  # long before the grace is over
    asked.put(None)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "the server ends" in error.value.details()
    assert found == ["1", "2"][: len(found)]


def test_a_client_that_leaves_its_stream_leaves_no_work(listening, stream):
    server = listening()
    with grpc.insecure_channel(server.address) as channel:
        messages = (request(seed).SerializeToString() for seed in range(100))
        call = channel.stream_stream(STREAM)(messages, timeout=WAIT_S)
        next(call)
        call.cancel()
    server.run(server.server.stop(WAIT_S))
    assert server.service.batcher.pending == 0
