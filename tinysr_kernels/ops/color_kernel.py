"""The kernels of affine_clamp and wavelet_fix, on images whose channels lie side by side: lanes are single numbers.

`affine`: one pass. `blur`: a pass for each level of the chain, both axes at once: nine numbers around each. The first
level takes the difference of the two images as it reads them, the last adds the image and clamps. Statistics are taken
by moments_kernel.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.tiles import rounded, unit_range


@jit
def affine(  # type: ignore[no-untyped-def]
    x,  # [N,numbers]
    gain,  # [N,channels]
    offset,  # [N,channels]
    out,  # [N,numbers]
    numbers,  # of a sample
    channels,
    LANES: tl.constexpr,
):
    """Grid: blocks of LANES numbers, samples."""
    begin = tl.program_id(0).to(tl.int64) * LANES
    sample = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, LANES)
    known = begin + lane < numbers
    chan = ((begin + lane) % channels).to(tl.int32)
    g = tl.load(gain + sample * channels + chan).to(tl.float32)
    b = tl.load(offset + sample * channels + chan).to(tl.float32)
    at = sample * numbers + begin + lane
    v = tl.load(x + at, mask=known, other=0.0).to(tl.float32) * g + b
    tl.store(out + at, rounded(unit_range(v), out.dtype.element_ty), mask=known)


@jit
def _low(x, style, low, at):  # type: ignore[no-untyped-def]
    """The band to blur: style - x on the first level, then what the last level left."""
    if low is None:
        v = tl.load(style + at).to(tl.float32) - tl.load(x + at).to(tl.float32)
    else:
        v = tl.load(low + at)
    return v


@jit
def blur(  # type: ignore[no-untyped-def]
    x,  # [N,height,width*channels]
    style,  # like x
    low,  # like x, float32, or None on the first level
    out,  # like x: float32, or on the last level the result
    height,
    width,
    channels,
    DILATION: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid: blocks of LANES numbers of a row, rows, samples. The border is repeated on every level."""
    length = width * channels
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    y = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64) * height
    # Lanes behind the row's end read its last number; they store nothing.
    column = tl.minimum(lane, length - 1)
    chan = column % channels
    left = tl.maximum(column - DILATION * channels, chan)
    right = tl.minimum(column + DILATION * channels, length - channels + chan)
    total = tl.full((LANES,), 0.0, tl.float32)
    for step in tl.static_range(-1, 2):
        row = (sample + tl.minimum(tl.maximum(y + step * DILATION, 0), height - 1)) * length
        middle = _low(x, style, low, row + column)
        sides = _low(x, style, low, row + left) + _low(x, style, low, row + right)
        total += (0.5 * middle + 0.25 * sides) * (0.5 - 0.25 * step * step)
    at = (sample + y) * length + lane
    known = lane < length
    if LAST:
        total = unit_range(total + tl.load(x + at, mask=known, other=0.0).to(tl.float32))
        total = rounded(total, out.dtype.element_ty)
    tl.store(out + at, total, mask=known)
