"""What limits the contenders of a bench: each runtime's matrix products and memory, measured."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coat_deploy.cli import console
from coat_deploy.errors import BackendMissing, RunnerError
from coat_deploy.spec import ModelSpec, Size

if TYPE_CHECKING:
    from coat_deploy.measure.bench import Contender
    from coat_deploy.measure.limits import Bandwidth, Limits, Rate, Work

Engine = tuple[str, str, int | None]
"""(target, precision, threads)."""


def limits_if_possible(
    spec: ModelSpec, size: Size, contenders: "Sequence[Contender]", tell: Callable[[str], None]
) -> "Limits | None":
    """Measure as `measure_limits` does; tell why not where PyTorch is not installed."""
    try:
        return measure_limits(spec, size, contenders, tell)
    except BackendMissing as error:
        console.note(f"left out: limits: {error}")
        return None


def measure_limits(
    spec: ModelSpec, size: Size, contenders: "Sequence[Contender]", tell: Callable[[str], None]
) -> "Limits":
    """Measure what the contenders could reach; a runtime that fails at it is told of.

    `tell` is called with what is going on. Raises: BackendMissing without PyTorch, which counts
    the work.
    """
    from coat_deploy.backends.select import ENGINES
    from coat_deploy.graph.form import FORMS
    from coat_deploy.measure.limits import Limits

    work = count_work(spec, size)
    engines = {(c.target, c.precision, c.threads): None for c in contenders}
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            if engine[0] not in FORMS or engine[0] in ENGINES:
                continue
            tell(f"limits: products of {engine[0]} {engine[1]}")
            try:
                rates.append(_rate(engine, Path(folder)))
            except (RunnerError, OSError) as error:
                console.note(f"limits: {engine[0]} {engine[1]} was not measured: {error}")
    tell("limits: memory")
    threads = {engine[2]: None for engine in engines}
    return Limits(work, tuple(rates), tuple(map(_bandwidth, threads)))


def count_work(spec: ModelSpec, size: Size) -> "Work":
    """Return what one image of `size` asks for. Raises BackendMissing without PyTorch."""
    from coat_deploy.backends.select import require
    from coat_deploy.cli.contenders import EAGER

    require(EAGER)
    from coat_deploy.measure.limits import Work
    from coat_deploy.network.macs import count

    parameters, macs = count(spec, size)
    return Work(macs, parameters, size)


def _rate(engine: Engine, folder: Path) -> "Rate":
    import numpy as np

    from coat_deploy.graph.gemm import INT8, Gemm, author_gemm
    from coat_deploy.measure.limits import Rate, measure_rate
    from coat_deploy.open import load_unchecked
    from coat_deploy.runner import LoadOptions

    target, precision, threads = engine
    gemm = Gemm()
    file = folder / ("integers.onnx" if precision == INT8 else "floats.onnx")
    if not file.exists():
        file.write_bytes(author_gemm(gemm, precision).SerializeToString())
    load = functools.partial(
        load_unchecked, target, file, LoadOptions(threads=threads, precision=precision)
    )
    left = np.random.default_rng(1).standard_normal(gemm.input_shape, np.float32)
    return Rate(target, precision, threads, measure_rate(load, left, gemm.operations))


def _bandwidth(threads: int | None) -> "Bandwidth":
    from coat_deploy.machine import describe
    from coat_deploy.measure.limits import Bandwidth, measure_bandwidth, sweep_mib

    machine = describe()
    readers = threads or machine.cores or machine.threads
    return Bandwidth(threads, measure_bandwidth(readers, sweep_mib(machine)))
