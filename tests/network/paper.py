"""The formulas of arXiv 2104.06399 read plainly, in NumPy float64: the network's yardstick.

Written from the paper, with explicit sums and loops where they are obviously right, for one
image at a time. Weights come by the names of the authors' checkpoints.

Letters: C channels, h heads, c = C / h, N = 1 + H*W tokens (class token first), M window.
Tokens are (N, C), maps (H, W, C); token 1 + y*W + x is the map's pixel (y, x).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray
Size = tuple[int, int]
Scales = list[tuple[Array, Size]]
"""Tokens of some scales, with the sizes of their maps."""


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """y_no = sum_i W_oi x_ni + b_o."""
    return np.einsum("oi,ni->no", weight, x) + bias


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Every token on its own: less its mean, over its standard deviation."""
    y = np.empty_like(x)
    for n, token in enumerate(x):
        mean = token.sum() / token.size
        variance = ((token - mean) ** 2).sum() / token.size
        y[n] = (token - mean) / math.sqrt(variance + eps) * weight + bias
    return y


def gelu(x: Array) -> Array:
    """X Phi(x), Phi the normal distribution function."""
    phi = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.ravel()]
    return x * np.array(phi).reshape(x.shape)


def softmax_over_tokens(k: Array) -> Array:
    """exp(k_nc) / sum_m exp(k_mc): a channel sums to 1 over the tokens."""
    return np.exp(k) / np.exp(k).sum(axis=0)


def factor_att(q: Array, k: Array, v: Array, num_heads: int) -> Array:
    """Q / sqrt(c) (softmax_N(K)^T V), head by head."""
    c = q.shape[1] // num_heads
    y = np.empty_like(q)
    for head in range(num_heads):
        own = slice(head * c, (head + 1) * c)
        context = softmax_over_tokens(k[:, own]).T @ v[:, own]  # (c, c)
        y[:, own] = q[:, own] / math.sqrt(c) @ context
    return y


