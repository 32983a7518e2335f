"""Runners that sleep, fail or die on purpose; imported by name in the worker processes."""

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

loads = 0
turn = threading.Lock()


@dataclass
class FakeRunner:
    """Sleeps `ms` a step and notes every step as a line `name pid start end` (ns) in `log`.

    A step of a batch takes `ms * batch**growth`; `one_at_a_time` steps of threads wait for each
    other; batches from `largest_batch` on are too large.
    """

    name: str
    ms: float
    log: Path | None
    fail_at: int | None
    die: str
    growth: float = 0
    one_at_a_time: bool = False
    largest_batch: int | None = None
    steps: int = 0

    def __enter__(self) -> "FakeRunner":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def bind(self, pixels: np.ndarray) -> Callable[[], object]:
        assert pixels.dtype == np.float32
        if self.largest_batch is not None and len(pixels) > self.largest_batch:
            fail(self.die)
        seconds = self.ms / 1e3 * len(pixels) ** self.growth
        return functools.partial(self.step, seconds)

    def step(self, seconds: float) -> int:
        self.steps += 1
        start = time.perf_counter_ns()
        if self.steps == self.fail_at:
            fail(self.die)
        with turn if self.one_at_a_time else contextlib.nullcontext():
            time.sleep(seconds)
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(f"{self.name} {os.getpid()} {start} {time.perf_counter_ns()}\n")
        return self.steps


def load(
    name: str,
    ms: float = 0.2,
    *,
    log: Path | None = None,
    load_ms: float = 0,
    warm_load_ms: float = 0,
    memory_mib: int = 0,
    fail_at: int | None = None,
    die: str = "raise",
    farewell: Path | None = None,
    **steps: Any,
) -> Any:
    """Return a runner; `fail_at` counts steps, 0 being the load, -1 the second load.

    `farewell` is a file made when the process ends by itself.
    """
    global loads, ballast
    loads += 1
    if fail_at == 0 or (fail_at == -1 and loads == 2):
        fail(die)
    time.sleep((load_ms if loads == 1 else warm_load_ms) / 1e3)
    ballast = np.ones(memory_mib << 17)  # 8 bytes each
    if farewell is not None:
        atexit.register(farewell.touch)
    print("a runtime that talks", flush=True)
    return FakeRunner(name, ms, log, fail_at, die, **steps)


def fail(how: str) -> None:
    match how:
        case "raise":
            raise ValueError("the artifact\nis not to my taste")
        case "exit":
            os._exit(7)
        case "sys.exit":
            sys.exit("no licence")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
