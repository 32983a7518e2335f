"""What every runner asks of its input, so that all of them refuse the same in the same words.

Runtimes differ here: one converts another dtype in silence, one returns the last result again
for an image that leaves no position at scale 4, one takes a batch of none.
"""

import numpy as np

from coat_deploy.errors import RunnerError
from coat_deploy.network.variants import VARIANTS
from coat_deploy.runner import Pixels, TensorSpec

MIN_SIDE = min(variant.min_side for variant in VARIANTS.values())
"""Smallest side of an image where a graph leaves H and W open; the same for all variants."""

_LEAST = {0: 1, 2: MIN_SIDE, 3: MIN_SIDE}
"""Smallest length of the axes (B, 3, H, W) that may be dynamic."""


def accept(pixels: Pixels, spec: TensorSpec, target: str) -> Pixels:
    """Return `pixels`, copied where they are not contiguous and writable, as runtimes want them.

    Raises: RunnerError when dtype or shape are not those of the input `spec`.
    """
    fits = len(pixels.shape) == len(spec.shape) and all(
        got == want if isinstance(want, int) else got >= _LEAST.get(axis, 1)
        for axis, (got, want) in enumerate(zip(pixels.shape, spec.shape, strict=True))
    )
    if not fits or pixels.dtype != spec.dtype:
        advice = "Bring the images to this size, or export the model for theirs."
        raise RunnerError(
            f"{target}: the pixels do not fit (got {pixels.dtype} {_describe(pixels.shape)}, "
            f"expected {spec.dtype} {_describe(spec.shape)}). "
            f"{'Convert them first.' if fits else advice}"
        )
    return np.require(pixels, requirements=("C_CONTIGUOUS", "WRITEABLE"))


def _describe(shape: tuple[int | str, ...]) -> str:
    """Return a shape with the least length of what is dynamic: (B >= 1, 3, H >= 32, W >= 32)."""
    return "({})".format(
        ", ".join(
            str(length) if isinstance(length, int) else f"{'BCHW'[axis]} >= {_LEAST.get(axis, 1)}"
            for axis, length in enumerate(shape)
        )
    )
