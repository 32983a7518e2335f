"""The cells of the ablation tables: networks that differ in one part.

Source: arXiv 2104.06399, the ablations of position encodings and of co-scale in its section 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coat_deploy.network.variants import VARIANTS, Variant, get_variant
from coat_deploy.train.recipe import Recipe

if TYPE_CHECKING:
    from coat_deploy.network.coat import CoaT

POSITIONS, CO_SCALE, COST = "position encodings", "co-scale", "cost"


@dataclass(frozen=True)
class Cell:
    """A network of a table: sizes and the switches that make the difference (see `CoaT`)."""

    group: str
    name: str
    variant: Variant
    model_args: Mapping[str, Any] = field(default_factory=dict)

    def network(self, classes: int, recipe: Recipe) -> "CoaT":
        """Return the network as a training begins with it: a function of the recipe's seed."""
        import torch

        from coat_deploy.network.coat import CoaT

        torch.manual_seed(recipe.seed)
        return CoaT(self.variant, classes, **self.model_args, drop_path=recipe.drop_path)


def position_cells(variant: Variant) -> list[Cell]:
    """Return a network without position encodings, with each of the two, and with both."""
    switches = {
        "neither": {"cpe": False, "crpe": False},
        "CRPE": {"cpe": False},
        "CPE": {"crpe": False},
        "CPE and CRPE": {},
    }
    return [Cell(POSITIONS, name, variant, args) for name, args in switches.items()]


def co_scale_cells(variant: Variant) -> list[Cell]:
    """Return a network of serial blocks only, and its parallel blocks in three ways.

    The serial one has a serial block more at each scale instead of the parallel blocks, and
    so about as many parameters.
    """
    assert variant.parallel_depth > 0
    depths = variant.serial_depths
    serial = replace(
        variant,
        serial_depths=(depths[0], depths[1] + 1, depths[2] + 1, depths[3] + 1),
        parallel_depth=0,
    )
    return [
        Cell(CO_SCALE, "serial blocks only", serial),
        Cell(CO_SCALE, "parallel, no exchange", variant, {"co_scale": "none"}),
        Cell(CO_SCALE, "cross-layer attention", variant, {"co_scale": "direct"}),
        Cell(CO_SCALE, "feature interpolation", variant),
    ]


def variant_cells() -> list[Cell]:
    """Return every published variant as it is, for the table of costs."""
    published = [variant for variant in VARIANTS.values() if variant.published]
    return [Cell(COST, variant.name, variant) for variant in published]


def all_cells(groups: Sequence[str] = (POSITIONS, CO_SCALE)) -> list[Cell]:
    """Return the cells of the tables wanted, of our small variants."""
    cells = [
        *position_cells(get_variant("coat_lite_nano")),
        *co_scale_cells(get_variant("coat_nano")),
    ]
    return [cell for cell in cells if cell.group in groups]
