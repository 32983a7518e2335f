import pytest
from onnx import TensorProto, helper

from coat_deploy.errors import GraphError
from coat_deploy.graph.check import check_graph, shape_operators


@pytest.fixture
def model(make_case):
    return make_case("coat_lite_toy").graph()


@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize("size", [(64, 64), None], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
def test_an_authored_graph_passes(make_case, name, size, features) -> None:
    check_graph(make_case(name).graph(size, features=features))


def test_a_missing_node_is_refused_with_the_tensor_that_lacks(model) -> None:
    lost = next(i for i, n in enumerate(model.graph.node) if n.name == "serial_blocks2.1.mlp.act")
    del model.graph.node[lost]
    with pytest.raises(GraphError, match=r"coat_lite_toy: not a valid .*serial_blocks2\.1\.mlp"):
        check_graph(model)


def test_an_output_of_another_shape_than_declared_is_refused(model) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11
    with pytest.raises(GraphError, match=r"coat_lite_toy: not a valid ONNX graph .*11"):
        check_graph(model)


def test_an_operator_that_the_opset_does_not_know_is_refused(model) -> None:
    model.opset_import[0].version = 19
    with pytest.raises(GraphError, match="Gelu"):
        check_graph(model)


def test_weights_that_do_not_fit_their_operator_are_refused(model) -> None:
    head = next(t for t in model.graph.initializer if t.name == "head.weight")
    head.CopyFrom(helper.make_tensor("head.weight", TensorProto.FLOAT, (3, 10), [0.0] * 30))
    with pytest.raises(GraphError, match="coat_lite_toy: not a valid ONNX graph"):
        check_graph(model)


def test_other_names_of_inputs_and_outputs_are_refused(model) -> None:
    model.graph.input[0].name = "image"
    for node in model.graph.node:
        node.input[:] = ["image" if name == "pixels" else name for name in node.input]
    with pytest.raises(GraphError, match=r"got \['image'\] to \['logits'\], expected \['pixels'\]"):
        check_graph(model)


def test_shape_operators_are_named(make_case) -> None:
    assert shape_operators(make_case("coat_toy").graph()) == []
    dynamic = make_case("coat_toy").graph(None)
    assert shape_operators(dynamic)[0] == "patch_embed1.size"
    dynamic.graph.node.append(helper.make_node("Gather", ["a", "b"], ["c"], name="picked"))
    assert shape_operators(dynamic)[-1] == "picked"
