"""The config.pbtxt of the network: a graph for onnxruntime, or TensorRT's engines."""

from collections.abc import Mapping, Sequence

from coat_deploy.runner import INPUT, LOGITS
from coat_deploy.spec import format_size
from coat_deploy.triton.pbtxt import Message, Word, map_of, render
from coat_deploy.triton.plan import Plan, Source

CONFIG, LABELS = "config.pbtxt", "labels.txt"
GRAPH, ENGINE = "model.onnx", "model.plan"
FLOAT = Word("TYPE_FP32")


def network_config(plan: Plan) -> str:
    """Return the text of the network's config, what was asked of Triton in comments above it."""
    config: dict[str, object] = {"name": plan.name}
    if plan.profiles:
        config |= {"platform": "tensorrt_plan", **_file_names(plan)}
    else:
        config |= {"backend": "onnxruntime", "default_model_filename": GRAPH}
    config |= {
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": plan.max_batch,
        "input": [tensor(INPUT, FLOAT, plan.input_shape)],
        "output": outputs(plan),
        "instance_group": [_instances(plan)],
        **_batching(plan),
        **_optimisation(plan),
        **_parameters(plan),
        "model_warmup": [_warm_up(plan, batch) for batch in _warm_batches(plan)],
    }
    return "".join(f"# {line}\n" for line in _comments(plan)) + render(config)


def tensor(name: str, kind: Word, dims: Sequence[int]) -> dict[str, object]:
    """Return the field of an input or output, whose `dims` are of one image."""
    return {"name": name, "data_type": kind, "dims": list(dims)}


def outputs(plan: Plan) -> list[Message]:
    """Return the fields of the network's outputs; the logits know their labels."""
    return [
        tensor(name, FLOAT, shape) | ({"label_filename": LABELS} if name == LOGITS else {})
        for name, shape in plan.output_shapes.items()
    ]


def engine_files(plan: Plan) -> Mapping[str, Source]:
    """Return the engines by the names of their files in the repository."""
    if len(plan.sources) == 1 and plan.sources[0].capability is None:
        return {ENGINE: plan.sources[0]}
    return {_engine_file(source): source for source in plan.sources}


def _engine_file(source: Source) -> str:
    capability = source.capability
    return f"model-sm{capability.replace('.', '')}.plan" if capability else ENGINE


def _file_names(plan: Plan) -> Message:
    """Return which engine is for which GPU; one for any is the default."""
    files = engine_files(plan)
    exact = {source.capability: file for file, source in files.items() if source.capability}
    default = {"default_model_filename": ENGINE} if ENGINE in files else {}
    return default | {"cc_model_filenames": map_of({str(cc): exact[cc] for cc in sorted(exact)})}


def _instances(plan: Plan) -> Message:
    kind = Word("KIND_GPU" if plan.on_gpu else "KIND_CPU")
    group: dict[str, object] = {"count": plan.options.instances, "kind": kind}
    if plan.profiles:
        group["profile"] = [str(i) for i in range(len(plan.profiles))]
    return group


def _batching(plan: Plan) -> Message:
    """Return how requests are put together: those that wait, into what an idle instance takes."""
    options = plan.options
    queue = {"timeout_action": Word("REJECT"), "max_queue_size": options.max_queue}
    batching: dict[str, object] = {}
    if plan.best_batches:
        batching["preferred_batch_size"] = plan.best_batches
    if options.delay_us:
        batching["max_queue_delay_microseconds"] = options.delay_us
    return {"dynamic_batching": batching | {"default_queue_policy": queue}}


def _optimisation(plan: Plan) -> Message:
    if plan.profiles:
        graphs = [_captured(plan, batch) for batch in _warm_batches(plan)]
        return {"optimization": {"cuda": {"graphs": True, "graph_spec": graphs}}}
    accelerators: Message
    if plan.options.accelerator == "openvino":
        accelerators = {"cpu_execution_accelerator": [{"name": "openvino"}]}
    elif plan.options.accelerator == "tensorrt":
        # fp32 alone: lower precisions are in the graphs of engines, where they were held to a bar.
        fp32 = {"name": "tensorrt", "parameters": map_of({"precision_mode": "FP32"})}
        accelerators = {"gpu_execution_accelerator": [fp32]}
    else:
        return {}
    return {"optimization": {"execution_accelerators": accelerators}}


def _captured(plan: Plan, batch: int) -> Message:
    """Return a shape whose launches are captured as one CUDA graph."""
    return {"batch_size": batch, "input": map_of({INPUT: {"dim": [3, *plan.nominal]}})}


def _parameters(plan: Plan) -> Message:
    if not plan.options.threads:
        return {}
    count = {"string_value": str(plan.options.threads)}
    return {"parameters": map_of({"intra_op_thread_count": count})}


def _warm_batches(plan: Plan) -> list[int]:
    return sorted({1, *(plan.best_batches or [plan.max_batch])})


def _warm_up(plan: Plan, batch: int) -> Message:
    """Return a request that is computed before the model is ready, of the nominal size."""
    pixels = {"data_type": FLOAT, "dims": [3, *plan.nominal], "random_data": True}
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": map_of({INPUT: pixels})}


def _comments(plan: Plan) -> list[str]:
    artifact, engine = plan.artifact, plan.artifact.engine
    lines = [f"Written by coat-deploy, of {plan.model.name}'s {artifact.name}."]
    if engine:
        lines.append(f"Needs a Triton with {engine.flavour} {engine.version}, which built it.")
    elif plan.on_gpu and artifact.precision == "fp32":
        lines.append("A GPU may round products to TF32: set NVIDIA_TF32_OVERRIDE=0 to keep fp32.")
    if artifact.size is None:
        lines.append(f"Any image size; best at {format_size(plan.nominal)}.")
    return lines
