"""A network compiled ahead of time, as a package that runs without this code: AOTInductor's.

Whoever runs it needs PyTorch of the same version and the same kind of device, and no model code;
Triton's kernels of a fused network are in it as machine code.
"""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coat_deploy.spec import Size

CONFIG: Mapping[str, Any] = {"cpp.dynamic_threads": True}
"""Of the compiler. A package uses as many threads as its process has when it runs; by itself it
would use the number that there was at its compilation."""


class Float32Ends(nn.Module):
    """A network of a low type, which takes and returns float32 as one of float32 does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dtype = next(network.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the network makes of pixels (B, 3, H, W), in float32."""
        outputs = self.network(pixels.to(self.dtype))
        if isinstance(outputs, tuple):
            return tuple(output.float() for output in outputs)
        return outputs.float()


def compile_package(
    network: nn.Module,
    size: Size,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    example_batch: int = 2,
) -> Path:
    """Compile `network` for images of one size and any number of them; write it to `path` (.pt2).

    It takes pixels (B, 3, H, W) and returns tensors, both float32 and on the device of the
    network's weights, whatever their type. A fused network must be fused without its feed-forward
    part, which asks for the size of the batch. `metadata` is kept in the package, as text.
    Raises: RuntimeError and others of PyTorch's when the compiler fails.
    """
    assert path.suffix == ".pt2"
    device = next(network.parameters()).device
    pixels = torch.zeros(example_batch, 3, *size, device=device)
    batch = torch.export.Dim("batch", min=1)
    configs = {**CONFIG, "aot_inductor.metadata": dict(metadata or {})}
    with torch.no_grad(), _quiet(), _no_cache():
        ends = Float32Ends(network.eval())
        program = torch.export.export(ends, (pixels,), dynamic_shapes=({0: batch},))
        written = torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=configs
        )
    return Path(written)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Let the compiler leave nothing behind: its cache would grow by the weights at every call."""
    from torch._inductor.utils import fresh_inductor_cache

    with tempfile.TemporaryDirectory() as folder, fresh_inductor_cache(dir=folder):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch's warnings to itself; what fails is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
