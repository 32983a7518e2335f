"""Inner tensors of a graph at the ends of its blocks, for comparison block by block."""

import re
from collections.abc import Sequence
from pathlib import Path

from coat_deploy.errors import GraphError
from coat_deploy.graph.read import read_graph

_BLOCK_END = re.compile(
    # The class token that joins at an embedding is a constant: nothing to compare.
    r"patch_embed\d\.image|(serial_blocks\d\.\d+|parallel_blocks\.\d+)\.(image|cls)\d?"
)


def block_taps(path: Path) -> tuple[str, ...]:
    """Return the names of the tensors at the ends of the blocks of an ONNX file, in order.

    Raises: GraphError for a graph whose names do not tell its blocks (a traced one),
        CorruptArtifact for a file that is no whole ONNX model.
    """
    graph = read_graph(path, weights=False).graph
    names = [name for node in graph.node for name in node.output if _BLOCK_END.fullmatch(name)]
    if not names:
        raise GraphError(
            f"{path}: its tensors are not named by block, as those of an authored graph are. "
            "Compare an artifact exported with --form authored."
        )
    return tuple(names)


def expose(path: Path, taps: Sequence[str]) -> bytes:
    """Return an ONNX file's model with the inner tensors `taps` as further outputs.

    Raises: GraphError for a tensor that is not there, CorruptArtifact as `block_taps`.
    """
    import onnx

    model = read_graph(path, weights=True)
    known = {name for node in model.graph.node for name in node.output}
    for tap in taps:
        if tap not in known:
            raise GraphError(f"{path}: the graph has no inner tensor '{tap}'.")
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(tap, onnx.TensorProto.FLOAT, None)
        )
    content: bytes = model.SerializeToString()
    return content
