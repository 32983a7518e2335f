"""The eager network traced by PyTorch's exporter: the oracle of the authored graphs.

It is also the baseline that their speed is divided by, so it is made as a careful user would:
`torch.onnx.export` with dynamo, dynamic batch, the same opset, names and outputs.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from onnx import ModelProto

from coat_deploy.errors import BackendMissing, GraphError
from coat_deploy.graph.author import check_opset
from coat_deploy.graph.coat import GraphOptions, check_size
from coat_deploy.graph.layer import Floats
from coat_deploy.network.coat import CoaT, create_network
from coat_deploy.runner import FEATURES, INPUT, LOGITS
from coat_deploy.spec import ModelSpec


def trace_graph(
    spec: ModelSpec, weights: Mapping[str, Floats], options: GraphOptions
) -> ModelProto:
    """Return the traced graph of `spec` with `weights`; batch dynamic, H and W as in `options`.

    Raises: BackendMissing without onnxscript; GraphError for a size or an opset that is not
        supported, or when the exporter fails.
    """
    check_opset(options.opset)
    network = _network(spec, weights, options.features)
    check_size(network.variant, options.size)
    height, width = options.size or spec.preprocess.input_size
    example = torch.zeros(2, 3, height, width)
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch")}
    if options.size is None:
        smallest = network.variant.min_side
        dynamic[2] = torch.export.Dim("height", min=smallest)
        dynamic[3] = torch.export.Dim("width", min=smallest)
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                opset_version=options.opset,
                input_names=[INPUT],
                output_names=list(FEATURES) if options.features else [LOGITS],
                verbose=False,
            )
    except ImportError as error:
        raise BackendMissing(
            f"traced graph: package {error.name} is not installed. "
            'Run: pip install "coat-deploy[torch]".'
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(
            f"{spec.architecture}: PyTorch's exporter failed ({type(error).__name__}: {reason}). "
            "Export the authored graph instead: --form authored."
        ) from error
    assert program is not None
    return program.model_proto


def _network(spec: ModelSpec, weights: Mapping[str, Floats], features: bool) -> CoaT:
    network = create_network(
        spec.architecture, spec.num_classes, features=features, **spec.model_args
    )
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    network.load_state_dict(tensors, strict=not features)
    return network.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and advice, meant for its developers, off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
