import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from safetensors.numpy import save_file

from coat_deploy.graph.metadata import add_metadata
from coat_deploy.graph.serialise import EXTERNAL_DATA_BYTES, MIN_TENSOR_BYTES, serialise


@pytest.fixture
def model(make_case) -> ModelProto:
    return make_case("coat_toy").graph()


def weight_bytes(model: ModelProto) -> int:
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def test_a_small_graph_is_one_file(model: ModelProto) -> None:
    files = serialise(model, "graph.onnx")
    assert list(files) == ["graph.onnx"]
    assert ModelProto.FromString(files["graph.onnx"]) == model


def test_weights_go_beside_exactly_above_the_limit(model: ModelProto) -> None:
    count = weight_bytes(model)
    assert list(serialise(model, "graph.onnx", limit=count)) == ["graph.onnx"]
    assert list(serialise(model, "graph.onnx", limit=count - 1)) == [
        "graph.onnx",
        "graph.onnx.data",
    ]


def test_the_limit_is_below_what_protobuf_can_hold() -> None:
    assert EXTERNAL_DATA_BYTES == 1.5e9 < 2**31


def test_two_files_in_a_folder_run_as_the_one(
    model: ModelProto, pixels, open_session, tmp_path: Path
) -> None:
    for file, content in serialise(model, "graph.onnx", limit=1000).items():
        (tmp_path / file).write_bytes(content)
    x = pixels(3)
    got = open_session(str(tmp_path / "graph.onnx"))(x)["logits"]
    assert np.array_equal(got, open_session(model)(x)["logits"])
    onnx.checker.check_model(tmp_path / "graph.onnx", full_check=True)


def test_small_tensors_stay_where_shapes_are_inferred(model: ModelProto) -> None:
    files = serialise(model, "graph.onnx", limit=1000)
    graph = ModelProto.FromString(files["graph.onnx"]).graph
    for before, after in zip(model.graph.initializer, graph.initializer, strict=True):
        outside = after.data_location == onnx.TensorProto.EXTERNAL
        assert outside == (len(before.raw_data) >= MIN_TENSOR_BYTES)
        assert outside or after == before
    assert len(files["graph.onnx"]) < len(files["graph.onnx.data"])


def test_every_tensor_outside_is_found_at_its_offset(model: ModelProto) -> None:
    files = serialise(model, "graph.onnx", limit=1000)
    graph = ModelProto.FromString(files["graph.onnx"]).graph
    end = 0
    for before, after in zip(model.graph.initializer, graph.initializer, strict=True):
        if after.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in after.external_data}
        offset, length = int(where["offset"]), int(where["length"])
        assert where["location"] == "graph.onnx.data"
        assert files["graph.onnx.data"][offset : offset + length] == before.raw_data
        assert offset == end
        end += length
    assert end == len(files["graph.onnx.data"])


def test_the_model_stays_as_it_was(model: ModelProto) -> None:
    before = model.SerializeToString()
    serialise(model, "graph.onnx", limit=1000)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("limit", [EXTERNAL_DATA_BYTES, 1000], ids=["one file", "two files"])
def test_authoring_twice_gives_the_same_bytes(make_case, limit: int) -> None:
    case = make_case("coat_toy")
    assert serialise(case.graph(), "g", limit) == serialise(case.graph(), "g", limit)


AUTHOR_IN_A_PROCESS_OF_ITS_OWN = """
import hashlib, json, sys
sys.modules.update(dict.fromkeys(["torch", "onnxruntime", "openvino"]))  # importing them fails
from pathlib import Path
from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.metadata import add_metadata
from coat_deploy.graph.serialise import serialise
from coat_deploy.network.weights import read_safetensors
from coat_deploy.spec import ModelSpec
folder = Path(sys.argv[1])
spec = ModelSpec.from_json(json.loads((folder / "config.json").read_text()))
weights = read_safetensors(folder / "model.safetensors")
graph = author_graph(spec, weights, GraphForm(), GraphOptions((64, 64)))
add_metadata(graph, spec, ["a", "b"], "digest", target="onnxruntime")
print(hashlib.sha256(serialise(graph, "g")["g"]).hexdigest())
"""


def test_another_process_without_torch_writes_the_same_bytes(make_case, tmp_path: Path) -> None:
    case = make_case("coat_toy")
    (tmp_path / "config.json").write_text(json.dumps(case.spec.to_json()))
    # Aliases are arrays of their own in the file: shared storage is not.
    save_file({k: v.copy() for k, v in case.weights.items()}, tmp_path / "model.safetensors")
    graph = case.graph()
    add_metadata(graph, case.spec, ["a", "b"], "digest", target="onnxruntime")
    expected = hashlib.sha256(serialise(graph, "g")["g"]).hexdigest()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", AUTHOR_IN_A_PROCESS_OF_ITS_OWN, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.strip() == expected, done.stderr
