"""The door of the command line: every command, one file each."""

from typing import Annotated

import typer

from coat_deploy.cli import console
from coat_deploy.cli.bench import bench
from coat_deploy.cli.doctor import doctor
from coat_deploy.cli.export import export
from coat_deploy.cli.models import models
from coat_deploy.cli.predict import predict
from coat_deploy.cli.selftest import selftest
from coat_deploy.cli.validate import validate
from coat_deploy.version import __version__

app = typer.Typer(
    name="coat-deploy",
    help="Deploy CoaT image classifiers: export to ONNX, prove the export equal to PyTorch on "
    "your images, measure it, run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (export, validate, bench, predict, selftest, doctor):
    app.command()(console.guarded(command))
app.add_typer(models, name="models")


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell more on stderr.")] = False,
) -> None:
    """Set what holds for every command."""
    console.configure(debug, verbose)


def main() -> None:
    """Run the command line."""
    app()
