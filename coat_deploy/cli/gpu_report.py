"""`coat-deploy gpu-report`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from coat_deploy.cli import console
from coat_deploy.gpu_report.options import HELP, ReportOptions, parse_variants


def gpu_report(
    budget: Annotated[
        float, typer.Option(min=1.0, metavar="S", help=HELP["budget"])
    ] = ReportOptions.budget_s,
    variants: Annotated[str | None, typer.Option(metavar="LIST", help=HELP["variants"])] = None,
    ways: Annotated[str | None, typer.Option(metavar="LIST", help=HELP["ways"])] = None,
    bench: Annotated[str, typer.Option(metavar="LIST", help=HELP["bench"])] = ",".join(
        ReportOptions.bench
    ),
    batch: Annotated[str, typer.Option(metavar="N,N", help=HELP["batch"])] = ",".join(
        map(str, ReportOptions.batches)
    ),
    device: Annotated[
        str, typer.Option(metavar="NAME", help=HELP["device"])
    ] = ReportOptions.device,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help=HELP["record"])] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help=HELP["markdown"])] = None,
    as_json: console.JsonOption = False,
) -> None:
    """Check and time every way to run a network on this machine's GPU, in one call.

    Numbers of each network and precision against float64; onnxruntime's guards; PyTorch eager,
    compiled and ahead of time, fused kernels, onnxruntime with and without CUDA graphs, TensorRT:
    each in a process of its own, so that one that crashes or hangs ends alone. What is not
    installed, or not in time, is skipped and said to be. Needs no network and no weights.

    Exit status 1 without a GPU, and when anything failed or missed its bar.
    """
    from coat_deploy.gpu_report.keep import Keep, make_report
    from coat_deploy.gpu_report.render import to_markdown

    options = ReportOptions(
        budget_s=budget,
        variants=parse_variants(_names(variants, "variants") if variants else ()),
        ways=_names(ways, "ways") if ways else (),
        bench=_names(bench, "bench"),
        batches=tuple(console.counts(batch, "batch")),
        device=device,
    )
    keep = Keep(shlex.join([console.NAME, *sys.argv[1:]]), record, markdown)
    with console.steps("measuring") as tell:
        found = make_report(options, keep, tell)
    if as_json:
        console.print_json(found.to_json())
    else:
        console.emit(to_markdown(found))
    if not found.sound:
        raise typer.Exit(1)


def _names(text: str, what: str) -> tuple[str, ...]:
    return tuple(console.comma_separated(text, what))
