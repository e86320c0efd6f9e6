"""The kernels of conv3x3 and upsample_conv: implicit products of a tile of pixels with a block of outputs.

`conv`: the reduction runs over taps and channels together, k = tap * channels + channel, as the weight lies in memory,
so that a step may end one tap and begin the next: 240 channels need no padding to 256. Behind it stand the slices of a
1x1 shortcut, read in place from its two tensors. Behind a nearest enlargement (ENLARGE = 2) a program computes one of
the four phases of a tile of the small image: 2x2 taps, and every other pixel of every other row of the result.
`merge`: where an image is too small to fill the GPU, several programs share the reduction of a tile and leave partial
sums; this kernel adds them in their order, so that results repeat bit for bit, and finishes the tile.

All sums are float32.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import accumulate_matmul, await_inputs, bias_row, epilogue, round_to, tile_dot
from tinysr_kernels.ops.norm.kernels.channel_moments import group_moments, store_moments, tile_moments
from tinysr_kernels.ops.norm.kernels.norm_silu_prologue import norm_silu


@jit
def _borders(row, column, inside, height, width, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[PIXELS] int32: bit i * SIDE + j says whether the image has pixel (row + i, column + j); 0 for those outside."""
    across = column * 0
    for j in tl.static_range(SIDE):
        across |= tl.where((column + j >= 0) & (column + j < width), 1 << j, 0)
    bits = row * 0
    for i in tl.static_range(SIDE):
        bits |= tl.where((row + i >= 0) & (row + i < height), across << (SIDE * i), 0)
    return tl.where(inside, bits, 0)


