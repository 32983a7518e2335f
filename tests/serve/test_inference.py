import asyncio
import time

import numpy as np
import pytest

from coat_deploy.errors import RequestError
from coat_deploy.images import load
from coat_deploy.labels import top_labels
from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.open import find_source, open_source
from coat_deploy.runner import LOGITS, LoadOptions
from coat_deploy.serve.options import Limits
from coat_deploy.serve.requests import InferRequest, RequestedOutput, Tensor

NAME = "coat_lite_toy"


@pytest.fixture
def direct(exported):
    """What the artifact computes of pixels without a server."""
    source = find_source(Model(exported / NAME), ArtifactQuery("onnxruntime"))
    with open_source(source, LoadOptions(threads=1)) as runner:
        yield lambda pixels: runner.run(pixels)[LOGITS]


def pixels(images=1, size=(64, 64), seed=0):
    shape = (images, 3, *size)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(data, name="pixels", datatype="FP32"):
    return Tensor(name, datatype, data.shape, data)


def ask(service, *inputs, **how):
    return asyncio.run(service.infer(InferRequest(how.pop("model", NAME), inputs, **how)))


def refused(service, *inputs, **how):
    with pytest.raises(RequestError) as error:
        ask(service, *inputs, **how)
    return error.value.kind, str(error.value)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_logits_are_those_of_the_artifact(serving, direct, images):
    data = pixels(images)
    response = ask(serving(), tensor(data), id="seven")
    assert (response.model, response.version, response.id) == (NAME, "1", "seven")
    (output,) = response.outputs
    assert (output.name, output.datatype, output.shape) == ("logits", "FP32", (images, 5))
    np.testing.assert_allclose(output.data, direct(data), atol=1e-5)


def test_classes_are_score_index_and_label(serving, direct):
    data = pixels(2)
    response = ask(serving(), tensor(data), outputs=(RequestedOutput("logits", 2),))
    (output,) = response.outputs
    assert (output.datatype, output.shape, len(output.data)) == ("BYTES", (2, 2), 4)
    score, index, label = output.data[0].decode().split(":")
    logits = direct(data)[0]
    assert int(index) == logits.argmax() and label == ["bag", "boot", "coat", "dress", "hat"][
        int(index)
    ]  # fmt: skip
    assert float(score) == pytest.approx(logits.max(), abs=1e-5)


def test_an_encoded_image_is_prepared_as_predict_does(serving, direct, jpeg):
    service = serving()
    how = service.registry.get(NAME).processing.how
    expected = direct(load(jpeg, how)[np.newaxis])
    image = Tensor("image", "BYTES", (2,), [jpeg, jpeg])
    (output,) = ask(service, image).outputs
    np.testing.assert_allclose(output.data, np.concatenate([expected] * 2), atol=1e-5)
    labels = asyncio.run(service.classify(jpeg, NAME, top=2))
    expected = top_labels(expected[0], ["bag", "boot", "coat", "dress", "hat"], 2)
    assert [label["label"] for label in labels] == [label["label"] for label in expected]
    assert labels[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "kind", "words"),
    [
        ([], "invalid", "takes one input (got 0"),
        ([tensor(pixels()), tensor(pixels())], "invalid", "takes one input (got 2"),
        ([tensor(pixels(), "pixel")], "invalid", "Did you mean 'pixels'?"),
        ([tensor(pixels().astype(np.float64), datatype="FP64")], "invalid", "another datatype"),
        ([tensor(pixels(size=(64, 65)))], "invalid", "do not fit"),
        ([tensor(pixels()[0])], "invalid", "do not fit"),
        ([tensor(pixels(0))], "invalid", "do not fit"),
        ([tensor(pixels(65))], "too_large", "too many images (got 65"),
        ([tensor(np.full((1, 3, 64, 64), np.nan, np.float32))], "invalid", "NaN or infinity"),
        ([tensor(np.full((1, 3, 64, 64), 3e38, np.float32))], "invalid", "far from any pixel"),
        ([Tensor("image", "BYTES", (1,), [b"rubbish"])], "invalid", "not an image"),
        ([Tensor("image", "BYTES", (1,), [b""])], "invalid", "is empty"),
        ([Tensor("image", "BYTES", (0,), [])], "invalid", "no images"),
        ([tensor(pixels(), "image")], "invalid", "another datatype"),
    ],
)
def test_inputs_that_do_not_fit_are_the_clients_to_mend(serving, inputs, kind, words):
    found, message = refused(serving(), *inputs)
    assert found == kind and words in message and message.endswith((".", "?"))


def test_names_and_versions_that_are_not_there(serving):
    service = serving()
    assert refused(service, tensor(pixels()), model="no_such")[0] == "not_found"
    assert refused(service, tensor(pixels()), version="2")[0] == "not_found"
    output = (RequestedOutput("logit"),)
    assert "Did you mean 'logits'?" in refused(service, tensor(pixels()), outputs=output)[1]
    many = (RequestedOutput("logits", 6),)
    assert "expected 0 to 5" in refused(service, tensor(pixels()), outputs=many)[1]


def test_a_request_that_is_late_already_is_not_computed(serving):
    kind, _ = refused(serving(), tensor(pixels()), deadline=time.monotonic() - 1)
    assert kind == "deadline"


def test_images_are_held_to_limits(serving, jpeg):
    service = serving(limits=Limits(batch=1))
    both = Tensor("image", "BYTES", (2,), [jpeg, jpeg])
    assert refused(service, both)[0] == "too_large"


def test_statistics_count_what_was_done(serving):
    service = serving()
    ask(service, tensor(pixels(3)))
    refused(service, Tensor("image", "BYTES", (1,), [b"rubbish"]))
    (counts,) = service.model_statistics(NAME)
    assert (counts["inference_count"], counts["execution_count"]) == (3, 3)
    stats = counts["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (1, 1)
    assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] // 2 > 0
    assert [batch["batch_size"] for batch in counts["batch_stats"]] == [1]
    (other,) = service.model_statistics("coat_toy")
    assert other["inference_count"] == 0


def test_a_model_tells_what_it_takes(serving):
    service = serving()
    assert service.model_metadata(NAME) == {
        "name": NAME,
        "versions": ["1"],
        "platform": "onnxruntime_fp32",
        "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 64, 64]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}],
    }
    config = service.model_config(NAME)
    assert config["input"][0]["format"] == "FORMAT_NCHW"
    assert config["input"][0]["dims"] == [3, 64, 64]
    assert config["max_batch_size"] == 64


def test_a_server_that_ends_is_not_ready_but_answers(serving):
    service = serving()
    service.drain()
    assert not service.ready
    assert ask(service, tensor(pixels())).outputs
