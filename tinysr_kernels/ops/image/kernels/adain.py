"""The kernels of adain_fix: statistics of parts of both images, then their merging and the map.

`part_moments` writes count, mean and squared deviations of every channel for a bounded number of parts of each image.
In `adain` every program merges all parts (a few KiB) by Chan's rule, then maps, clamps and stores its own elements. An
element of x that is not finite makes its sample's statistics not finite, hence its flag False.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, extent_or_1, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, image_value, unit_range


@jit
def _block_start(block, CHANNELS: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pixel of a block's first element, and the block's elements [BLOCK_SIZE] relative to that pixel's channel 0.

    In 32-bit arithmetic, which holds pixel indices but not always element indices: a 64-bit division is a function call
    that spills registers.
    """
    rest = block % CHANNELS * BLOCK_SIZE
    pixel = block // CHANNELS * BLOCK_SIZE + rest // CHANNELS
    element = rest % CHANNELS + tl.arange(0, BLOCK_SIZE)
    return pixel, element


@jit
def _load_block(  # type: ignore[no-untyped-def]
    image,  # one sample, with the strides below
    block,
    pixels,
    width,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    DENSE: tl.constexpr,  # whether it is dense in channels_last memory
    BLOCK_SIZE: tl.constexpr,
):
    """A block of an image's elements, in channels_last order, as float32 [BLOCK_SIZE], and the mask of those inside."""
    pixel, element = _block_start(block, CHANNELS, BLOCK_SIZE)
    at = block.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = at < tl.full((), CHANNELS, tl.int64) * pixels
    if DENSE:
        v = tl.load(image + at, mask=mask, other=0)
    else:
        row = pixel // width
        column = pixel - row * width + element // CHANNELS
        down = column // width
        at = (row + down).to(tl.int64) * row_stride + (column - down * width).to(tl.int64) * column_stride
        at += (element % CHANNELS).to(tl.int64) * channel_stride
        v = tl.load(image + at, mask=mask, other=0)
    return v.to(tl.float32), mask


@jit
def _store_moments(  # type: ignore[no-untyped-def]
    image,  # one sample, with the strides below
    scratch,  # the count of this part's channel 0; other channels and kinds at multiples of the steps below
    part,
    parts,
    blocks,  # of BLOCK_SIZE elements
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
    BLOCK_SIZE: tl.constexpr,
):
    """Count, mean and squared deviations of each channel over every `parts`-th block of BLOCK_SIZE elements.

    With several blocks per part, CHANNELS divides `parts`: each position in a block then sees a single channel.
    """
    steps = (blocks - part + parts - 1) // parts
    _, element = _block_start(part, CHANNELS, BLOCK_SIZE)
    chan = element % CHANNELS
    seen = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
    total = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
    for step in range(steps):
        v, mask = _load_block(
            image,
            part + step * parts,
            pixels,
            width,
            channel_stride,
            row_stride,
            column_stride,
            CHANNELS,
            DENSE,
            BLOCK_SIZE,
        )
        if CLAMP:
            # Clamping would hide an infinity.
            v = tl.where(tl.abs(v) < float("inf"), unit_range(v), float("nan"))
        seen += mask.to(tl.float32)
        total += v
    mean = total * 0.0
    for c in tl.static_range(CHANNELS):
        own = chan == c
        count = tl.sum(tl.where(own, seen, 0.0), 0)
        mean = tl.where(own, tl.sum(tl.where(own, total, 0.0), 0) / tl.maximum(count, 1.0), mean)
    squares = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
    lost = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
    for step in range(steps):
        v, mask = _load_block(
            image,
            part + step * parts,
            pixels,
            width,
            channel_stride,
            row_stride,
            column_stride,
            CHANNELS,
            DENSE,
            BLOCK_SIZE,
        )
        if CLAMP:
            v = unit_range(v)
        deviation = tl.where(mask, v - mean, 0.0)
        squares += deviation * deviation
        lost += deviation
    for c in tl.static_range(CHANNELS):
        own = chan == c
        count = tl.sum(tl.where(own, seen, 0.0), 0)
        # The sum of the deviations is the rounding error of the sum.
        refined = tl.sum(tl.where(own, total, 0.0), 0) / tl.maximum(count, 1.0)
        refined += tl.sum(tl.where(own, lost, 0.0), 0) / tl.maximum(count, 1.0)
        tl.store(scratch + c * channel_step, count)
        tl.store(scratch + c * channel_step + kind_step, refined)
        tl.store(scratch + c * channel_step + 2 * kind_step, tl.sum(tl.where(own, squares, 0.0), 0))


