"""How far from the pixels each parameter is, in layers: what layer-wise learning rates go by."""

from coat_deploy.network.variants import Variant


def layer_count(variant: Variant) -> int:
    """Return the number of layers: the pixels' end, every block, and the head's end."""
    return sum(variant.serial_depths) + variant.parallel_depth + 2


def layer_of(key: str, variant: Variant) -> int:
    """Return the layer of a parameter by its key, 0 to `layer_count` - 1.

    The first patch embedding and class token are layer 0, each serial block in turn is one, then
    each parallel block, then the last norms and the head. What a scale shares among its blocks
    (CPE, CRPE), and the embedding and class token before it, belong to the first that uses them.
    """
    module, *rest = key.split(".")
    name, scale = module.rstrip("1234"), module[-1]
    if module == "parallel_blocks":
        # CRPE appears in blocks too, under the scale whose serial blocks used it first.
        if "crpe" in rest:
            return _first_of(int(rest[1][-1]), variant)
        return 1 + sum(variant.serial_depths) + int(rest[0])
    if name == "serial_blocks":
        first = _first_of(int(scale), variant)
        return first if rest[1] == "cpe" or "crpe" in rest else first + int(rest[0])
    if name in ("cpe", "crpe"):
        return _first_of(int(scale), variant)
    if name in ("patch_embed", "cls_token"):
        return 0 if scale == "1" else _first_of(int(scale), variant)
    return layer_count(variant) - 1


def _first_of(scale: int, variant: Variant) -> int:
    """Return the layer of the first serial block of a scale."""
    return 1 + sum(variant.serial_depths[: scale - 1])
