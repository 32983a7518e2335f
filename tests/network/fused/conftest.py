"""What the tests of the fused operators share: their inputs, and the paper's formulas for them."""

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
WINDOWS = [3, 3, 5, 5, 5, 7, 7, 7]
SECONDS = 300
"""What one launch may take in the interpreter on a busy machine."""


@dataclass(frozen=True)
class Case:
    """Inputs of conv-attention, drawn from a seed; `dtype` rounds them."""

    qkv: torch.Tensor
    taps: torch.Tensor
    bias: torch.Tensor
    size: tuple[int, int]

    @classmethod
    def draw(cls, channels: int, size: tuple[int, int], batch: int, dtype: torch.dtype) -> "Case":
        generator = torch.Generator().manual_seed(channels)
        tokens = 1 + size[0] * size[1]
        qkv = 1.5 * torch.randn(batch, tokens, 3 * channels, generator=generator)
        taps = 0.2 * torch.randn(7, 7, channels, generator=generator)
        for head, window in enumerate(WINDOWS):
            rim, own = (7 - window) // 2, slice(head * channels // 8, (head + 1) * channels // 8)
            inner = torch.zeros(7, 7, 1)
            inner[rim : 7 - rim, rim : 7 - rim] = 1
            taps[:, :, own] *= inner
        bias = torch.randn(channels, generator=generator)
        return cls(qkv.to(dtype), taps.reshape(49, channels), bias, size)

    def arguments(self, encode: bool = True) -> tuple[Any, ...]:
        crpe = (self.taps, self.bias) if encode else (None, None)
        return (self.qkv, *crpe, 8, WINDOWS, self.size)

    def expected(self, paper: ModuleType, encode: bool = True) -> np.ndarray:
        """The paper's formulas on the rounded inputs, in float64."""
        channels = self.qkv.shape[2] // 3
        taps = self.taps.double().T.reshape(channels, 1, 7, 7).numpy()
        images = []
        for image in self.qkv.double().numpy():
            q, k, v = np.split(image, 3, axis=1)
            y = paper.factor_att(q, k, v, 8)
            if encode:
                maps = (paper.to_map(q, self.size), paper.to_map(v, self.size))
                ev = paper.relative_encoding(*maps, taps, self.bias.double().numpy())
                y[1:] += ev.reshape(-1, channels)
            images.append(y)
        return np.stack(images)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Case]:
    return Case.draw


@pytest.fixture(scope="session")
def error() -> Callable[[torch.Tensor, np.ndarray], float]:
    """Return a function for the error relative to what was expected, both as lengths."""

    def relative(got: torch.Tensor, expected: np.ndarray) -> float:
        assert got.shape == expected.shape
        difference = got.double().numpy() - expected
        return float(np.linalg.norm(difference) / np.linalg.norm(expected))

    return relative


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Return `launch(name, *arguments, **constants)`, computed by Triton's interpreter."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("interpreter.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def launch(name: str, *arguments: Any, **constants: int) -> Any:
            pickle.dump((name, arguments, constants), process.stdin)
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], SECONDS)
            assert ready, f"{name} took more than {SECONDS} s"
            answer = pickle.load(process.stdout)
            if isinstance(answer, Exception):
                raise answer
            return answer

        try:
            yield launch
        finally:
            process.kill()
