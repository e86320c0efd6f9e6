"""The kernels of the color fixes, from the network's image to the image that is shown: lanes are single numbers.

adain_fix: `measure` takes the moments of both images at once, a bounded number of parts of each; `adain` merges the
parts by Chan's rule in every program (they are a few KiB), maps, clamps and writes. clamp_image: `clamp`.
wavelet_fix: resize_kernel writes the band to blur, and each `blur` is one level of the chain, both axes at once; the
last one adds the image, clamps and writes. What is not finite in an image is noticed as its numbers pass by.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, image_value, unit_range


@jit
def _place(block, CHANNELS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block of LANES numbers the pixel of the first, and the numbers as counted from that pixel's first channel.

    In 32 bits, which pixels fit and numbers may not: a division of 64 bits is a call that spills registers.
    """
    rest = block % CHANNELS * LANES
    pixel = block // CHANNELS * LANES + rest // CHANNELS
    number = rest % CHANNELS + tl.arange(0, LANES)
    return pixel, number


@jit
def _numbers(  # type: ignore[no-untyped-def]
    image,  # one sample of the strides below
    block,
    pixels,
    width,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    DENSE: tl.constexpr,  # whether the strides are those of channels_last memory without gaps
    LANES: tl.constexpr,
):
    """A block of an image's numbers, row by row and channels innermost, in float32, and which of them there are."""
    pixel, number = _place(block, CHANNELS, LANES)
    at = block.to(tl.int64) * LANES + tl.arange(0, LANES)
    known = at < tl.full((), CHANNELS, tl.int64) * pixels
    if DENSE:
        v = tl.load(image + at, mask=known, other=0)
    else:
        row = pixel // width
        column = pixel - row * width + number // CHANNELS
        down = column // width
        at = (row + down).to(tl.int64) * row_stride + (column - down * width).to(tl.int64) * column_stride
        at += (number % CHANNELS).to(tl.int64) * channel_stride
        v = tl.load(image + at, mask=known, other=0)
    return v.to(tl.float32), known


