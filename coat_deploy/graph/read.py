"""Read the graph of an ONNX file, or say why it is none."""

from pathlib import Path
from typing import Any

from coat_deploy.errors import CorruptArtifact


def read_graph(path: Path, weights: bool) -> Any:
    """Return the model of an ONNX file, with or without what lies in a file beside it.

    Raises: CorruptArtifact.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=weights)
        reason = None if model.graph.node else "it holds no graph"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # protobuf's and onnx's errors share no base
        reason = str(error)
    if reason:
        raise CorruptArtifact(f"{path}: not a whole ONNX model ({reason}). Export it again.")
    return model
