"""The kernels of sepconv, in two forms that compute the same result.

`march`: all input channels at once. A program holds BLOCK_M columns and marches down `rows` output rows. Each row of u
is loaded once, in its three horizontal shifts, and accumulated into the three output rows that depend on it. A finished
row is multiplied by the pointwise weight. Three loads per output row instead of nine.
`tile`: any number of input channels, BLOCK_K at a time, for BLOCK_M output pixels in reading order; nine loads per
step. It serves wide layers, where the GEMM dominates, and images smaller than a program of the other form.

Depthwise weights and accumulators are float32; they are rounded once, to the dtype of the GEMM's operands.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import accumulate_matmul, await_inputs, bias_row, epilogue, round_to, tile_dot
from tinysr_kernels.ops.norm.kernels.channel_moments import store_moments, tile_moments


@jit
def _tap(depthwise, chan, NUMBER: tl.constexpr, channels):  # type: ignore[no-untyped-def]
    """The weights of one tap, [1,BLOCK_K] float32."""
    return tl.load(depthwise + NUMBER * channels + chan, mask=chan < channels, other=0.0).to(tl.float32)[None, :]


@jit
def _values(  # type: ignore[no-untyped-def]
    x,  # x[sample, first // SCALE, 0, 0]
    first,  # scalar, a row of u
    row,  # scalar or [BLOCK_M], row of u, near first
    column,  # [BLOCK_M], column of u
    chan,  # [BLOCK_K]
    limit,  # width, or 0 where the row is outside
    width,  # of u
    channels,
    SCALE: tl.constexpr,  # 2 if u is x upsampled, else 1
):
    """u[row, column, chan] as float32 [BLOCK_M,BLOCK_K], zero outside."""
    inside = (column >= 0) & (column < limit)
    if SCALE == 2:
        pixel = ((row >> 1) - (first >> 1)) * (width // 2) + (column >> 1)
    else:
        pixel = (row - first) * width + column
    at = (pixel * channels)[:, None] + chan[None, :]
    v = tl.load(x + at, mask=inside[:, None] & (chan[None, :] < channels), other=0.0)
    return v.to(tl.float32)


@jit
def _add_row(  # type: ignore[no-untyped-def]
    x,  # the sample
    depthwise,  # [3,3,channels]
    row,  # scalar, of u
    column,  # [BLOCK_M], of u
    chan,  # [BLOCK_K]
    height,  # of u
    width,  # of u
    upper,  # [BLOCK_M,BLOCK_K], accumulators of the output row to which this row contributes by the kernel's upper row,
    middle,  # by the middle row
    lower,  # and by the lower row
    UPPER: tl.constexpr,  # whether there is such an output row
    MIDDLE: tl.constexpr,
    LOWER: tl.constexpr,
    channels,
    SCALE: tl.constexpr,
):
    """The three accumulators after one row of u, in its three horizontal shifts."""
    # The row's offset may need 64 bits; from there on, 32-bit offsets take half the registers.
    x += (row // SCALE).to(tl.int64) * ((width // SCALE) * channels)
    # A loop, because unrolled the taps of all shifts would be held at once (72 registers of 16-byte vectors in half
    # precision).
    limit = tl.where((row >= 0) & (row < height), width, 0)
    for j in tl.range(0, 3, num_stages=1, loop_unroll_factor=1):
        v = _values(x, row, row, column + (j - 1), chan, limit, width, channels, SCALE)
        weights = depthwise + j * channels
        if LOWER:
            lower += v * _tap(weights, chan, 6, channels)
        if MIDDLE:
            middle += v * _tap(weights, chan, 3, channels)
        if UPPER:
            upper += v * _tap(weights, chan, 0, channels)
    return upper, middle, lower


@jit
def _epilogue(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M,BLOCK_N] float32, the accumulators of the GEMM
    bias,
    base,  # int64, a pixel of all samples' results
    pixel,  # [BLOCK_M] counted from there
    inside,  # [BLOCK_M]
    outs,  # [BLOCK_N]
    out,
    residual,
    shortcut,
    skip,
    shortcut_weight,
    out_channels,
    shortcut_c,
    skip_c,
    BLOCK_N: tl.constexpr,
    SHORTCUT_BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
):
    """The epilogue of the pointwise GEMM; stores the tile and returns it."""
    at = pixel[:, None] * out_channels + outs[None, :]
    known = inside[:, None] & (outs[None, :] < out_channels)
    if shortcut is not None:
        depth = shortcut_c + skip_c
        shortcut += base * shortcut_c
        acc = accumulate_matmul(
            acc,
            shortcut,
            shortcut_weight,
            pixel,
            inside,
            outs,
            out_channels,
            0,
            shortcut_c,
            shortcut_c,
            depth,
            SHORTCUT_BLOCK,
        )
        if skip is not None:
            skip += base * skip_c
            weight = shortcut_weight + shortcut_c
            acc = accumulate_matmul(
                acc,
                skip,
                weight,
                pixel,
                inside,
                outs,
                out_channels,
                0,
                skip_c,
                skip_c,
                depth,
                SHORTCUT_BLOCK,
            )
    # Loaded here for each row: held from the start, the bias would take registers throughout.
    beta = bias_row(bias, outs, out_channels, BLOCK_N)
    return epilogue(acc, beta, residual, out, base * out_channels, at, known, ACTIVATION, ACTIVATE_RESIDUAL)


@jit
def march(  # type: ignore[no-untyped-def]
    x,  # [N,height/SCALE,width/SCALE,channels]
    depthwise,  # [3,3,channels]
    pointwise,  # [out_channels,channels]
    bias,  # [out_channels] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,shortcut_c] or None
    skip,  # [N,out_height,out_width,skip_c] or None
    shortcut_weight,  # [out_channels,shortcut_c+skip_c] or None
    out,  # [N,out_height,out_width,out_channels]
    scratch_moments,  # [N,3,out_channels,tl.num_programs(0)] float32, statistics of each program's pixels, or None
    height: extent,  # of u
    width: extent,  # of u
    out_height: extent,
    out_width: extent,
    rows: extent,  # output rows per program
    channels,
    out_channels,  # channels of out
    shortcut_c,  # channels of shortcut
    skip_c,  # channels of skip
    CHANNELS: tl.constexpr,  # the four numbers as constants, or None
    OUT_CHANNELS: tl.constexpr,
    SHORTCUT_C: tl.constexpr,
    SKIP_C: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least channels
    BLOCK_N: tl.constexpr,
    SHORTCUT_BLOCK: tl.constexpr,
):
    """Grid: strips of rows x BLOCK_M in reading order, blocks of outputs, samples."""
    await_inputs()
    if CHANNELS is not None:
        channels = CHANNELS
        out_channels = OUT_CHANNELS
        shortcut_c = SHORTCUT_C
        skip_c = SKIP_C
    across = tl.cdiv(out_width, BLOCK_M)
    top = tl.program_id(0) // across * rows
    left = (tl.program_id(0) % across) * BLOCK_M
    column = left + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(2).to(tl.int64)
    chan = tl.arange(0, BLOCK_K)
    x += sample * (height // SCALE) * (width // SCALE) * channels
    weight = tl.load(
        pointwise + outs[None, :] * channels + chan[:, None],
        mask=(outs[None, :] < out_channels) & (chan[:, None] < channels),
        other=0.0,
    )

    at = column * STRIDE
    row = top * STRIDE - 1
    zero = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
    # `above` accumulates what earlier rows contribute to the output row that the next row finishes.
    above, _, _ = _add_row(
        x, depthwise, row, at, chan, height, width, zero, zero, zero,
        True, False, False, channels, SCALE,
    )  # fmt: skip
    below = zero
    if STRIDE == 1:
        below, above, _ = _add_row(
            x, depthwise, row + 1, at, chan, height, width, zero, above, zero,
            True, True, False, channels, SCALE,
        )  # fmt: skip
    # Unused without scratch_moments.
    count = tl.minimum(out_width - left, BLOCK_M).to(tl.float32)
    mean = tl.full((BLOCK_N,), 0.0, tl.float32)
    squares = tl.full((BLOCK_N,), 0.0, tl.float32)
    steps = tl.minimum(rows, out_height - top)
    for step in tl.range(0, steps, num_stages=1):
        y = top + step
        if STRIDE == 1:
            below, above, done = _add_row(
                x, depthwise, y + 1, at, chan, height, width, zero, below, above,
                True, True, True, channels, SCALE,
            )  # fmt: skip
        else:
            _, above, _ = _add_row(
                x, depthwise, 2 * y, at, chan, height, width, zero, above, zero,
                False, True, False, channels, SCALE,
            )  # fmt: skip
            above, _, done = _add_row(
                x, depthwise, 2 * y + 1, at, chan, height, width, zero, zero, above,
                True, False, True, channels, SCALE,
            )  # fmt: skip
        acc = tile_dot(round_to(done, weight.dtype), weight, tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32))
        base = (sample * out_height + y) * out_width
        inside = column < out_width
        stored = _epilogue(
            acc, bias, base, column, inside, outs, out, residual, shortcut, skip, shortcut_weight,
            out_channels, shortcut_c, skip_c, BLOCK_N, SHORTCUT_BLOCK, ACTIVATION, ACTIVATE_RESIDUAL,
        )  # fmt: skip
        if scratch_moments is not None:
            row_mean, row_squares = tile_moments(stored.to(tl.float32), inside, count)
            # Chan's rule for rows of equal count.
            share = 1.0 / (y - top + 1).to(tl.float32)
            delta = row_mean - mean
            mean += delta * share
            squares += row_squares + delta * delta * (count - count * share)
    if scratch_moments is not None:
        count *= steps.to(tl.float32)
        store_moments(
            scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, out_channels, count, mean, squares
        )


@jit
def tile(  # type: ignore[no-untyped-def]
    x,  # [N,height/SCALE,width/SCALE,channels]
    depthwise,  # [3,3,channels]
    pointwise,  # [out_channels,channels]
    bias,  # [out_channels] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,shortcut_c] or None
    skip,  # [N,out_height,out_width,skip_c] or None
    shortcut_weight,  # [out_channels,shortcut_c+skip_c] or None
    out,  # [N,out_height,out_width,out_channels]
    scratch_moments,  # [N,3,out_channels,tl.num_programs(0)] float32, statistics of each program's pixels, or None
    height: extent,  # of u
    width: extent,  # of u
    out_height: extent,
    out_width: extent,
    channels,
    out_channels,  # channels of out
    shortcut_c,  # channels of shortcut
    skip_c,  # channels of skip
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # channels per step
    BLOCK_N: tl.constexpr,
    SHORTCUT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: BLOCK_M output pixels in reading order, blocks of outputs, samples."""
    await_inputs()
    begin = tl.program_id(0) * BLOCK_M
    pixel = begin + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(2).to(tl.int64)
    inside = pixel < out_height * out_width
    row = pixel // out_width * STRIDE - 1
    column = pixel % out_width * STRIDE - 1
    first = tl.maximum(begin // out_width * STRIDE - 1, 0)
    x += sample * (height // SCALE) * (width // SCALE) * channels
    # The first row's offset may need 64 bits; from there on, 32-bit offsets take half the registers.
    x += (first // SCALE).to(tl.int64) * ((width // SCALE) * channels)

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
        chan = start + tl.arange(0, BLOCK_K)
        done = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
        for i in tl.static_range(3):
            limit = tl.where((row + i >= 0) & (row + i < height), width, 0)
            for j in tl.static_range(3):
                v = _values(
                    x, first, row + i, column + j, chan, limit, width, channels, SCALE
                )  # fmt: skip
                done += v * _tap(depthwise, chan, 3 * i + j, channels)
        weight = tl.load(
            pointwise + outs[None, :] * channels + chan[:, None],
            mask=(outs[None, :] < out_channels) & (chan[:, None] < channels),
            other=0.0,
        )
        acc = tile_dot(round_to(done, weight.dtype), weight, acc)
    stored = _epilogue(
        acc, bias, sample * out_height * out_width + begin, tl.arange(0, BLOCK_M), inside, outs,
        out, residual, shortcut, skip, shortcut_weight,
        out_channels, shortcut_c, skip_c, BLOCK_N, SHORTCUT_BLOCK, ACTIVATION, ACTIVATE_RESIDUAL,
    )  # fmt: skip
    if scratch_moments is not None:
        count = tl.minimum(out_height * out_width - begin, BLOCK_M).to(tl.float32)
        mean, squares = tile_moments(stored.to(tl.float32), inside, count)
        store_moments(
            scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, out_channels, count, mean, squares
        )
