"""The options of `export` for targets that are engines, and what they come to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from coat_deploy.cli import console
from coat_deploy.errors import UsageError

if TYPE_CHECKING:
    from coat_deploy.engine import EngineOptions, Range

PANEL = "An engine (tensorrt, tensorrt-rtx)"

BatchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--batch",
        metavar="N,N,N",
        rich_help_panel=PANEL,
        help="Least, best and largest batch, or one number for a static engine; may be repeated, "
        "a profile each. Default: 1,8,64.",
    ),
]
SizeRangeOption = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,N",
        rich_help_panel=PANEL,
        help="With --size dynamic: least, best and largest side. Default: the least that the "
        "network takes, the model's own, and twice that.",
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep-fp32",
        metavar="PATH,PATH",
        rich_help_panel=PANEL,
        help="Modules that stay fp32 in an fp16 or bf16 engine: serial_blocks1.0,norm4.",
    ),
]
IslandsOption = Annotated[
    str | None,
    typer.Option(
        metavar="OP,OP",
        rich_help_panel=PANEL,
        help="Operators that stay fp32, last for the layer that makes the output, or none. "
        "Default: LayerNormalization,Softmax,last.",
    ),
]
WorkspaceOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="MIB", rich_help_panel=PANEL, help="Device memory that kernels may use."
    ),
]
EffortOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=5, metavar="N", rich_help_panel=PANEL, help="How long to search for kernels."
    ),
]
CapabilityOption = Annotated[
    str | None,
    typer.Option(
        "--compute-capability",
        metavar="X.Y,X.Y",
        rich_help_panel=PANEL,
        help="tensorrt-rtx: GPUs to build for (8.9,12.0). Default: all that it knows.",
    ),
]
HardwareCompatibleOption = Annotated[
    bool,
    typer.Option(
        "--hardware-compatible",
        metavar="",
        rich_help_panel=PANEL,
        help="Run on GPUs from Ampere on, somewhat slower.",
    ),
]
VersionCompatibleOption = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        metavar="",
        rich_help_panel=PANEL,
        help="Run on later versions of the library, too.",
    ),
]
RefitOption = Annotated[
    bool,
    typer.Option(
        "--refit", metavar="", rich_help_panel=PANEL, help="Let weights be replaced later."
    ),
]
StripOption = Annotated[
    bool,
    typer.Option(
        "--strip-weights",
        metavar="",
        rich_help_panel=PANEL,
        help="Leave the weights out; they have to be put in before it runs.",
    ),
]


def read_engine_options(
    batch: Sequence[str] | None,
    size_range: str | None,
    *,
    workspace: int | None,
    effort: int | None,
    compute_capability: str | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refit: bool,
    strip_weights: bool,
) -> "EngineOptions":
    """Return what was asked for. Raises UsageError for what cannot be read."""
    from coat_deploy.engine import BuildOptions, EngineOptions

    capabilities = compute_capability and console.comma_separated(
        compute_capability, "compute-capability"
    )
    how = BuildOptions(
        workspace_mib=workspace,
        effort=effort,
        compute_capabilities=tuple(capabilities or ()),
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        refit=refit,
        strip_weights=strip_weights,
    )
    sides = None if size_range is None else read_range(size_range, "size-range")
    if not batch:
        return EngineOptions(sides=sides, how=how)
    ranges = tuple(dict.fromkeys(read_range(text, "batch") for text in batch))
    return EngineOptions(ranges, sides, how)


def read_range(text: str, what: str) -> "Range":
    """Return the range of "1,8,64", or of "8" alone. Raises UsageError."""
    numbers = [console.counts(part, what)[0] for part in console.comma_separated(text, what)]
    if len(numbers) == 1:
        return (numbers[0],) * 3
    if len(numbers) != 3 or sorted(numbers) != numbers:
        raise UsageError(
            f"--{what}: must be least, best and largest, or one number (got {text!r}). "
            "Give three that ascend: 1,8,64."
        )
    return numbers[0], numbers[1], numbers[2]


def read_islands(text: str | None) -> tuple[str, ...] | None:
    """Return the operators of `--islands`; None for the default."""
    if text is None:
        return None
    return () if text == "none" else tuple(console.comma_separated(text, "islands"))
