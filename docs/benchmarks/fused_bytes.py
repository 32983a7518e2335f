"""Print what blocks move through a GPU's memory, fused and not, for every published variant.

No measurement: a count of tensors read and written once each, in units of (B, N, C), as PyTorch's
eager network does it and as the fused operators do; what a cache keeps between two is not known.
"""

import argparse
from collections.abc import Iterator

from coat_deploy.network.variants import VARIANTS, Variant

ATTENTION = {
    "softmax of K": 2,
    "context of K and V": 2,
    "Q with the context": 2,
    "scaled": 2,
    "V copied as a map": 2,
    "windows of V": 2,
    "their results joined": 2,
    "times Q": 3,
    "padded for the class token": 2,
    "added": 3,
    "heads side by side": 2,
}
FUSED_ATTENTION = {"K and V": 2, "windows of V": 2, "Q and they": 2, "written": 1}
POSITION = {"window": 2, "added": 3, "class token joined": 2}
FUSED_POSITION = {"read and written": 2}
FUSED_CHANNELS = 128
"""The widest FFN that is fused."""


def feed_forward(ratio: int) -> int:
    """LayerNorm 2; fc1 1 + ratio; GELU 2 ratio; fc2 ratio + 1; added 3."""
    return 7 + 4 * ratio


def scales(variant: Variant, batch: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (channels, serial blocks, all blocks, FFN ratio, elements of one tensor) a scale."""
    rows = zip(variant.channels, variant.serial_depths, variant.ffn_ratios, strict=True)
    for scale, (channels, serial, ratio) in enumerate(rows):
        side = variant.input_size // variant.patch_size // 2**scale
        blocks = serial + (variant.parallel_depth if scale else 0)
        yield channels, serial, blocks, ratio, batch * (1 + side * side) * channels


def row(variant: Variant, batch: int, element: int) -> list[float]:
    """Return GB of attention, CPE and narrow FFNs, unfused and fused each, and their TFLOP."""
    gigabytes, operations = [0.0] * 6, 0.0
    for channels, serial, blocks, ratio, elements in scales(variant, batch):
        size = elements * element / 1e9
        for i, passes in enumerate((ATTENTION, FUSED_ATTENTION, POSITION, FUSED_POSITION)):
            gigabytes[i] += blocks * size * sum(passes.values())
        if channels <= FUSED_CHANNELS:
            gigabytes[4] += serial * size * feed_forward(ratio)
            gigabytes[5] += serial * size * 2
            operations += serial * 4 * elements * channels * ratio / 1e12
    return [*gigabytes, operations]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bytes", type=int, default=2, help="of an element")
    options = parser.parse_args()
    parts = ("attention", "CPE", "FFN")
    print("| variant |", " | ".join(f"{part} | fused" for part in parts), "| FFN, TFLOP |")
    print("| --- |" + " ---: |" * 7)
    for variant in VARIANTS.values():
        if variant.published:
            figures = [f"{figure:.1f}" for figure in row(variant, options.batch, options.bytes)]
            print(f"| {variant.name} |", " | ".join(figures), "|")


if __name__ == "__main__":
    main()
