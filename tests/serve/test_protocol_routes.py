import gzip
import json
import zlib

import numpy as np
import pytest

from coat_deploy.serve.binary import HEADER_LENGTH, pack_items
from coat_deploy.serve.options import Limits

NAME = "coat_lite_toy"
INFER = f"/v2/models/{NAME}/infer"
SHAPE = (1, 3, 64, 64)
PIXELS = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def head(**changes):
    return {"name": "pixels", "datatype": "FP32", "shape": list(SHAPE)} | changes


def flat(**changes):
    return {"inputs": [head(data=PIXELS.ravel().tolist())]} | changes


def binary(outputs=None, pixels=PIXELS, **changes):
    content = pixels.tobytes()
    tensor = head(shape=list(pixels.shape), parameters={"binary_data_size": len(content)})
    document = {"inputs": [tensor | changes]}
    document |= {"outputs": outputs} if outputs else {}
    text = json.dumps(document).encode()
    return {"content": text + content, "headers": {HEADER_LENGTH: str(len(text))}}


def logits(answer):
    (output,) = answer.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


@pytest.fixture
def expected(client):
    answer = client.post(INFER, json=flat())
    assert answer.status_code == 200, answer.text
    return logits(answer)


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        (f"/v2/models/{NAME}/ready", {"name": NAME, "ready": True}),
        (f"/v2/models/{NAME}/versions/1/ready", {"name": NAME, "ready": True}),
    ],
)
def test_health(client, path, document):
    answer = client.get(path)
    assert (answer.status_code, answer.json()) == (200, document)


def test_the_server_tells_what_it_speaks(client):
    document = client.get("/v2").json()
    assert document["name"] == "coat-deploy"
    assert {"binary_tensor_data", "classification", "statistics"} <= set(document["extensions"])


def test_a_model_tells_what_it_takes(client):
    document = client.get(f"/v2/models/{NAME}").json()
    assert document["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 64, 64]}]
    assert document == client.get(f"/v2/models/{NAME}/versions/1").json()
    config = client.get(f"/v2/models/{NAME}/config").json()
    assert config["input"][0]["format"] == "FORMAT_NCHW"


def test_statistics_are_of_a_model_or_of_all(client):
    (one,) = client.get(f"/v2/models/{NAME}/stats").json()["model_stats"]
    assert one["name"] == NAME
    every = client.get("/v2/models/stats").json()["model_stats"]
    assert [model["name"] for model in every] == ["coat_lite_toy", "coat_toy"]


def test_nested_and_flat_data_are_the_same(client, expected):
    nested = client.post(INFER, json={"inputs": [head(data=PIXELS.tolist())]})
    np.testing.assert_array_equal(logits(nested), expected)


def test_the_id_comes_back(client):
    answer = client.post(INFER, json=flat(id="abc-1")).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("abc-1", NAME, "1")
    assert "id" not in client.post(INFER, json=flat()).json()


def test_binary_tensors_go_in_and_json_comes_out(client, expected):
    answer = client.post(INFER, **binary())
    assert answer.headers["content-type"] == "application/json"
    np.testing.assert_array_equal(logits(answer), expected)


@pytest.mark.parametrize("whole_request", [True, False])
def test_binary_tensors_come_out_where_they_are_wanted(client, expected, whole_request):
    if whole_request:
        document = flat(parameters={"binary_data_output": True})
    else:
        document = flat(outputs=[{"name": "logits", "parameters": {"binary_data": True}}])
    answer = client.post(INFER, json=document)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[HEADER_LENGTH])
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 4 * 5} and "data" not in output
    found = np.frombuffer(answer.content[length:], np.float32).reshape(output["shape"])
    np.testing.assert_array_equal(found, expected)


def test_an_output_may_decline_what_the_request_wants(client, expected):
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}]
    document = flat(outputs=outputs, parameters={"binary_data_output": True})
    np.testing.assert_array_equal(logits(client.post(INFER, json=document)), expected)


def test_a_raw_body_is_the_one_input(client, expected):
    answer = client.post(INFER, content=PIXELS.tobytes(), headers={HEADER_LENGTH: "0"})
    length = int(answer.headers[HEADER_LENGTH])
    found = np.frombuffer(answer.content[length:], np.float32)
    np.testing.assert_array_equal(found, expected[0])


