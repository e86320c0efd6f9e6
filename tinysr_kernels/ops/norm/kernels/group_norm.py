"""The kernels of group_norm, in three forms. Statistics are (mean, sum of squared deviations), never sums of squares.

`single`: one launch, a program per sample and group, which reads its group twice; for groups that a cache holds.
`moments`, `merge`, `apply`: three launches. The image is split into chunks, whatever the batch; a program takes the
moments of every channel of its chunk, the second kernel merges them by Chan's rule into those of each group, the third
normalises. No atomics: the order of every sum is fixed, so results repeat bit for bit.
`given`: one launch, where the producers have left every channel's moments; a program puts those of its groups together.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import activate, await_inputs, round_to


@jit
def image_tile(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,first_depth]
    skip,  # [N,pixels,second_depth] or None
    start,  # int64, a pixel of all samples
    lane,  # [PIXELS] counted from there
    chan,  # [CHANNELS] of the concatenation
    known,  # [PIXELS,CHANNELS] what there is
    first_depth,
    second_depth,
):
    """concat(x, skip)[start + lane, chan] as float32, zero where it is not known."""
    if skip is None:
        at = x + start * first_depth + (lane[:, None] * first_depth + chan[None, :])
        v = tl.load(at, mask=known, other=0.0).to(tl.float32)
    else:
        front = chan[None, :] < first_depth
        at = x + start * first_depth + (lane[:, None] * first_depth + chan[None, :])
        v = tl.load(at, mask=known & front, other=0.0).to(tl.float32)
        at = skip + start * second_depth + (lane[:, None] * second_depth + (chan[None, :] - first_depth))
        v += tl.load(at, mask=known & (chan[None, :] >= first_depth), other=0.0).to(tl.float32)
    return v


@jit
def follow(v, known, step, mean, squares):  # type: ignore[no-untyped-def]
    """Welford's update of each lane's mean and squared deviations by its value number step + 1, if known."""
    delta = tl.where(known, v - mean, 0.0)
    mean += delta / (step + 1).to(tl.float32)
    squares += delta * tl.where(known, v - mean, 0.0)
    return mean, squares


@jit
def rstd_of(variance, eps):  # type: ignore[no-untyped-def]
    """1 / sqrt(variance + eps), correctly rounded: it multiplies every element."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@jit
