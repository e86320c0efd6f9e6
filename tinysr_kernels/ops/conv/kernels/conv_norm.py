"""The kernels that normalise a convolution's result in the launch that finishes or follows it.

`merge`: behind a shared reduction (conv3x3_kernel), a program per sample and group adds the partial sums of the group's
channels, finishes them, takes their statistics and stores both the result and what GroupNorm makes of it.
`apply`: behind a convolution that has left the moments of its tiles, group by group: a program puts together those of
its groups and normalises its share of the pixels. Few tiles it merges itself; many are merged before, by
`moments_kernel.merge`.

Statistics are (mean, sum of squared deviations), never sums of squares; every sum has a fixed order.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, epilogue, round_to
from tinysr_kernels.ops.norm.kernels.group_norm import follow, image_tile, normalise, rstd_of


@jit
def _finished(  # type: ignore[no-untyped-def]
    scratch_parts,
    bias,
    residual,
    skip,
    out,
    start,  # int64, the tile's first pixel, of all samples
    part_size,  # int64, elements of a part
    lane,  # [PIXELS] counted from start
    chan,  # [CHANNELS] of the concatenation
    known,  # [PIXELS,CHANNELS] what there is
    RESULTS: tl.constexpr,
    SECOND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
):
    """concat(out, skip)[start + lane, chan] as float32, zero where it is not known; out's share is stored."""
    front = chan < RESULTS
    mine = known & front[None, :]
    at = lane[:, None] * RESULTS + chan[None, :]
    acc = tl.full(known.shape, 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        acc += tl.load(scratch_parts + (part * part_size + start * RESULTS) + at, mask=mine, other=0.0)
    beta = tl.full(chan.shape, 0.0, tl.float32)
    if bias is not None:
        beta = tl.load(bias + chan, mask=front, other=0.0).to(tl.float32)
    v = epilogue(acc, beta[None, :], residual, out, start * RESULTS, at, mine, ACTIVATION, ACTIVATE_RESIDUAL)
    v = v.to(tl.float32)
    if skip is not None:
        at = lane[:, None] * SECOND + (chan[None, :] - RESULTS)
        other = known & (chan[None, :] >= RESULTS)
        v += tl.load(skip + start * SECOND + at, mask=other, other=0.0).to(tl.float32)
    return v


@jit
def merge(  # type: ignore[no-untyped-def]
    scratch_parts,  # [PARTS,N,pixels,RESULTS] float32
    bias,  # [RESULTS] or None
    residual,  # [N,pixels,RESULTS] or None
    skip,  # [N,pixels,SECOND] or None, behind the result in the groups
    gain,  # [RESULTS+SECOND]
    shift,  # [RESULTS+SECOND]
    out,  # [N,pixels,RESULTS]
    normed,  # [N,pixels,RESULTS+SECOND]
    eps,
    pixels,
    RESULTS: tl.constexpr,
    SECOND: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # at least WIDTH
    WHOLE: tl.constexpr,  # whether a tile of PIXELS is the whole image
):
    """Grid: groups, samples."""
    await_inputs()
    lane = tl.arange(0, PIXELS)
    inner = tl.arange(0, CHANNELS)
    chan = tl.program_id(0) * WIDTH + inner
    sample = tl.program_id(1).to(tl.int64) * pixels
    part_size = tl.num_programs(1).to(tl.int64) * pixels * RESULTS
    v = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    mean = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    squares = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    steps = tl.cdiv(pixels, PIXELS)
    for step in range(steps):
        known = (step * PIXELS + lane < pixels)[:, None] & (inner < WIDTH)[None, :]
        v = _finished(
            scratch_parts,
            bias,
            residual,
            skip,
            out,
            sample + step * PIXELS,
            part_size,
            lane,
            chan,
            known,
            RESULTS,
            SECOND,
            ACTIVATION,
            ACTIVATE_RESIDUAL,
            PARTS,
        )
        number = lane * 0 + step
        mean, squares = follow(v, known, number[:, None], mean, squares)
    # Lanes have seen steps values, or one less behind the end of the image.
    seen = tl.where(inner < WIDTH, 1.0, 0.0)[None, :] * ((pixels - lane + PIXELS - 1) // PIXELS).to(tl.float32)[:, None]
    total = pixels.to(tl.float32) * WIDTH
    center = tl.sum(tl.sum(mean * seen, 1), 0) / total
    deviation = mean - center
    rstd = rstd_of(tl.sum(tl.sum(squares + seen * deviation * deviation, 1), 0) / total, eps)
    gamma = tl.load(gain + chan, mask=inner < WIDTH, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(shift + chan, mask=inner < WIDTH, other=0.0).to(tl.float32)[None, :]
    if not WHOLE:
        # What follows reads what other threads have stored in `out`.
        tl.debug_barrier()
    for step in range(steps):
        known = (step * PIXELS + lane < pixels)[:, None] & (inner < WIDTH)[None, :]
        start = sample + step * PIXELS
        if not WHOLE:
            v = image_tile(out, skip, start, lane, chan, known, RESULTS, SECOND)
        y = normalise(v, center, rstd, gamma, beta, SILU)
        at = lane[:, None] * (RESULTS + SECOND) + chan[None, :]
        tl.store(normed + start * (RESULTS + SECOND) + at, round_to(y, normed.dtype.element_ty), mask=known)


@jit
def apply(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,RESULTS]
    scratch_moments,  # [N,3,groups,parts] float32: pixels, mean, squares; MERGED: [N,2,groups], mean and variance
    gain,  # [RESULTS]
    shift,  # [RESULTS]
    normed,  # [N,pixels,RESULTS]
    eps,
    pixels,
    parts,
    chunk,  # pixels of a program
    RESULTS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group, divides CHANNELS
    MERGED: tl.constexpr,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,  # of a step
    PIXELS: tl.constexpr,  # of a step
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: chunks of pixels, blocks of channels, samples."""
    await_inputs()
    GROUPS: tl.constexpr = CHANNELS // WIDTH
    groups = RESULTS // WIDTH
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    there = group < groups
    sample = tl.program_id(2).to(tl.int64)
    if MERGED:
        at = scratch_moments + sample * 2 * groups + group
        center = tl.load(at, mask=there, other=0.0)
        variance = tl.load(at + groups, mask=there, other=0.0)
    else:
        at = scratch_moments + sample * 3 * groups * parts + group[:, None] * parts
        lane = tl.arange(0, PARTS)[None, :]
        row = groups * parts
        # Means are counted from the first one: what is then rounded is small.
        first = tl.load(at + row, mask=there[:, None], other=0.0)
        total = tl.full((GROUPS, PARTS), 0.0, tl.float32)
        weighted = tl.full((GROUPS, PARTS), 0.0, tl.float32)
        for start in range(0, parts, PARTS):
            known = there[:, None] & (start + lane < parts)
            count = tl.load(at + (start + lane), mask=known, other=0.0)
            total += count
            weighted += count * (tl.load(at + (row + start + lane), mask=known, other=0.0) - first)
        elements = tl.maximum(tl.sum(total, 1), 1.0)
        center = tl.sum(first, 1) + tl.sum(weighted, 1) / elements
        squares = tl.full((GROUPS, PARTS), 0.0, tl.float32)
        for start in range(0, parts, PARTS):
            known = there[:, None] & (start + lane < parts)
            count = tl.load(at + (start + lane), mask=known, other=0.0)
            deviation = tl.load(at + (row + start + lane), mask=known, other=0.0) - center[:, None]
            within = tl.load(at + (2 * row + start + lane), mask=known, other=0.0)
            squares += within + count * deviation * deviation
        variance = tl.sum(squares, 1) / elements
    # Each channel's share of its group: sums of one number and zeros.
    inner = tl.arange(0, CHANNELS)
    own = (inner // WIDTH)[:, None] == tl.arange(0, GROUPS)[None, :]
    center = tl.sum(tl.where(own, center[None, :], 0.0), 1)[None, :]
    rstd = tl.sum(tl.where(own, rstd_of(variance, eps)[None, :], 0.0), 1)[None, :]
    chan = tl.program_id(1) * CHANNELS + inner
    gamma = tl.load(gain + chan, mask=chan < RESULTS, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(shift + chan, mask=chan < RESULTS, other=0.0).to(tl.float32)[None, :]
    pixel = tl.arange(0, PIXELS)
    begin = tl.program_id(0) * chunk
    count = tl.minimum(chunk, pixels - begin)
    base = (sample * pixels + begin) * RESULTS
    for step in tl.range(0, tl.cdiv(count, PIXELS), num_stages=STAGES):
        known = (step * PIXELS + pixel < count)[:, None] & (chan < RESULTS)[None, :]
        place = base + step * PIXELS * RESULTS + (pixel[:, None] * RESULTS + chan[None, :])
        v = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
        y = normalise(v, center, rstd, gamma, beta, SILU)
        tl.store(normed + place, round_to(y, normed.dtype.element_ty), mask=known)
