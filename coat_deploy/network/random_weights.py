"""Random weights that behave like trained ones: for tests and figures without a download.

A fresh network's small initialisation says little about an export: its logits hardly differ
between images, and a wrong bias or a lost class token goes unseen. These weights make every
parameter matter and keep activations of order 1 through the deepest variant.

They are the same bits on every machine and with every version of numpy and PyTorch: a key's
values come from its name, the seed and the raw stream of PCG64, by integer sums and one
product, without a library's transcendental functions.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

import numpy as np

from coat_deploy.runner import Array

Shape = tuple[int, ...]

_GAINS = (("cpe", 0.15), ("factoratt_crpe.proj", 0.5), ("fc2", 0.5), ("head", 1.25))
"""Standard deviation of a layer's output where that of its input is 1, by a part of the key.

CPE is one convolution applied in every block of a scale: a larger gain lets a few channels grow
until they drown the others. Residual branches of a gain of 1 amplify rounding errors by the
depth, so that two correct runtimes would disagree in the fifth digit.
"""


def random_tensors(
    shapes: Mapping[str, Shape], aliases: Iterable[tuple[str, ...]], seed: int
) -> dict[str, Array]:
    """Return a float32 tensor for every key of `shapes`, scaled by what its name says it is.

    aliases: groups of keys of one shared parameter; they hold the same array, drawn for the
        first key of the group.
    """
    canonical = {key: group[0] for group in aliases for key in group}
    tensors: dict[str, Array] = {}
    for key, shape in shapes.items():
        source = canonical.get(key, key)
        if source not in tensors:
            tensors[source] = _draw(source, shape, seed)
        tensors[key] = tensors[source]
    return {key: tensors[key] for key in shapes}


def _draw(key: str, shape: Shape, seed: int) -> Array:
    """Return the values of one parameter."""
    noise = _noise(f"{seed}:{key}", math.prod(shape)).reshape(shape)
    name = key.split(".")
    if name[-1].startswith("cls_token"):
        values = 0.25 * noise
    elif name[-1] == "bias":
        values = 0.1 * noise
    elif name[-2].startswith("norm"):
        values = 1 + 0.1 * noise
    elif name[-2] == "aggregate":
        values = (1 + 0.2 * noise) / shape[1]  # a mean of the scales, roughly, as trained
    else:
        gain = next((gain for part, gain in _GAINS if part in key), 1.0)
        values = gain / math.sqrt(math.prod(shape[1:])) * noise  # over the fan-in
    return values.astype(np.float32)


def _noise(stream: str, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return `count` numbers of mean 0 and variance 1, within 3.5: nearly normal.

    A sum of four uniform integers (Irwin-Hall), exact in float64.
    """
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest())
    raw = np.random.PCG64(seed).random_raw(count)
    parts = (raw & 0xFFFF) + (raw >> 16 & 0xFFFF) + (raw >> 32 & 0xFFFF) + (raw >> 48)
    centred = parts.astype(np.int64) - 2 * 0xFFFF
    return centred / math.sqrt(4 * (2**32 - 1) / 12)
