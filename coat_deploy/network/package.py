"""A network compiled ahead of time, as a package that runs without this code: AOTInductor's.

Whoever runs it needs PyTorch of the same version and the same kind of device, and no model code;
Triton's kernels of a fused network are in it as machine code.
"""

from pathlib import Path

import torch
from torch import nn

from coat_deploy.spec import Size


def compile_package(network: nn.Module, size: Size, path: Path, example_batch: int = 2) -> Path:
    """Compile `network` for images of one size and any number of them; write it to `path` (.pt2).

    It takes pixels (B, 3, H, W) of the type and on the device of the network's weights. A fused
    network must be fused without its feed-forward part, which asks for the size of the batch.
    """
    assert path.suffix == ".pt2"
    weight = next(network.parameters())
    pixels = torch.zeros(example_batch, 3, *size, dtype=weight.dtype, device=weight.device)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(network.eval(), (pixels,), dynamic_shapes=({0: batch},))
        return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))