def test_a_raw_body_may_be_an_image(client, jpeg):
    raw = client.post(INFER, content=jpeg, headers={HEADER_LENGTH: "0"})
    assert raw.status_code == 200
    length = int(raw.headers[HEADER_LENGTH])
    image = {"name": "image", "datatype": "BYTES", "shape": [1]}
    content = pack_items([jpeg])
    text = json.dumps(
        {"inputs": [image | {"parameters": {"binary_data_size": len(content)}}]}
    ).encode()
    named = client.post(INFER, content=text + content, headers={HEADER_LENGTH: str(len(text))})
    assert np.frombuffer(raw.content[length:], np.float32) == pytest.approx(logits(named)[0])


def test_images_in_base64_fit_into_json(client, jpeg):
    import base64

    image = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [2],
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(jpeg).decode()] * 2,
    }
    found = logits(client.post(INFER, json={"inputs": [image]}))
    assert found.shape == (2, 5) and (found[0] == found[1]).all()


def test_classes_in_json_and_in_binary(client, expected):
    parameters = {"classification": 2}
    outputs = [{"name": "logits", "parameters": parameters}]
    (output,) = client.post(INFER, json=flat(outputs=outputs)).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    score, index, label = output["data"][0].split(":")
    assert int(index) == expected.argmax() and label in ("bag", "boot", "coat", "dress", "hat")
    assert float(score) == pytest.approx(expected.max(), abs=1e-5)
    parameters["binary_data"] = True
    answer = client.post(INFER, json=flat(outputs=outputs))
    length = int(answer.headers[HEADER_LENGTH])
    packed = pack_items([item.encode() for item in output["data"]])
    assert answer.content[length:] == packed


PACKERS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "bare deflate": lambda content: zlib.compress(content, wbits=-15),
}


@pytest.mark.parametrize("name", PACKERS)
def test_packed_bodies(client, expected, name):
    request = binary()
    request["content"] = PACKERS[name](request["content"])
    request["headers"]["content-encoding"] = name.split()[-1]
    np.testing.assert_array_equal(logits(client.post(INFER, **request)), expected)


@pytest.mark.parametrize(
    ("accept", "found"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("br, gzip;q=0.5", "gzip"), ("gzip;q=0", None),
     ("identity", None)],
)  # fmt: skip
def test_answers_are_packed_as_the_client_likes(client, accept, found):
    many = np.concatenate([PIXELS] * 30)
    answer = client.post(INFER, **binary(pixels=many) | {
        "headers": binary(pixels=many)["headers"] | {"accept-encoding": accept}
    })  # fmt: skip
    assert answer.headers.get("content-encoding") == found
    assert logits(answer).shape == (30, 5)


BROKEN = {
    "no body": (b"", "not JSON"),
    "rubbish": (b"{", "not JSON"),
    "not UTF-8": (b'{"id":"\xff"}', "not valid UTF-8"),
    "a list": (b"[]", "must be a JSON object (got an array)"),
    "deep": (b"[" * 100_000, "depth limit exceeded"),
    "no inputs": (b"{}", "'inputs' must be an array"),
    "inputs of texts": (b'{"inputs":["a"]}', "'inputs' must be an array of objects"),
    "many inputs": (json.dumps({"inputs": [{}] * 17}).encode(), "too many (got 17"),
    "no name": (b'{"inputs":[{}]}', "'name' must be a text"),
    "id": (b'{"id":5,"inputs":[]}', "'id' must be a text"),
    "parameters": (b'{"parameters":5,"inputs":[]}', "'parameters' must be an object"),
    "timeout": (b'{"parameters":{"timeout":"1"},"inputs":[]}', "whole microseconds"),
}
TENSORS = {
    "datatype": (head(datatype="FP31", data=[]), "Did you mean 'FP32'?"),
    "shape": (head(shape=[1.5], data=[]), "'shape' must be an array of whole numbers"),
    "negative shape": (head(shape=[-1, 3, 64, 64], data=[]), "'shape' must be"),
    "huge shape": (head(shape=[2**62], data=[]), "'shape' must be"),
    "huge shape of nothing": (head(shape=[0, 2**39, 2**39], data=[]), "so large a shape"),
    "no data": (head(), "has no data"),
    "data": (head(data="abc"), "'data' must be an array (got a text)"),
    "ragged": (head(data=[[1], [1, 2]]), "rows differ in length"),
    "texts": (head(data=["1", "2"]), "holds something else than FP32"),
    "nulls": (head(data=[None]), "holds something else than FP32"),
    "large": (head(data=[10**400]), "infinity when parsed"),
    "large integer": (head(datatype="INT64", shape=[1], data=[10**30]), "range of INT64"),
    "too few": (head(data=[1.0, 2.0]), "does not have the shape (got [2]"),
    "other shape": (head(data=PIXELS.reshape(3, 64, 64).tolist()), "does not have the shape"),
    "range": (head(datatype="UINT8", shape=[1], data=[256]), "out of the range of UINT8"),
    "not texts": (head(datatype="BYTES", shape=[1], data=[5]), "must be 1 texts"),
    "surrogate": (head(datatype="BYTES", shape=[1], data=["\ud800"]), "no low surrogate"),
    "other size": (head(shape=[1, 3, 2, 2], data=[0.0] * 12), "the pixels do not fit"),
    "other name": (head(name="x", data=PIXELS.tolist()), "unknown input 'x'"),
}
OUTPUTS = {
    "unknown": ([{"name": "probs"}], "unknown output 'probs'"),
    "twice": ([{"name": "logits"}] * 2, "names an output twice"),
    "classes": ([{"name": "logits", "parameters": {"classification": 9}}], "expected 0 to 5"),
    "classes of text": (
        [{"name": "logits", "parameters": {"classification": "3"}}],
        "'classification' must be a whole number",
    ),
}


