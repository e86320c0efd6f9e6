"""The kernels of sepconv, in two forms that compute the same sums.

`march`: all input channels at once. A program holds PIXELS columns and walks down ROWS output rows. Each row of u is
loaded once, in its three horizontal shifts, and added into the three output rows that it touches; a finished row goes
through the product with the pointwise weight. Three loads for a row of outputs instead of nine.
`tile`: any number of input channels, CHANNELS at a time, for PIXELS output pixels in reading order; nine loads a step.
It serves wide layers, where the product dominates, and images smaller than a program of the other form.

Depthwise weights and sums are float32; the finished sums are rounded once, to the dtype of the product's operands.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.moments_kernel import joined, leave, of_tile
from tinysr_kernels.ops.tiles import add_product, bias_row, finish, product, rounded


@jit
def _taps(depthwise, chan, channels, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The three weights of one kernel row, each [1,CHANNELS] float32."""
    at = depthwise + chan * 9 + ROW * 3
    known = chan < channels
    left = tl.load(at, mask=known, other=0.0).to(tl.float32)
    middle = tl.load(at + 1, mask=known, other=0.0).to(tl.float32)
    right = tl.load(at + 2, mask=known, other=0.0).to(tl.float32)
    return left[None, :], middle[None, :], right[None, :]


