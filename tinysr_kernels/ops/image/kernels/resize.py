"""The kernel of resize_bicubic: one pass from an image of any strides to the enlarged channels_last one.

A program computes BLOCK_N consecutive elements of output rows (columns and channels together, so that stores are wide
although there are three channels) and iterates downwards. From each input row it loads the four pixels around every
element and interpolates them horizontally once; four such rows give the FACTOR output rows between the middle two.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, extent_or_1, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, round_to, unit_range


@jit
def _cubic_weights(t, A: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of four pixels at -1, 0, 1 and 2 for a position t in [0,1] between the middle two.

    Keys' kernel, (a+2) d^3 - (a+3) d^2 + 1 near and a d^3 - 5a d^2 + 8a d - 4a far, in factors: nothing cancels.
    """
    back = 1.0 - t
    w0 = A * t * back * back
    w1 = back * (1.0 + t - (A + 2.0) * t * t)
    w2 = t * (1.0 + back - (A + 2.0) * back * back)
    w3 = A * back * t * t
    return w0, w1, w2, w3


@jit
def _inside(w0, w1, w2, w3, at, size):  # type: ignore[no-untyped-def]
    """The weights of the pixels at-1, at, at+1 and at+2, zero for those outside [0,size), and their sum."""
    w0 = tl.where((at >= 1) & (at - 1 < size), w0, 0.0)
    w1 = tl.where((at >= 0) & (at < size), w1, 0.0)
    w2 = tl.where((at >= -1) & (at + 1 < size), w2, 0.0)
    w3 = tl.where((at >= -2) & (at + 2 < size), w3, 0.0)
    total = w0 + w1 + w2 + w3
    return w0, w1, w2, w3, tl.where(total == 0.0, 1.0, total)  # zero past the end, where nothing is stored


@jit
def _interpolate_row(x, row, height, row_stride, c0, c1, c2, c3, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """Row `row` of x, clamped to the image, interpolated between four columns: [BLOCK_N] float32."""
    at = x + tl.minimum(tl.maximum(row, 0), height - 1).to(tl.int64) * row_stride
    v = tl.load(at + c0).to(tl.float32) * w0
    v += tl.load(at + c1).to(tl.float32) * w1
    v += tl.load(at + c2).to(tl.float32) * w2
    return v + tl.load(at + c3).to(tl.float32) * w3


@jit
def enlarge(  # type: ignore[no-untyped-def]
    x,  # [N,channels,height,width], with the strides below
    base,  # [N,channels,height*FACTOR,width*FACTOR], with the strides below, or None
    out,  # [N,height*FACTOR,width*FACTOR,channels]
    mul,
    add,
    height: extent,  # of x
    width: extent,  # of x
    channels,
    sample_stride: extent,
    channel_stride: extent_or_1,
    row_stride: extent,
    column_stride: extent_or_1,
    base_sample_stride: extent,
    base_channel_stride: extent_or_1,
    base_row_stride: extent,
    base_column_stride: extent_or_1,
    PILLOW: tl.constexpr,  # a = -0.5 and only pixels inside, instead of a = -0.75 and the border repeated
    CLAMP: tl.constexpr,  # to [0,1]
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,  # gaps between input rows per program
):
    """out = mul * bicubic(x) + add, or with base the difference clamp(that) - clamp(base), both clamped to [0,1].

    Grid: blocks of BLOCK_M gaps between input rows x blocks of BLOCK_N elements of an output row, samples.
    """
    await_inputs()
    A: tl.constexpr = -0.5 if PILLOW else -0.75
    length = width * FACTOR * channels
    # Both on one axis: the others end at 65535.
    blocks = tl.cdiv(length, BLOCK_N)
    offs_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(1).to(tl.int64)
    # Output columns FACTOR * left + HALF + 0, 1, ... lie between the input columns left and left + 1.
    HALF: tl.constexpr = FACTOR // 2
    column = offs_n // channels - HALF
    left = (column + FACTOR) // FACTOR - 1
    t = tl.div_rn((2 * (column - left * FACTOR + HALF) + 1 - FACTOR).to(tl.float32), 2.0 * FACTOR)
    w0, w1, w2, w3 = _cubic_weights(t, A)
    if PILLOW:
        w0, w1, w2, w3, across = _inside(w0, w1, w2, w3, left, width)
    # Elements past the end of the row read the last column: no load needs a mask.
    c0 = tl.minimum(tl.maximum(left - 1, 0), width - 1) * column_stride
    c1 = tl.minimum(tl.maximum(left, 0), width - 1) * column_stride
    c2 = tl.minimum(left + 1, width - 1) * column_stride
    c3 = tl.minimum(left + 2, width - 1) * column_stride
    x += sample * sample_stride + (offs_n % channels).to(tl.int64) * channel_stride
    out += sample * height * FACTOR * length
    if base is not None:
        base += sample * base_sample_stride + (offs_n % channels).to(tl.int64) * base_channel_stride
        base += (offs_n // channels).to(tl.int64) * base_column_stride

    top = tl.program_id(0) // blocks * BLOCK_M - 1
    above = _interpolate_row(x, top - 1, height, row_stride, c0, c1, c2, c3, w0, w1, w2, w3)
    upper = _interpolate_row(x, top, height, row_stride, c0, c1, c2, c3, w0, w1, w2, w3)
    lower = _interpolate_row(x, top + 1, height, row_stride, c0, c1, c2, c3, w0, w1, w2, w3)
    for step in range(BLOCK_M):
        below = _interpolate_row(x, top + step + 2, height, row_stride, c0, c1, c2, c3, w0, w1, w2, w3)
        for k in tl.static_range(FACTOR):
            v0, v1, v2, v3 = _cubic_weights(tl.full((), (2 * (HALF + k) + 1 - FACTOR) / (2 * FACTOR), tl.float32), A)
            if PILLOW:
                v0, v1, v2, v3, down = _inside(v0, v1, v2, v3, top + step, height)
            y = (top + step) * FACTOR + HALF + k
            v = above * v0 + upper * v1 + lower * v2 + below * v3
            if PILLOW:
                # Once per element, within 2 ulp: an exact division is a call, and registers spill around it.
                v = v / (across * down)
            mask = (offs_n < length) & (y >= 0) & (y < height * FACTOR)
            v = v * mul + add
            if CLAMP:
                v = unit_range(v)
            if base is not None:
                other = tl.load(base + y.to(tl.int64) * base_row_stride, mask=mask, other=0.0).to(tl.float32)
                v = unit_range(v) - unit_range(other)
            tl.store(out + y.to(tl.int64) * length + offs_n, round_to(v, out.dtype.element_ty), mask=mask)
        above = upper
        upper = lower
        lower = below
