"""What this machine could do at best: a roofline of two measured rates.

A batch cannot be over before its multiplications are done at the rate at which the runtime
multiplies large matrices here, nor before its weights and images have been read from memory
once, at the rate at which memory is read. The longer of the two is the limit; which share of a
median it makes says how much a better graph or runtime could still gain.

It is a yardstick, not a law. All of a network's MACs, as the paper's authors count them, are
taken at the rate of the largest products, though depthwise convolutions and normalisations never
reach it, and with int8 some layers stay in float: so 100 % is out of reach. On the other hand an
authored graph leaves out what no output needs, a few per cent of the MACs. Activations count no
bytes, since they may stay in a cache; of weights and images each byte is needed once a batch,
which is the least that any implementation reads. A cache that holds all of them from one batch to
the next could spare even that, but by then the products are what takes time.
"""

import dataclasses
import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from coat_deploy.machine import Machine, largest_cache_mib
from coat_deploy.measure.latency import Latency
from coat_deploy.measure.worker import Load, Worker
from coat_deploy.runner import Pixels
from coat_deploy.spec import Size

BYTES_A_WEIGHT = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
BYTES_A_PIXEL = 3 * 4
"""Three channels of float32, whatever is computed in."""

RATE_S, MIN_RUNS, MAX_RUNS = 0.4, 3, 200
"""Seconds of timing an engine, and the fewest and most runs."""
PASSES = 5
RATE_TIMEOUT_S = 60.0
CACHES, LEAST_MIB, MOST_MIB = 4, 256, 1024
"""What is read to measure memory: so many times the largest cache, within these MiB."""


@dataclass(frozen=True)
class Work:
    """What a network asks for: MACs of one image, weights in all, image size (height, width)."""

    macs: int
    weights: int
    size: Size

    def operations(self, batch: int) -> int:
        """Return the multiplications and additions of a batch: two a MAC."""
        return 2 * self.macs * batch

    def least_bytes(self, batch: int, precision: str) -> int:
        """Return the bytes of all weights and of the images of a batch, each once."""
        height, width = self.size
        images = batch * height * width * BYTES_A_PIXEL
        return self.weights * BYTES_A_WEIGHT[precision] + images


@dataclass(frozen=True)
class Rate:
    """How fast a runtime multiplies large matrices; `threads` None is its default."""

    target: str
    precision: str
    threads: int | None
    gflops: float


@dataclass(frozen=True)
class Bandwidth:
    """How fast so many threads read memory; `threads` None is one a core."""

    threads: int | None
    gb_per_s: float


@dataclass(frozen=True)
class Limits:
    """The measured rates, and what they mean for the work."""

    work: Work
    rates: tuple[Rate, ...]
    bandwidths: tuple[Bandwidth, ...]

    def limit_ms(self, result: Latency) -> float | None:
        """Return the least time a batch of `result` could take, in ms; None without a rate.

        The rate is that of the result's own runtime and precision. A target that takes no graph
        of ours (PyTorch) is held against the fastest of the others in that precision.
        """
        alike = [
            rate
            for rate in self.rates
            if (rate.precision, rate.threads) == (result.precision, result.threads)
        ]
        own = [rate for rate in alike if rate.target == result.target]
        gflops = max((rate.gflops for rate in own or alike), default=None)
        gb_per_s = next((b.gb_per_s for b in self.bandwidths if b.threads == result.threads), None)
        if gflops is None or gb_per_s is None:
            return None
        computing = self.work.operations(result.batch) / gflops
        reading = self.work.least_bytes(result.batch, result.precision) / gb_per_s
        return max(computing, reading) / 1e6

    def apply(self, results: Iterable[Latency]) -> tuple[Latency, ...]:
        """Return the results with their `limit_ms` and `limit_share`."""
        return tuple(map(self._applied, results))

    def _applied(self, result: Latency) -> Latency:
        limit = self.limit_ms(result)
        share = None if limit is None else limit / result.p50_ms
        return dataclasses.replace(result, limit_ms=limit, limit_share=share)

    def to_json(self) -> dict[str, Any]:
        """Return work and rates as JSON values; the size is a list of two."""
        return {
            "work": dataclasses.asdict(self.work) | {"size": list(self.work.size)},
            "rates": [dataclasses.asdict(rate) for rate in self.rates],
            "bandwidths": [dataclasses.asdict(bandwidth) for bandwidth in self.bandwidths],
        }


def measure_rate(
    load: Load, pixels: Pixels, operations: int, timeout_s: float = RATE_TIMEOUT_S
) -> float:
    """Return the GFLOP/s of a runner for which one run of `pixels` is so many operations.

    The fastest of several runs, in a process of its own; `load` must be picklable.
    Raises: RunnerError when it fails, or takes longer than `timeout_s` for one answer.
    """
    worker = Worker("limits", timeout_s)
    try:
        worker.open(load, pixels, None)
        step_ms = worker.warm_up(2, 0)
        runs = round(RATE_S * 1e3 / max(step_ms, 1e-6))
        best_ms = float(worker.time(min(max(runs, MIN_RUNS), MAX_RUNS)).min())
    finally:
        worker.close()
    return operations / best_ms / 1e6


def measure_bandwidth(threads: int, mib: int) -> float:
    """Return the GB/s (10^9 bytes) at which threads together read `mib` MiB; the best pass.

    The maximum of integers, which numpy computes faster than memory delivers, without the
    interpreter's lock.
    """
    values = np.ones((mib << 20) // 8, np.int64)
    parts = np.array_split(values, threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            start = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return values.nbytes / best / 1e9


def sweep_mib(machine: Machine) -> int:
    """Return how many MiB to read, so that no cache holds them, of the memory that is there."""
    wanted = max(CACHES * (largest_cache_mib() or 0), LEAST_MIB)
    allowed = min(MOST_MIB, (machine.memory_mib or MOST_MIB) // 4)
    return int(max(min(wanted, allowed), 1))