@jit
def _pixel(  # type: ignore[no-untyped-def]
    x,  # x[sample, first // ENLARGE, 0, 0]
    first,  # scalar, a row of u
    row,  # scalar or [PIXELS], row of u, near first
    column,  # [PIXELS], column of u
    chan,  # [CHANNELS]
    channels,
    height,  # of u
    width,  # of u
    ENLARGE: tl.constexpr,  # 1, or 2 where u is x enlarged
):
    """u[row, column, chan] as float32 [PIXELS,CHANNELS], zero outside."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if ENLARGE == 2:
        pixel = ((row >> 1) - (first >> 1)) * (width // 2) + (column >> 1)
    else:
        pixel = (row - first) * width + column
    at = (pixel * channels)[:, None] + chan[None, :]
    return tl.load(x + at, mask=inside[:, None] & (chan[None, :] < channels), other=0.0).to(tl.float32)


@jit
def _shifts(x, first, row, column, chan, channels, height, width, ENLARGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of u in its three horizontal shifts."""
    # Only the way to the first row may need 64 bits; from there on offsets of 32 take half the registers.
    x += (first // ENLARGE).to(tl.int64) * ((width // ENLARGE) * channels)
    left = _pixel(x, first, row, column - 1, chan, channels, height, width, ENLARGE)
    middle = _pixel(x, first, row, column, chan, channels, height, width, ENLARGE)
    right = _pixel(x, first, row, column + 1, chan, channels, height, width, ENLARGE)
    return left, middle, right


@jit
def _finish(  # type: ignore[no-untyped-def]
    acc,  # [PIXELS,OUTPUTS] float32, the product
    beta,  # [1,OUTPUTS] float32, the bias
    base,  # int64, a pixel of all samples' results
    pixel,  # [PIXELS] counted from there
    inside,  # [PIXELS]
    outs,  # [OUTPUTS]
    out,
    residual,
    shortcut,
    skip,
    shortcut_weight,
    outputs,
    first_depth,  # channels of shortcut
    second_depth,  # channels of skip
    SLICE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
):
    """Everything behind the product with the pointwise weight, and the store of the tile, which is returned."""
    at = pixel[:, None] * outputs + outs[None, :]
    known = inside[:, None] & (outs[None, :] < outputs)
    if shortcut is not None:
        depth = first_depth + second_depth
        shortcut += base * first_depth
        acc = add_product(
            acc, shortcut, shortcut_weight, pixel, inside, outs, outputs, 0, first_depth, first_depth, depth, SLICE
        )
        if skip is not None:
            skip += base * second_depth
            weight = shortcut_weight + first_depth
            acc = add_product(
                acc, skip, weight, pixel, inside, outs, outputs, 0, second_depth, second_depth, depth, SLICE
            )
    return finish(acc, beta, residual, out, base * outputs, at, known, ACTIVATION, ACTIVATE_RESIDUAL)


@jit
def march(  # type: ignore[no-untyped-def]
    x,  # [N,height/ENLARGE,width/ENLARGE,channels]
    depthwise,  # [channels,3,3]
    pointwise,  # [outputs,channels]
    bias,  # [outputs] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,first_depth] or None
    skip,  # [N,out_height,out_width,second_depth] or None
    shortcut_weight,  # [outputs,first_depth+second_depth] or None
    out,  # [N,out_height,out_width,outputs]
    scratch_moments,  # [N,3,outputs,tl.num_programs(0)] float32, the moments of each program's pixels, or None
    height,  # of u
    width,  # of u
    out_height,
    out_width,
    channels,
    outputs,
    first_depth,
    second_depth,
    STRIDE: tl.constexpr,
    ENLARGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # at least `channels`
    OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: strips of ROWS x PIXELS in reading order, blocks of outputs, samples."""
    across = tl.cdiv(out_width, PIXELS)
    top = (tl.program_id(0) // across) * ROWS
    column = (tl.program_id(0) % across) * PIXELS + tl.arange(0, PIXELS)
    outs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sample = tl.program_id(2).to(tl.int64)
    chan = tl.arange(0, CHANNELS)
    x += sample * (height // ENLARGE) * (width // ENLARGE) * channels

    weight = tl.load(
        pointwise + outs[None, :] * channels + chan[:, None],
        mask=(outs[None, :] < outputs) & (chan[:, None] < channels),
        other=0.0,
    )
    beta = bias_row(bias, outs, outputs, OUTPUTS)
    a0, a1, a2 = _taps(depthwise, chan, channels, 0)
    b0, b1, b2 = _taps(depthwise, chan, channels, 1)
    c0, c1, c2 = _taps(depthwise, chan, channels, 2)

    from_column = column * STRIDE
    row = top * STRIDE - 1
    left, middle, right = _shifts(x, row, row, from_column, chan, channels, height, width, ENLARGE)
    # `above` has what the rows before the next one give to the output row that the next one finishes.
    below = left * a0 + middle * a1 + right * a2
    above = below
    if STRIDE == 1:
        left, middle, right = _shifts(x, row + 1, row + 1, from_column, chan, channels, height, width, ENLARGE)
        above = below + left * b0 + middle * b1 + right * b2
        below = left * a0 + middle * a1 + right * a2
    # No pixel counted yet; unused without scratch_moments.
    count = 0.0
    mean = tl.full((OUTPUTS,), 0.0, tl.float32)
    squares = tl.full((OUTPUTS,), 0.0, tl.float32)
    for step in tl.range(0, tl.minimum(ROWS, out_height - top), num_stages=STAGES):
        y = top + step
        if STRIDE == 2:
            left, middle, right = _shifts(x, 2 * y, 2 * y, from_column, chan, channels, height, width, ENLARGE)
            above = below + left * b0 + middle * b1 + right * b2
        left, middle, right = _shifts(
            x, y * STRIDE + 1, y * STRIDE + 1, from_column, chan, channels, height, width, ENLARGE
        )
        done = above + left * c0 + middle * c1 + right * c2
        if STRIDE == 1:
            above = below + left * b0 + middle * b1 + right * b2
        below = left * a0 + middle * a1 + right * a2
        acc = product(rounded(done, weight.dtype), weight, tl.full((PIXELS, OUTPUTS), 0.0, tl.float32))
        stored = _finish(
            acc,
            beta,
            (sample * out_height + y) * out_width,
            column,
            column < out_width,
            outs,
            out,
            residual,
            shortcut,
            skip,
            shortcut_weight,
            outputs,
            first_depth,
            second_depth,
            SLICE,
            ACTIVATION,
            ACTIVATE_RESIDUAL,
        )
        if scratch_moments is not None:
            more, more_mean, more_squares = of_tile(stored.to(tl.float32), column < out_width)
            count, mean, squares = joined(count, mean, squares, more, more_mean, more_squares)
    if scratch_moments is not None:
        leave(scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, outputs, count, mean, squares)


@jit
def tile(  # type: ignore[no-untyped-def]
    x,  # [N,height/ENLARGE,width/ENLARGE,channels]
    depthwise,  # [channels,3,3]
    pointwise,  # [outputs,channels]
    bias,  # [outputs] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,first_depth] or None
    skip,  # [N,out_height,out_width,second_depth] or None
    shortcut_weight,  # [outputs,first_depth+second_depth] or None
    out,  # [N,out_height,out_width,outputs]
    scratch_moments,  # [N,3,outputs,tl.num_programs(0)] float32, the moments of each program's pixels, or None
    height,  # of u
    width,  # of u
    out_height,
    out_width,
    channels,
    outputs,
    first_depth,
    second_depth,
    STRIDE: tl.constexpr,
    ENLARGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # channels a step
    OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: PIXELS output pixels in reading order, blocks of outputs, samples."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    outs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sample = tl.program_id(2).to(tl.int64)
    inside = pixel < out_height * out_width
    row = pixel // out_width * STRIDE - 1
    column = pixel % out_width * STRIDE
    first = tl.maximum((tl.program_id(0) * PIXELS) // out_width * STRIDE - 1, 0)
    x += sample * (height // ENLARGE) * (width // ENLARGE) * channels

    acc = tl.full((PIXELS, OUTPUTS), 0.0, tl.float32)
    for start in tl.range(0, channels, CHANNELS, num_stages=STAGES):
        chan = start + tl.arange(0, CHANNELS)
        done = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
        for i in tl.static_range(3):
            left, middle, right = _shifts(x, first, row + i, column, chan, channels, height, width, ENLARGE)
            w0, w1, w2 = _taps(depthwise, chan, channels, i)
            done = done + left * w0 + middle * w1 + right * w2
        weight = tl.load(
            pointwise + outs[None, :] * channels + chan[:, None],
            mask=(outs[None, :] < outputs) & (chan[:, None] < channels),
            other=0.0,
        )
        acc = product(rounded(done, weight.dtype), weight, acc)
    stored = _finish(
        acc,
        bias_row(bias, outs, outputs, OUTPUTS),
        sample * out_height * out_width + tl.program_id(0).to(tl.int64) * PIXELS,
        tl.arange(0, PIXELS),
        inside,
        outs,
        out,
        residual,
        shortcut,
        skip,
        shortcut_weight,
        outputs,
        first_depth,
        second_depth,
        SLICE,
        ACTIVATION,
        ACTIVATE_RESIDUAL,
    )
    if scratch_moments is not None:
        count, mean, squares = of_tile(stored.to(tl.float32), inside)
        leave(scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, outputs, count, mean, squares)
