"""The state that travels through an authored graph: image rows, class token, and their grid.

The class token is kept apart from the image all the way: no slicing, gluing or padding as in
the network's file, and what no output needs of either simply has no consumer and is pruned.
"""

from dataclasses import dataclass

from coat_deploy.graph.author import Author, Value

NCHW_TO_NHWC = (0, 2, 3, 1)
NHWC_TO_NCHW = (0, 3, 1, 2)
LAST = 2**31 - 1
"""End of a slice that goes to the end of its axis, whatever its length."""


@dataclass(frozen=True)
class Grid:
    """Shape of one scale: plain numbers, or values of the graph where the size is dynamic.

    `num_tokens` is H*W, of the nominal size where H and W are dynamic: a hint, for choices that
    change speed and not results.
    """

    channels: int
    fixed: tuple[int, int] | None  # (H, W)
    num_tokens: int
    size: Value  # (H, W)
    map_shape: Value  # (-1, H, W, C)
    token_shape: Value  # (-1, H*W, C)
    joined_shape: Value  # (-1, 1 + H*W, C)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one scale: `image` rows (B*H*W, C) and `cls` (B, C)."""

    image: Value
    cls: Value
    grid: Grid


def fixed_grid(a: Author, height: int, width: int, channels: int) -> Grid:
    """Return the grid of a scale whose size is fixed: all shapes are constants."""
    count = height * width
    return Grid(
        channels=channels,
        fixed=(height, width),
        num_tokens=count,
        size=a.integers(height, width),
        map_shape=a.integers(-1, height, width, channels),
        token_shape=a.integers(-1, count, channels),
        joined_shape=a.integers(-1, 1 + count, channels),
    )


def dynamic_grid(a: Author, feature_map: Value, num_tokens: int, channels: int) -> Grid:
    """Return the grid of a map (B, C, H, W) whose size is known only at run time."""
    size = a.node("Shape", (feature_map,), "size", start=2, end=4)[0]
    count = a.node("ReduceProd", (size,), "count", keepdims=1)[0]
    joined = a.add(count, a.integers(1), name="joined_count")
    return Grid(
        channels=channels,
        fixed=None,
        num_tokens=num_tokens,
        size=size,
        map_shape=a.shape(-1, size, channels, name="map_shape"),
        token_shape=a.shape(-1, count, channels, name="token_shape"),
        joined_shape=a.shape(-1, joined, channels, name="joined_shape"),
    )


def rows(a: Author, x: Value, channels: int) -> Value:
    """Return `x` (..., C) as rows (R, C)."""
    return a.reshape(x, a.integers(-1, channels), "rows")


def join_tokens(a: Author, x: Tokens, name: str) -> Value:
    """Return class token and image tokens as one (B, N, C)."""
    cls = a.reshape(x.cls, a.integers(-1, 1, x.grid.channels), f"{name}_cls")
    image = a.reshape(x.image, x.grid.token_shape, f"{name}_image")
    return a.concat((cls, image), 1, name)


def part_tokens(a: Author, joined: Value, grid: Grid, image: str, cls: str) -> Tokens:
    """Return rows (B*N, C), joined as by `join_tokens`, as tokens named `image` and `cls`."""
    tokens = a.reshape(joined, grid.joined_shape, f"{image}_and_{cls}")
    one = a.integers(-1, grid.channels)
    images = a.slice(tokens, 1, LAST, 1, f"{image}_part")
    classes = a.slice(tokens, 0, 1, 1, f"{cls}_part")
    return Tokens(a.reshape(images, one, image), a.reshape(classes, one, cls), grid)


def to_map(a: Author, image: Value, grid: Grid) -> Value:
    """Return image rows as a map (B, C, H, W)."""
    return a.transpose(a.reshape(image, grid.map_shape, "map"), NHWC_TO_NCHW, "nchw")


def from_map(a: Author, feature_map: Value, channels: int) -> Value:
    """Return a map (B, C, H, W) as image rows."""
    return rows(a, a.transpose(feature_map, NCHW_TO_NHWC, "nhwc"), channels)
