"""Options of the commands that take a table as labelled images."""

from typing import Annotated

import typer

DATA = "Data"
"""Their panel in the help."""

ImageColumnOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=DATA, help="Column that holds the images."),
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=DATA, help="Column that holds the classes."),
]
