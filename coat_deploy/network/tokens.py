"""Tokens and maps: the two ways in which a scale is laid out.

Letters: B batch, H x W a map, C channels. Image tokens go in rows; the class token is not here.
"""

from torch import Tensor


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Lay image tokens (B, H*W, C) out as a map (B, C, H, W)."""
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, channels, size[0], size[1])


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Flatten a map (B, C, H, W) to image tokens (B, H*W, C)."""
    return feature_map.flatten(2).transpose(1, 2)