@jit
def part_moments(  # type: ignore[no-untyped-def]
    x,  # [N,CHANNELS,..], with the strides below
    style,  # the same, of another size
    scratch_moments,  # [N,3,2*CHANNELS,max_parts] float32: count, mean, squared deviations; x's channels first
    max_parts,  # parts that scratch_moments has room for
    x_parts: extent,
    x_blocks: extent,
    x_pixels,
    x_width: extent,
    x_sample_stride,
    x_channel_stride: extent_or_1,
    x_row_stride: extent,
    x_column_stride: extent_or_1,
    style_parts: extent,
    style_blocks: extent,
    style_pixels,
    style_width: extent,
    style_sample_stride: extent,
    style_channel_stride: extent_or_1,
    style_row_stride: extent,
    style_column_stride: extent_or_1,
    CHANNELS: tl.constexpr,
    CLAMP: tl.constexpr,  # whether x is clamped to [0,1] first
    X_DENSE: tl.constexpr,
    STYLE_DENSE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: x's parts followed by style's, samples."""
    await_inputs()
    part = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    kind_step = 2 * CHANNELS * max_parts
    scratch = scratch_moments + sample * 3 * kind_step
    if part < x_parts:
        _store_moments(
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
            max_parts,
            kind_step,
            CHANNELS,
            X_DENSE,
            CLAMP,
            BLOCK_SIZE,
        )
    else:
        _store_moments(
            style + sample * style_sample_stride,
            scratch + CHANNELS * max_parts + part - x_parts,
            part - x_parts,
            style_parts,
            style_blocks,
            style_pixels,
            style_width,
            style_channel_stride,
            style_row_stride,
            style_column_stride,
            max_parts,
            kind_step,
            CHANNELS,
            STYLE_DENSE,
            False,
            BLOCK_SIZE,
        )


@jit
def _pick(values, index, c):  # type: ignore[no-untyped-def]
    """Element c of a short vector."""
    return tl.sum(tl.where(index == c, values, 0.0), 0)


@jit
def adain(  # type: ignore[no-untyped-def]
    x,  # [N,CHANNELS,..], with the strides below
    scratch_moments,  # [N,3,2*CHANNELS,max_parts] float32, from `part_moments`
    out,  # [N,pixels,CHANNELS]
    finite,  # [N] bool
    style_scale,  # 1/255 for a style of bytes, else 1
    eps,
    least,
    max_parts,
    x_parts: extent,
    style_parts: extent,
    pixels,
    width: extent,
    sample_stride,
    channel_stride: extent_or_1,
    row_stride: extent,
    column_stride: extent_or_1,
    CHANNELS: tl.constexpr,
    CLAMP: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,  # at least 2 * CHANNELS
    BLOCK_PARTS: tl.constexpr,  # at least max_parts
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: blocks of BLOCK_SIZE elements, samples. Every program merges the parts, in the same order."""
    await_inputs()
    sample = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK_CHANNELS)
    part = tl.arange(0, BLOCK_PARTS)[None, :]
    inside = (index < 2 * CHANNELS)[:, None] & (part < tl.where(index < CHANNELS, x_parts, style_parts)[:, None])
    kind_step = 2 * CHANNELS * max_parts
    row = scratch_moments + sample * 3 * kind_step + index * max_parts
    at = row[:, None] + part
    count = tl.load(at, mask=inside, other=0.0)
    # Means are taken relative to the first part's: rounding errors are then small.
    first = tl.load(row + kind_step, mask=index < 2 * CHANNELS, other=0.0)
    offset = tl.where(inside, tl.load(at + kind_step, mask=inside, other=0.0) - first[:, None], 0.0)
    total = tl.maximum(tl.sum(count, 1), 1.0)
    shift = tl.sum(count * offset, 1) / total
    deviation = offset - shift[:, None]
    squares = tl.load(at + 2 * kind_step, mask=inside, other=0.0) + count * deviation * deviation
    # The unbiased variance of a single pixel is 0, as the biased one is.
    variance = tl.sum(squares, 1) / tl.maximum(total - 1.0, 1.0)
    scale = tl.where(index < CHANNELS, 1.0, style_scale)
    mean = (first + shift) * scale
    std = tl.sqrt_rn(variance * scale * scale + eps)

    if tl.program_id(0) == 0:
        bad = tl.where((index >= CHANNELS) | (tl.abs(mean + std) < float("inf")), 0, 1)
        tl.store(finite + sample, tl.sum(bad, 0) == 0)

    block = tl.program_id(0)
    _, element = _block_start(block, CHANNELS, BLOCK_SIZE)
    chan = element % CHANNELS
    center = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
    gain = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
    style_mean = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
    for c in tl.static_range(CHANNELS):
        ratio = tl.div_rn(_pick(std, index, CHANNELS + c), tl.maximum(_pick(std, index, c), least))
        center = tl.where(chan == c, _pick(mean, index, c), center)
        gain = tl.where(chan == c, ratio, gain)
        style_mean = tl.where(chan == c, _pick(mean, index, CHANNELS + c), style_mean)
    image = x + sample * sample_stride
    v, mask = _load_block(
        image, block, pixels, width, channel_stride, row_stride, column_stride, CHANNELS, DENSE, BLOCK_SIZE
    )
    if CLAMP:
        v = unit_range(v)
    v = unit_range((v - center) * gain + style_mean)
    at = out + sample * pixels * CHANNELS + block.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(at, image_value(v, out.dtype.element_ty), mask=mask)
