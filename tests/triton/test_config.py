"""Every config.pbtxt by Triton's schema, and against the file that it is of."""

import json
import shutil

import onnx
import pytest

ARTIFACTS = (
    "onnxruntime-fp32",
    "onnxruntime-fp32-dynamic",
    "onnxruntime-fp32-features",
    "onnxruntime-fp32-dynamic-features",
)


def shapes(tensors):
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in tensors}


def graph_shapes(values):
    """Names, types and shapes less the batch of a graph's inputs or outputs, as Triton has them."""
    found = {}
    for value in values:
        kind = value.type.tensor_type
        assert kind.elem_type == onnx.TensorProto.FLOAT
        batch, *lengths = kind.shape.dim
        assert batch.dim_param
        found[value.name] = (11, [length.dim_value or -1 for length in lengths])  # TYPE_FP32
    return found


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_names_types_and_shapes_are_those_of_the_graph(triton, repository, artifact, configs):
    ran = triton("--artifact", artifact)
    assert ran.status == 0, ran.err
    config = configs()["toy"]
    graph = onnx.load(repository / "toy" / "1" / config.default_model_filename).graph
    assert shapes(config.input) == graph_shapes(graph.input)
    assert shapes(config.output) == graph_shapes(graph.output)
    assert config.backend == "onnxruntime"


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_the_ensemble_leads_from_an_image_to_the_networks_outputs(triton, artifact, configs):
    assert triton("--artifact", artifact, "--decoders", 3).status == 0
    read = configs()
    network, decoding, ensemble = (read[n] for n in ("toy", "toy_preprocess", "toy_image"))
    assert shapes(decoding.input) == shapes(ensemble.input) == {"image": (13, [1])}  # TYPE_STRING
    assert shapes(decoding.output) == {"pixels": (11, [3, 64, 96])}
    assert shapes(ensemble.output) == shapes(network.output)
    assert {c.max_batch_size for c in read.values()} == {8}
    assert [group.count for group in decoding.instance_group] == [3]
    first, second = ensemble.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == ("toy_preprocess", "toy")
    assert dict(first.input_map) == {"image": "image"}
    assert dict(first.output_map) == dict(second.input_map) == {"pixels": "pixels"}
    assert dict(second.output_map) == {name: name for name in shapes(network.output)}


def test_how_images_are_prepared_stands_in_the_config(triton, configs):
    assert triton().status == 0
    text = configs()["toy_preprocess"].parameters["preprocess"].string_value
    assert json.loads(text) == {
        "input_size": [64, 96],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }


def test_feature_maps_have_no_labels(triton, repository, configs):
    assert triton("--artifact", "onnxruntime-fp32-features").status == 0
    assert not list(repository.rglob("labels.txt"))
    assert all(not o.label_filename for o in configs()["toy"].output)


def test_requests_share_a_step_and_too_many_are_refused(triton, configs):
    words = ("--max-batch", 16, "--delay-us", 500, "--max-queue", 99, "--instances", 3)
    assert triton(*words, "--threads", 2).status == 0
    config = configs()["toy"]
    batching = config.dynamic_batching
    assert config.max_batch_size == 16
    assert batching.max_queue_delay_microseconds == 500
    assert batching.default_queue_policy.max_queue_size == 99
    assert batching.default_queue_policy.timeout_action == 0  # REJECT
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, 2)  # KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "2"


def test_it_is_warmed_up_with_one_image_and_a_full_step(triton, configs):
    assert triton("--max-batch", 16).status == 0
    config = configs()["toy"]
    assert [entry.batch_size for entry in config.model_warmup] == [1, 16]
    assert {tuple(e.inputs["pixels"].dims) for e in config.model_warmup} == {(3, 64, 96)}


@pytest.mark.parametrize(
    ("accelerator", "kind", "cpu", "gpu"),
    [
        ("cpu", 2, [], []),
        ("openvino", 2, ["openvino"], []),
        ("cuda", 1, [], []),  # what its onnxruntime takes on a GPU without being told
        ("tensorrt", 1, [], ["tensorrt"]),
    ],
)
def test_accelerators(triton, repository, accelerator, kind, cpu, gpu, configs):
    assert triton("--accelerator", accelerator).status == 0
    config = configs()["toy"]
    chosen = config.optimization.execution_accelerators
    assert [group.kind for group in config.instance_group] == [kind]
    assert [a.name for a in chosen.cpu_execution_accelerator] == cpu
    assert [a.name for a in chosen.gpu_execution_accelerator] == gpu
    text = (repository / "toy" / "config.pbtxt").read_text()
    assert ("NVIDIA_TF32_OVERRIDE" in text) == (kind == 1)


def test_engines_are_files_by_compute_capability(
    triton, repository, models, add_engine, tmp_path, configs
):
    for name, capability in (("a10", "8.6"), ("h100", "9.0")):
        folder = tmp_path / name / "toy"
        folder.parent.mkdir()
        shutil.copytree(models / "toy", folder)
        add_engine(folder, capability)
    words = ("--target", "tensorrt", "--also", tmp_path / "h100" / "toy")
    ran = triton(*words, model=str(tmp_path / "a10" / "toy"))
    assert ran.status == 0, ran.err
    config = configs()["toy"]
    assert config.platform == "tensorrt_plan"
    files = dict(config.cc_model_filenames)
    assert files == {"8.6": "model-sm86.plan", "9.0": "model-sm90.plan"}
    for capability, file in files.items():
        plan = repository / "toy" / "1" / file
        assert plan.read_text() == f"engine for {capability}"


def test_an_engine_is_served_by_its_profiles_and_cuda_graphs(
    triton, repository, models, add_engine, configs
):
    add_engine(models / "toy")
    assert triton("--target", "tensorrt").status == 0
    config = configs()["toy"]
    (group,) = config.instance_group
    assert (group.kind, list(group.profile)) == (1, ["0", "1"])
    assert config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 8]
    cuda = config.optimization.cuda
    assert cuda.graphs
    assert [spec.batch_size for spec in cuda.graph_spec] == [1, 8]
    assert {tuple(s.input["pixels"].dim) for s in cuda.graph_spec} == {(3, 64, 96)}
    assert "TensorRT 10.13.3" in (repository / "toy" / "config.pbtxt").read_text()


def test_an_engine_for_any_gpu_is_the_default(triton, repository, models, add_engine, configs):
    add_engine(models / "toy", record={"options": {"hardware_compatible": True}})
    assert triton("--target", "tensorrt").status == 0
    config = configs()["toy"]
    assert (config.default_model_filename, len(config.cc_model_filenames)) == ("model.plan", 0)
    assert (repository / "toy" / "1" / "model.plan").is_file()
