"""`coat-deploy export`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coat_deploy.cli import console, engine_options
from coat_deploy.cli.sizes import check_sizes, read_size
from coat_deploy.cli.tables import format_share, render_facts
from coat_deploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coat_deploy.export import Exported
    from coat_deploy.measure.bar import Bar

AUTO = "auto"
GRAPH, CHECKS, CLASSES = "The graph", "Its validation", "Another classifier than the config's"


def export(
    model: console.ModelArgument,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Runtime to export for: onnxruntime, openvino, tensorrt, tensorrt-rtx or "
            "aotinductor.",
        ),
    ] = "onnxruntime",
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="fp32; for onnxruntime also int8, and fp16 on GPUs, for openvino bf16, for "
            "aotinductor fp16 and bf16 on GPUs, for engines tf32, fp16 and bf16, and best: fp16 "
            "with the fewest blocks in fp32 that it takes; auto: what runs best here of those that "
            "agree, by measuring. Default: fp32.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="timm, official, a .safetensors or .pth file, random or random:SEED. "
            "Default: those in the model's folder, else where its config points to.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="SIDE, HEIGHTxWIDTH, or dynamic. Default: the model's own."
        ),
    ] = None,
    rename: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Write a model folder of another name."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", metavar="", help="Use cached downloads only.")
    ] = False,
    threads: console.ThreadsOption = None,
    device: console.DeviceOption = "cpu",
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
    form: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=GRAPH,
            help="authored: ours; traced: what PyTorch's exporter makes, to compare with.",
        ),
    ] = "authored",
    features: Annotated[
        bool,
        typer.Option(
            "--features",
            metavar="",
            rich_help_panel=GRAPH,
            help="Output the feature maps x1, x2, x3, x4 instead of logits.",
        ),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=GRAPH,
            help="ONNX operator set, 18 to 23. Default: 20, or 22 for bf16 in the graph.",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=CHECKS,
            help="Photographs to validate on, a file or a folder; may be repeated. "
            "Default: synthetic images.",
        ),
    ] = None,
    no_validate: Annotated[
        bool,
        typer.Option(
            "--no-validate",
            metavar="",
            rich_help_panel=CHECKS,
            help="Leave it at replaying the proof: two images, without classes.",
        ),
    ] = False,
    max_abs_difference: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel=CHECKS,
            help="Bar: largest |delta logit|. Default: by precision.",
        ),
    ] = None,
    min_top1_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel=CHECKS,
            help="Bar: least share of equal top-1 classes, 0 to 1.",
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=CLASSES, help="Classes of the checkpoint."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=CLASSES, help="Text file with one class name a line."
        ),
    ] = None,
    replace_head: Annotated[
        bool,
        typer.Option(
            "--replace-head",
            metavar="",
            rich_help_panel=CLASSES,
            help="Take all but the classifier from the checkpoint; the new one is random.",
        ),
    ] = False,
    batch: engine_options.BatchOption = None,
    size_range: engine_options.SizeRangeOption = None,
    keep_fp32: engine_options.KeepOption = None,
    islands: engine_options.IslandsOption = None,
    workspace: engine_options.WorkspaceOption = None,
    effort: engine_options.EffortOption = None,
    compute_capability: engine_options.CapabilityOption = None,
    hardware_compatible: engine_options.HardwareCompatibleOption = False,
    version_compatible: engine_options.VersionCompatibleOption = False,
    refit: engine_options.RefitOption = False,
    strip_weights: engine_options.StripOption = False,
) -> None:
    """Turn a model's weights into an artifact, proven equal to PyTorch.

    Writes MODELS/MODEL/1/TARGET-PRECISION.onnx, its proof, the weights and a manifest that says
    where everything came from. The artifact is held against PyTorch first: one that does not
    agree is not written, what was there stays, and the exit status is 3. With --precision auto
    every precision is tried, and the most exact one kept unless another is clearly faster.

    An engine is built of the graph, strongly typed, and what each of its layers computes in is
    read back: one that is not what was asked fails the export. Without a GPU, which tensorrt-rtx
    does not need to build, the graph is held against PyTorch by another runtime.

    For aotinductor PyTorch compiles the network itself, for minutes, to a package (.pt2) for just
    this version of PyTorch and this kind of processor or, with --device cuda, GPU; it needs a C++
    compiler. A package is machine code: load only those that you trust.
    """
    from coat_deploy.choose import ChooseOptions, choose
    from coat_deploy.cli.choice_report import render_choice
    from coat_deploy.cli.inputs import load_batches
    from coat_deploy.export import ExportOptions
    from coat_deploy.export import export as run
    from coat_deploy.network.weights import WeightsOptions
    from coat_deploy.repository import Repository

    repository = Repository.open(models)
    fixed, dynamic = read_size(size)
    check_sizes([fixed] if fixed else [], repository.find(model).spec)
    if rename == "":
        raise UsageError("--as: an empty name (got ''). Give one, or leave it out.")
    limits = read_limits(max_abs_difference, min_top1_agreement)
    with console.steps(f"exporting {model}") as tell:
        options = ExportOptions(
            target=target,
            precision=precision,
            form=form,
            size=fixed,
            dynamic=dynamic,
            features=features,
            opset=opset,
            build=engine_options.read_engine_options(
                batch,
                size_range,
                workspace=workspace,
                effort=effort,
                compute_capability=compute_capability,
                hardware_compatible=hardware_compatible,
                version_compatible=version_compatible,
                refit=refit,
                strip_weights=strip_weights,
            ),
            keep_fp32=tuple(console.comma_separated(keep_fp32, "keep-fp32")) if keep_fp32 else (),
            islands=engine_options.read_islands(islands),
            weights=weights,
            rename=rename,
            num_classes=num_classes,
            labels=read_lines(labels) if labels else (),
            validate=not no_validate,
            bar=None if precision == AUTO else read_bar(precision, limits),
            threads=threads,
            device=device,
            loading=WeightsOptions(
                replace_head=replace_head,
                offline=offline,
                progress=lambda file, done, total: tell(describe_download(file, done, total)),
            ),
        )
        batches = load_batches(images) if images else None
        if precision == AUTO:
            choosing = ChooseOptions(limits=limits)
            exported = choose(repository, model, options, choosing, batches, tell)
        else:
            exported = run(repository, model, options, batches, tell)
    if exported.stale:
        console.note(
            f"warning: the weights or the config of {exported.model.name} changed; "
            f"to be exported again: {', '.join(exported.stale)}."
        )
    if as_json:
        console.print_json(exported.to_json())
    else:
        choice = exported.artifact.choice
        compared = f"\n{render_choice(choice, console.terminal_width())}" if choice else ""
        console.emit(render(exported) + compared)
        folder = str(exported.model.folder)
        next_step = ["coat-deploy", "validate", folder if "/" in folder else f"./{folder}"]
        flags = [] if target == "onnxruntime" else ["--target", target]
        flags += ["--precision", exported.artifact.precision] if choice else []
        console.hint(f"Next: {shlex.join([*next_step, *flags])} --images FOLDER")


def read_limits(
    max_abs_difference: float | None, min_top1_agreement: float | None
) -> dict[str, float]:
    """Return the limits of a bar that were given. Raises UsageError for one that cannot be."""
    from coat_deploy.measure.bar import Bar

    given = {"max_abs_difference": max_abs_difference, "min_top1_agreement": min_top1_agreement}
    limits = {name: value for name, value in given.items() if value is not None}
    Bar().override(**limits)
    return limits


def read_bar(precision: str | None, limits: "Mapping[str, float]") -> "Bar | None":
    """Return the precision's bar with `limits` in place of its own, None without any."""
    from coat_deploy.best import BEST, BEST_OF
    from coat_deploy.measure.bar import BARS

    precision = BEST_OF if precision == BEST else precision
    # A precision that cannot be is told by the export, which knows the target's.
    return BARS.get(precision or "fp32", BARS["fp32"]).override(**limits) if limits else None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UsageError(f"{path}: names no class (expected one a line). Check the file.")
    return names


