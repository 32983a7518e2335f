"""The fields of a recipe as options of a command."""

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from coat_deploy.train.recipe import KNOBS, Recipe


def _option(name: str) -> inspect.Parameter:
    """Return the option that sets a field of the recipe; None leaves it."""
    knob, kind = KNOBS[name], type(getattr(Recipe(), name))
    flag = "--" + name.replace("_", "-")
    declarations = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    metavar = {int: "N", float: "X", str: "NAME", bool: ""}[kind]
    option = typer.Option(
        *declarations, help=knob.help, rich_help_panel=f"Recipe: {knob.group}", metavar=metavar
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def with_recipe_options(command: Callable[..., None]) -> None:
    """Give the command an option for every field of a recipe, in the place of `fields`."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    options = [_option(name) for name in KNOBS]
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*keyword, *options]
    )
    command.__annotations__ |= {option.name: option.annotation for option in options}
    command.__annotations__.pop("fields")
