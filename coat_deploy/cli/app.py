"""The door of the command line: every command, one file each."""

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from coat_deploy.cli import console
from coat_deploy.cli.bench import bench
from coat_deploy.cli.doctor import doctor
from coat_deploy.cli.evaluate import evaluate
from coat_deploy.cli.export import export
from coat_deploy.cli.gpu_report import gpu_report
from coat_deploy.cli.inspect import inspect as inspect_command
from coat_deploy.cli.kserve import kserve
from coat_deploy.cli.models import models
from coat_deploy.cli.predict import predict
from coat_deploy.cli.selftest import selftest
from coat_deploy.cli.serve import serve
from coat_deploy.cli.study import study
from coat_deploy.cli.train import train
from coat_deploy.cli.triton import triton
from coat_deploy.cli.validate import validate
from coat_deploy.errors import UsageError
from coat_deploy.version import __version__

ABOUT = "About models and the machine"
PANELS = {
    "From images to a model": (train, study),
    "From weights to a proven artifact": (export, validate, evaluate, bench),
    "With an artifact": (predict, serve, selftest, inspect_command),
    "To where it is served": (triton, kserve),
    ABOUT: (doctor, gpu_report),
}
EXAMPLES = {
    "": """
        $ coat-deploy train coat_lite_nano --data photos/ --out shirts
        $ coat-deploy export coat_tiny --weights timm
        $ coat-deploy validate coat_tiny --images photos/
        $ coat-deploy bench coat_tiny --targets eager,onnxruntime,openvino
        $ coat-deploy predict coat_tiny cat.jpg
    """,
    "train": """
        $ coat-deploy train coat_lite_nano --data digits --out digits
        $ coat-deploy train coat_lite_nano --preset small --data photos/ --out shirts
        $ coat-deploy train coat_tiny --preset finetune --data photos/ --out shirts
        $ coat-deploy train coat_tiny --preset finetune --data photos/ --out shirts --resume
    """,
    "study": """
        $ coat-deploy study --data photos/ --record study.jsonl
        $ coat-deploy study --tables cost
    """,
    "export": """
        $ coat-deploy export coat_tiny --weights timm
        $ coat-deploy export coat_tiny --target openvino --precision bf16
        $ coat-deploy export coat_tiny --target tensorrt --precision fp16 --batch 1,8,64
        $ coat-deploy export coat_tiny --target aotinductor
        $ coat-deploy export coat_tiny --size dynamic --images photos/
        $ coat-deploy export coat_mini --weights my.pth --labels my.txt --as my_mini
    """,
    "validate": """
        $ coat-deploy validate coat_tiny --images photos/
        $ coat-deploy validate coat_tiny --images photos/ --target openvino --by-block
        $ coat-deploy validate coat_tiny --images photos/ --size 224,224x320
    """,
    "evaluate": """
        $ coat-deploy evaluate coat_tiny --data photos/
        $ coat-deploy evaluate coat_tiny --data photos/ --split test --target onnxruntime
        $ coat-deploy evaluate coat_tiny --data photos/ --size 256 --crop-pct 1 --json
    """,
    "bench": """
        $ coat-deploy bench coat_tiny --targets eager,onnxruntime,openvino:bf16
        $ coat-deploy bench coat_tiny --batch 1,8 --threads 1,4 --plot coat_tiny.svg
        $ coat-deploy bench coat_tiny --weights random --record results.jsonl
    """,
    "predict": """
        $ coat-deploy predict coat_tiny cat.jpg
        $ coat-deploy predict coat_tiny photos/ --top 1 --json > labels.json
        $ coat-deploy predict coat_tiny photos/ --out labels --engine ray
    """,
    "serve": """
        $ coat-deploy serve --models models
        $ coat-deploy serve coat_tiny --port 8080 --precision int8
        $ curl --data-binary @cat.jpg http://127.0.0.1:8000/models/coat_tiny
    """,
    "selftest": """
        $ coat-deploy selftest coat_tiny
    """,
    "triton": """
        $ coat-deploy triton coat_tiny --out repository
        $ coat-deploy triton coat_tiny --out repository --accelerator openvino --threads 4
        $ coat-deploy triton a10/coat_tiny --also h100/coat_tiny --target tensorrt --out repository
    """,
    "kserve": """
        $ coat-deploy kserve coat_tiny --image IMAGE --storage pvc://models | kubectl apply -f -
        $ coat-deploy kserve coat_tiny --server triton --storage s3://bucket/repository --gpus 1
    """,
    "gpu_report": """
        $ coat-deploy gpu-report --record report.jsonl --markdown report.md
        $ coat-deploy gpu-report --bench coat_tiny --variants coat_tiny --batch 1,256
        $ coat-deploy gpu-report --device cpu --bench coat_lite_nano --variants coat_lite_nano
    """,
    "inspect": """
        $ coat-deploy inspect coat_tiny/openvino-bf16
        $ coat-deploy inspect models/coat_tiny/1/tensorrt-rtx-fp16.engine --json
    """,
}
BEFORE_COMMAND = ("--debug", "--verbose", "-v", "--version")
"""Options of every command, that stand before it; people try them behind it."""

app = typer.Typer(
    name=console.NAME,
    help="Deploy CoaT image classifiers: export to ONNX, prove the export equal to PyTorch on "
    "your images, measure it, run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _examples(command: str) -> str | None:
    if command not in EXAMPLES:
        return None
    return "Examples:\n" + inspect.cleandoc(EXAMPLES[command])


def _one_line_paragraphs(text: str) -> str:
    """Return a docstring with every paragraph on one line, for the help to fold at its width."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for panel, members in PANELS.items():
    for command in members:
        app.command(epilog=_examples(command.__name__), rich_help_panel=panel)(
            console.guarded(command)
        )
app.add_typer(models, name="models", rich_help_panel=ABOUT)
for info in (*app.registered_commands, *models.registered_commands):
    assert info.callback is not None and info.callback.__doc__
    info.help = _one_line_paragraphs(info.callback.__doc__)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback(epilog=_examples(""))
def main_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the trace of an error.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", metavar="", help="Tell more on stderr.")
    ] = False,
) -> None:
    """Set what holds for every command."""
    console.configure(debug, verbose)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, `arguments` or the process's own, and exit with its status."""
    _open_streams()
    try:
        status = app(arguments, prog_name=console.NAME, standalone_mode=False)
    except Exception as error:
        message = _usage_message(error)
        if message is None:
            raise
        with contextlib.suppress(typer.Exit):
            if message:  # no argument at all: the help was printed
                console.fail(message, UsageError.exit_status)
        status = UsageError.exit_status
    # What a command returns is no status; leaving by typer.Exit is.
    sys.exit(status if isinstance(status, int) else 0)


def _open_streams() -> None:
    """Make stdout and stderr take whatever a file may be called, also where they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _usage_message(error: Exception) -> str | None:
    """Return the line for an option or argument that typer refused; None for another error.

    Its classes are private and moved from one version to the next; all have `format_message`.
    """
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    message = format_message()
    option = getattr(error, "option_name", None)
    if option in BEFORE_COMMAND:
        return f"{option}: stands before the command. Run: {console.NAME} {option} COMMAND ..."
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else console.NAME
    return message and f"{message} Try: {path} --help"
