"""`coat-deploy triton`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coat_deploy.cli import console
from coat_deploy.cli.tables import render_facts, render_table
from coat_deploy.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coat_deploy.artifact import Artifact
    from coat_deploy.model import ArtifactQuery, Model
    from coat_deploy.triton.repository import Written


def triton(
    model: console.ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            show_default=False,
            help="The repository: a new folder, an empty one, or one with models for Triton.",
        ),
    ],
    target: Annotated[
        str, typer.Option(metavar="NAME", help="onnxruntime, or tensorrt.")
    ] = "onnxruntime",
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Precision of the artifact.")
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The artifact, by its name; for one with feature maps or of another size.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="tensorrt: the same model with an engine for GPUs of another compute capability; "
            "may be repeated.",
        ),
    ] = None,
    rename: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Name that clients call it by.")
    ] = None,
    accelerator: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What computes a graph within Triton's onnxruntime: cpu, openvino, cuda or "
            "tensorrt.",
        ),
    ] = "cpu",
    max_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most images in a step. Default: the engine's, or 8 on a CPU (int8: 1), and 64 "
            "on a GPU.",
        ),
    ] = None,
    instances: Annotated[
        int, typer.Option(metavar="N", help="Steps at once; on every GPU, if on GPUs.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads of a step on the CPU. Default: one a core."),
    ] = None,
    delay_us: Annotated[
        int,
        typer.Option(
            metavar="N", help="Microseconds that a request may wait for others to share its step."
        ),
    ] = 0,
    max_queue: Annotated[
        int, typer.Option(metavar="N", help="Waiting requests above which one is refused.")
    ] = 256,
    decoders: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Processes that decode images; 0 leaves out the models that take images.",
        ),
    ] = 2,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    DIR/MODEL takes pixels and gives logits, with labels for the classification extension.
    DIR/MODEL_image takes images as they are in files, and prepares them as in validation, by
    Triton's Python backend and a copy of the very code. Requests that wait share a step, and
    the model is warmed up before it is ready.

    Written whole or not at all: what an earlier run wrote is replaced, anything else in the way
    is refused. Every copied file is verified against the digest that the export took.

    On a CPU, --max-batch 1 --threads 1 --instances CORES computes images one by one, which takes
    less time than batches do.
    """
    from coat_deploy.model import ArtifactQuery
    from coat_deploy.repository import Repository
    from coat_deploy.triton.plan import Source, TritonOptions, check_target, settle
    from coat_deploy.triton.repository import write_repository

    repository = Repository.open(models)
    check_target(target)
    query = ArtifactQuery(target, precision)
    found = [repository.find(name) for name in (model, *(also or ()))]
    sources = [Source(each, _artifact(each, artifact, query)) for each in found]
    options = TritonOptions(
        name=rename,
        accelerator=accelerator,
        max_batch=max_batch,
        instances=instances,
        threads=threads,
        delay_us=delay_us,
        max_queue=max_queue,
        decoders=decoders,
    )
    with console.steps(f"writing {out}"):
        written = write_repository(settle(sources, options), out)
    if as_json:
        console.print_json(written.to_json())
    else:
        console.emit(render(written))
        console.hint(f"Next: tritonserver --model-repository {out.resolve()}")


def _artifact(model: "Model", name: str | None, query: "ArtifactQuery") -> "Artifact":
    """Return the artifact of that name, else the one meant. Raises UsageError, RepositoryError."""
    if name is None:
        return model.find(query)
    by_name = {artifact.name: artifact for artifact in model.artifacts}
    if name not in by_name:
        raise UsageError(f"{model.folder}: {unknown_name('artifact', name, by_name)}")
    return by_name[name]


def render(written: "Written") -> str:
    """Return what clients call, and where the files are."""
    from coat_deploy.runner import INPUT

    plan = written.plan
    facts: list[tuple[str, object]] = [
        ("repository", written.out.resolve()),
        *(("artifact", source.model.path(source.artifact)) for source in plan.sources),
        ("computed by", plan.artifact.target if plan.profiles else plan.options.accelerator),
        ("batch", f"up to {plan.max_batch}"),
    ]
    results = ", ".join(f"{name} {_shape(shape)}" for name, shape in plan.output_shapes.items())
    rows = [(plan.name, f"{INPUT} {_shape(plan.input_shape)}", results)]
    if plan.options.decoders:
        rows.append((plan.folders[2], "image (an encoded image)", results))
    calls = render_table(("model", "takes", "gives"), rows)
    return f"{render_facts(facts)}\n{calls}"


def _shape(shape: "Sequence[int]") -> str:
    return f"({', '.join('any' if length < 0 else str(length) for length in shape)})"
