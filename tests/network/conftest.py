"""What the tests of the network share: non-trivial weights, and the paper's formulas."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

Randomise = Callable[..., None]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Toys are too small for threads: on busy cores they only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def paper() -> ModuleType:
    """The module `paper.py`, loaded by its path: test folders are no packages."""
    path = Path(__file__).with_name("paper.py")
    spec = importlib.util.spec_from_file_location("coat_paper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def randomise() -> Randomise:
    """Return a function that fills every parameter of a network, so that no term vanishes.

    A fresh network hides mistakes: its biases are 0, its LayerNorms the identity, its class
    tokens tiny, its softmax all but uniform. Here activations stay of the order of 1.
    """

    def fill(network: torch.nn.Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.normal_(generator=generator)
                if name.startswith("cls_token"):
                    continue
                if parameter.ndim > 1:
                    fan_in = parameter.numel() / parameter.shape[0]
                    # One CPE serves many blocks: at full size it would outgrow what they add.
                    gain = 0.15 if name.startswith("cpe") else 1
                    parameter.mul_(gain * fan_in**-0.5)
                else:
                    parameter.mul_(0.3)
                    if "norm" in name and name.endswith("weight"):
                        parameter.add_(1)

    return fill
