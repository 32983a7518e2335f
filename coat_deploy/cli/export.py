"""`coat-deploy export`."""

from pathlib import Path
from typing import Annotated

import typer

from coat_deploy.cli import console
from coat_deploy.errors import UsageError
from coat_deploy.spec import Size, parse_size


def export(
    model: console.ModelArgument,
    target: Annotated[
        str, typer.Option(help="Runtime to export for: onnxruntime or openvino.")
    ] = "onnxruntime",
    precision: Annotated[
        str | None, typer.Option(help="fp32; for openvino also bf16. Default: fp32.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="random[:SEED], a .safetensors or .pth file, timm, or official. "
            "Default: those in the model's folder, else where its config points to."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Image size: SIDE, HEIGHTxWIDTH, or dynamic. Default: the model's."),
    ] = None,
    form: Annotated[
        str, typer.Option(help="authored: our graph; traced: PyTorch's exporter.")
    ] = "authored",
    features: Annotated[
        bool, typer.Option("--features", help="Output the feature maps x1..x4, not logits.")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 23.")] = 20,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Photographs (files, folders) to validate on. Default: synthetic ones."),
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Hold the artifact against PyTorch.")
    ] = True,
    max_abs_difference: Annotated[
        float | None, typer.Option(help="Bar: largest |delta logit|. Default: by precision.")
    ] = None,
    min_top1_agreement: Annotated[
        float | None, typer.Option(help="Bar: least share of equal top-1 classes, 0 to 1.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the checkpoint, if not the config's.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Text file with one class name a line.")
    ] = None,
    replace_head: Annotated[
        bool,
        typer.Option("--replace-head", help="Take all but the classifier from the checkpoint."),
    ] = False,
    rename: Annotated[
        str | None, typer.Option("--as", help="Name of the model folder that is written.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use cached downloads only.")] = False,
    threads: console.ThreadsOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Export a model: weights to graph to proven artifact.

    Writes MODELS/MODEL/1/<target>-<precision>.onnx, the weights and a manifest with where
    everything came from. The artifact is held against PyTorch first; one that does not agree is
    not written, and what was there stays (exit status 3).
    """
    from coat_deploy.cli.inputs import load_batches
    from coat_deploy.export import ExportOptions
    from coat_deploy.export import export as run
    from coat_deploy.measure.agreement import get_bar
    from coat_deploy.network.weights import WeightsOptions
    from coat_deploy.repository import Repository

    bar = None
    if max_abs_difference is not None or min_top1_agreement is not None:
        given = {"max_abs_difference": max_abs_difference, "min_top1_agreement": min_top1_agreement}
        limits = {name: value for name, value in given.items() if value is not None}
        bar = get_bar(precision or "fp32").override(**limits)
    fixed, dynamic = read_size(size)
    with console.steps(f"exporting {model}") as tell:
        options = ExportOptions(
            target=target,
            precision=precision,
            form=form,
            size=fixed,
            dynamic=dynamic,
            features=features,
            opset=opset,
            weights=weights,
            rename=rename,
            num_classes=num_classes,
            labels=read_lines(labels) if labels else (),
            validate=validate,
            bar=bar,
            threads=threads,
            loading=WeightsOptions(
                replace_head=replace_head,
                offline=offline,
                progress=lambda file, done, total: tell(f"{file} {done / 2**20:.1f} MiB"),
            ),
        )
        batches = load_batches(images) if images else None
        exported = run(Repository.open(models), model, options, batches, tell)
    if as_json:
        console.print_json(exported.to_json())
        return
    agreement = exported.artifact.agreement
    rows: list[tuple[str, object]] = [
        ("artifact", exported.path),
        ("size", f"{exported.path.stat().st_size / 2**20:.1f} MiB"),
        ("sha256", exported.artifact.sha256),
    ]
    if agreement:
        rows += [
            ("validated on", f"{agreement['images']} {agreement['source']} images"),
            ("max |delta|", agreement["max_abs_difference"]),
            ("top-1 agreement", agreement["top1_agreement"]),
        ]
    console.print_table(("", model), rows)


def read_size(text: str | None) -> tuple[Size | None, bool]:
    """Return the fixed size, if given, and whether the size is dynamic."""
    if text is None:
        return None, False
    if text.lower() == "dynamic":
        return None, True
    return parse_size(text), False


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error}).") from error
    return [line.strip() for line in lines if line.strip()]
