"""What a network costs: parameters, MACs, latency and memory, in PyTorch on this machine."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coat_deploy.backends.eager import EagerRunner
from coat_deploy.images import normalise
from coat_deploy.measure.bench import BenchOptions, Contender, Progress, bench
from coat_deploy.measure.proof import probe_images
from coat_deploy.network.variants import Variant
from coat_deploy.runner import LoadOptions, Pixels, Runner
from coat_deploy.spec import IMAGENET_MEAN, IMAGENET_STD, Size
from coat_deploy.study.cells import Cell


@dataclass(frozen=True)
class Cost:
    """Cost of one image; `parameters` and `macs` are counts, memory is the process's peak.

    `ratio` is the latency of the first of the table over this one's, with its 95% interval.
    """

    name: str
    size: Size
    parameters: int
    macs: int
    latency_ms: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    memory_mib: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        pairs: dict[str, Any] = {"size": list(self.size)}
        if self.ratio_interval:
            pairs["ratio_interval"] = list(self.ratio_interval)
        return dataclasses.asdict(self) | pairs


def measure_costs(
    cells: Sequence[Cell],
    classes: int,
    size: Size | None,
    threads: int | None,
    options: BenchOptions,
    progress: Progress | None = None,
) -> tuple[list[Cost], Mapping[str, Any]]:
    """Return the cost of each cell's network, and the machine; one image at a time.

    size: (height, width); None takes each variant's own. Networks of one size are measured
    interleaved. Raises: RunnerError when all fail.
    """
    sizes = [size or (cell.variant.input_size,) * 2 for cell in cells]
    contenders = [
        _contender(cell, classes, side, threads) for cell, side in zip(cells, sizes, strict=True)
    ]
    report = bench(contenders, _pixels, options, progress)
    found = {result.name: result for result in report.results}
    costs = []
    for cell, side in zip(cells, sizes, strict=True):
        result = found[cell.name]
        parameters, macs = count(cell, classes, side)
        costs.append(
            Cost(
                cell.name, side, parameters, macs, result.p50_ms, result.ratio,
                result.ratio_interval, result.peak_memory_mib,
            )
        )  # fmt: skip
    return costs, report.machine.to_json()


def _contender(cell: Cell, classes: int, size: Size, threads: int | None) -> Contender:
    switches = dict(cell.model_args)
    return Contender(
        name=cell.name,
        target="eager",
        precision="fp32",
        form="eager",
        batch=1,
        size=size,
        load=functools.partial(load_network, cell.variant, switches, classes, threads),
        threads=threads,
    )


def load_network(
    variant: Variant, model_args: Mapping[str, Any], classes: int, threads: int | None
) -> Runner:
    """Return the network with fresh weights, for one process to run."""
    from coat_deploy.network.coat import CoaT

    network = CoaT(variant, classes, **model_args)
    return EagerRunner(network.eval(), LoadOptions(threads=threads))


def count(cell: Cell, classes: int, size: Size) -> tuple[int, int]:
    """Return parameters and MACs of one image of `size`."""
    import torch

    from coat_deploy.network.coat import CoaT
    from coat_deploy.network.macs import count_macs, count_parameters

    with torch.device("meta"):
        network = CoaT(cell.variant, classes, **cell.model_args)
    return count_parameters(network), count_macs(network, size)


def _pixels(batch: int, size: Size) -> Pixels:
    return normalise(probe_images(size, batch), IMAGENET_MEAN, IMAGENET_STD)
