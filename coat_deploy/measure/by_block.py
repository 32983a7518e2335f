"""Find the first block in which a candidate departs from its reference.

Both runners were loaded with the same `taps`, so both return the tokens after every block. Two
exact implementations differ by rounding, and in a residual network with normed branches that
error hardly grows from block to block; a changed weight makes a jump where it sits, and whatever
follows only carries it on. So a block departs when its error jumps over all errors before it, or
when it is larger than rounding explains at all.

Taps are named `serial_blocks1.0.image`, `parallel_blocks.3.cls4`: the block is all up to the last
dot. A parallel block mixes its three scales, so its tensors count as one block, and the errors
before it as one level.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coat_deploy.errors import RunnerError
from coat_deploy.measure.agreement import relative
from coat_deploy.runner import Array, Pixels, Runner


@dataclass(frozen=True)
class BlockLimit:
    """When a block departs, in relative L2 errors |candidate - reference| / |reference|.

    `floor`: the error that one block may make by rounding alone; smaller ones count as this.
    `jump`: a block departs when its error is above `jump` times the largest error before it.
    `ceiling`: a block departs above this, however slowly the error got there.
    """

    floor: float
    jump: float
    ceiling: float


BLOCK_LIMITS: dict[str, BlockLimit] = {
    # Measured against float64 on coat_lite_tiny, coat_lite_medium, coat_tiny and coat_small with
    # random weights at 224 px: 1.3e-7 after the first embedding, 4.5e-7 after the first block,
    # 1.2e-6 at most anywhere, in class tokens. One weight moved by 0.05, of a layer drawn at
    # random, was traced to its block 58 times in 58. Class tokens have to be tensors of their
    # own: beside the image's tokens a change of theirs drowns, and 3 in 60 were missed.
    "fp32": BlockLimit(floor=5e-7, jump=8, ceiling=1e-4),
    # 10 fraction bits where bf16 has 7: an eighth of its errors.
    "tf32": BlockLimit(floor=5e-4, jump=5, ceiling=2e-2),
    "fp16": BlockLimit(floor=5e-4, jump=5, ceiling=2e-2),
    # Measured likewise: 3e-3 after the first embedding, 1.1e-2 at most. What changes less than
    # this rounding cannot be seen through it.
    "bf16": BlockLimit(floor=4e-3, jump=5, ceiling=0.15),
    # A step of 1/127 of the largest value is a relative error of about 1e-2 a layer.
    "int8": BlockLimit(floor=2e-2, jump=5, ceiling=0.5),
}


@dataclass(frozen=True)
class BlockDifference:
    """How far one block's tensors are apart; figures are those of the worst, named `tensor`.

    `non_finite`: values of both sides that are NaN or infinite; with any, the figures are NaN.
    """

    block: str
    tensor: str
    max_abs_difference: float
    relative_l2: float
    non_finite: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the figures; one that is not finite is null."""
        return {
            "block": self.block,
            "tensor": self.tensor,
            "max_abs_difference": _finite(self.max_abs_difference),
            "relative_l2": _finite(self.relative_l2),
            "non_finite": self.non_finite,
        }


@dataclass(frozen=True)
class Departure:
    """The first block that departs, and a sentence with the figures that say so."""

    difference: BlockDifference
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the block's figures and the reason."""
        return {**self.difference.to_json(), "reason": self.reason}


@dataclass(frozen=True)
class BlockReport:
    """Every block in order, and the first that departs, if one does."""

    blocks: tuple[BlockDifference, ...]
    departure: Departure | None

    def to_json(self) -> dict[str, Any]:
        """Return `first_departing` (a block's name or null), why, and every block's figures."""
        return {
            "first_departing": self.departure.difference.block if self.departure else None,
            "departure": self.departure.to_json() if self.departure else None,
            "blocks": [difference.to_json() for difference in self.blocks],
        }


def compare_blocks(
    reference: Runner,
    candidate: Runner,
    taps: Sequence[str],
    pixels: Pixels,
    limit: BlockLimit,
) -> BlockReport:
    """Run `pixels` (B, 3, H, W) through both and compare every tap, then every output, in order.

    A pair may differ in shape, (B, N, C) against (B * N, C), but holds the same elements in the
    same order.
    Raises: RunnerError when a tensor is missing or has another number of elements.
    """
    left, right = reference.run(pixels), candidate.run(pixels)
    tensors = dict.fromkeys((*taps, *(spec.name for spec in reference.outputs)))
    by_block: dict[str, list[BlockDifference]] = {}
    for name in tensors:
        difference = _compare(name, left, right)
        by_block.setdefault(difference.block, []).append(difference)
    blocks = tuple(_worst(differences) for differences in by_block.values())
    return BlockReport(blocks, first_departure(blocks, limit))


def first_departure(blocks: Sequence[BlockDifference], limit: BlockLimit) -> Departure | None:
    """Return the first of `blocks`, given in order of execution, that departs; None if none does.

    A value that is not finite departs at once.
    """
    before, where = limit.floor, "the rounding of one block"
    for difference in blocks:
        error = difference.relative_l2
        if difference.non_finite:
            return Departure(
                difference,
                f"{difference.block}: {difference.non_finite} values of {difference.tensor} are "
                "NaN or infinite.",
            )
        if not error <= limit.jump * before:
            return Departure(
                difference,
                f"{difference.block}: relative error {error:.2g} in {difference.tensor} is "
                f"{error / before:.3g} times {where}, {before:.2g} (limit {limit.jump:g} times).",
            )
        if not error <= limit.ceiling:
            return Departure(
                difference,
                f"{difference.block}: relative error {error:.2g} in {difference.tensor} is above "
                f"{limit.ceiling:g}, more than rounding explains.",
            )
        if error > before:
            before, where = error, f"the largest before, of {difference.tensor}"
    return None


def _compare(
    name: str, reference: Mapping[str, Array], candidate: Mapping[str, Array]
) -> BlockDifference:
    for side, outputs in (("reference", reference), ("candidate", candidate)):
        if name not in outputs:
            raise RunnerError(
                f"tensor '{name}': the {side} does not return it. "
                "Export the model again, so that its inner tensors have their names."
            )
    r, c = reference[name], candidate[name]
    if r.size != c.size:
        raise RunnerError(
            f"tensor '{name}': the two hold different numbers of elements "
            f"(got {list(c.shape)}, expected {list(r.shape)} in any shape). "
            "Export the model again."
        )
    block = name.rpartition(".")[0] or name
    r, c = r.ravel().astype(np.float64), c.ravel().astype(np.float64)
    bad = int((~np.isfinite(r)).sum() + (~np.isfinite(c)).sum())
    if bad:
        return BlockDifference(block, name, math.nan, math.nan, bad)
    delta = np.abs(c - r)
    return BlockDifference(
        block, name, float(delta.max()), relative(float(delta @ delta), float(r @ r))
    )


def _worst(differences: Sequence[BlockDifference]) -> BlockDifference:
    return max(differences, key=lambda d: (d.non_finite, d.relative_l2))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