@jit
def _taps(  # type: ignore[no-untyped-def]
    acc,  # [PIXELS,OUTPUTS] float32
    x,  # the first tap of the tile's first pixel
    place,  # [PIXELS] how far from there a pixel's first tap is
    borders,  # [PIXELS]
    weight,  # [outputs,SIDE,SIDE,CHANNELS]
    outs,  # [OUTPUTS]
    outputs,
    width,  # of the image
    begin,  # of the reduction, a multiple of SLICE
    end,
    scale,  # [2,CHANNELS] mean and gain of each channel, or None
    norm_bias,  # [CHANNELS] or None
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    SLICE: tl.constexpr,
    QUICK: tl.constexpr,
):
    """acc + the products over k from begin to end."""
    DEPTH: tl.constexpr = SIDE * SIDE * CHANNELS
    lane = tl.arange(0, SLICE)
    there = outs[None, :] < outputs
    weight += outs[None, :] * DEPTH + lane[:, None]
    place = place[:, None]
    borders = borders[:, None]
    for start in range(begin, end, SLICE):
        if CHANNELS % SLICE == 0:
            # Each step lies in a single tap.
            tap = start // CHANNELS
            shift = (tap // SIDE * width + tap % SIDE) * CHANNELS + tl.multiple_of(start % CHANNELS, SLICE)
            seen = ((borders >> tap) & 1) != 0
            chan = tl.multiple_of(start % CHANNELS, SLICE) + lane
            rows = tl.load(x + ((place + shift) + lane[None, :]), mask=seen, other=0.0)
            columns = tl.load(weight + start, mask=there, other=0.0)
        else:
            k = start + lane
            # Behind the last tap stands a bit that is always 0.
            tap = tl.minimum(k // CHANNELS, SIDE * SIDE)
            shift = (tap // SIDE * width + tap % SIDE) * CHANNELS + k % CHANNELS
            seen = ((borders >> tap[None, :]) & 1) != 0
            chan = k % CHANNELS
            rows = tl.load(x + (place + shift[None, :]), mask=seen, other=0.0)
            columns = tl.load(weight + start, mask=there & (k[:, None] < DEPTH), other=0.0)
        if scale is not None:
            mean, gain = tl.load(scale + chan)[None, :], tl.load(scale + CHANNELS + chan)[None, :]
            y = norm_silu(rows, mean, gain, tl.load(norm_bias + chan).to(tl.float32)[None, :], QUICK)
            # Outside the image stand zeros behind the norm, not before it.
            rows = round_to(tl.where(seen, y, 0.0), columns.dtype)
        acc = tile_dot(rows.to(columns.dtype), columns, acc)
    return acc


@jit
def conv(  # type: ignore[no-untyped-def]
    x,  # [N,height,width,CHANNELS]
    weight,  # [RESULTS,3,3,CHANNELS], or the phases [4,RESULTS,2,2,CHANNELS] behind an enlargement
    bias,  # [RESULTS] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,FIRST] or None
    skip,  # [N,out_height,out_width,SECOND] or None
    shortcut_weight,  # [RESULTS,FIRST+SECOND] or None
    out,  # [N,out_height,out_width,RESULTS]
    scratch_parts,  # [parts,N,out_height,out_width,RESULTS] float32, what `merge` adds, or None
    scratch_scale,  # [N,2,CHANNELS] float32, mean and gain of a GroupNorm with SiLU before, or None
    norm_bias,  # [CHANNELS], its shift, or None
    scratch_moments,  # [N,3,RESULTS // WIDTH,tiles and phases] float32, the moments of each tile, or None
    height,
    width,
    out_height,
    out_width,
    share,  # of the reduction, a part: a multiple of SLICE
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,  # channels of out
    FIRST: tl.constexpr,  # channels of shortcut
    SECOND: tl.constexpr,  # channels of skip
    STRIDE: tl.constexpr,
    ENLARGE: tl.constexpr,  # 1, or 2 behind an enlargement
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the tile, which has PIXELS // COLUMNS rows
    OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr,
    QUICK: tl.constexpr,  # whether half precision's digits are enough for SiLU
    WIDTH: tl.constexpr,  # neighbouring channels whose moments are one: 1, or a group that divides OUTPUTS
):
    """Grid: tiles in reading order, each in all its blocks of outputs; parts of the reduction; samples."""
    await_inputs()
    SIDE: tl.constexpr = 4 - ENLARGE
    PHASES: tl.constexpr = ENLARGE * ENLARGE
    DEPTH: tl.constexpr = SIDE * SIDE * CHANNELS
    # Programs that read the same pixels run at the same time.
    blocks = tl.cdiv(RESULTS, OUTPUTS) * PHASES
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks
    across = tl.cdiv(out_width, ENLARGE * COLUMNS)
    top = tile // across * (PIXELS // COLUMNS)
    left = tile % across * COLUMNS
    phase = block % PHASES
    down = phase // ENLARGE
    right = phase % ENLARGE
    outs = block // PHASES * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)

    lane = tl.arange(0, PIXELS)
    row = top + lane // COLUMNS
    column = left + lane % COLUMNS
    inside = (row * ENLARGE < out_height) & (column * ENLARGE < out_width)
    # Only the way to the tile may need 64 bits; from there on offsets of 32 take half the registers.
    base = (sample * out_height + (top * ENLARGE + down)) * out_width + (left * ENLARGE + right)
    pixel = (lane // COLUMNS * out_width + lane % COLUMNS) * ENLARGE
    begin = part * share
    end = begin + share
    acc = _taps(
        tl.full((PIXELS, OUTPUTS), 0.0, tl.float32),
        x + ((sample * height + (top * STRIDE - 1 + down)) * width + (left * STRIDE - 1 + right)) * CHANNELS,
        (lane // COLUMNS * width + lane % COLUMNS) * (STRIDE * CHANNELS),
        _borders(row * STRIDE - 1 + down, column * STRIDE - 1 + right, inside, height, width, SIDE),
        weight + phase * RESULTS * DEPTH,
        outs,
        RESULTS,
        width,
        begin,
        tl.minimum(end, DEPTH),
        None if scratch_scale is None else scratch_scale + sample * 2 * CHANNELS,
        norm_bias,
        CHANNELS,
        SIDE,
        SLICE,
        QUICK,
    )
    if shortcut is not None:
        # The shortcut's slices follow those of the taps, and the skip's follow them.
        begin -= tl.cdiv(DEPTH, SLICE) * SLICE
        end -= tl.cdiv(DEPTH, SLICE) * SLICE
        acc = accumulate_matmul(
            acc,
            shortcut + base * FIRST,
            shortcut_weight,
            pixel,
            inside,
            outs,
            RESULTS,
            tl.maximum(begin, 0),
            tl.minimum(end, FIRST),
            FIRST,
            FIRST + SECOND,
            SLICE,
        )
        if skip is not None:
            begin -= tl.cdiv(FIRST, SLICE) * SLICE
            end -= tl.cdiv(FIRST, SLICE) * SLICE
            acc = accumulate_matmul(
                acc,
                skip + base * SECOND,
                shortcut_weight + FIRST,
                pixel,
                inside,
                outs,
                RESULTS,
                tl.maximum(begin, 0),
                tl.minimum(end, SECOND),
                SECOND,
                FIRST + SECOND,
                SLICE,
            )
    known = inside[:, None] & (outs[None, :] < RESULTS)
    at = pixel[:, None] * RESULTS + outs[None, :]
    if scratch_parts is not None:
        samples = tl.num_programs(2).to(tl.int64)
        tl.store(scratch_parts + (part * samples * out_height * out_width + base) * RESULTS + at, acc, mask=known)
    else:
        beta = bias_row(bias, outs, RESULTS, OUTPUTS)
        stored = epilogue(acc, beta, residual, out, base * RESULTS, at, known, ACTIVATION, ACTIVATE_RESIDUAL)
        if scratch_moments is not None:
            count, mean, squares = tile_moments(stored.to(tl.float32), inside)
            tiles = tl.num_programs(0) // tl.cdiv(RESULTS, OUTPUTS)
            if WIDTH > 1:
                mean, squares = group_moments(count, mean, squares, WIDTH)
                outs = block // PHASES * (OUTPUTS // WIDTH) + tl.arange(0, OUTPUTS // WIDTH)
                count *= WIDTH
            store_moments(
                scratch_moments, sample, tile * PHASES + phase, tiles, outs, RESULTS // WIDTH, count, mean, squares
            )


@jit
def merge(  # type: ignore[no-untyped-def]
    scratch_parts,  # [PARTS,N,pixels,RESULTS]
    bias,  # [RESULTS] or None
    residual,  # [N,pixels,RESULTS] or None
    out,  # [N,pixels,RESULTS]; scratch_parts itself where that is one part of its dtype
    pixels,
    RESULTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Grid: pixels in reading order, each in all its blocks of outputs; samples."""
    await_inputs()
    blocks = tl.cdiv(RESULTS, OUTPUTS)
    outs = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    start = tl.program_id(0) // blocks * PIXELS
    lane = tl.arange(0, PIXELS)
    samples = tl.num_programs(1).to(tl.int64)
    base = (tl.program_id(1).to(tl.int64) * pixels + start) * RESULTS
    known = (start + lane < pixels)[:, None] & (outs[None, :] < RESULTS)
    at = lane[:, None] * RESULTS + outs[None, :]
    acc = tl.full((PIXELS, OUTPUTS), 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        first = samples * part * pixels * RESULTS + base
        acc += tl.load(scratch_parts + first + at, mask=known, other=0.0).to(tl.float32)
    beta = bias_row(bias, outs, RESULTS, OUTPUTS)
    epilogue(acc, beta, residual, out, base, at, known, ACTIVATION, ACTIVATE_RESIDUAL)
