"""The kernels of linear, unpatchify_subtract and patch_embed: products of a tile of rows with a block of features.

`linear`: a program has one or two blocks of features. Two of different width make tiles of 96 or 192 features, which
fill a GPU where powers of two leave a part of it idle; with GEGLU the second block holds the gates of the first. Both
share the rows that are read. Programs run in bands of rows, so that those which run together share weights and rows
in the cache.
`unpatchify`: the same product, subtracted from the latent where its patches belong.
`embed`: the patches of the latent are gathered as rows.

All sums are float32; one rounding at the end. A product whose input goes through a LayerNorm first takes the moments of
its rows and normalises its sums instead; one whose result does leaves them (ops/norm/row_moments.py).
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, gelu_tanh, round_to, tile_dot
from tinysr_kernels.ops.norm.kernels.row_moments import merge_row_moments, store_row_moments


@jit
def _gelu(v):  # type: ignore[no-untyped-def]
    """v times the normal distribution function."""
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@jit
def _products(  # type: ignore[no-untyped-def]
    acc,  # [ROWS,COLUMNS] float32
    side,  # [ROWS,SIDE] float32
    x,  # the tile's first row of [rows,depth]
    weight,  # [features,depth]
    row,  # [ROWS] existing rows of x, counted from there
    out,  # [COLUMNS] existing rows of weight
    side_out,  # [SIDE] likewise
    depth,
    SECOND: tl.constexpr,  # whether there is a second block
    SLICE: tl.constexpr,
    WHOLE: tl.constexpr,  # whether SLICE divides depth
):
    """acc and side + x[row] @ weight[out].T and weight[side_out].T."""
    k = tl.arange(0, SLICE)
    at_x = x + row[:, None] * depth + k[None, :]
    at_weight = weight + out[None, :] * depth + k[:, None]
    at_side = weight + side_out[None, :] * depth + k[:, None]
    for start in range(0, depth, SLICE):
        if WHOLE:
            rows = tl.load(at_x + start)
            columns = tl.load(at_weight + start)
        else:
            known = k < depth - start
            rows = tl.load(at_x + start, mask=known[None, :], other=0.0)
            columns = tl.load(at_weight + start, mask=known[:, None], other=0.0)
        acc = tile_dot(rows.to(columns.dtype), columns, acc)
        if SECOND:
            if WHOLE:
                more = tl.load(at_side + start)
            else:
                more = tl.load(at_side + start, mask=known[:, None], other=0.0)
            side = tile_dot(rows.to(more.dtype), more, side)
    return acc, side


@jit
def _vector(values, column, features):  # type: ignore[no-untyped-def]
    """values[column] as a row [1,COLUMNS] of float32."""
    return tl.load(values + column, mask=column < features, other=0.0).to(tl.float32)[None, :]


@jit
def _normalised(v, mean, rstd, weight_sums, column, features):  # type: ignore[no-untyped-def]
    """What the sums v [ROWS,COLUMNS] of a product would be had its rows been normalised first."""
    return rstd[:, None] * (v - mean[:, None] * _vector(weight_sums, column, features))


@jit
def _epilogue(  # type: ignore[no-untyped-def]
    v,  # [ROWS,COLUMNS] float32, with its activation but for gelu_tanh
    first_row,  # int64
    row,  # [ROWS] counted from there
    begin,  # the tile's first feature
    bias,  # [features] or None where it has been added
    residual,  # [rows,features] or None
    gate,  # [features] or None
    out,  # [rows,features]
    out_moments,  # [rows,2,parts] or None
    rows,
    features,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,
):
    """Everything behind the sums, and the store of the tile."""
    column = begin + tl.arange(0, v.shape[1])
    # Only the way to the first row may need 64 bits; from there on offsets of 32 take half the registers.
    known = (row < rows - first_row)[:, None] & (column < features)[None, :]
    at = row[:, None] * features + column[None, :]
    if bias is not None:
        v += _vector(bias, column, features)
    if ACTIVATION == "gelu_tanh":
        v = gelu_tanh(v)
    if gate is not None:
        v *= _vector(gate, column, features)
    if residual is not None:
        v += tl.load(residual + first_row * features + at, mask=known, other=0.0).to(tl.float32)
    v = round_to(v, out.dtype.element_ty)
    tl.store(out + first_row * features + at, v, mask=known)
    if out_moments is not None:
        store_row_moments(v, out_moments, first_row, row, begin, rows, features, PART)


@jit
def linear(  # type: ignore[no-untyped-def]
    x,  # [rows,depth]
    weight,  # [features,depth], twice the features for geglu
    x2,  # [rows,second_depth] or None
    weight2,  # like weight, [..,second_depth], or None
    bias,  # [features], twice for geglu, or None
    residual,  # [rows,features] or None
    gate,  # [features] or None
    out,  # [rows,features]
    row_moments,  # [rows,2,parts] of x where it is to be normalised, or None
    weight_sums,  # like bias, or None
    out_moments,  # [rows,2,parts] of out, float32, or None
    eps,
    rows,
    features,
    depth,
    second_depth,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,  # features of the second block, 0 without one; COLUMNS for geglu
    SLICE: tl.constexpr,
    WHOLE: tl.constexpr,  # whether SLICE divides both depths
    BAND: tl.constexpr,  # blocks of rows that run together
    PART: tl.constexpr,  # features that share moments
    PARTS: tl.constexpr,  # at least as many as row_moments has
):
    """Grid: all tiles of the result, in bands of BAND blocks of rows."""
    await_inputs()
    GEGLU: tl.constexpr = ACTIVATION == "geglu"
    SECOND: tl.constexpr = SIDE > 0
    LANES: tl.constexpr = SIDE if SECOND else 16
    WIDTH: tl.constexpr = COLUMNS if GEGLU else COLUMNS + SIDE
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(features, WIDTH)
    first = tl.program_id(0) // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    inside = tl.program_id(0) % (BAND * across)
    first_row = (first + inside % height).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    begin = inside // height * WIDTH
    column = begin + tl.arange(0, COLUMNS)
    side_column = begin + (0 if GEGLU else COLUMNS) + tl.arange(0, LANES)

    # Rows and features that are not there read the last one, which needs no mask; nothing of it is stored.
    last = tl.minimum(row, (rows - 1 - first_row).to(tl.int32))
    taken = tl.minimum(column, features - 1)
    side_taken = tl.minimum(side_column, features - 1)
    if GEGLU:
        side_taken += features
    if row_moments is not None:
        mean, rstd = merge_row_moments(row_moments, first_row, last, depth, eps, PART, PARTS)
    acc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    side = tl.full((ROWS, LANES), 0.0, tl.float32)
    acc, side = _products(
        acc, side, x + first_row * depth, weight, last, taken, side_taken, depth, SECOND, SLICE, WHOLE
    )
    if x2 is not None:
        x2 += first_row * second_depth
        acc, side = _products(acc, side, x2, weight2, last, taken, side_taken, second_depth, SECOND, SLICE, WHOLE)
    if row_moments is not None:
        acc = _normalised(acc, mean, rstd, weight_sums, column, features)
        if GEGLU:
            side = _normalised(side, mean, rstd, weight_sums + features, side_column, features)
        elif SECOND:
            side = _normalised(side, mean, rstd, weight_sums, side_column, features)
    if GEGLU:
        if bias is not None:
            acc += _vector(bias, column, features)
            side += _vector(bias + features, side_column, features)
        acc *= _gelu(side)
        _epilogue(acc, first_row, row, begin, None, residual, gate, out, out_moments, rows, features, ACTIVATION, PART)
    else:
        _epilogue(acc, first_row, row, begin, bias, residual, gate, out, out_moments, rows, features, ACTIVATION, PART)
        if SECOND:
            begin += COLUMNS
            _epilogue(
                side, first_row, row, begin, bias, residual, gate, out, out_moments, rows, features, ACTIVATION, PART
            )


@jit
def unpatchify(  # type: ignore[no-untyped-def]
    t,  # [tokens of all samples,depth]
    weight,  # [PATCH*PATCH*CHANNELS,depth]
    bias,  # like weight's rows, or None
    z,  # [N,H,W,CHANNELS]
    out,  # like z
    row_moments,  # [tokens of all samples,2,parts] where t is to be normalised, or None
    weight_sums,  # like bias, or None
    eps,
    tokens,  # of all samples
    across,  # tokens in a row of the image
    depth,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    WHOLE: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: blocks of tokens, blocks of features."""
    await_inputs()
    FEATURES: tl.constexpr = PATCH * PATCH * CHANNELS
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    taken = tl.minimum(column, FEATURES - 1)
    last = tl.minimum(tl.arange(0, ROWS), (tokens - 1 - first_row).to(tl.int32))
    acc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    if row_moments is not None:
        mean, rstd = merge_row_moments(row_moments, first_row, last, depth, eps, PART, PARTS)
    acc, _ = _products(acc, acc, t + first_row * depth, weight, last, taken, taken, depth, False, SLICE, WHOLE)
    if row_moments is not None:
        acc = _normalised(acc, mean, rstd, weight_sums, column, FEATURES)
    if bias is not None:
        acc += _vector(bias, column, FEATURES)
    # Rows of tokens follow each other through all samples as rows of pixels do.
    down = row // across * PATCH
    right = row % across * PATCH
    pixel = column // CHANNELS
    y = down[:, None] + (pixel // PATCH)[None, :]
    place = right[:, None] + (pixel % PATCH)[None, :]
    at = (y * (across * PATCH) + place) * CHANNELS + (column % CHANNELS)[None, :]
    known = (row < tokens)[:, None] & (column < FEATURES)[None, :]
    v = tl.load(z + at, mask=known, other=0.0).to(tl.float32) - acc
    tl.store(out + at, round_to(v, out.dtype.element_ty), mask=known)


@jit
def embed(  # type: ignore[no-untyped-def]
    z,  # [N,H,W,CHANNELS]
    weight,  # [features,PATCH,PATCH,CHANNELS]
    table,  # [tokens of a sample,features]
    out,  # [tokens of all samples,features]
    out_moments,  # [tokens of all samples,2,parts] float32, or None
    tokens,  # of all samples
    sample_tokens,
    across,  # tokens in a row of the image
    features,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    PART: tl.constexpr,
):
    """Grid: blocks of tokens, blocks of features."""
    await_inputs()
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    begin = tl.program_id(1) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    corner = row // across * (PATCH * PATCH) * across + row % across * PATCH
    acc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in tl.static_range(0, DEPTH, SLICE):
        # Channel by channel of a pixel, as the latent lies in memory.
        k = start + tl.arange(0, SLICE)
        pixel = k // CHANNELS
        shift = pixel // PATCH * (across * PATCH) + pixel % PATCH
        at = (corner[:, None] + shift[None, :]) * CHANNELS + (k % CHANNELS)[None, :]
        rows = tl.load(z + at, mask=(row < tokens)[:, None] & (k < DEPTH)[None, :], other=0.0)
        at = weight + column[None, :] * DEPTH + k[:, None]
        columns = tl.load(at, mask=(column < features)[None, :] & (k < DEPTH)[:, None], other=0.0)
        acc = tile_dot(rows.to(columns.dtype), columns, acc)
    known = (row < tokens)[:, None] & (column < features)[None, :]
    at = table + (row % sample_tokens)[:, None] * features + column[None, :]
    acc += tl.load(at, mask=known, other=0.0).to(tl.float32)
    v = round_to(acc, out.dtype.element_ty)
    tl.store(out + row[:, None] * features + column[None, :], v, mask=known)
    if out_moments is not None:
        store_row_moments(v, out_moments, first_row, tl.arange(0, ROWS), begin, tokens, features, PART)
