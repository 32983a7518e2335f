"""Time a training step of ours against timm's, on one variant, batch and precision.

    python docs/benchmarks/training_step.py --variant coat_lite_nano --batch 32 --threads 2

A step is all of it: zero_grad, forward, loss, backward, gradient clip, AdamW. Both networks start
from the same weights, see the same images and are set up alike; they take turns in one process, in
rounds of shuffled order, so that what slows the machine slows both. Needs timm beside PyTorch.
"""

import argparse
import importlib
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from coat_deploy.machine import describe
from coat_deploy.measure.latency import append_records, ratio_of_medians
from coat_deploy.network.coat import create_network
from coat_deploy.network.variants import VARIANTS, get_variant

CLASSES = 10
WARM_UP_STEPS = 3
OURS, TIMMS = "ours", "timm"

Step = Callable[[], None]


def main() -> None:
    """Measure, print, and record if asked."""
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    networks = {OURS: ours(arguments), TIMMS: timms(arguments)}
    networks[TIMMS].load_state_dict(networks[OURS].state_dict(), strict=True)
    steps = {name: training_step(network, arguments) for name, network in networks.items()}
    times = race(steps, arguments)
    result = figures(times, arguments)
    report(result)
    if arguments.record:
        document = result | {"machine": describe().to_json()}
        append_records(arguments.record, [json.dumps(document)])


def parse() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="coat_lite_nano")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, help="image side in pixels (default: the variant's)")
    parser.add_argument("--threads", type=int, help="compute threads (default: PyTorch's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--drop-path", type=float, default=0.05)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2, help="steps in turn in a round")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append a line of JSON")
    arguments = parser.parse_args()
    arguments.size = arguments.size or get_variant(arguments.variant).input_size
    return arguments


def ours(arguments: argparse.Namespace) -> nn.Module:
    """Return our network, freshly initialised."""
    torch.manual_seed(0)
    network = create_network(arguments.variant, CLASSES, drop_path=arguments.drop_path)
    return network.to(arguments.device).train()


def timms(arguments: argparse.Namespace) -> nn.Module:
    """Return timm's network of the same sizes."""
    variant = get_variant(arguments.variant)
    name, args = (
        (variant.timm.architecture, variant.timm.args) if variant.timm else (variant.name, {})
    )
    network: nn.Module = import_timm().create_model(
        name,
        num_classes=CLASSES,
        img_size=arguments.size,
        drop_path_rate=arguments.drop_path,
        **args,
    )
    return network.to(arguments.device).train()


def import_timm() -> ModuleType:
    """Import timm, which imports torchvision, beside a PyTorch that torchvision was not built for.

    Its Python files register kernels for operators that its library would have defined. Empty
    definitions are enough: nothing here calls them.
    """
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        try:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # a torchvision with its library is installed
            break
    globals()["_torchvision_library"] = library  # operators live as long as this object
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("timm")


def training_step(network: nn.Module, arguments: argparse.Namespace) -> Step:
    """Return a step of training on images and labels drawn once."""
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    pixels = torch.randn(shape, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (arguments.batch,), generator=generator).to(device)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    half = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")

    def step() -> None:
        optimiser.zero_grad()
        with half:
            loss = loss_of(network(pixels), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def race(steps: dict[str, Step], arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Return each contender's times in seconds, a list of them for each round."""
    order = random.Random(0)
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    times: dict[str, list[Any]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name in order.sample(list(steps), len(steps)):
            times[name].append(np.array([timed(steps[name]) for _ in range(arguments.steps)]))
    return times


def timed(step: Step) -> float:
    """Return how long a step takes, in seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def figures(times: dict[str, list[Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, as JSON values.

    `ratio` is timm's median over ours, how many times as fast ours is; its interval is a paired
    bootstrap over rounds. `quartiles` are those of the ratios of single rounds.
    """
    medians = {name: float(np.median(np.concatenate(rounds))) for name, rounds in times.items()}
    ratio = ratio_of_medians(times[TIMMS], times[OURS], np.random.default_rng(0))
    by_round = [
        np.median(theirs) / np.median(own)
        for theirs, own in zip(times[TIMMS], times[OURS], strict=True)
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "variant": arguments.variant,
        "batch": arguments.batch,
        "size": [arguments.size, arguments.size],
        "precision": arguments.precision,
        "threads": torch.get_num_threads(),
        "device": arguments.device,
        "rounds": arguments.rounds,
        "median_ms": {name: 1000 * median for name, median in medians.items()},
        "images_per_second": {name: arguments.batch / median for name, median in medians.items()},
        "ratio": ratio.value,
        "ratio_interval": [ratio.interval.low, ratio.interval.high],
        "quartiles": [float(q) for q in np.percentile(by_round, (25, 75))],
        "timm": importlib.import_module("timm").__version__,
    }


def report(result: dict[str, Any]) -> None:
    """Print what was measured."""
    size, machine = result["size"], describe()
    print(
        f"{result['variant']}, {result['batch']} images of {size[0]}x{size[1]}, "
        f"{result['precision']}, {result['threads']} threads, {result['device']}; "
        f"{result['rounds']} rounds\n{machine.summary()}, torch {torch.__version__}, "
        f"timm {result['timm']}\n"
    )
    for name, median in result["median_ms"].items():
        print(
            f"{name:>5} {median:8.1f} ms a step {result['images_per_second'][name]:8.1f} images/s"
        )
    low, high = result["ratio_interval"]
    first, third = result["quartiles"]
    print(
        f"\nours is {result['ratio']:.2f} times as fast (95% {low:.2f} to {high:.2f}; "
        f"half of the rounds {first:.2f} to {third:.2f})"
    )


if __name__ == "__main__":
    main()
