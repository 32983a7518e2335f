"""Time the fused kernels on this machine's GPU over the sizes in `network/fused/launches.py`.

    python docs/benchmarks/fused_sweep.py --record sweep.jsonl

For 256 images in fp16 and the shapes of a few scales. Every kernel is first compiled for every
choice, on all cores; then each is timed alone, by Triton's `do_bench`, and the choice printed that
takes the least time over all shapes.
"""

import argparse
import functools
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from coat_deploy.machine import usable_threads
from coat_deploy.measure.latency import append_records
from coat_deploy.network.fused import launches

BATCH = 256
WINDOWS = [3, 3, 5, 5, 5, 7, 7, 7]


class Shape(NamedTuple):
    """A scale: its channels, the side of its map, and the ratio of its FFN where that is fused."""

    channels: int
    side: int
    ratio: int | None = None


SHAPES = (Shape(64, 56, 8), Shape(128, 28, 8), Shape(152, 28), Shape(320, 14))

CHOICES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "window_kernel": (
        "EACH NARROW WINDOW_LANES",
        [
            (8, 4, 16), (8, 2, 32), (8, 4, 32), (8, 8, 32), (8, 2, 64), (8, 4, 64), (16, 2, 32),
            (16, 4, 32), (16, 4, 64),
        ],
    ),
    "attend_kernel": (
        "ATTENDED ATTEND_WARPS",
        [(32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8)],
    ),
    "context_kernel": (
        "BLOCK CONTEXT_WARPS CONTEXT_STAGES",
        [(32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 3), (128, 4, 3), (128, 8, 3)],
    ),
    "position_kernel": (
        "TILE POSITION_LANES POSITION_WARPS",
        [(8, 32, 4), (8, 64, 4), (8, 64, 8), (16, 32, 4), (16, 64, 8)],
    ),
    "norm_kernel": ("NORMED", [(1024,), (2048,), (4096,)]),
    "feed_forward_kernel": (
        "ROWS HIDDEN_BLOCK FFN_WARPS FFN_STAGES",
        [
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 8, 3), (128, 64, 4, 3),
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
        ],
    ),
}  # fmt: skip
"""Of every kernel the names in `launches`, and the values to try."""


class Job(NamedTuple):
    """One kernel on one shape, with the sizes to try."""

    kernel: str
    shape: Shape
    sizes: dict[str, int]


def main() -> None:
    """Compile, measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="append lines of JSON")
    arguments = parser.parse_args()
    todo = list(jobs())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, usable_threads() - 2), mp_context=spawn) as compilers:
        list(compilers.map(compile_one, todo))
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for job in todo:
        ms = triton.testing.do_bench(launch(job), warmup=2, rep=8, return_mode="median")
        total[job.kernel][json.dumps(job.sizes)] += ms
        row = {"kernel": job.kernel, **job.shape._asdict(), **job.sizes, "ms": round(ms, 4)}
        if arguments.record:
            append_records(arguments.record, [json.dumps(row)])
    for kernel, times in total.items():
        best = min(times, key=times.__getitem__)
        print(f"{kernel}: {best} {times[best]:.3f} ms, of up to {max(times.values()):.3f} ms")


def jobs() -> Iterator[Job]:
    """Yield what there is to time; those that compile longest first."""
    for kernel, (names, choices) in CHOICES.items():
        for shape in SHAPES:
            if kernel == "feed_forward_kernel" and shape.ratio is None:
                continue
            for values in choices:
                yield Job(kernel, shape, dict(zip(names.split(), values, strict=True)))


def compile_one(job: Job) -> None:
    """Launch a job once: Triton keeps on disk what it compiled."""
    launch(job)
    torch.cuda.synchronize()


def launch(job: Job) -> Callable[[], object]:
    """Launch a job, what it needs before it too; return what launches its kernel alone again."""
    vars(launches).update(SIZES | job.sizes)
    inputs, side = draw(job.shape), job.shape.side
    wrap = Alone(job.kernel)
    if job.kernel == "position_kernel":
        taps = inputs["taps"][:9]
        launches.encode_position(inputs["x"], taps, inputs["bias"], (side, side), wrap)
    elif job.kernel == "norm_kernel":
        launches.layer_norm(inputs["x"], *inputs["norm"], 1e-6, wrap)
    elif job.kernel == "feed_forward_kernel":
        launches.feed_forward(inputs["x"], *inputs["norm"], *inputs["ffn"], 1e-6, wrap)
    else:
        crpe = (inputs["taps"], inputs["bias"])
        launches.conv_attention(inputs["qkv"], *crpe, 8, WINDOWS, (side, side), wrap)
    assert wrap.again is not None
    return wrap.again


SIZES = {name: value for name, value in vars(launches).items() if name.isupper()}
"""What is not tried is as it is."""


class Alone:
    """Launches kernels, and keeps the launch of one of them."""

    def __init__(self, kernel: str) -> None:
        self.kernel, self.again = kernel, None

    def __call__(self, kernel: Any) -> Any:
        """Return a kernel that is noticed when it is launched."""
        alone = self

        class Noticed:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launched(*arguments: Any, **constants: Any) -> None:
                    again = functools.partial(kernel[grid], *arguments, **constants)
                    again()
                    if kernel.__name__ == alone.kernel:
                        alone.again = again

                return launched

        return Noticed()


@functools.lru_cache(maxsize=1)
def draw(shape: Shape) -> dict[str, Any]:
    """Return random inputs of every kernel for a shape."""
    channels, side, ratio = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return scale * torch.randn(size, generator=generator, device="cuda", dtype=dtype)

    tokens, hidden = 1 + side * side, (ratio or 1) * channels
    narrow, wide = channels**-0.5, hidden**-0.5
    return {
        "qkv": random(BATCH, tokens, 3 * channels),
        "x": random(BATCH, tokens, channels),
        "taps": random(49, channels, scale=0.1, dtype=torch.float32),
        "bias": random(channels, dtype=torch.float32),
        "norm": [random(channels), random(channels)],
        "ffn": [
            random(hidden, channels, scale=narrow), random(hidden),
            random(channels, hidden, scale=wide), random(channels),
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main()
