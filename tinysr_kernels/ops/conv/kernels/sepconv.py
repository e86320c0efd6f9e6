"""The kernels of sepconv, in two forms that compute the same sums.

`march`: all input channels at once. A program holds PIXELS columns and walks down ROWS output rows. Each row of u is
loaded once, in its three horizontal shifts, and added into the three output rows that it touches; a finished row goes
through the product with the pointwise weight. Three loads for a row of outputs instead of nine.
`tile`: any number of input channels, STEP at a time, for PIXELS output pixels in reading order; nine loads a step.
It serves wide layers, where the product dominates, and images smaller than a program of the other form.

Depthwise weights and sums are float32; the finished sums are rounded once, to the dtype of the product's operands.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import add_product, await_inputs, bias_row, finish, product, rounded
from tinysr_kernels.ops.norm.kernels.channel_moments import joined, leave, of_tile
from tinysr_kernels.ops.norm.kernels.norm_silu_prologue import mean_and_gain, normed


@jit
def _tap(depthwise, chan, NUMBER: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of one tap, [1,STEP] float32."""
    return tl.load(depthwise + NUMBER * CHANNELS + chan, mask=chan < CHANNELS, other=0.0).to(tl.float32)[None, :]


@jit
def _values(  # type: ignore[no-untyped-def]
    x,  # x[sample, first // ENLARGE, 0, 0]
    first,  # scalar, a row of u
    row,  # scalar or [PIXELS], row of u, near first
    column,  # [PIXELS], column of u
    chan,  # [STEP]
    limit,  # width, or 0 where the row is outside
    width,  # of u
    center,  # [1,STEP] and so on: GroupNorm's map of x, or None
    gain,
    shift,
    CHANNELS: tl.constexpr,
    ENLARGE: tl.constexpr,  # 1, or 2 where u is x enlarged
):
    """u[row, column, chan], with its norm, as float32 [PIXELS,STEP], zero outside."""
    inside = (column >= 0) & (column < limit)
    if ENLARGE == 2:
        pixel = ((row >> 1) - (first >> 1)) * (width // 2) + (column >> 1)
    else:
        pixel = (row - first) * width + column
    at = (pixel * CHANNELS)[:, None] + chan[None, :]
    v = tl.load(x + at, mask=inside[:, None] & (chan[None, :] < CHANNELS), other=0.0)
    if center is not None:
        # Outside the image stand zeros behind the norm, not before it.
        return tl.where(inside[:, None], normed(v, center, gain, shift, v.dtype != tl.float32), 0.0)
    return v.to(tl.float32)


@jit
def _map(  # type: ignore[no-untyped-def]
    norm_moments,
    norm_weight,
    norm_bias,
    sample,
    chan,  # [STEP]
    norm_eps,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """center, gain and shift of the norm, each [1,STEP] float32."""
    center, gain = mean_and_gain(norm_moments, norm_weight, norm_eps, sample, chan, CHANNELS, GROUP, MEMBERS)
    shift = tl.load(norm_bias + chan, mask=chan < CHANNELS, other=0.0).to(tl.float32)
    return center[None, :], gain[None, :], shift[None, :]


@jit
def _add_row(  # type: ignore[no-untyped-def]
    x,  # the sample
    depthwise,  # [3,3,CHANNELS]
    row,  # scalar, of u
    column,  # [PIXELS], of u
    chan,  # [STEP]
    height,  # of u
    width,  # of u
    center,
    gain,
    shift,
    upper,  # [PIXELS,STEP], the sums of the output rows that this row meets with the upper row of the kernel,
    middle,  # the middle one
    lower,  # and the lower one
    UPPER: tl.constexpr,  # whether there is such an output row
    MIDDLE: tl.constexpr,
    LOWER: tl.constexpr,
    CHANNELS: tl.constexpr,
    ENLARGE: tl.constexpr,
):
    """The three sums with one row of u added, in its three horizontal shifts."""
    # Only the way to the row may need 64 bits; from there on offsets of 32 take half the registers.
    x += (row // ENLARGE).to(tl.int64) * ((width // ENLARGE) * CHANNELS)
    # A loop, where the compiler would hold the taps of all shifts at once (72 registers of 16-byte vectors in half
    # precision): the weights come from the L1 again and again, 24 registers at a time.
    limit = tl.where((row >= 0) & (row < height), width, 0)
    for j in tl.range(0, 3, num_stages=1, loop_unroll_factor=1):
        v = _values(x, row, row, column + (j - 1), chan, limit, width, center, gain, shift, CHANNELS, ENLARGE)
        weights = depthwise + j * CHANNELS
        if LOWER:
            lower += v * _tap(weights, chan, 6, CHANNELS)
        if MIDDLE:
            middle += v * _tap(weights, chan, 3, CHANNELS)
        if UPPER:
            upper += v * _tap(weights, chan, 0, CHANNELS)
    return upper, middle, lower


@jit
def _finish(  # type: ignore[no-untyped-def]
    acc,  # [PIXELS,OUTPUTS] float32, the product
    bias,
    base,  # int64, a pixel of all samples' results
    pixel,  # [PIXELS] counted from there
    inside,  # [PIXELS]
    outs,  # [OUTPUTS]
    out,
    residual,
    shortcut,
    skip,
    shortcut_weight,
    RESULTS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
):
    """Everything behind the product with the pointwise weight, and the store of the tile, which is returned."""
    at = pixel[:, None] * RESULTS + outs[None, :]
    known = inside[:, None] & (outs[None, :] < RESULTS)
    if shortcut is not None:
        depth = FIRST + SECOND
        shortcut += base * FIRST
        acc = add_product(acc, shortcut, shortcut_weight, pixel, inside, outs, RESULTS, 0, FIRST, FIRST, depth, SLICE)
        if skip is not None:
            skip += base * SECOND
            weight = shortcut_weight + FIRST
            acc = add_product(acc, skip, weight, pixel, inside, outs, RESULTS, 0, SECOND, SECOND, depth, SLICE)
    # The bias is loaded here, row by row: held from the start it would take registers all the way.
    beta = bias_row(bias, outs, RESULTS, OUTPUTS)
    return finish(acc, beta, residual, out, base * RESULTS, at, known, ACTIVATION, ACTIVATE_RESIDUAL)


@jit
def march(  # type: ignore[no-untyped-def]
    x,  # [N,height/ENLARGE,width/ENLARGE,CHANNELS]
    depthwise,  # [3,3,CHANNELS]
    pointwise,  # [RESULTS,CHANNELS]
    bias,  # [RESULTS] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,FIRST] or None
    skip,  # [N,out_height,out_width,SECOND] or None
    shortcut_weight,  # [RESULTS,FIRST+SECOND] or None
    norm_moments,  # [N,2,CHANNELS], or None without a norm of x
    norm_weight,  # [CHANNELS] or None
    norm_bias,  # [CHANNELS] or None
    out,  # [N,out_height,out_width,RESULTS]
    scratch_moments,  # [N,3,RESULTS,tl.num_programs(0)] float32, the moments of each program's pixels, or None
    norm_eps,
    first_row,  # of out, to compute
    end_row,  # behind the last
    height,  # of u
    width,  # of u
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,  # channels of out
    FIRST: tl.constexpr,  # channels of shortcut
    SECOND: tl.constexpr,  # channels of skip
    GROUP: tl.constexpr,  # channels of a group of the norm
    MEMBERS: tl.constexpr,  # a power of two, at least GROUP
    STRIDE: tl.constexpr,
    ENLARGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEP: tl.constexpr,  # at least CHANNELS
    OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Grid: strips of ROWS x PIXELS in reading order, blocks of outputs, samples."""
    await_inputs()
    across = tl.cdiv(out_width, PIXELS)
    top = first_row + (tl.program_id(0) // across) * ROWS
    column = (tl.program_id(0) % across) * PIXELS + tl.arange(0, PIXELS)
    outs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sample = tl.program_id(2).to(tl.int64)
    chan = tl.arange(0, STEP)
    x += sample * (height // ENLARGE) * (width // ENLARGE) * CHANNELS
    weight = tl.load(
        pointwise + outs[None, :] * CHANNELS + chan[:, None],
        mask=(outs[None, :] < RESULTS) & (chan[:, None] < CHANNELS),
        other=0.0,
    )
    if norm_moments is not None:
        center, gain, shift = _map(
            norm_moments, norm_weight, norm_bias, sample, chan, norm_eps, CHANNELS, GROUP, MEMBERS
        )
    else:
        center = None
        gain = None
        shift = None

    at = column * STRIDE
    row = top * STRIDE - 1
    zero = tl.full((PIXELS, STEP), 0.0, tl.float32)
    # `above` has what the rows before the next one give to the output row that the next one finishes.
    above, _, _ = _add_row(
        x, depthwise, row, at, chan, height, width, center, gain, shift, zero, zero, zero,
        True, False, False, CHANNELS, ENLARGE,
    )  # fmt: skip
    below = zero
    if STRIDE == 1:
        below, above, _ = _add_row(
            x, depthwise, row + 1, at, chan, height, width, center, gain, shift, zero, above, zero,
            True, True, False, CHANNELS, ENLARGE,
        )  # fmt: skip
    # No pixel counted yet; unused without scratch_moments.
    count = 0.0
    mean = tl.full((OUTPUTS,), 0.0, tl.float32)
    squares = tl.full((OUTPUTS,), 0.0, tl.float32)
    for step in tl.range(0, tl.minimum(ROWS, end_row - top), num_stages=1):
        y = top + step
        if STRIDE == 1:
            below, above, done = _add_row(
                x, depthwise, y + 1, at, chan, height, width, center, gain, shift, zero, below, above,
                True, True, True, CHANNELS, ENLARGE,
            )  # fmt: skip
        else:
            _, above, _ = _add_row(
                x, depthwise, 2 * y, at, chan, height, width, center, gain, shift, zero, above, zero,
                False, True, False, CHANNELS, ENLARGE,
            )  # fmt: skip
            above, _, done = _add_row(
                x, depthwise, 2 * y + 1, at, chan, height, width, center, gain, shift, zero, zero, above,
                True, False, True, CHANNELS, ENLARGE,
            )  # fmt: skip
        acc = product(rounded(done, weight.dtype), weight, tl.full((PIXELS, OUTPUTS), 0.0, tl.float32))
        base = (sample * out_height + y) * out_width
        inside = column < out_width
        stored = _finish(
            acc, bias, base, column, inside, outs, out, residual, shortcut, skip, shortcut_weight,
            RESULTS, FIRST, SECOND, OUTPUTS, SLICE, ACTIVATION, ACTIVATE_RESIDUAL,
        )  # fmt: skip
        if scratch_moments is not None:
            more, more_mean, more_squares = of_tile(stored.to(tl.float32), inside)
            count, mean, squares = joined(count, mean, squares, more, more_mean, more_squares)
    if scratch_moments is not None:
        leave(scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, RESULTS, count, mean, squares)


@jit
def tile(  # type: ignore[no-untyped-def]
    x,  # [N,height/ENLARGE,width/ENLARGE,CHANNELS]
    depthwise,  # [3,3,CHANNELS]
    pointwise,  # [RESULTS,CHANNELS]
    bias,  # [RESULTS] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,FIRST] or None
    skip,  # [N,out_height,out_width,SECOND] or None
    shortcut_weight,  # [RESULTS,FIRST+SECOND] or None
    norm_moments,  # [N,2,CHANNELS], or None without a norm of x
    norm_weight,  # [CHANNELS] or None
    norm_bias,  # [CHANNELS] or None
    out,  # [N,out_height,out_width,RESULTS]
    scratch_moments,  # [N,3,RESULTS,tl.num_programs(0)] float32, the moments of each program's pixels, or None
    norm_eps,
    first_row,  # of out, to compute
    end_row,  # behind the last
    height,  # of u
    width,  # of u
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,  # channels of out
    FIRST: tl.constexpr,  # channels of shortcut
    SECOND: tl.constexpr,  # channels of skip
    GROUP: tl.constexpr,  # channels of a group of the norm
    MEMBERS: tl.constexpr,  # a power of two, at least GROUP
    STRIDE: tl.constexpr,
    ENLARGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,
    STEP: tl.constexpr,  # channels a step
    OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: PIXELS output pixels in reading order, blocks of outputs, samples."""
    await_inputs()
    begin = first_row * out_width + tl.program_id(0) * PIXELS
    pixel = begin + tl.arange(0, PIXELS)
    outs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sample = tl.program_id(2).to(tl.int64)
    inside = pixel < end_row * out_width
    row = pixel // out_width * STRIDE - 1
    column = pixel % out_width * STRIDE - 1
    first = tl.maximum(begin // out_width * STRIDE - 1, 0)
    x += sample * (height // ENLARGE) * (width // ENLARGE) * CHANNELS
    # Only the way to the first row may need 64 bits; from there on offsets of 32 take half the registers.
    x += (first // ENLARGE).to(tl.int64) * ((width // ENLARGE) * CHANNELS)

    acc = tl.full((PIXELS, OUTPUTS), 0.0, tl.float32)
    for start in tl.range(0, CHANNELS, STEP, num_stages=STAGES):
        chan = start + tl.arange(0, STEP)
        if norm_moments is not None:
            center, gain, shift = _map(
                norm_moments, norm_weight, norm_bias, sample, chan, norm_eps, CHANNELS, GROUP, MEMBERS
            )
        else:
            center = None
            gain = None
            shift = None
        done = tl.full((PIXELS, STEP), 0.0, tl.float32)
        for i in tl.static_range(3):
            limit = tl.where((row + i >= 0) & (row + i < height), width, 0)
            for j in tl.static_range(3):
                v = _values(
                    x, first, row + i, column + j, chan, limit, width, center, gain, shift, CHANNELS, ENLARGE
                )  # fmt: skip
                done += v * _tap(depthwise, chan, 3 * i + j, CHANNELS)
        weight = tl.load(
            pointwise + outs[None, :] * CHANNELS + chan[:, None],
            mask=(outs[None, :] < RESULTS) & (chan[:, None] < CHANNELS),
            other=0.0,
        )
        acc = product(rounded(done, weight.dtype), weight, acc)
    stored = _finish(
        acc, bias, sample * out_height * out_width + begin, tl.arange(0, PIXELS), inside, outs,
        out, residual, shortcut, skip, shortcut_weight,
        RESULTS, FIRST, SECOND, OUTPUTS, SLICE, ACTIVATION, ACTIVATE_RESIDUAL,
    )  # fmt: skip
    if scratch_moments is not None:
        count, mean, squares = of_tile(stored.to(tl.float32), inside)
        leave(scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, RESULTS, count, mean, squares)