def normalise(v, mean, rstd, weight, bias, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """GroupNorm's map of a float32 tile, with SiLU where wanted; everything else broadcasts."""
    y = (v - mean) * rstd * weight + bias
    if SILU:
        y = activate(y, "silu")
    return y


@jit
def single(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,first_depth]
    skip,  # [N,pixels,second_depth] or None
    weight,  # [channels]
    bias,  # [channels]
    out,  # [N,pixels,channels]
    eps,
    pixels,
    channels,
    first_depth,
    second_depth,
    width,  # channels of a group
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # at least width
):
    """Grid: groups, samples."""
    await_inputs()
    lane = tl.arange(0, PIXELS)
    inner = tl.arange(0, CHANNELS)
    chan = tl.program_id(0) * width + inner
    sample = tl.program_id(1).to(tl.int64) * pixels
    mean = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    squares = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    steps = tl.cdiv(pixels, PIXELS)
    for step in range(steps):
        first = lane * 0 + step
        known = (step * PIXELS + lane < pixels)[:, None] & (inner < width)[None, :]
        v = image_tile(x, skip, sample + step * PIXELS, lane, chan, known, first_depth, second_depth)
        mean, squares = follow(v, known, first[:, None], mean, squares)
    # Lanes have seen steps values, or one less behind the end of the image.
    seen = tl.where(inner < width, 1.0, 0.0)[None, :] * ((pixels - lane + PIXELS - 1) // PIXELS).to(tl.float32)[:, None]
    total = pixels.to(tl.float32) * width
    center = tl.sum(tl.sum(mean * seen, 1), 0) / total
    deviation = mean - center
    variance = tl.sum(tl.sum(squares + seen * deviation * deviation, 1), 0) / total
    rstd = rstd_of(variance, eps)
    gamma = tl.load(weight + chan, mask=inner < width, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + chan, mask=inner < width, other=0.0).to(tl.float32)[None, :]
    for step in range(steps):
        known = (step * PIXELS + lane < pixels)[:, None] & (inner < width)[None, :]
        start = sample + step * PIXELS
        v = image_tile(x, skip, start, lane, chan, known, first_depth, second_depth)
        y = normalise(v, center, rstd, gamma, beta, SILU)
        at = out + start * channels + (lane[:, None] * channels + chan[None, :])
        tl.store(at, round_to(y, out.dtype.element_ty), mask=known)


@jit
def moments(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,first_depth]
    skip,  # [N,pixels,second_depth] or None
    scratch_mean,  # [N,chunks,channels] float32
    scratch_squares,  # [N,chunks,channels] float32
    pixels,
    channels,
    first_depth,
    second_depth,
    chunk,  # pixels of a chunk
    chunks,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: chunks, blocks of channels, samples."""
    await_inputs()
    lane = tl.arange(0, PIXELS)
    chan = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(0) * chunk
    count = tl.minimum(chunk, pixels - begin)
    sample = tl.program_id(2).to(tl.int64)
    mean = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    squares = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    for step in tl.range(0, tl.cdiv(count, PIXELS), num_stages=STAGES):
        number = lane * 0 + step
        known = (step * PIXELS + lane < count)[:, None] & (chan < channels)[None, :]
        v = image_tile(x, skip, sample * pixels + begin + step * PIXELS, lane, chan, known, first_depth, second_depth)
        mean, squares = follow(v, known, number[:, None], mean, squares)
    seen = ((count - lane + PIXELS - 1) // PIXELS).to(tl.float32)[:, None]
    center = tl.sum(mean * seen, 0) / count.to(tl.float32)
    deviation = mean - center[None, :]
    squares = tl.sum(squares + seen * deviation * deviation, 0)
    at = (sample * chunks + tl.program_id(0)) * channels + chan
    tl.store(scratch_mean + at, center, mask=chan < channels)
    tl.store(scratch_squares + at, squares, mask=chan < channels)


@jit
def merge(  # type: ignore[no-untyped-def]
    scratch_mean,  # [N,chunks,channels] float32
    scratch_squares,  # [N,chunks,channels] float32
    scratch_center,  # [N,groups] float32
    scratch_rstd,  # [N,groups] float32
    eps,
    pixels,
    channels,
    width,  # channels of a group
    chunk,  # pixels of a chunk
    chunks,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,  # at least width
):
    """Grid: groups, samples."""
    await_inputs()
    inner = tl.arange(0, CHANNELS)
    chan = tl.program_id(0) * width + inner
    sample = tl.program_id(1).to(tl.int64)
    total = pixels.to(tl.float32) * width
    center = tl.full((CHUNKS, CHANNELS), 0.0, tl.float32)
    for start in range(0, chunks, CHUNKS):
        number = start + tl.arange(0, CHUNKS)
        known = (number < chunks)[:, None] & (inner < width)[None, :]
        count = tl.minimum(chunk, pixels - number * chunk).to(tl.float32)[:, None]
        at = sample * chunks * channels + (number[:, None] * channels + chan[None, :])
        center += tl.load(scratch_mean + at, mask=known, other=0.0) * (count / total)
    center = tl.sum(tl.sum(center, 1), 0)
    squares = tl.full((CHUNKS, CHANNELS), 0.0, tl.float32)
    for start in range(0, chunks, CHUNKS):
        number = start + tl.arange(0, CHUNKS)
        known = (number < chunks)[:, None] & (inner < width)[None, :]
        count = tl.minimum(chunk, pixels - number * chunk).to(tl.float32)[:, None]
        at = sample * chunks * channels + (number[:, None] * channels + chan[None, :])
        deviation = tl.load(scratch_mean + at, mask=known, other=0.0) - center
        within = tl.load(scratch_squares + at, mask=known, other=0.0)
        squares += tl.where(known, within + count * deviation * deviation, 0.0)
    variance = tl.sum(tl.sum(squares, 1), 0) / total
    at = sample * (channels // width) + tl.program_id(0)
    tl.store(scratch_center + at, center)
    tl.store(scratch_rstd + at, rstd_of(variance, eps))


@jit
def apply(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,first_depth]
    skip,  # [N,pixels,second_depth] or None
    weight,  # [channels]
    bias,  # [channels]
    scratch_center,  # [N,groups] float32
    scratch_rstd,  # [N,groups] float32
    out,  # [N,pixels,channels]
    pixels,
    channels,
    first_depth,
    second_depth,
    width,  # channels of a group
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid: blocks of pixels, blocks of channels, samples."""
    await_inputs()
    lane = tl.arange(0, PIXELS)
    chan = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(0).to(tl.int64) * PIXELS
    sample = tl.program_id(2).to(tl.int64)
    there = chan < channels
    known = (begin + lane < pixels)[:, None] & there[None, :]
    start = sample * pixels + begin
    v = image_tile(x, skip, start, lane, chan, known, first_depth, second_depth)
    group = sample * (channels // width) + chan // width
    center = tl.load(scratch_center + group, mask=there, other=0.0)[None, :]
    rstd = tl.load(scratch_rstd + group, mask=there, other=0.0)[None, :]
    gamma = tl.load(weight + chan, mask=there, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + chan, mask=there, other=0.0).to(tl.float32)[None, :]
    y = normalise(v, center, rstd, gamma, beta, SILU)
    at = out + start * channels + (lane[:, None] * channels + chan[None, :])
    tl.store(at, round_to(y, out.dtype.element_ty), mask=known)


@jit
def _moment(moments, skip_moments, which, sample, chan, there, first_depth, second_depth):  # type: ignore[no-untyped-def]
    """Means (which = 0) or variances (1) of channels of the concatenation, zero where there are none."""
    at = moments + (sample * 2 + which) * first_depth + chan
    if skip_moments is None:
        v = tl.load(at, mask=there, other=0.0).to(tl.float32)
    else:
        front = chan < first_depth
        v = tl.load(at, mask=there & front, other=0.0).to(tl.float32)
        at = skip_moments + (sample * 2 + which) * second_depth + (chan - first_depth)
        v += tl.load(at, mask=there & (chan >= first_depth), other=0.0).to(tl.float32)
    return v


@jit
def given(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,first_depth]
    skip,  # [N,pixels,second_depth] or None
    weight,  # [channels]
    bias,  # [channels]
    moments,  # [N,2,first_depth]
    skip_moments,  # [N,2,second_depth] or None
    out,  # [N,pixels,channels]
    eps,
    pixels,
    channels,
    first_depth,
    second_depth,
    width,  # channels of a group
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,  # at least width
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid: blocks of pixels, blocks of channels, samples."""
    await_inputs()
    lane = tl.arange(0, PIXELS)
    chan = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(0).to(tl.int64) * PIXELS
    sample = tl.program_id(2).to(tl.int64)
    there = chan < channels
    known = (begin + lane < pixels)[:, None] & there[None, :]
    start = sample * pixels + begin
    v = image_tile(x, skip, start, lane, chan, known, first_depth, second_depth)
    # All channels of the group that each channel belongs to; every channel has equally many pixels.
    inner = tl.arange(0, WIDTH)
    member = (chan // width * width)[:, None] + inner[None, :]
    counts = there[:, None] & (inner < width)[None, :]
    mean = _moment(moments, skip_moments, 0, sample, member, counts, first_depth, second_depth)
    variance = _moment(moments, skip_moments, 1, sample, member, counts, first_depth, second_depth)
    center = tl.sum(mean, 1) / width
    deviation = tl.where(counts, mean - center[:, None], 0.0)
    rstd = rstd_of(tl.sum(variance + deviation * deviation, 1) / width, eps)
    gamma = tl.load(weight + chan, mask=there, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + chan, mask=there, other=0.0).to(tl.float32)[None, :]
    y = normalise(v, center[None, :], rstd[None, :], gamma, beta, SILU)
    at = out + start * channels + (lane[:, None] * channels + chan[None, :])
    tl.store(at, round_to(y, out.dtype.element_ty), mask=known)
