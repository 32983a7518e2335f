"""Whether onnxruntime's guards hold: a node without a kernel on the GPU must not go unseen."""

from pathlib import Path

from coat_deploy.errors import RunnerError
from coat_deploy.gpu_report.apart import Tell
from coat_deploy.gpu_report.networks import write_graph
from coat_deploy.gpu_report.way import Place
from coat_deploy.runner import LoadOptions

VARIANT = "coat_lite_toy"


def check_placement(tell: Tell, place: Place) -> None:
    """Load a network that belongs on the GPU, and a graph that cannot be there; in a process."""
    from coat_deploy.backends import onnxruntime_cuda

    options = LoadOptions(device="cuda")
    graph = write_graph(VARIANT, "onnxruntime", "fp32", place.folder)
    with onnxruntime_cuda.load(graph.path, options):
        tell({"check": "every node of a network is on the GPU", "passed": True})
    what = "a node that CUDA has no kernel for is refused"
    try:
        with onnxruntime_cuda.load(write_stray(place.folder), options):
            tell({"check": what, "passed": False})
    except RunnerError as error:
        tell({"check": what, "passed": True, "said": str(error)})


def write_stray(folder: Path) -> Path:
    """Write a graph of a determinant, which onnxruntime computes on CPUs alone."""
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Det", ["pixels"], ["logits"], name="stray")],
        "stray",
        [info("pixels", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [info("logits", TensorProto.FLOAT, ["batch", 3])],
    )
    opset = helper.make_opsetid("", 20)
    path = folder / "stray.onnx"
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path