@jit
def _leave_moments(  # type: ignore[no-untyped-def]
    image,  # one sample of the strides below
    scratch,  # the count of this part's first channel; further channels and kinds at the steps below
    part,
    parts,
    blocks,  # of LANES numbers
    pixels,
    width,
    channel_stride,
    row_stride,
    column_stride,
    channel_step,
    kind_step,
    CHANNELS: tl.constexpr,
    DENSE: tl.constexpr,
    CLAMP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count, mean and squared deviations of each channel over every `parts`-th block of LANES numbers.

    Where there are several blocks, CHANNELS divides `parts`: a lane then meets one channel alone.
    """
    turns = (blocks - part + parts - 1) // parts
    _, number = _place(part, CHANNELS, LANES)
    chan = number % CHANNELS
    seen = tl.full((LANES,), 0.0, tl.float32)
    total = tl.full((LANES,), 0.0, tl.float32)
    for turn in range(turns):
        v, known = _numbers(
            image,
            part + turn * parts,
            pixels,
            width,
            channel_stride,
            row_stride,
            column_stride,
            CHANNELS,
            DENSE,
            LANES,
        )
        if CLAMP:
            # Infinity would vanish in the clamp.
            v = tl.where(tl.abs(v) < float("inf"), unit_range(v), float("nan"))
        seen += known.to(tl.float32)
        total += v
    mean = total * 0.0
    for c in tl.static_range(CHANNELS):
        own = chan == c
        count = tl.sum(tl.where(own, seen, 0.0), 0)
        mean = tl.where(own, tl.sum(tl.where(own, total, 0.0), 0) / tl.maximum(count, 1.0), mean)
    squares = tl.full((LANES,), 0.0, tl.float32)
    lost = tl.full((LANES,), 0.0, tl.float32)
    for turn in range(turns):
        v, known = _numbers(
            image,
            part + turn * parts,
            pixels,
            width,
            channel_stride,
            row_stride,
            column_stride,
            CHANNELS,
            DENSE,
            LANES,
        )
        if CLAMP:
            v = unit_range(v)
        deviation = tl.where(known, v - mean, 0.0)
        squares += deviation * deviation
        lost += deviation
    for c in tl.static_range(CHANNELS):
        own = chan == c
        count = tl.sum(tl.where(own, seen, 0.0), 0)
        # What the sum has lost by rounding shows in the sum of the deviations.
        about = tl.sum(tl.where(own, total, 0.0), 0) / tl.maximum(count, 1.0)
        about += tl.sum(tl.where(own, lost, 0.0), 0) / tl.maximum(count, 1.0)
        tl.store(scratch + c * channel_step, count)
        tl.store(scratch + c * channel_step + kind_step, about)
        tl.store(scratch + c * channel_step + 2 * kind_step, tl.sum(tl.where(own, squares, 0.0), 0))


@jit
def measure(  # type: ignore[no-untyped-def]
    x,  # [N,CHANNELS,..] of the strides below
    style,  # likewise, another size
    scratch_moments,  # [N,3,2*CHANNELS,most] float32: count, mean, squared deviations of x's channels, then style's
    most,  # parts that there is room for
    x_parts,
    x_blocks,
    x_pixels,
    x_width,
    x_sample_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    style_parts,
    style_blocks,
    style_pixels,
    style_width,
    style_sample_stride,
    style_channel_stride,
    style_row_stride,
    style_column_stride,
    CHANNELS: tl.constexpr,
    CLAMP: tl.constexpr,  # whether x is measured clamped to [0,1]
    X_DENSE: tl.constexpr,
    STYLE_DENSE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid: x's parts and then style's, samples."""
    await_inputs()
    part = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    kind_step = 2 * CHANNELS * most
    scratch = scratch_moments + sample * 3 * kind_step
    if part < x_parts:
        _leave_moments(
            x + sample * x_sample_stride,
            scratch + part,
            part,
            x_parts,
            x_blocks,
            x_pixels,
            x_width,
            x_channel_stride,
            x_row_stride,
            x_column_stride,
            most,
            kind_step,
            CHANNELS,
            X_DENSE,
            CLAMP,
            LANES,
        )
    else:
        _leave_moments(
            style + sample * style_sample_stride,
            scratch + CHANNELS * most + part - x_parts,
            part - x_parts,
            style_parts,
            style_blocks,
            style_pixels,
            style_width,
            style_channel_stride,
            style_row_stride,
            style_column_stride,
            most,
            kind_step,
            CHANNELS,
            STYLE_DENSE,
            False,
            LANES,
        )


@jit
def _pick(values, which, c):  # type: ignore[no-untyped-def]
    """Number c of a short vector."""
    return tl.sum(tl.where(which == c, values, 0.0), 0)


@jit
def adain(  # type: ignore[no-untyped-def]
    x,  # [N,CHANNELS,..] of the strides below
    scratch_moments,  # as `measure` leaves it
    out,  # [N,numbers]: channels_last
    finite,  # [N] bool
    unit,  # what style's numbers are to be multiplied by
    eps,
    least,
    most,
    x_parts,
    style_parts,
    pixels,
    width,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    CLAMP: tl.constexpr,
    DENSE: tl.constexpr,
    GROUP: tl.constexpr,  # at least 2 * CHANNELS
    PARTS: tl.constexpr,  # at least most
    LANES: tl.constexpr,
):
    """Grid: blocks of LANES numbers, samples. Every program merges the parts, in the same order."""
    await_inputs()
    sample = tl.program_id(1).to(tl.int64)
    which = tl.arange(0, GROUP)
    part = tl.arange(0, PARTS)[None, :]
    there = (which < 2 * CHANNELS)[:, None] & (part < tl.where(which < CHANNELS, x_parts, style_parts)[:, None])
    kind_step = 2 * CHANNELS * most
    row = scratch_moments + sample * 3 * kind_step + which * most
    at = row[:, None] + part
    count = tl.load(at, mask=there, other=0.0)
    # Means are counted from the first one: what is then rounded is small.
    first = tl.load(row + kind_step, mask=which < 2 * CHANNELS, other=0.0)
    aside = tl.where(there, tl.load(at + kind_step, mask=there, other=0.0) - first[:, None], 0.0)
    total = tl.maximum(tl.sum(count, 1), 1.0)
    shift = tl.sum(count * aside, 1) / total
    deviation = aside - shift[:, None]
    squares = tl.load(at + 2 * kind_step, mask=there, other=0.0) + count * deviation * deviation
    # The unbiased variance of a single pixel is 0, as the biased one is.
    variance = tl.sum(squares, 1) / tl.maximum(total - 1.0, 1.0)
    scale = tl.where(which < CHANNELS, 1.0, unit)
    mean = (first + shift) * scale
    spread = tl.sqrt_rn(variance * scale * scale + eps)

    if tl.program_id(0) == 0:
        good = tl.where((which >= CHANNELS) | (tl.abs(mean + spread) < float("inf")), 0, 1)
        tl.store(finite + sample, tl.sum(good, 0) == 0)

    block = tl.program_id(0)
    _, number = _place(block, CHANNELS, LANES)
    chan = number % CHANNELS
    middle = tl.full((LANES,), 0.0, tl.float32)
    gain = tl.full((LANES,), 0.0, tl.float32)
    target = tl.full((LANES,), 0.0, tl.float32)
    for c in tl.static_range(CHANNELS):
        slope = tl.div_rn(_pick(spread, which, CHANNELS + c), tl.maximum(_pick(spread, which, c), least))
        middle = tl.where(chan == c, _pick(mean, which, c), middle)
        gain = tl.where(chan == c, slope, gain)
        target = tl.where(chan == c, _pick(mean, which, CHANNELS + c), target)
    image = x + sample * sample_stride
    v, known = _numbers(image, block, pixels, width, channel_stride, row_stride, column_stride, CHANNELS, DENSE, LANES)
    if CLAMP:
        v = unit_range(v)
    v = unit_range((v - middle) * gain + target)
    at = out + sample * pixels * CHANNELS + block.to(tl.int64) * LANES + tl.arange(0, LANES)
    tl.store(at, image_value(v, out.dtype.element_ty), mask=known)


@jit
def _at(lane, channels, channel_stride, column_stride, DENSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where number `lane` of a row of an image of these strides lies in it; DENSE: its columns lie side by side."""
    if DENSE:
        at = lane
    else:
        at = (lane // channels).to(tl.int64) * column_stride + (lane % channels).to(tl.int64) * channel_stride
    return at


@jit
def clamp(  # type: ignore[no-untyped-def]
    x,  # [N,channels,height,width] of the strides below
    out,  # [N,height,width*channels]
    finite,  # [N,height] bool
    height,
    width,
    channels,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    DENSE: tl.constexpr,  # whether the columns of a row lie side by side
    LANES: tl.constexpr,
):
    """Grid: rows, samples."""
    await_inputs()
    y = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    length = width * channels
    x += sample * sample_stride + y.to(tl.int64) * row_stride
    out += (sample * height + y) * length
    bad = tl.full((LANES,), 0, tl.int32)
    for start in range(0, length, LANES):
        lane = start + tl.arange(0, LANES)
        known = lane < length
        at = _at(lane, channels, channel_stride, column_stride, DENSE)
        v = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
        bad += tl.where(tl.abs(v) < float("inf"), 0, 1)
        tl.store(out + lane, image_value(unit_range(v), out.dtype.element_ty), mask=known)
    tl.store(finite + sample * height + y, tl.sum(bad, 0) == 0)


@jit
def blur(  # type: ignore[no-untyped-def]
    low,  # [N,height,width*channels] float32: the band to blur
    x,  # [N,channels,height,width] of the strides below on the last level, else None
    out,  # like low: float32, or on the last level the result
    finite,  # [N,height] bool on the last level, else None
    height,
    width,
    channels,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    DILATION: tl.constexpr,
    DENSE: tl.constexpr,  # whether the columns of a row of x lie side by side
    LANES: tl.constexpr,
):
    """Grid: blocks of LANES numbers of a row (on the last level one program a row), rows, samples.

    The border is repeated on every level.
    """
    await_inputs()
    length = width * channels
    y = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    bad = tl.full((LANES,), 0, tl.int32)
    for start in range(tl.program_id(0) * LANES, length, tl.num_programs(0) * LANES):
        lane = start + tl.arange(0, LANES)
        # Lanes behind the row's end read its last number; they store nothing.
        column = tl.minimum(lane, length - 1)
        chan = column % channels
        left = tl.maximum(column - DILATION * channels, chan)
        right = tl.minimum(column + DILATION * channels, length - channels + chan)
        total = tl.full((LANES,), 0.0, tl.float32)
        for step in tl.static_range(-1, 2):
            row = tl.minimum(tl.maximum(y + step * DILATION, 0), height - 1)
            band = low + (sample * height + row) * length
            sides = tl.load(band + left) + tl.load(band + right)
            total += (0.5 * tl.load(band + column) + 0.25 * sides) * (0.5 - 0.25 * step * step)
        known = lane < length
        if x is not None:
            at = _at(lane, channels, channel_stride, column_stride, DENSE)
            image = x + sample * sample_stride + y.to(tl.int64) * row_stride
            v = tl.load(image + at, mask=known, other=0.0).to(tl.float32)
            bad += tl.where(tl.abs(v) < float("inf"), 0, 1)
            total = unit_range(unit_range(v) + total)
        tl.store(out + (sample * height + y) * length + lane, image_value(total, out.dtype.element_ty), mask=known)
    if x is not None:
        tl.store(finite + sample * height + y, tl.sum(bad, 0) == 0)
