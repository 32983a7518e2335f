"""Conv-attention, and what is before and after it in a block, as GPU kernels, in Triton's language.

    context = softmax_N(K)^T V                          a head, (c, c)
    y       = Q context / sqrt(c) + Q * DWConv(V)       the second term on the image tokens
    x       = X + DWConv(X)                             before it, on the image tokens
    x       = LayerNorm(X)
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
def attend_kernel(
    qkv,
    contexts,
    statistics,
    out,
    tokens,
    splits,
    scale,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ENCODE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write conv-attention of a group of heads on a block of tokens.

    With `ENCODE` the image tokens of `out` hold DWConv(V), as `window_kernel` wrote it.

    Grid: groups, blocks of tokens, B. Shapes: qkv (B, N, 3C); contexts and statistics as
    `context_kernel` wrote them; out (B, N, C).
    """
    group = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    first = group * (GROUP_HEADS * HEAD)
    channel = first // ALIGNED * ALIGNED + tl.arange(0, LANES)
    known = channel < CHANNELS
    inside = (channel >= first) & (channel < first + GROUP_HEADS * HEAD) & known
    context = _joined_context(
        contexts, statistics, image, splits, channel, inside, CHANNELS, HEAD, LANES
    )

    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (token < tokens)[:, None]
    place = qkv + (image * tokens + token[:, None]) * (3 * CHANNELS) + channel[None, :]
    q = tl.load(place, mask=there & known[None, :], other=0.0)
    high, low = _halves(context, q.dtype)
    attended = tl.dot(q, high, input_precision=PRECISION)
    if q.dtype == tl.bfloat16:
        attended = tl.dot(q, low, attended, input_precision=PRECISION)
    attended = attended * scale
    place = out + (image * tokens + token[:, None]) * CHANNELS + channel[None, :]
    own = there & inside[None, :]
    if ENCODE:  # the class token has no place on the map
        encoded = tl.load(place, mask=own & (token > 0)[:, None], other=0.0)
        attended += q.to(tl.float32) * encoded.to(tl.float32)
    tl.store(place, attended.to(out.dtype.element_ty), mask=own)


