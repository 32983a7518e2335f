"""Conv-attention, and what is before and after it in a block, as GPU kernels, in Triton's language.

    context = softmax_N(K)^T V                          a head, (c, c)
    y       = Q context / sqrt(c) + Q * DWConv(V)       the second term on the image tokens
    x       = X + DWConv(X)                             before it, on the image tokens
    x       = X + W2 GELU(W1 LayerNorm(X) + b1) + b2    after it

Q, K and V are read where the projection wrote them, side by side (B, N, 3C), and y is written as
(B, N, C), as the output projection reads it. Sums are in float32.

A program takes a group of neighbouring heads: a head alone may be 8 channels wide, where the matrix
units want 16 and memory 32 bytes. Their products with each other are computed, and left out. Its
lanes begin at a multiple of `ALIGNED` channels, so that 16 bytes are read at once where heads are
19 channels wide, too; what a lane reads of a neighbour's channels is left out as well.

Letters: B images, N = 1 + H*W tokens (class token first), C channels, h heads, c = C / h.
"""

# Triton reads these functions: annotations mean constants there, and nothing else.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

ALIGNED = tl.constexpr(8)


@triton.jit
def _halves(x, dtype: tl.constexpr):
    """Return float32 rounded to `dtype`, and what the rounding left.

    bfloat16 has 8 bits: softmax and context rounded to it would cost more than the result's own
    rounding does, and a second product of what was left costs no more memory.
    """
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def context_kernel(
    qkv,
    contexts,
    statistics,
    tokens,
    chunk,
    splits,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the context of a group of heads over one chunk of an image's tokens.

    Softmax is taken in one pass: what was summed fades when a larger K comes. The sums are divided
    by their weights only by the reader, which joins the chunks.

    Grid: groups, splits, B. Shapes: qkv (B, N, 3C); contexts (B, splits, C, c) and statistics
    (B, splits, 2, C) float32: the largest K of a channel, and the sum of its weights.
    """
    group, split = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    first = group * (GROUP_HEADS * HEAD)
    channel = first // ALIGNED * ALIGNED + tl.arange(0, LANES)
    known = channel < CHANNELS
    inside = (channel >= first) & (channel < first + GROUP_HEADS * HEAD) & known
    rows = qkv + image * tokens * (3 * CHANNELS)
    end = tl.minimum((split + 1) * chunk, tokens)

    most = tl.where(known, float("-inf"), 0.0)
    total = tl.zeros((LANES,), tl.float32)
    context = tl.zeros((LANES, LANES), tl.float32)
    for start in range(split * chunk, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = (token < end)[:, None] & known[None, :]
        place = rows + token[:, None] * (3 * CHANNELS) + channel[None, :]
        k = tl.load(place + CHANNELS, mask=there, other=float("-inf")).to(tl.float32)
        v = tl.load(place + 2 * CHANNELS, mask=there, other=0.0)
        larger = tl.maximum(most, tl.max(k, axis=0))
        fade = tl.exp(most - larger)
        weights = tl.exp(k - larger[None, :])
        total = total * fade + tl.sum(weights, axis=0)
        high, low = _halves(tl.trans(weights), v.dtype)
        context = tl.dot(high, v, context * fade[:, None], input_precision=PRECISION)
        if v.dtype == tl.bfloat16:
            context = tl.dot(low, v, context, input_precision=PRECISION)
        most = larger

    part = image * splits + split
    head = channel // HEAD
    own = (head[:, None] == head[None, :]) & inside[:, None] & inside[None, :]
    place = (part * CHANNELS + channel[:, None]) * HEAD + (channel % HEAD)[None, :]
    tl.store(contexts + place, context, mask=own)
    place = part * (2 * CHANNELS) + channel
    tl.store(statistics + place, most, mask=inside)
    tl.store(statistics + place + CHANNELS, total, mask=inside)


@triton.jit
def _joined_context(
    contexts,
    statistics,
    image,
    splits,
    channel,
    inside,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return softmax_N(K)^T V of a group of heads, (LANES, LANES) with zeros between heads."""
    most = tl.where(inside, float("-inf"), 0.0)
    for split in range(splits):
        place = statistics + (image * splits + split) * (2 * CHANNELS) + channel
        most = tl.maximum(most, tl.load(place, mask=inside, other=float("-inf")))

    head = channel // HEAD
    own = (head[:, None] == head[None, :]) & inside[:, None] & inside[None, :]
    total = tl.zeros((LANES,), tl.float32)
    context = tl.zeros((LANES, LANES), tl.float32)
    for split in range(splits):
        part = image * splits + split
        place = statistics + part * (2 * CHANNELS) + channel
        share = tl.exp(tl.load(place, mask=inside, other=float("-inf")) - most)
        total += share * tl.load(place + CHANNELS, mask=inside, other=0.0)
        place = contexts + (part * CHANNELS + channel[:, None]) * HEAD + (channel % HEAD)[None, :]
        context += share[:, None] * tl.load(place, mask=own, other=0.0)
    return context / tl.where(inside, total, 1.0)[:, None]


@triton.jit
def _convolved(
    values,
    taps,
    bias,
    y,
    x,
    channel,
    there,
    known,
    height,
    width,
    STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Return DWConv(V) at the pixels (y, x), a window of `RADIUS` in taps stored `SIDE` wide.

    STRIDE: from one token to the next, which may be wider than the C channels of V.
    """
    at = (1 + y * width + x)[:, None] * STRIDE + channel[None, :]
    result = tl.zeros(there.shape, tl.float32)
    result += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for dy in range(-RADIUS, RADIUS + 1):
        row = (y + dy >= 0) & (y + dy < height)
        shifted = values + at + dy * width * STRIDE
        weights = taps + ((dy + SIDE // 2) * SIDE + SIDE // 2) * CHANNELS + channel
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            near = row & (x + dx >= 0) & (x + dx < width)
            v = tl.load(shifted + dx * STRIDE, mask=there & near[:, None], other=0.0)
            tap = tl.load(weights + dx * CHANNELS, mask=known, other=0.0).to(tl.float32)
            result += v.to(tl.float32) * tap[None, :]
    return result


@triton.jit
def attend_kernel(
    qkv,
    contexts,
    statistics,
    taps,
    bias,
    out,
    tokens,
    splits,
    height,
    width,
    columns,
    scale,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    ENCODE: tl.constexpr,
    HEADS_A: tl.constexpr,
    HEADS_B: tl.constexpr,
    HEADS_C: tl.constexpr,
    RADIUS_A: tl.constexpr,
    RADIUS_B: tl.constexpr,
    RADIUS_C: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write conv-attention of a group of heads on one tile of the map, and of the class token.

    The first `HEADS_A` heads have a window of `RADIUS_A`, and so on; a group stays in its kind, so
    that no head pays for a window wider than its own. Tiles are square: what they read of V beyond
    themselves, for the windows, is least.

    Grid: groups, tiles in `columns` columns, B. Shapes: qkv (B, N, 3C); contexts and statistics as
    `context_kernel` wrote them; taps (SIDE * SIDE, C); bias (C,); out (B, N, C).
    """
    group, tile = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    groups_a: tl.constexpr = (HEADS_A + GROUP_HEADS - 1) // GROUP_HEADS
    groups_b: tl.constexpr = (HEADS_B + GROUP_HEADS - 1) // GROUP_HEADS
    in_a = group < groups_a
    in_b = (group >= groups_a) & (group < groups_a + groups_b)
    first = tl.where(
        in_a,
        group * GROUP_HEADS,
        tl.where(
            in_b,
            HEADS_A + (group - groups_a) * GROUP_HEADS,
            HEADS_A + HEADS_B + (group - groups_a - groups_b) * GROUP_HEADS,
        ),
    )
    last = tl.where(in_a, HEADS_A, tl.where(in_b, HEADS_A + HEADS_B, HEADS_A + HEADS_B + HEADS_C))
    last = tl.minimum(first + GROUP_HEADS, last)
    channel = first * HEAD // ALIGNED * ALIGNED + tl.arange(0, LANES)
    known = channel < CHANNELS
    inside = (channel >= first * HEAD) & (channel < last * HEAD)
    rows = qkv + image * tokens * (3 * CHANNELS)
    written = out + image * tokens * CHANNELS
    context = _joined_context(
        contexts, statistics, image, splits, channel, inside, CHANNELS, HEAD, LANES
    )

    if tile == 0:  # the class token has no place on the map
        q = tl.load(rows + channel, mask=inside, other=0.0).to(tl.float32)
        attended = scale * tl.sum(q[:, None] * context, axis=0)
        tl.store(written + channel, attended.to(out.dtype.element_ty), mask=inside)

    pixel = tl.arange(0, TILE * TILE)
    y = tile // columns * TILE + pixel // TILE
    x = tile % columns * TILE + pixel % TILE
    on_map = ((y < height) & (x < width))[:, None]
    there = on_map & known[None, :]
    token = (1 + y * width + x)[:, None]
    q = tl.load(rows + token * (3 * CHANNELS) + channel[None, :], mask=there, other=0.0)
    high, low = _halves(context, q.dtype)
    attended = tl.dot(q, high, input_precision=PRECISION)
    if q.dtype == tl.bfloat16:
        attended = tl.dot(q, low, attended, input_precision=PRECISION)
    attended = attended * scale
    if ENCODE:
        values = rows + 2 * CHANNELS
        if in_a:
            encoded = _convolved(
                values, taps, bias, y, x, channel, there, known, height, width,
                3 * CHANNELS, CHANNELS, RADIUS_A, SIDE,
            )  # fmt: skip
        elif in_b:
            encoded = _convolved(
                values, taps, bias, y, x, channel, there, known, height, width,
                3 * CHANNELS, CHANNELS, RADIUS_B, SIDE,
            )  # fmt: skip
        else:
            encoded = _convolved(
                values, taps, bias, y, x, channel, there, known, height, width,
                3 * CHANNELS, CHANNELS, RADIUS_C, SIDE,
            )  # fmt: skip
        attended += q.to(tl.float32) * encoded
    place = written + token * CHANNELS + channel[None, :]
    tl.store(place, attended.to(out.dtype.element_ty), mask=on_map & inside[None, :])


@triton.jit
def position_kernel(
    x,
    taps,
    bias,
    out,
    tokens,
    height,
    width,
    columns,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Write X + DWConv(X) on one tile of the map, and the class token as it is.

    Grid: groups of `LANES` channels, tiles in `columns` columns, B. Shapes: x and out (B, N, C);
    taps (SIDE * SIDE, C); bias (C,).
    """
    group, tile = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = group * LANES + tl.arange(0, LANES)
    known = channel < CHANNELS
    rows = x + image * tokens * CHANNELS
    written = out + image * tokens * CHANNELS
    if tile == 0:
        tl.store(written + channel, tl.load(rows + channel, mask=known), mask=known)

    pixel = tl.arange(0, TILE * TILE)
    row = tile // columns * TILE + pixel // TILE
    column = tile % columns * TILE + pixel % TILE
    there = ((row < height) & (column < width))[:, None] & known[None, :]
    place = (1 + row * width + column)[:, None] * CHANNELS + channel[None, :]
    encoded = _convolved(
        rows, taps, bias, row, column, channel, there, known, height, width,
        CHANNELS, CHANNELS, SIDE // 2, SIDE,
    )  # fmt: skip
    encoded += tl.load(rows + place, mask=there, other=0.0).to(tl.float32)
    tl.store(written + place, encoded.to(out.dtype.element_ty), mask=there)


@triton.jit
def feed_forward_kernel(
    x,
    norm_weight,
    norm_bias,
    weight1,
    bias1,
    weight2,
    bias2,
    out,
    num_rows,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write X + W2 GELU(W1 LayerNorm(X) + b1) + b2 of a block of tokens.

    The hidden channels, up to eight times as many, are made `BLOCK` at a time and never leave the
    registers.

    Grid: blocks of rows. Shapes: x and out (R, C); weight1 (HIDDEN, C); weight2 (C, HIDDEN).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    there = (row < num_rows)[:, None]
    place = row[:, None] * CHANNELS + channel[None, :]
    tokens = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    centred = tokens - tl.sum(tokens, axis=1)[:, None] / CHANNELS
    variance = tl.sum(centred * centred, axis=1) / CHANNELS
    normed = centred / tl.sqrt(variance + eps)[:, None]
    normed = normed * tl.load(norm_weight + channel).to(tl.float32)[None, :]
    normed = normed + tl.load(norm_bias + channel).to(tl.float32)[None, :]
    normed = normed.to(weight1.dtype.element_ty)

    result = tokens + tl.load(bias2 + channel).to(tl.float32)[None, :]
    for start in range(0, HIDDEN, BLOCK):
        hidden = start + tl.arange(0, BLOCK)
        weights = tl.load(weight1 + hidden[None, :] * CHANNELS + channel[:, None])  # (C, BLOCK)
        h = tl.dot(normed, weights, input_precision=PRECISION)
        h += tl.load(bias1 + hidden).to(tl.float32)[None, :]
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
        weights = tl.load(weight2 + channel[None, :] * HIDDEN + hidden[:, None])  # (BLOCK, C)
        result = tl.dot(h.to(weights.dtype), weights, result, input_precision=PRECISION)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=there)