def refused(answer, status, words):
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert list(document) == ["error"] and words in document["error"]


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_a_document_that_is_none(client, content, words):
    refused(client.post(INFER, content=content), 400, words)


@pytest.mark.parametrize(("tensor", "words"), TENSORS.values(), ids=TENSORS)
def test_an_input_that_is_none(client, tensor, words):
    refused(client.post(INFER, content=json.dumps({"inputs": [tensor]})), 400, words)


@pytest.mark.parametrize(("outputs", "words"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_is_none(client, outputs, words):
    refused(client.post(INFER, json=flat(outputs=outputs)), 400, words)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json(client, word):
    text = json.dumps({"inputs": [head(data=[0.5])]}).replace("0.5", word)
    refused(client.post(INFER, content=text), 400, "JSON has no NaN or infinity")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"content": b"{}"}, "is beyond the end of the body"),
        ({"headers": {HEADER_LENGTH: "-1"}}, "must be a whole number"),
        ({"headers": {HEADER_LENGTH: "9" * 30}}, "must be a whole number"),
        ({"headers": {HEADER_LENGTH: "10"}}, "not JSON"),
        ({"content": binary()["content"] + b"x"}, "has another length than the inputs say"),
        ({"content": binary()["content"][:-1]}, "has another length than the inputs say"),
        (binary(data=[1.0]), "has both 'data' and 'binary_data_size'"),
        (binary(shape=[1, 3, 64, 65]), "does not fit the shape"),
        (binary(shape=[0, 2**39, 2**39]), "so large a shape"),
        (binary(datatype="BYTES", shape=[64]), "are not 64 elements of BYTES"),
        (binary(parameters={"binary_data_size": -1}), "must be a whole number"),
        (binary(parameters={"binary_data_size": 1 << 60}), "has another length"),
    ],
)
def test_binary_that_does_not_fit(client, change, words):
    refused(client.post(INFER, **(binary() | change)), 400, words)


def test_a_text_among_numbers_does_not_make_them_all_as_long(client):
    data = ["x" * 10_000_000, *[0] * (PIXELS.size - 1)]  # as an array of texts: half a terabyte
    document = {"inputs": [head(data=data)]}
    refused(client.post(INFER, json=document), 400, "holds something else than FP32")


def test_millions_of_images_are_refused_before_each_becomes_an_object(client):
    many, content = 4_000_000, bytes(4 * 4_000_000)  # each of no bytes
    tensor = {"name": "image", "datatype": "BYTES", "shape": [many]}
    parameters = {"binary_data_size": len(content)}
    text = json.dumps({"inputs": [tensor | {"parameters": parameters}]}).encode()
    answer = client.post(INFER, content=text + content, headers={HEADER_LENGTH: str(len(text))})
    refused(answer, 413, "input 'image': too many images (got 4000000, expected 1 to 64)")


@pytest.mark.parametrize(
    "document",
    [
        flat(id=None, parameters=None, outputs=None),
        flat(parameters={"timeout": None, "binary_data_output": None}),
        flat(outputs=[{"name": "logits", "parameters": {"binary_data": None}}]),
        flat(outputs=[{"name": "logits", "parameters": {"classification": None}}]),
    ],
)
def test_what_is_optional_may_be_null(client, expected, document):
    np.testing.assert_array_equal(logits(client.post(INFER, json=document)), expected)


