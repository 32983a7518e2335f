import base64
import io
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from coat_deploy.cli.app import app

PATH = "/models/coat_lite_toy"


def refused(answer, status, words):
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and words in answer.json()["error"]


def encoded(image):
    return base64.b64encode(image).decode()


def test_an_image_gets_its_labels(client, jpeg):
    answer = client.post(PATH, content=jpeg, headers={"content-type": "image/jpeg"})
    labels = answer.json()
    assert answer.status_code == 200 and len(labels) == 5
    assert sum(label["score"] for label in labels) == pytest.approx(1)
    assert [label["score"] for label in labels] == sorted(
        (m["score"] for m in labels), reverse=True
    )


def test_labels_are_those_of_predict(client, jpeg, exported, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg)
    words = ["predict", "coat_lite_toy", str(tmp_path / "a.jpg"), "--models", str(exported)]
    ran = CliRunner().invoke(app, [*words, "--json", "--threads", "1"])
    (predicted,) = json.loads(ran.stdout)["predictions"]
    served = client.post(PATH, content=jpeg).json()
    assert [label["label"] for label in served] == [m["label"] for m in predicted["labels"]]
    for mine, theirs in zip(served, predicted["labels"], strict=True):
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-6)


def test_json_with_base64_is_the_same(client, jpeg):
    plain = client.post(PATH, content=jpeg).json()
    assert client.post(PATH, json={"inputs": encoded(jpeg)}).json() == plain
    url = f"data:image/jpeg;base64,{encoded(jpeg)}"
    assert client.post(PATH, json={"inputs": url}).json() == plain


def test_as_many_labels_as_are_wanted(client, jpeg):
    document = {"inputs": encoded(jpeg), "parameters": {"top_k": 2}}
    assert len(client.post(PATH, json=document).json()) == 2
    assert len(client.post(f"{PATH}?top_k=3", content=jpeg).json()) == 3
    assert len(client.post(f"{PATH}?top_k=99", content=jpeg).json()) == 5


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats(client, kind):
    content = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(content, kind)
    assert client.post(PATH, content=content.getvalue()).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"rubbish", "not an image"),
        (b"<svg/>", "not an image"),
        (b"\xff\xd8\xff" + bytes(100), "damaged, cut short"),
    ],
)
def test_what_is_no_image(client, content, words):
    refused(client.post(PATH, content=content), 400, words)


def test_an_image_cut_short(client, jpeg):
    refused(client.post(PATH, content=jpeg[: len(jpeg) // 2]), 400, "cut short")


def test_a_bomb_of_pixels(client):
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")
    refused(client.post(PATH, content=content.getvalue()), 400, "too many pixels")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "'inputs' must be an image in base64"),
        ({"inputs": 5}, "'inputs' must be an image in base64"),
        ({"inputs": "###"}, "is not base64"),
        ({"inputs": "", "parameters": []}, "'parameters' must be an object"),
        ({"inputs": "", "parameters": [1]}, "'parameters' must be an object"),
        ({"inputs": "", "parameters": {"top": 1}}, "Did you mean 'top_k'?"),
        ({"inputs": "", "parameters": {"top_k": 0}}, "'top_k' must be"),
        ({"inputs": "", "parameters": {"top_k": True}}, "'top_k' must be"),
        (
            {"inputs": "", "parameters": {"function_to_apply": "none"}},
            "are those of softmax",
        ),
        ([], "must be a JSON object"),
    ],
)
def test_a_document_that_is_none(client, document, words):
    refused(client.post(PATH, json=document), 400, words)


def test_forms_are_not_read(client, jpeg):
    refused(client.post(PATH, files={"image": jpeg}), 415, "multipart")


def test_a_count_that_is_none(client, jpeg):
    refused(client.post(f"{PATH}?top_k=x", content=jpeg), 400, "'top_k' must be")


def test_a_model_that_is_not_there(client, jpeg):
    refused(client.post("/models/no_such", content=jpeg), 404, "not served")


def test_models_have_cards(client):
    cards = client.get("/models").json()
    assert [card["name"] for card in cards] == ["coat_lite_toy", "coat_toy"]
    card = cards[0]
    assert (card["variant"], card["precision"], card["target"]) == (
        "coat_lite_toy",
        "fp32",
        "onnxruntime",
    )
    assert len(card["sha256"]) == 64 and card["size"] == [64, 64] and card["classes"] == 5
    assert card["weights"] == "random:0"
