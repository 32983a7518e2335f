"""The clients that people have, against the server as a process."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

NAME = "coat_lite_toy"
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)


@pytest.fixture
def triton():
    return pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")


@pytest.fixture
def asked(running, triton):
    server = running()
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def pixels(triton, **how):
    tensor = triton.InferInput("pixels", PIXELS.shape, "FP32")
    tensor.set_data_from_numpy(PIXELS, **how)
    return [tensor]


def test_tritonclient_sees_what_there_is(asked):
    assert asked.is_server_live() and asked.is_server_ready() and asked.is_model_ready(NAME)
    assert asked.get_server_metadata()["name"] == "coat-deploy"
    assert asked.get_model_metadata(NAME)["inputs"][0]["name"] == "pixels"
    assert asked.get_model_config(NAME)["max_batch_size"] == 64
    assert [model["state"] for model in asked.get_model_repository_index()] == ["READY", "READY"]
    assert asked.get_inference_statistics(NAME)["model_stats"][0]["inference_count"] == 0


def test_tritonclient_infers_in_every_way_it_knows(asked, triton):
    plain = asked.infer(NAME, pixels(triton), request_id="seven")
    logits = plain.as_numpy("logits")
    assert logits.shape == (2, 5) and plain.get_response()["id"] == "seven"
    in_json = asked.infer(
        NAME,
        pixels(triton, binary_data=False),
        outputs=[triton.InferRequestedOutput("logits", binary_data=False)],
    )
    np.testing.assert_array_equal(in_json.as_numpy("logits"), logits)
    for packing in ("gzip", "deflate"):
        packed = asked.infer(
            NAME,
            pixels(triton),
            request_compression_algorithm=packing,
            response_compression_algorithm=packing,
        )
        np.testing.assert_array_equal(packed.as_numpy("logits"), logits)


def test_tritonclient_classifies(asked, triton, jpeg):
    wanted = [triton.InferRequestedOutput("logits", class_count=3)]
    classes = asked.infer(NAME, pixels(triton), outputs=wanted).as_numpy("logits")
    assert classes.shape == (2, 3) and len(classes[0, 0].split(b":")) == 3
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([jpeg], dtype=np.object_))
    assert asked.infer(NAME, [image], outputs=wanted).as_numpy("logits").shape == (1, 3)


@pytest.mark.parametrize("name", ["Landscape", "Portrait"])
def test_photographs_of_every_orientation_get_the_logits_of_the_upright(
    asked, triton, shared_data, name
):
    """As Pillow turns them; each file was compressed anew, so no two of them are the same image."""

    def logits(content):
        image = triton.InferInput("image", [1], "BYTES")
        image.set_data_from_numpy(np.array([content], dtype=np.object_))
        return asked.infer(NAME, [image]).as_numpy("logits")[0]

    upright = logits((shared_data / "exif-orientation" / f"{name}_1.jpg").read_bytes())
    for orientation in range(9):
        path = shared_data / "exif-orientation" / f"{name}_{orientation}.jpg"
        turned = io.BytesIO()
        ImageOps.exif_transpose(Image.open(path)).convert("RGB").save(turned, "PNG")
        answer = logits(path.read_bytes())
        np.testing.assert_allclose(answer, logits(turned.getvalue()), atol=1e-3)
        assert answer.argmax() == upright.argmax()


def test_tritonclient_is_told_what_is_wrong(asked, triton):
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="has no version '3'"):
        asked.infer(NAME, pixels(triton), model_version="3")
    with pytest.raises(InferenceServerException, match="--allow-load"):
        asked.unload_model(NAME)


def test_tritonclient_loads_and_unloads(running, triton):
    server = running("--allow-load", NAME)
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        client.unload_model(NAME)
        assert not client.is_model_ready(NAME)
        client.load_model(NAME)
        client.load_model("coat_toy")
        assert client.is_model_ready(NAME) and client.is_model_ready("coat_toy")


def test_hugging_faces_client_works_unchanged(running, jpeg):
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(model=f"{running().url}/models/{NAME}")
    labels = client.image_classification(jpeg)
    assert len(labels) == 5 and labels[0].score >= labels[1].score
    assert [label.label for label in client.image_classification(jpeg, top_k=2)] == [
        label.label for label in labels[:2]
    ]