def test_bytes_with_lengths_that_lie(client):
    for content in (b"\xff\xff\xff\xff", b"\x05\x00\x00\x00abc", b"\x01", b""):
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
        parameters = {"binary_data_size": len(content)}
        text = json.dumps({"inputs": [tensor | {"parameters": parameters}]}).encode()
        answer = client.post(INFER, content=text + content, headers={HEADER_LENGTH: str(len(text))})
        refused(answer, 400, "are not 1 elements of BYTES")


@pytest.mark.parametrize(
    ("encoding", "content", "status", "words"),
    [
        ("br", b"x", 415, "is not read (expected gzip or deflate)"),
        ("gzip", b"rubbish", 400, "is not gzip"),
        ("deflate", b"\x78rubbish", 400, "is not deflate"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-2], 400, "is cut short"),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", 400, "goes on behind its end"),
    ],
)
def test_packed_bodies_that_are_none(client, encoding, content, status, words):
    headers = {"content-encoding": encoding}
    refused(client.post(INFER, content=content, headers=headers), status, words)


def test_a_bomb_is_not_unpacked(http, serving):
    client = http(serving(limits=Limits(body_bytes=100_000)))
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    headers = {"content-encoding": "gzip"}
    refused(client.post(INFER, content=bomb, headers=headers), 413, "unpacked")


def test_a_large_body_is_refused_whether_it_says_so_or_not(http, serving):
    client = http(serving(limits=Limits(body_bytes=1000)))
    refused(client.post(INFER, content=bytes(1001)), 413, "too large (got 1001 bytes")
    chunks = (bytes(600) for _ in range(3))
    refused(client.post(INFER, content=chunks), 413, "too large (got more than 1000")


def test_json_has_a_limit_of_its_own(http, serving):
    client = http(serving(limits=Limits(json_bytes=1000)))
    refused(client.post(INFER, content=b" " * 1001), 413, "too large for JSON")
    assert client.post(INFER, **binary()).status_code == 200


def test_bodies_together_have_a_limit(http, serving):
    client = http(serving(limits=Limits(receiving_bytes=1000)))
    answer = client.post(INFER, content=bytes(1001))
    refused(answer, 503, "of other requests")
    assert answer.headers["retry-after"] == "1"
    refused(client.post(INFER, content=b"{}"), 400, "'inputs'")  # what was held is free again


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models/no_such/infer", 404),
        (f"/v2/models/{NAME}/versions/2/infer", 404),
        ("/v2/models/..%2f..%2fetc%2fpasswd/infer", 404),
        ("/v2/models/%00/infer", 404),
        (f"/v2/models/{NAME}/infer/", 404),
    ],
)
def test_what_is_not_there(client, path, status):
    answer = client.post(path, json=flat())
    assert answer.status_code == status and list(answer.json()) == ["error"]


def test_a_request_gives_itself_a_time(client):
    refused(client.post(INFER, json=flat(parameters={"timeout": 1})), 504, "not computed in time")


def test_the_index_lists_models(client, http, serving):
    every = client.post("/v2/repository/index").json()
    assert [(m["name"], m["state"]) for m in every] == [
        ("coat_lite_toy", "READY"),
        ("coat_toy", "READY"),
    ]
    one = http(serving(names=("coat_toy",)))
    assert [m["name"] for m in one.post("/v2/repository/index", json={"ready": True}).json()] == [
        "coat_toy"
    ]
    refused(one.post("/v2/repository/index", json={"ready": 1}), 400, "'ready' must be")


def test_models_are_loaded_and_unloaded_where_that_is_allowed(client, http, serving):
    load, unload = (f"/v2/repository/models/{NAME}/{what}" for what in ("load", "unload"))
    refused(client.post(load), 403, "--allow-load")
    allowed = http(serving(allow_load=True))
    assert allowed.post(unload).status_code == 200
    refused(allowed.post(INFER, json=flat()), 503, "unloaded")
    assert allowed.get(f"/v2/models/{NAME}/ready").status_code == 503
    refused(allowed.post(load, json={"parameters": {"config": "{}"}}), 400, "are not taken")
    assert allowed.post(load).status_code == 200
    assert allowed.post(INFER, json=flat()).status_code == 200
    refused(allowed.post("/v2/repository/models/no_such/load"), 404, "not in the repository")
