"""The figures of a study, put together: mean and deviation over seeds beside the costs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coat_deploy.study.cells import Cell
from coat_deploy.study.cost import Cost


@dataclass(frozen=True)
class Row:
    """A cell of an ablation table.

    `top1` holds the share of each seed (0 to 1). `difference` is the mean over seeds of this
    cell's top-1 less the first cell's of its group, seed by seed, and `difference_error` its
    standard error, None with one seed.
    """

    group: str
    name: str
    top1: tuple[float, ...]
    images: int
    difference: float
    difference_error: float | None
    cost: Cost

    @property
    def mean(self) -> float:
        """Mean top-1 over seeds."""
        return statistics.fmean(self.top1)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of top-1 over seeds; None with one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return the row."""
        return {
            "group": self.group,
            "cell": self.name,
            "top1": self.mean,
            "deviation": self.deviation,
            "top1_by_seed": list(self.top1),
            "images": self.images,
            "difference": self.difference,
            "difference_error": self.difference_error,
            "parameters": self.cost.parameters,
            "macs": self.cost.macs,
            "latency_ms": self.cost.latency_ms,
            "latency_ratio": self.cost.ratio,
        }


def ablation_rows(
    cells: Sequence[Cell], results: Sequence[Mapping[str, Any]], costs: Sequence[Cost]
) -> list[Row]:
    """Return a row for each cell, of the results of its trials and its cost."""
    by_cell: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for result in results:
        by_cell.setdefault((result["group"], result["cell"]), {})[result["seed"]] = result
    rows = []
    for cell, cost in zip(cells, costs, strict=True):
        mine = by_cell[cell.group, cell.name]
        first = by_cell[cell.group, next(c.name for c in cells if c.group == cell.group)]
        seeds = sorted(mine)
        differences = [mine[seed]["top1"] - first[seed]["top1"] for seed in seeds]
        rows.append(
            Row(
                group=cell.group,
                name=cell.name,
                top1=tuple(mine[seed]["top1"] for seed in seeds),
                images=mine[seeds[0]]["images"],
                difference=statistics.fmean(differences),
                difference_error=_standard_error(differences),
                cost=cost,
            )
        )
    return rows


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))