def window_of(i: Size, m: int, size: Size) -> list[tuple[Size, Size]]:
    """Return each pixel j in the window around i that lies on the map, and j - i."""
    pixels = []
    for dy in range(-(m // 2), m // 2 + 1):
        for dx in range(-(m // 2), m // 2 + 1):
            y, x = i[0] + dy, i[1] + dx
            if 0 <= y < size[0] and 0 <= x < size[1]:
                pixels.append(((y, x), (dy, dx)))
    return pixels


def relative_encoding(q: Array, v: Array, p: Array, bias: Array) -> Array:
    """EV_i = sum_{j in window(i)} p_{j-i} (q_i . v_j), every channel its own head.

    q, v are maps, p is (C, 1, M, M). The checkpoints add a bias to the sum over the window.
    """
    m = p.shape[2]
    ev = np.empty_like(q)
    for i in np.ndindex(q.shape[:2]):
        ev[i] = bias * q[i]
        for j, (dy, dx) in window_of(i, m, q.shape[:2]):
            ev[i] += p[:, 0, m // 2 + dy, m // 2 + dx] * (q[i] * v[j])
    return ev


def position_encoding(x: Array, p: Array, bias: Array) -> Array:
    """X + DWConv(X) on a map, p is (C, 1, M, M)."""
    m = p.shape[2]
    y = x + bias
    for i in np.ndindex(x.shape[:2]):
        for j, (dy, dx) in window_of(i, m, x.shape[:2]):
            y[i] += p[:, 0, m // 2 + dy, m // 2 + dx] * x[j]
    return y


def between(position: int, length: int, new_length: int) -> tuple[int, int, float]:
    """Return the two neighbours that a resampled position lies between, and the second's share.

    Pixels are areas (align_corners=False): centres lie at whole numbers plus one half.
    """
    source = max((position + 0.5) * length / new_length - 0.5, 0)
    first = min(math.floor(source), length - 1)
    return first, min(first + 1, length - 1), source - first


def bilinear(x: Array, size: Size) -> Array:
    """Resample a map to `size`."""
    y = np.empty((*size, x.shape[2]))
    for row in range(size[0]):
        top, bottom, down = between(row, x.shape[0], size[0])
        for column in range(size[1]):
            left, right, across = between(column, x.shape[1], size[1])
            upper = (1 - across) * x[top, left] + across * x[top, right]
            lower = (1 - across) * x[bottom, left] + across * x[bottom, right]
            y[row, column] = (1 - down) * upper + down * lower
    return y


def to_map(x: Array, size: Size) -> Array:
    """Return the image tokens of x as a map."""
    return x[1:].reshape(*size, -1)


def on_image_tokens(cls: Array, image: Array) -> Array:
    """Return tokens of a class token (C,) and a map."""
    return np.concatenate((cls[None], image.reshape(-1, image.shape[2])))


def resample(x: Array, size: Size, new_size: Size) -> Array:
    """Resample the image tokens; the class token, which has no place, stays."""
    return on_image_tokens(x[0], bilinear(to_map(x, size), new_size))


@dataclass(frozen=True)
class Scope:
    """The weights below one name of the checkpoint."""

    weights: Mapping[str, Array]
    prefix: str = ""

    def __truediv__(self, name: str) -> "Scope":
        return replace(self, prefix=f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Array:
        return self.weights[self.prefix + name]

    def linear(self, x: Array) -> Array:
        return linear(x, self["weight"], self["bias"])

    def norm(self, x: Array, eps: float = 1e-6) -> Array:
        return layer_norm(x, self["weight"], self["bias"], eps)

    def ffn(self, x: Array) -> Array:
        return (self / "fc2").linear(gelu((self / "fc1").linear(x)))


@dataclass(frozen=True)
class Paper:
    """A CoaT as the paper writes it. `windows` holds (M, number of heads) in the heads' order."""

    weights: Mapping[str, Array]
    serial_depths: Sequence[int]
    parallel_depth: int
    num_heads: int = 8
    windows: Sequence[tuple[int, int]] = ((3, 2), (5, 3), (7, 3))
    cpe: bool = True
    crpe: bool = True
    co_scale: str = "interpolation"

    @property
    def root(self) -> Scope:
        return Scope(self.weights)

    def logits(self, pixels: Array) -> Array:
        """(K,) of an image (3, H, W): CoaT-Lite reads CLS of scale 4, CoaT a mean of 2 to 4."""
        tokens = [x for x, _ in self.tokens(pixels)]
        if self.parallel_depth:
            cls = [(self.root / f"norm{s}").norm(tokens[s - 1])[0] for s in (2, 3, 4)]
            share, bias = self.weights["aggregate.weight"][0, :, 0], self.weights["aggregate.bias"]
            vector = share[0] * cls[0] + share[1] * cls[1] + share[2] * cls[2] + bias
        else:
            vector = (self.root / "norm4").norm(tokens[3])[0]
        return (self.root / "head").linear(vector[None])[0]

    def features(self, pixels: Array) -> list[Array]:
        """The four maps (C, H, W)."""
        return [to_map(x, size).transpose(2, 0, 1) for x, size in self.tokens(pixels)]

    def tokens(self, pixels: Array) -> Scales:
        """Return all four scales after the last block."""
        image = pixels.transpose(1, 2, 0)
        scales = []
        for s in (1, 2, 3, 4):
            image = self.patch_embedding(s, image)
            size = image.shape[:2]
            x = on_image_tokens(self.weights[f"cls_token{s}"][0, 0], image)
            for n in range(self.serial_depths[s - 1]):
                x = self.serial_block(self.root / f"serial_blocks{s}" / str(n), s, x, size)
            image = to_map(x, size)
            scales.append((x, size))
        for n in range(self.parallel_depth):
            scales[1:] = self.parallel_block(self.root / "parallel_blocks" / str(n), scales[1:])
        return scales

    def patch_embedding(self, s: int, image: Array) -> Array:
        """One linear map of every patch of pixels, then LayerNorm."""
        w = self.root / f"patch_embed{s}"
        kernel = w["proj.weight"]  # (C, C', P, P)
        p = kernel.shape[2]
        y = np.empty((image.shape[0] // p, image.shape[1] // p, kernel.shape[0]))
        for row, column in np.ndindex(y.shape[:2]):
            patch = image[row * p : (row + 1) * p, column * p : (column + 1) * p]
            y[row, column] = np.einsum("oiyx,yxi->o", kernel, patch) + w["proj.bias"]
        return (w / "norm").norm(y.reshape(-1, y.shape[2]), eps=1e-5).reshape(y.shape)

    def serial_block(self, w: Scope, s: int, x: Array, size: Size) -> Array:
        x = self.encode_position(s, x, size)
        q, k, v = self.qkv(w / "factoratt_crpe", (w / "norm1").norm(x))
        x = x + (w / "factoratt_crpe" / "proj").linear(self.conv_att(s, q, k, v, size))
        return x + (w / "mlp").ffn((w / "norm2").norm(x))

    def parallel_block(
        self, w: Scope, scales: list[tuple[Array, Size]]
    ) -> list[tuple[Array, Size]]:
        """Scales 2 to 4 attend and exchange; the FFN's weights are those of scale 2 for all."""
        sizes = [size for _, size in scales]
        xs = [self.encode_position(s, *scales[s - 2]) for s in (2, 3, 4)]
        qkvs = [
            self.qkv(w / f"factoratt_crpe{s}", (w / f"norm1{s}").norm(xs[s - 2])) for s in (2, 3, 4)
        ]
        exchange = self.attend_directly if self.co_scale == "direct" else self.interpolate
        attended = exchange(w, qkvs, sizes)
        result = []
        for s, x, y, size in zip((2, 3, 4), xs, attended, sizes, strict=True):
            x = x + y
            result.append((x + (w / "mlp2").ffn((w / f"norm2{s}").norm(x)), size))
        return result

    def interpolate(self, w: Scope, qkvs: list[list[Array]], sizes: list[Size]) -> list[Array]:
        """Conv-attention of every scale; a scale gets the sum of all, resampled to its size."""
        own = [
            (w / f"factoratt_crpe{s}" / "proj").linear(self.conv_att(s, *qkvs[s - 2], sizes[s - 2]))
            for s in (2, 3, 4)
        ]
        if self.co_scale == "none":
            return own
        return [
            sum(resample(y, size, target) for y, size in zip(own, sizes, strict=True))
            for target in sizes
        ]

    def attend_directly(self, w: Scope, qkvs: list[list[Array]], sizes: list[Size]) -> list[Array]:
        """Q of a scale attends K and V of every scale, resampled to its size; summed."""
        result = []
        for s in (2, 3, 4):
            target = sizes[s - 2]
            total = 0
            for (_, k, v), size in zip(qkvs, sizes, strict=True):
                k, v = resample(k, size, target), resample(v, size, target)
                total = total + self.conv_att(s, qkvs[s - 2][0], k, v, target)
            result.append((w / f"factoratt_crpe{s}" / "proj").linear(total))
        return result

    def encode_position(self, s: int, x: Array, size: Size) -> Array:
        """CPE on the image tokens."""
        if not self.cpe:
            return x
        p = self.root / f"cpe{s}" / "proj"
        return on_image_tokens(x[0], position_encoding(to_map(x, size), p["weight"], p["bias"]))

    def qkv(self, w: Scope, x: Array) -> list[Array]:
        """Q, K and V (N, C): the first, second and last third of the projection's rows."""
        weights, biases = np.split(w["qkv.weight"], 3), np.split(w["qkv.bias"], 3)
        return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def conv_att(self, s: int, q: Array, k: Array, v: Array, size: Size) -> Array:
        """FactorAtt + EV; the class token has no EV."""
        y = factor_att(q, k, v, self.num_heads)
        if not self.crpe:
            return y
        start = 0
        for group, (_, heads) in enumerate(self.windows):
            own = slice(start, start + heads * q.shape[1] // self.num_heads)
            p = self.root / f"crpe{s}" / "conv_list" / str(group)
            ev = relative_encoding(
                to_map(q[:, own], size), to_map(v[:, own], size), p["weight"], p["bias"]
            )
            y[1:, own] += ev.reshape(-1, ev.shape[2])
            start = own.stop
        return y
