import json
from dataclasses import replace

import onnx
import pytest
from onnx import ModelProto, helper

from coat_deploy.graph.check import check_graph
from coat_deploy.graph.metadata import add_metadata, read_metadata
from coat_deploy.spec import ModelSpec, WeightsRecord
from coat_deploy.version import __version__

LABELS = ["T-shirt", 'a "quoted" name', "Schürze, weiß", "裤子"]
DIGEST = "3f" * 32


@pytest.fixture
def model(make_case) -> ModelProto:
    """A graph with metadata, as it is read back from its bytes."""
    case = make_case("coat_lite_toy", 4)
    model = case.graph()
    add_metadata(model, case.spec, LABELS, DIGEST, target="openvino", precision="bf16")
    return ModelProto.FromString(model.SerializeToString())


def test_metadata_is_read_back_as_written(model: ModelProto) -> None:
    found = read_metadata(model)
    assert found["model"] == "coat_lite_toy"
    assert json.loads(found["labels"]) == LABELS
    assert found["weights_sha256"] == DIGEST
    assert (found["target"], found["precision"]) == ("openvino", "bf16")


def test_the_file_says_which_versions_made_it(model: ModelProto) -> None:
    found = read_metadata(model)
    assert (found["version"], found["onnx_version"]) == (__version__, onnx.__version__)
    assert (model.producer_name, model.producer_version) == ("coat-deploy", __version__)


def test_the_config_is_the_models_whole_config(make_case) -> None:
    case = make_case("coat_toy", 4, co_scale="none")
    spec = replace(
        case.spec,
        label_names=tuple(LABELS),
        weights=WeightsRecord("official", "http://127.0.0.1/x.pth", DIGEST),
    )
    model = case.graph()
    add_metadata(model, spec, LABELS, DIGEST)
    assert ModelSpec.from_json(json.loads(read_metadata(model)["config"])) == spec


def test_metadata_leaves_the_graph_valid_and_as_it_was(make_case, model: ModelProto) -> None:
    check_graph(model)
    assert model.graph == make_case("coat_lite_toy", 4).graph().graph


def test_entries_of_others_are_not_ours(model: ModelProto) -> None:
    before = read_metadata(model)
    entry = model.metadata_props.add()
    entry.key, entry.value = "author", "someone"
    assert read_metadata(model) == before


def test_a_file_of_another_tool_has_none() -> None:
    model = helper.make_model(helper.make_graph([], "empty", [], []))
    assert read_metadata(model) == {}


def test_a_traced_graphs_producer_is_replaced(make_case) -> None:
    model = make_case("coat_lite_toy").graph()
    model.producer_name, model.producer_version = "pytorch", "2.0"
    add_metadata(model, make_case("coat_lite_toy").spec, [], DIGEST)
    assert model.producer_name == "coat-deploy"
