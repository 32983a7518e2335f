from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from coat_deploy.backends.eager import EagerRunner
from coat_deploy.errors import CorruptArtifact, GraphError
from coat_deploy.graph.serialise import serialise
from coat_deploy.graph.taps import block_taps, expose
from coat_deploy.runner import LoadOptions


@pytest.fixture
def write(tmp_path: Path):
    """Return `write(model)`, the path of the file it is written to."""

    def save(model: onnx.ModelProto) -> Path:
        path = tmp_path / "graph.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return save


def test_taps_are_the_ends_of_the_blocks_in_order_of_execution(make_case, write) -> None:
    assert block_taps(write(make_case("coat_toy").graph())) == (
        "patch_embed1.image",
        "serial_blocks1.0.image",  # x1 has no class token that anything reads
        "patch_embed2.image",
        "serial_blocks2.0.image",
        "serial_blocks2.0.cls",
        "patch_embed3.image",
        "serial_blocks3.0.image",
        "serial_blocks3.0.cls",
        "patch_embed4.image",
        "serial_blocks4.0.image",
        "serial_blocks4.0.cls",
        "parallel_blocks.0.image2",
        "parallel_blocks.0.cls2",
        "parallel_blocks.0.image3",
        "parallel_blocks.0.cls3",
        "parallel_blocks.0.image4",
        "parallel_blocks.0.cls4",
        "parallel_blocks.1.cls2",  # the head reads class tokens only
        "parallel_blocks.1.cls3",
        "parallel_blocks.1.cls4",
    )


def test_every_serial_block_has_a_tap(make_case, write) -> None:
    taps = block_taps(write(make_case("coat_lite_toy").graph()))
    blocks = [tap.rpartition(".")[0] for tap in taps]
    assert list(dict.fromkeys(blocks)) == [
        "patch_embed1", "serial_blocks1.0",
        "patch_embed2", "serial_blocks2.0", "serial_blocks2.1",
        "patch_embed3", "serial_blocks3.0",
        "patch_embed4", "serial_blocks4.0",
    ]  # fmt: skip


def test_reading_taps_needs_no_weights(make_case, tmp_path: Path) -> None:
    files = serialise(make_case("coat_toy").graph(), "graph.onnx", limit=1000)
    (tmp_path / "graph.onnx").write_bytes(files["graph.onnx"])
    assert len(block_taps(tmp_path / "graph.onnx")) == 20


@pytest.mark.parametrize("size", [(75, 50), None], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
def test_taps_hold_what_the_networks_blocks_return(
    make_case, pixels, open_session, write, name, features, size
) -> None:
    case, x = make_case(name), pixels(3, (75, 50))
    path = write(case.graph(size, features=features))
    taps = block_taps(path)
    got = open_session(onnx.ModelProto.FromString(expose(path, taps)))(x)
    options = LoadOptions(features=features, taps=taps)
    with EagerRunner(case.network(features), options) as eager:
        expected = eager.run(x)
    assert got.keys() == expected.keys() >= set(taps)
    for tap in taps:
        difference = np.abs(got[tap].ravel() - expected[tap].ravel()).max()
        assert difference < 1e-5 * np.abs(expected[tap]).max(), tap


def test_exposing_leaves_the_file_as_it_was(make_case, write) -> None:
    path = write(make_case("coat_toy").graph())
    before = path.read_bytes()
    exposed = onnx.ModelProto.FromString(expose(path, ["serial_blocks1.0.image"]))
    assert [o.name for o in exposed.graph.output] == ["logits", "serial_blocks1.0.image"]
    assert path.read_bytes() == before


def test_exposing_brings_weights_along_that_lie_beside(
    make_case, pixels, open_session, tmp_path: Path
) -> None:
    case, x = make_case("coat_toy"), pixels()
    for file, content in serialise(case.graph(), "graph.onnx", limit=1000).items():
        (tmp_path / file).write_bytes(content)
    exposed = expose(tmp_path / "graph.onnx", ["serial_blocks1.0.image"])
    got = open_session(onnx.ModelProto.FromString(exposed))(x)["logits"]
    assert np.array_equal(got, open_session(case.graph())(x)["logits"])


def test_a_tensor_that_is_not_there_is_named(make_case, write) -> None:
    with pytest.raises(GraphError, match="has no inner tensor 'serial_blocks9.0.image'"):
        expose(write(make_case("coat_toy").graph()), ["serial_blocks9.0.image"])


def test_a_graph_without_block_names_sends_to_the_authored_form(write) -> None:
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"])

    node = helper.make_node("Relu", ["pixels"], ["logits"], name="node_relu_1")
    graph = helper.make_graph([node], "main_graph", [value("pixels")], [value("logits")])
    with pytest.raises(GraphError, match=r"graph\.onnx: .*not named by block.*--form authored"):
        block_taps(write(helper.make_model(graph)))


@pytest.mark.parametrize("kind", ["absent", "empty", "truncated", "garbage"])
def test_a_file_that_is_no_whole_graph_is_named(make_case, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "graph.onnx"
    whole = make_case("coat_toy").graph().SerializeToString()
    content = {"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"hello " * 99}
    if kind != "absent":
        path.write_bytes(content[kind])
    for read in (block_taps, lambda path: expose(path, ["serial_blocks1.0.image"])):
        with pytest.raises(CorruptArtifact, match=r"graph\.onnx: not a whole ONNX model"):
            read(path)
