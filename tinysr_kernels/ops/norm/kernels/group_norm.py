"""The kernels of group_norm, in three forms. Statistics are (mean, sum of squared deviations), never sums of squares.

`single`: one launch, one program per sample and group, which reads its group twice; for groups that a cache holds.
`chunk_moments`, `merge_chunks`, `apply`: three launches. The image is split into chunks, independently of the batch
size. A program computes the statistics of each channel of its chunk, the second kernel merges them per group by Chan's
rule, the third normalizes. No atomics: the order of every sum is fixed, so results repeat bit for bit.
`from_moments`: one launch that consumes the per-channel statistics of the input's producers; each program merges those
of its own groups.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import activate, await_inputs, round_to


@jit
def image_tile(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,x_channels]
    skip,  # [N,pixels,skip_channels] or None
    start,  # int64, the tile's first pixel, counted over all samples
    row,  # [BLOCK_M], pixels relative to start
    chan,  # [BLOCK_N], channels of the concatenation
    mask,  # [BLOCK_M,BLOCK_N], which elements exist
    x_channels,
    skip_channels,
):
    """concat(x, skip)[start + row, chan] as float32 [BLOCK_M,BLOCK_N], zero where masked out."""
    if skip is None:
        at = x + start * x_channels + (row[:, None] * x_channels + chan[None, :])
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        front = chan[None, :] < x_channels
        at = x + start * x_channels + (row[:, None] * x_channels + chan[None, :])
        v = tl.load(at, mask=mask & front, other=0.0).to(tl.float32)
        at = skip + start * skip_channels + (row[:, None] * skip_channels + (chan[None, :] - x_channels))
        v += tl.load(at, mask=mask & (chan[None, :] >= x_channels), other=0.0).to(tl.float32)
    return v


@jit
def welford_update(v, mask, step, mean, squares):  # type: ignore[no-untyped-def]
    """Welford's update of running means and squared deviations, per element of the tile, by value number step + 1."""
    delta = tl.where(mask, v - mean, 0.0)
    mean += delta / (step + 1).to(tl.float32)
    squares += delta * tl.where(mask, v - mean, 0.0)
    return mean, squares


@jit
def rstd_of(variance, eps):  # type: ignore[no-untyped-def]
    """1 / sqrt(variance + eps), correctly rounded: it scales every element."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@jit
def normalize(v, mean, rstd, weight, bias, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The normalization and affine map of a float32 tile, then SiLU if SILU; the other arguments broadcast."""
    y = (v - mean) * rstd * weight + bias
    if SILU:
        y = activate(y, "silu")
    return y


