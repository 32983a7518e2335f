"""Check a graph before it is written."""

import onnx
from onnx import ModelProto

from coat_deploy.errors import GraphError
from coat_deploy.runner import FEATURES, INPUT, LOGITS

SHAPE_OPERATORS = frozenset(
    {"ConstantOfShape", "Expand", "Gather", "NonZero", "Range", "Shape", "Size", "Tile"}
)
"""What exporters compute shapes with. A fixed size needs none of it, a dynamic one `Shape`."""


def check_graph(model: ModelProto) -> None:
    """Check a model by ONNX's own checker, shapes inferred and compared, and its names by ours.

    Raises: GraphError with the checker's reason.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"{model.graph.name}: not a valid ONNX graph ({error}).") from error
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    if inputs != [INPUT] or outputs not in ([LOGITS], list(FEATURES)):
        raise GraphError(
            f"{model.graph.name}: wrong inputs or outputs (got {inputs} to {outputs}, expected "
            f"['{INPUT}'] to ['{LOGITS}'] or {list(FEATURES)})."
        )


def shape_operators(model: ModelProto) -> list[str]:
    """Return the names of nodes that compute shapes."""
    return [node.name for node in model.graph.node if node.op_type in SHAPE_OPERATORS]
