"""Image sizes as options give them, refused before anything is loaded."""

from collections.abc import Sequence

from coat_deploy.cli import console
from coat_deploy.errors import UsageError
from coat_deploy.spec import ModelSpec, Size, format_size, parse_size

DYNAMIC = "dynamic"


def read_size(text: str | None) -> tuple[Size | None, bool]:
    """Return the fixed size, if given, and whether the size is dynamic."""
    if text is None:
        return None, False
    if text.lower() == DYNAMIC:
        return None, True
    return parse_size(text), False


def read_sizes(text: str | None, spec: ModelSpec) -> list[Size]:
    """Return the sizes of "224,224x320", each once; the model's own where none is given."""
    if text is None:
        return [spec.preprocess.input_size]
    parts = console.comma_separated(text, "size")
    sizes = list(dict.fromkeys(parse_size(part) for part in parts))
    check_sizes(sizes, spec)
    return sizes


def check_sizes(sizes: Sequence[Size], spec: ModelSpec) -> None:
    """Raise UsageError for a size that leaves the network's last scale without a position."""
    from coat_deploy.network.variants import get_variant

    least = get_variant(spec.architecture).min_side
    for size in sizes:
        if min(size) < least:
            raise UsageError(
                f"size {format_size(size)}: too small for {spec.architecture} "
                f"(got {min(size)}, expected {least} or more a side). Choose a larger --size."
            )