@jit
def single(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,x_channels]
    skip,  # [N,pixels,skip_channels] or None
    weight,  # [channels]
    bias,  # [channels]
    out,  # [N,pixels,channels]
    eps,
    pixels: extent,
    channels,
    x_channels,
    skip_channels,
    group_size,  # channels per group
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least group_size
):
    """Grid: groups, samples."""
    await_inputs()
    row = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_N)
    chan = tl.program_id(0) * group_size + inner
    sample = tl.program_id(1).to(tl.int64) * pixels
    mean = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    squares = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    steps = tl.cdiv(pixels, BLOCK_M)
    for step in range(steps):
        first = row * 0 + step
        mask = (step * BLOCK_M + row < pixels)[:, None] & (inner < group_size)[None, :]
        v = image_tile(x, skip, sample + step * BLOCK_M, row, chan, mask, x_channels, skip_channels)
        mean, squares = welford_update(v, mask, first[:, None], mean, squares)
    # Each tile row has seen `steps` values, or one less where the last step is past the end of the image.
    counted = tl.where(inner < group_size, 1.0, 0.0)[None, :]
    seen = counted * ((pixels - row + BLOCK_M - 1) // BLOCK_M).to(tl.float32)[:, None]
    total = tl.cast(pixels, tl.float32) * group_size
    center = tl.sum(tl.sum(mean * seen, 1), 0) / total
    deviation = mean - center
    variance = tl.sum(tl.sum(squares + seen * deviation * deviation, 1), 0) / total
    rstd = rstd_of(variance, eps)
    gamma = tl.load(weight + chan, mask=inner < group_size, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + chan, mask=inner < group_size, other=0.0).to(tl.float32)[None, :]
    for step in range(steps):
        mask = (step * BLOCK_M + row < pixels)[:, None] & (inner < group_size)[None, :]
        start = sample + step * BLOCK_M
        v = image_tile(x, skip, start, row, chan, mask, x_channels, skip_channels)
        y = normalize(v, center, rstd, gamma, beta, SILU)
        at = out + start * channels + (row[:, None] * channels + chan[None, :])
        tl.store(at, round_to(y, out.dtype.element_ty), mask=mask)


@jit
def chunk_moments(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,x_channels]
    skip,  # [N,pixels,skip_channels] or None
    scratch_mean,  # [N,chunks,channels] float32
    scratch_squares,  # [N,chunks,channels] float32
    pixels: extent,
    channels,
    x_channels,
    skip_channels,
    chunk_pixels: extent,  # pixels per chunk
    chunks: extent,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: chunks, blocks of BLOCK_N channels, samples."""
    await_inputs()
    row = tl.arange(0, BLOCK_M)
    chan = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(0) * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - begin)
    sample = tl.program_id(2).to(tl.int64)
    mean = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    squares = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in tl.range(0, tl.cdiv(count, BLOCK_M), num_stages=NUM_STAGES):
        number = row * 0 + step
        mask = (step * BLOCK_M + row < count)[:, None] & (chan < channels)[None, :]
        v = image_tile(x, skip, sample * pixels + begin + step * BLOCK_M, row, chan, mask, x_channels, skip_channels)
        mean, squares = welford_update(v, mask, number[:, None], mean, squares)
    seen = ((count - row + BLOCK_M - 1) // BLOCK_M).to(tl.float32)[:, None]
    center = tl.sum(mean * seen, 0) / count.to(tl.float32)
    deviation = mean - center[None, :]
    squares = tl.sum(squares + seen * deviation * deviation, 0)
    at = (sample * chunks + tl.program_id(0)) * channels + chan
    tl.store(scratch_mean + at, center, mask=chan < channels)
    tl.store(scratch_squares + at, squares, mask=chan < channels)


@jit
def merge_chunks(  # type: ignore[no-untyped-def]
    scratch_mean,  # [N,chunks,channels] float32
    scratch_squares,  # [N,chunks,channels] float32
    scratch_center,  # [N,groups] float32
    scratch_rstd,  # [N,groups] float32
    eps,
    pixels: extent,
    channels,
    group_size: extent,  # channels per group
    chunk_pixels: extent,  # pixels per chunk
    chunks: extent,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least group_size
):
    """Grid: groups, samples."""
    await_inputs()
    inner = tl.arange(0, BLOCK_N)
    chan = tl.program_id(0) * group_size + inner
    sample = tl.program_id(1).to(tl.int64)
    total = tl.cast(pixels, tl.float32) * group_size
    center = tl.full((BLOCK_CHUNKS, BLOCK_N), 0.0, tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        number = start + tl.arange(0, BLOCK_CHUNKS)
        mask = (number < chunks)[:, None] & (inner < group_size)[None, :]
        count = tl.minimum(chunk_pixels, pixels - number * chunk_pixels).to(tl.float32)[:, None]
        at = sample * chunks * channels + (number[:, None] * channels + chan[None, :])
        center += tl.load(scratch_mean + at, mask=mask, other=0.0) * (count / total)
    center = tl.sum(tl.sum(center, 1), 0)
    squares = tl.full((BLOCK_CHUNKS, BLOCK_N), 0.0, tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        number = start + tl.arange(0, BLOCK_CHUNKS)
        mask = (number < chunks)[:, None] & (inner < group_size)[None, :]
        count = tl.minimum(chunk_pixels, pixels - number * chunk_pixels).to(tl.float32)[:, None]
        at = sample * chunks * channels + (number[:, None] * channels + chan[None, :])
        deviation = tl.load(scratch_mean + at, mask=mask, other=0.0) - center
        within = tl.load(scratch_squares + at, mask=mask, other=0.0)
        squares += tl.where(mask, within + count * deviation * deviation, 0.0)
    variance = tl.sum(tl.sum(squares, 1), 0) / total
    at = sample * (channels // group_size) + tl.program_id(0)
    tl.store(scratch_center + at, center)
    tl.store(scratch_rstd + at, rstd_of(variance, eps))


@jit
def apply(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,x_channels]
    skip,  # [N,pixels,skip_channels] or None
    weight,  # [channels]
    bias,  # [channels]
    scratch_center,  # [N,groups] float32
    scratch_rstd,  # [N,groups] float32
    out,  # [N,pixels,channels]
    pixels: extent,
    channels,
    x_channels,
    skip_channels,
    group_size: extent,  # channels per group
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of BLOCK_M pixels, blocks of BLOCK_N channels, samples."""
    await_inputs()
    row = tl.arange(0, BLOCK_M)
    chan = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_M
    sample = tl.program_id(2).to(tl.int64)
    inside = chan < channels
    mask = (begin + row < pixels)[:, None] & inside[None, :]
    start = sample * pixels + begin
    v = image_tile(x, skip, start, row, chan, mask, x_channels, skip_channels)
    group = sample * (channels // group_size) + chan // group_size
    center = tl.load(scratch_center + group, mask=inside, other=0.0)[None, :]
    rstd = tl.load(scratch_rstd + group, mask=inside, other=0.0)[None, :]
    gamma = tl.load(weight + chan, mask=inside, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + chan, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = normalize(v, center, rstd, gamma, beta, SILU)
    at = out + start * channels + (row[:, None] * channels + chan[None, :])
    tl.store(at, round_to(y, out.dtype.element_ty), mask=mask)


@jit
def _moment(moments, skip_moments, which, sample, chan, inside, x_channels, skip_channels):  # type: ignore[no-untyped-def]
    """Means (which = 0) or variances (1) of channels of the concatenation as float32, zero where not inside."""
    at = moments + (sample * 2 + which) * x_channels + chan
    if skip_moments is None:
        v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        front = chan < x_channels
        v = tl.load(at, mask=inside & front, other=0.0).to(tl.float32)
        at = skip_moments + (sample * 2 + which) * skip_channels + (chan - x_channels)
        v += tl.load(at, mask=inside & (chan >= x_channels), other=0.0).to(tl.float32)
    return v


@jit
def from_moments(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,x_channels]
    skip,  # [N,pixels,skip_channels] or None
    weight,  # [channels]
    bias,  # [channels]
    moments,  # [N,2,x_channels]
    skip_moments,  # [N,2,skip_channels] or None
    out,  # [N,pixels,channels]
    eps,
    pixels: extent,
    channels,
    x_channels,
    skip_channels,
    group_size: extent,  # channels per group
    SILU: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # at least group_size
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of BLOCK_M pixels, blocks of BLOCK_N channels, samples."""
    await_inputs()
    row = tl.arange(0, BLOCK_M)
    chan = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_M
    sample = tl.program_id(2).to(tl.int64)
    inside = chan < channels
    mask = (begin + row < pixels)[:, None] & inside[None, :]
    start = sample * pixels + begin
    v = image_tile(x, skip, start, row, chan, mask, x_channels, skip_channels)
    # All channels of each channel's group [BLOCK_N,GROUP_BLOCK]; every channel has the same number of pixels.
    inner = tl.arange(0, GROUP_BLOCK)
    member = (chan // group_size * group_size)[:, None] + inner[None, :]
    counts = inside[:, None] & (inner < group_size)[None, :]
    mean = _moment(moments, skip_moments, 0, sample, member, counts, x_channels, skip_channels)
    variance = _moment(moments, skip_moments, 1, sample, member, counts, x_channels, skip_channels)
    center = tl.sum(mean, 1) / group_size
    deviation = tl.where(counts, mean - center[:, None], 0.0)
    rstd = rstd_of(tl.sum(variance + deviation * deviation, 1) / group_size, eps)
    gamma = tl.load(weight + chan, mask=inside, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + chan, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = normalize(v, center[None, :], rstd[None, :], gamma, beta, SILU)
    at = out + start * channels + (row[:, None] * channels + chan[None, :])
    tl.store(at, round_to(y, out.dtype.element_ty), mask=mask)