def describe_download(file: str, done: int, total: int | None) -> str:
    """Return how far a download is, in MiB."""
    of = f" of {total / 2**20:.1f}" if total else ""
    return f"{file} {done / 2**20:.1f}{of} MiB"


def render(exported: "Exported") -> str:
    """Return what was made and how well it agrees."""
    artifact, agreement = exported.artifact, exported.artifact.agreement
    verdict = "not validated, its proof alone was replayed"
    if agreement:
        verdict = f"on {agreement['images']} {agreement['source']}"
        verdict += "" if agreement["source"] == "images" else " images"
        if "computed_by" in agreement:
            verdict += f"; by {agreement['computed_by']}, its graph: no GPU is here to run it"
    facts: list[tuple[str, object]] = [
        ("artifact", exported.path),
        ("on disk", f"{exported.path.stat().st_size / 2**20:.1f} MiB"),
        ("sha256", artifact.sha256),
        ("weights", exported.weights_source or "those in the folder"),
        ("agrees with PyTorch", verdict),
    ]
    if agreement:
        facts.append(("max |delta|", agreement["max_abs_difference"]))
        if agreement["top1_agreement"] is not None:
            facts.append(("top-1 agreement", format_share(agreement["top1_agreement"])))
    if package := artifact.package:
        facts.append(("compiled for", f"{package.device}, by PyTorch {package.host.torch}"))
    if artifact.engine:
        shares = artifact.engine.census["by_precision"].items()
        layers = ", ".join(f"{format_share(v['share'])} {name}" for name, v in shares)
        facts.append(("layers of the engine", layers))
        facts += [("profile", profile) for profile in artifact.engine.profiles]
    return f"{exported.model.name}: {artifact.name}\n\n{render_facts(facts)}"