@triton.jit
def _channels(values, channel, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    """Return values of channels for every pixel, (1, LANES)."""
    if CHANNELS % LANES == 0:
        return tl.load(values + channel)[None, :]
    return tl.load(values + channel, mask=channel < CHANNELS, other=0.0)[None, :]


@triton.jit
def _slide(
    values,
    taps,
    bias,
    written,
    channel,
    x,
    first,
    last,
    height,
    width,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    ACROSS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Write DWConv(V) of the columns `x` in the rows from `first` to before `last`.

    Goes down the rows of V, each of which is read once for every column of the window and added to
    all results that see it: `sum0` is of the highest row that does, and done when it was. The
    window is of `RADIUS`, its taps stored `SIDE` wide.
    """
    known = channel < CHANNELS
    beginning = tl.zeros((ACROSS, LANES), tl.float32)
    beginning += _channels(bias, channel, CHANNELS, LANES)
    sum0, sum1, sum2, sum3 = beginning, beginning, beginning, beginning
    sum4, sum5, sum6 = beginning, beginning, beginning
    line: tl.constexpr = SIDE * CHANNELS  # of taps
    for row in range(first - RADIUS, last + RADIUS):
        here = (row >= 0) & (row < height)
        at = values + (1 + row * width + x)[:, None] * (3 * CHANNELS) + channel[None, :]
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            near = (here & (x + dx >= 0) & (x + dx < width))[:, None] & known[None, :]
            v = tl.load(at + dx * (3 * CHANNELS), mask=near, other=0.0).to(tl.float32)
            lowest = taps + (SIDE // 2 + RADIUS) * line + (SIDE // 2 + dx) * CHANNELS
            sum0 += v * _channels(lowest, channel, CHANNELS, LANES)
            sum1 += v * _channels(lowest - line, channel, CHANNELS, LANES)
            sum2 += v * _channels(lowest - 2 * line, channel, CHANNELS, LANES)
            if RADIUS > 1:
                sum3 += v * _channels(lowest - 3 * line, channel, CHANNELS, LANES)
                sum4 += v * _channels(lowest - 4 * line, channel, CHANNELS, LANES)
            if RADIUS > 2:
                sum5 += v * _channels(lowest - 5 * line, channel, CHANNELS, LANES)
                sum6 += v * _channels(lowest - 6 * line, channel, CHANNELS, LANES)
        done = row - RADIUS
        if done >= first:
            place = written + (1 + done * width + x)[:, None] * CHANNELS + channel[None, :]
            kept = (x < width)[:, None] & known[None, :]
            tl.store(place, sum0.to(written.dtype.element_ty), mask=kept)
        sum0, sum1 = sum1, sum2
        if RADIUS == 1:
            sum2 = beginning
        else:
            sum2, sum3 = sum3, sum4
            if RADIUS == 2:
                sum4 = beginning
            else:
                sum4, sum5, sum6 = sum5, sum6, beginning


@triton.jit
def window_kernel(
    qkv,
    taps,
    bias,
    out,
    tokens,
    height,
    width,
    columns,
    rows,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    NARROW: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCKS_A: tl.constexpr,
    BLOCKS_B: tl.constexpr,
    RADIUS_A: tl.constexpr,
    RADIUS_B: tl.constexpr,
    RADIUS_C: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Write DWConv(V) on a tile of the map, `rows` high and `ACROSS` wide.

    The first `BLOCKS_A` blocks of channels have windows of `RADIUS_A`, and so on, so that few
    channels pay for a window wider than their own.

    Grid: blocks of `LANES` channels, tiles in `columns` columns, B. Shapes: qkv (B, N, 3C); taps
    (SIDE * SIDE, C) and bias (C,) float32; out (B, N, C), whose class token stays as it is.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    # Told of `NARROW` neighbouring channels alone, a thread takes those of more pixels instead, and
    # a tap that it has read serves them all.
    channel = tl.max_contiguous(block * LANES + tl.arange(0, LANES), NARROW)
    values = qkv + image * tokens * (3 * CHANNELS) + 2 * CHANNELS
    written = out + image * tokens * CHANNELS
    x = tile % columns * ACROSS + tl.arange(0, ACROSS)
    first = tile // columns * rows
    last = tl.minimum(first + rows, height)
    if block < BLOCKS_A:
        _slide(
            values, taps, bias, written, channel, x, first, last, height, width,
            CHANNELS, LANES, ACROSS, RADIUS_A, SIDE,
        )  # fmt: skip
    elif block < BLOCKS_A + BLOCKS_B:
        _slide(
            values, taps, bias, written, channel, x, first, last, height, width,
            CHANNELS, LANES, ACROSS, RADIUS_B, SIDE,
        )  # fmt: skip
    else:
        _slide(
            values, taps, bias, written, channel, x, first, last, height, width,
            CHANNELS, LANES, ACROSS, RADIUS_C, SIDE,
        )  # fmt: skip


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
    CHANNELS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Return DWConv(V) at the pixels (y, x), a window of `RADIUS` in taps stored `SIDE` wide."""
    at = (1 + y * width + x)[:, None] * CHANNELS + channel[None, :]
    result = tl.zeros(there.shape, tl.float32)
    result += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for dy in range(-RADIUS, RADIUS + 1):
        row = (y + dy >= 0) & (y + dy < height)
        shifted = values + at + dy * width * CHANNELS
        weights = taps + ((dy + SIDE // 2) * SIDE + SIDE // 2) * CHANNELS + channel
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            near = row & (x + dx >= 0) & (x + dx < width)
            v = tl.load(shifted + dx * CHANNELS, mask=there & near[:, None], other=0.0)
            tap = tl.load(weights + dx * CHANNELS, mask=known, other=0.0).to(tl.float32)
            result += v.to(tl.float32) * tap[None, :]
    return result


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
        CHANNELS, SIDE // 2, SIDE,
    )  # fmt: skip
    encoded += tl.load(rows + place, mask=there, other=0.0).to(tl.float32)
    tl.store(written + place, encoded.to(out.dtype.element_ty), mask=there)


@triton.jit
def norm_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    eps,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write LayerNorm(X) of a block of tokens.

    Grid: blocks of rows. Shapes: x and out (R, C); weight and bias (C,).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, LANES)
    known = channel < CHANNELS
    there = (row < num_rows)[:, None] & known[None, :]
    place = row[:, None] * CHANNELS + channel[None, :]
    tokens = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(tokens, axis=1) / CHANNELS
    centred = tl.where(known[None, :], tokens - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / CHANNELS
    normed = centred / tl.sqrt(variance + eps)[:, None]
    normed = normed * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    normed = normed + tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=there)


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
