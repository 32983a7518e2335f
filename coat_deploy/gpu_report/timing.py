"""Time a step on a device: alone, in a row without waiting, and by the device's own events."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coat_deploy.gpu_report.nvml import Nvml
from coat_deploy.measure.latency import percentiles

WARM_UP_S = 1.0
"""How long a step runs before it counts: clocks rise only under load."""
LEAST = 5
MOST = 20000
EVENTS = 200


@dataclass(frozen=True)
class Step:
    """Something to time.

    `launch` puts the network on the device for the next of the inputs that take turns, and `wait`
    returns when all that was launched is done. `events`: PyTorch's events see its work.
    """

    launch: Callable[[], object]
    wait: Callable[[], object]
    events: bool = False


def measure(step: Step, batch: int, seconds: float, nvml: Nvml) -> dict[str, Any]:
    """Return the times of a step in ms, its images a second, and power and memory meanwhile."""
    _warm_up(step, min(WARM_UP_S, seconds))
    alone = _alone(step, seconds / 2)
    p = percentiles(alone)
    found: dict[str, Any] = {
        "batch": batch,
        "p50_ms": p.p50,
        "p90_ms": p.p90,
        "p99_ms": p.p99,
        "iterations": len(alone),
    }
    before = nvml.millijoules()
    count, took = _in_a_row(step, seconds / 2, p.p50 / 1e3)
    after = nvml.millijoules()
    found["images_per_second"] = batch * count / took
    used = None if before is None or after is None else (after - before) / 1e3
    found["power_w"] = used and used / took
    found["joules_per_image"] = used and used / (batch * count)
    found["clock_mhz"] = nvml.clock_mhz()
    found["device_ms"] = _by_events(step, seconds / 2, p.p50 / 1e3) if step.events else None
    return found


def _warm_up(step: Step, seconds: float) -> None:
    end, count = time.perf_counter() + seconds, 0
    while count < LEAST or time.perf_counter() < end:
        step.launch()
        step.wait()
        count += 1


def _alone(step: Step, seconds: float) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return the times of runs each of which is waited for, ms."""
    clock, times = time.perf_counter, list[float]()
    end = clock() + seconds
    while len(times) < LEAST or (clock() < end and len(times) < MOST):
        start = clock()
        step.launch()
        step.wait()
        times.append((clock() - start) * 1e3)
    return np.array(times)


def _in_a_row(step: Step, seconds: float, each: float) -> tuple[int, float]:
    """Return how many runs, none waited for but the last, and the seconds that they took."""
    count = int(min(max(seconds / max(each, 1e-6), LEAST), MOST))
    start = time.perf_counter()
    for _ in range(count):
        step.launch()
    step.wait()
    return count, time.perf_counter() - start


def _by_events(step: Step, seconds: float, each: float) -> float:
    """Return the median time of a run by events on the device, without launches in between, ms."""
    import torch

    count = int(min(max(seconds / max(each, 1e-6), LEAST), EVENTS))
    event: Any = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step.launch()
        mark.record()
    step.wait()
    return float(np.median([a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]))
