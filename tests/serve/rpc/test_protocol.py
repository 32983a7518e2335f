import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.open import find_source, open_source
from coat_deploy.runner import LOGITS, LoadOptions
from coat_deploy.version import __version__

NAME = "coat_lite_toy"
LABELS = ["bag", "boot", "coat", "dress", "hat"]
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def direct(exported):
    """What the artifact computes of pixels without a server."""
    source = find_source(Model(exported / NAME), ArtifactQuery("onnxruntime"))
    with open_source(source, LoadOptions(threads=1)) as runner:
        yield lambda pixels: runner.run(pixels)[LOGITS]


def pixels(images=1, seed=0):
    shape = (images, 3, 64, 64)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(data, name="pixels", datatype="FP32"):
    found = triton.InferInput(name, data.shape, datatype)
    found.set_data_from_numpy(data)
    return found


def typed(data, **fields):
    """A request with typed contents, which Triton's client does not make."""
    request = service_pb2.ModelInferRequest(model_name=NAME, id="typed", **fields)
    item = request.inputs.add(name="pixels", datatype="FP32", shape=data.shape)
    item.contents.fp32_contents.extend(data.ravel().tolist())
    return request


@pytest.mark.parametrize("images", [1, 3])
def test_logits_are_those_of_the_artifact(client, direct, images):
    data = pixels(images)
    result = client.infer(NAME, [tensor(data)], request_id="seven")
    reply = result.get_response()
    assert (reply.model_name, reply.model_version, reply.id) == (NAME, "1", "seven")
    assert [(output.name, output.datatype) for output in reply.outputs] == [("logits", "FP32")]
    np.testing.assert_allclose(result.as_numpy("logits"), direct(data), atol=1e-5)


def test_typed_contents_are_answered_by_typed_contents(listening, calling, direct):
    data = pixels(2)
    content = calling(listening().address, INFER, typed(data).SerializeToString())
    reply = service_pb2.ModelInferResponse.FromString(content)
    assert not reply.raw_output_contents and reply.id == "typed"
    (output,) = reply.outputs
    logits = np.array(output.contents.fp32_contents, np.float32).reshape(output.shape)
    np.testing.assert_allclose(logits, direct(data), atol=1e-5)


def test_typed_contents_that_are_not_packed_are_read_as_well(listening, calling, direct):
    data = pixels()
    request = typed(data[:, :, :0])
    del request.inputs[:]
    shape = service_pb2.ModelInferRequest.InferInputTensor(
        name="pixels", datatype="FP32", shape=data.shape
    ).SerializeToString()
    numbers = b"".join(b"\x35" + value.tobytes() for value in data.ravel())
    length = _varint(len(numbers))
    item = shape + b"\x2a" + length + numbers
    content = request.SerializeToString() + b"\x2a" + _varint(len(item)) + item
    reply = service_pb2.ModelInferResponse.FromString(calling(listening().address, INFER, content))
    np.testing.assert_allclose(reply.outputs[0].contents.fp32_contents, direct(data)[0], atol=1e-5)


def _varint(number):
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_packed_requests_are_read(client, direct, packing):
    data = pixels()
    result = client.infer(NAME, [tensor(data)], compression_algorithm=packing)
    np.testing.assert_allclose(result.as_numpy("logits"), direct(data), atol=1e-5)


def test_classes_are_score_index_and_label(client, direct):
    data = pixels(2)
    wanted = triton.InferRequestedOutput("logits", class_count=2)
    found = client.infer(NAME, [tensor(data)], outputs=[wanted]).as_numpy("logits")
    assert found.shape == (2, 2)
    score, index, label = found[1, 0].decode().split(":")
    logits = direct(data)[1]
    assert (int(index), label) == (logits.argmax(), LABELS[logits.argmax()])
    assert float(score) == pytest.approx(logits.max(), abs=1e-5)


@pytest.mark.parametrize("raw", [True, False])
def test_an_encoded_image_is_an_input(listening, calling, jpeg, raw):
    request = service_pb2.ModelInferRequest(model_name=NAME)
    item = request.inputs.add(name="image", datatype="BYTES", shape=[2])
    wanted = request.outputs.add(name="logits")
    wanted.parameters["classification"].int64_param = 1
    if raw:
        request.raw_input_contents.append((len(jpeg).to_bytes(4, "little") + jpeg) * 2)
    else:
        item.contents.bytes_contents.extend([jpeg, jpeg])
    server = listening()
    content = calling(server.address, INFER, request.SerializeToString())
    result = triton.InferResult(service_pb2.ModelInferResponse.FromString(content))
    first, second = result.as_numpy("logits").ravel()
    expected = server.run(server.service.classify(jpeg, NAME, top=1))[0]["label"]
    assert first == second and first.decode().split(":")[2] == expected


def test_tritons_client_sends_an_encoded_image(client, jpeg):
    image = tensor(np.array([jpeg], object), "image", "BYTES")
    assert client.infer(NAME, [image]).as_numpy("logits").shape == (1, 5)


def test_it_tells_of_itself(client):
    assert client.is_server_live() and client.is_server_ready()
    server = client.get_server_metadata()
    assert (server.name, server.version) == ("coat-deploy", __version__)
    assert "statistics" in server.extensions


def test_it_tells_of_a_model(client):
    assert client.is_model_ready(NAME) and client.is_model_ready(NAME, "1")
    model = client.get_model_metadata(NAME)
    assert (model.name, model.versions, model.platform) == (NAME, ["1"], "onnxruntime_fp32")
    assert [(t.name, t.datatype, t.shape) for t in model.inputs] == [
        ("pixels", "FP32", [-1, 3, 64, 64])
    ]
    config = client.get_model_config(NAME).config
    assert config.input[0].format == config.input[0].FORMAT_NCHW
    assert (config.max_batch_size, config.WhichOneof("scheduling_choice")) == (
        64,
        "dynamic_batching",
    )


def test_it_counts(client):
    client.infer(NAME, [tensor(pixels(3))])
    (counts,) = client.get_inference_statistics(NAME).model_stats
    assert (counts.inference_count, counts.inference_stats.success.count) == (3, 1)
    assert counts.inference_stats.compute_infer.ns > 0
    assert len(client.get_inference_statistics().model_stats) == 2


def test_models_are_loaded_and_unloaded_where_that_is_allowed(listening):
    with triton.InferenceServerClient(listening(allow_load=True).address) as client:
        client.unload_model(NAME)
        assert not client.is_model_ready(NAME)
        states = {m.name: m.state for m in client.get_model_repository_index().models}
        assert states == {NAME: "UNAVAILABLE", "coat_toy": "READY"}
        client.load_model(NAME)
        assert client.infer(NAME, [tensor(pixels())]).as_numpy("logits").shape == (1, 5)


def test_elsewhere_they_are_not(client):
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException) as error:
            change(NAME)
        assert error.value.status() == "StatusCode.PERMISSION_DENIED"
    assert client.is_model_ready(NAME)
