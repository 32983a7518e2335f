"""`coat-deploy inspect`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.tables import format_share, render_facts, render_table
from coat_deploy.spec import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coat_deploy.inspection import Inspection


def inspect(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            show_default=False,
            help="MODEL/ARTIFACT, the path of its file, or a model that has only one.",
        ),
    ],
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Show what an artifact is, and what its layers compute in.

    Inputs, outputs, files, an engine's profiles, what a package was compiled for, where it came
    from, and a census: how many layers compute in which precision, by kind and by stage of the
    network. Of an engine they are the layers that its builder reported, of a graph its nodes; a
    package is machine code, and has none. Loads nothing into a runtime.
    """
    from coat_deploy.inspection import find_artifact
    from coat_deploy.inspection import inspect as run
    from coat_deploy.repository import Repository

    found = run(*find_artifact(Repository.open(models), artifact))
    if as_json:
        console.print_json(found.to_json())
    else:
        console.emit(render(found))


def render(found: "Inspection") -> str:
    """Return all there is to know, in tables."""
    artifact, engine = found.artifact, found.artifact.engine
    size = format_size(artifact.size) if artifact.size else "dynamic"
    opset = "" if artifact.opset is None else f", opset {artifact.opset}"
    facts: list[tuple[str, object]] = [
        ("target", artifact.target),
        ("precision", artifact.precision),
        ("form", f"{artifact.form}{opset}, size {size}"),
        *((f"input {name}", _shape(shape)) for name, shape in found.inputs.items()),
        *((f"output {name}", _shape(shape)) for name, shape in found.outputs.items()),
    ]
    if engine:
        facts.append(("built by", f"{engine.flavour} {engine.version}"))
        facts.append(("built on", _device(engine.gpu, engine.compute_capability)))
        facts += [(f"profile {i}", profile) for i, profile in enumerate(engine.profiles)]
        facts += [(name.replace("_", " "), value) for name, value in engine.options.items()]
    if package := artifact.package:
        host = package.host
        facts.append(("compiled for", f"{package.device}, by PyTorch {host.torch}"))
        facts.append(("compiled on", f"{host.cpu}, {host.system} {host.machine}"))
        if package.device != "cpu":
            facts.append(("for the GPU", _device(host.gpu, host.compute_capability)))
        facts.append(("instructions", ", ".join(host.instructions) or "unknown"))
    facts += [(name, f"{count / 2**20:.1f} MiB") for name, count in found.files.items()]
    record = found.model.weights_record
    facts += [
        ("sha256", artifact.sha256),
        ("weights", record.source if record else "those in the folder"),
        ("weights sha256", artifact.weights_sha256),
        ("exported", artifact.created),
        *(("with " + name, version) for name, version in artifact.tools.items()),
    ]
    census = found.census
    title = f"{found.model.name}: {artifact.name}"
    if census is None:
        return f"{title}\n\n{render_facts(facts)}"
    what = "layers of the engine" if engine else "nodes of the graph"
    return "\n".join(
        [
            f"{title}\n\n{render_facts(facts)}",
            render_table(("precision", what, "share"), _shares(census["by_precision"])),
            _counts("stage", census["by_stage"], census["by_precision"]),
            _counts("kind", census["by_kind"], census["by_precision"]),
        ]
    )


def _shares(by_precision: "Mapping[str, Any]") -> list[tuple[object, ...]]:
    return [(name, v["layers"], format_share(v["share"])) for name, v in by_precision.items()]


def _counts(what: str, counts: "Mapping[str, Mapping[str, int]]", precisions: Any) -> str:
    rows = [(name, *(of.get(p, 0) for p in precisions)) for name, of in counts.items()]
    return render_table((what, *precisions), rows)


def _shape(shape: list[int | str]) -> str:
    return f"({', '.join(map(str, shape))}) float32"


def _device(gpu: str | None, capability: str | None) -> str:
    return f"{gpu}, compute capability {capability}" if gpu else "a machine without a GPU"
