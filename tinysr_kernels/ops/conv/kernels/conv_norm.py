"""The kernels that normalize a convolution's result in the launch that completes or follows it.

`merge_splits_norm`: after a split-K convolution (conv3x3_kernel), one program per sample and group adds the partial
sums of the group's channels, applies the epilogue, computes their statistics and stores the result and its GroupNorm.
`apply`: after a convolution that stored the statistics of its tiles per group, a program merges those of its groups and
normalizes its chunk of the pixels. Many tiles are merged before, by `moments_kernel.merge`.

Statistics are (mean, sum of squared deviations), never sums of squares; every sum has a fixed order.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import activate, await_inputs, epilogue, round_to
from tinysr_kernels.ops.norm.kernels.group_norm import image_tile, normalize, rstd_of, welford_update


@jit
def _result_tile(  # type: ignore[no-untyped-def]
    scratch_partials,
    bias,
    residual,
    skip,
    out,
    start,  # int64, the tile's first pixel, counted over all samples
    split_size,  # int64, elements per split
    lane,  # [BLOCK_M], pixels relative to start
    chan,  # [BLOCK_N], channels of the concatenation
    known,  # [BLOCK_M,BLOCK_N], the mask
    OUT_CHANNELS: tl.constexpr,
    SKIP_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """concat(out, skip)[start + lane, chan] as float32, zero where masked out; stores out's part of it."""
    front = chan < OUT_CHANNELS
    mine = known & front[None, :]
    at = lane[:, None] * OUT_CHANNELS + chan[None, :]
    acc = tl.full(known.shape, 0.0, tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(scratch_partials + (split * split_size + start * OUT_CHANNELS) + at, mask=mine, other=0.0)
    beta = tl.full(chan.shape, 0.0, tl.float32)
    if bias is not None:
        beta = tl.load(bias + chan, mask=front, other=0.0).to(tl.float32)
    v = epilogue(acc, beta[None, :], residual, out, start * OUT_CHANNELS, at, mine, ACTIVATION, ACTIVATE_RESIDUAL)
    v = v.to(tl.float32)
    if skip is not None:
        at = lane[:, None] * SKIP_C + (chan[None, :] - OUT_CHANNELS)
        other = known & (chan[None, :] >= OUT_CHANNELS)
        v += tl.load(skip + start * SKIP_C + at, mask=other, other=0.0).to(tl.float32)
    return v


@jit
def merge_splits_norm(  # type: ignore[no-untyped-def]
    scratch_partials,  # [SPLIT_K,N,pixels,OUT_CHANNELS] float32
    bias,  # [OUT_CHANNELS] or None
    residual,  # [N,pixels,OUT_CHANNELS] or None
    skip,  # [N,pixels,SKIP_C] or None, the channels after the result's in the GroupNorm
    norm_weight,  # [OUT_CHANNELS+SKIP_C]
    norm_bias,  # [OUT_CHANNELS+SKIP_C]
    out,  # [N,pixels,OUT_CHANNELS]
    normed,  # [N,pixels,OUT_CHANNELS+SKIP_C]
    eps,
    pixels: extent,
    silu: extent,  # whether SiLU follows the norm
    OUT_CHANNELS: tl.constexpr,
    SKIP_C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # channels per group
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least GROUP_SIZE
    WHOLE: tl.constexpr,  # whether a tile of BLOCK_M is the whole image
):
    """Grid: groups, samples."""
    await_inputs()
    lane = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_N)
    chan = tl.program_id(0) * GROUP_SIZE + inner
    sample = tl.program_id(1).to(tl.int64) * pixels
    split_size = tl.num_programs(1).to(tl.int64) * pixels * OUT_CHANNELS
    v = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    mean = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    squares = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    steps = tl.cdiv(pixels, BLOCK_M)
    for step in range(steps):
        known = (step * BLOCK_M + lane < pixels)[:, None] & (inner < GROUP_SIZE)[None, :]
        v = _result_tile(
            scratch_partials,
            bias,
            residual,
            skip,
            out,
            sample + step * BLOCK_M,
            split_size,
            lane,
            chan,
            known,
            OUT_CHANNELS,
            SKIP_C,
            ACTIVATION,
            ACTIVATE_RESIDUAL,
            SPLIT_K,
        )
        number = lane * 0 + step
        mean, squares = welford_update(v, known, number[:, None], mean, squares)
    # Each tile row has seen `steps` values, or one less where the last step is past the end of the image.
    seen = ((pixels - lane + BLOCK_M - 1) // BLOCK_M).to(tl.float32)[:, None]
    seen = tl.where(inner < GROUP_SIZE, 1.0, 0.0)[None, :] * seen
    total = tl.cast(pixels, tl.float32) * GROUP_SIZE
    center = tl.sum(tl.sum(mean * seen, 1), 0) / total
    deviation = mean - center
    rstd = rstd_of(tl.sum(tl.sum(squares + seen * deviation * deviation, 1), 0) / total, eps)
    gamma = tl.load(norm_weight + chan, mask=inner < GROUP_SIZE, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(norm_bias + chan, mask=inner < GROUP_SIZE, other=0.0).to(tl.float32)[None, :]
    if not WHOLE:
        # The loop below reads what other threads have stored in `out`.
        tl.debug_barrier()
    for step in range(steps):
        known = (step * BLOCK_M + lane < pixels)[:, None] & (inner < GROUP_SIZE)[None, :]
        start = sample + step * BLOCK_M
        if not WHOLE:
            v = image_tile(out, skip, start, lane, chan, known, OUT_CHANNELS, SKIP_C)
        y = normalize(v, center, rstd, gamma, beta, False)
        y = tl.where(silu != 0, activate(y, "silu"), y)
        at = lane[:, None] * (OUT_CHANNELS + SKIP_C) + chan[None, :]
        tl.store(normed + start * (OUT_CHANNELS + SKIP_C) + at, round_to(y, normed.dtype.element_ty), mask=known)


@jit
def apply(  # type: ignore[no-untyped-def]
    x,  # [N,pixels,OUT_CHANNELS]
    scratch_moments,  # [N,3,groups,parts] float32: count, mean, squares; MERGED: [N,2,groups], mean and variance
    norm_weight,  # [OUT_CHANNELS]
    norm_bias,  # [OUT_CHANNELS]
    normed,  # [N,pixels,OUT_CHANNELS]
    eps,
    pixels: extent,
    parts,
    chunk_pixels: extent,  # pixels per program
    OUT_CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # channels per group, divides BLOCK_N
    MERGED: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,  # tiles per step of the merging
    BLOCK_M: tl.constexpr,  # pixels per step
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: chunks of pixels, blocks of channels, samples."""
    await_inputs()
    GROUPS: tl.constexpr = BLOCK_N // GROUP_SIZE
    groups = OUT_CHANNELS // GROUP_SIZE
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    group_mask = group < groups
    sample = tl.program_id(2).to(tl.int64)
    if MERGED:
        at = scratch_moments + sample * 2 * groups + group
        center = tl.load(at, mask=group_mask, other=0.0)
        variance = tl.load(at + groups, mask=group_mask, other=0.0)
    else:
        at = scratch_moments + sample * 3 * groups * parts + group[:, None] * parts
        lane = tl.arange(0, BLOCK_PARTS)[None, :]
        row = groups * parts
        # Means relative to the first one: the rounding errors are then small.
        first = tl.load(at + row, mask=group_mask[:, None], other=0.0)
        total = tl.full((GROUPS, BLOCK_PARTS), 0.0, tl.float32)
        weighted = tl.full((GROUPS, BLOCK_PARTS), 0.0, tl.float32)
        for start in range(0, parts, BLOCK_PARTS):
            known = group_mask[:, None] & (start + lane < parts)
            count = tl.load(at + (start + lane), mask=known, other=0.0)
            total += count
            weighted += count * (tl.load(at + (row + start + lane), mask=known, other=0.0) - first)
        elements = tl.maximum(tl.sum(total, 1), 1.0)
        center = tl.sum(first, 1) + tl.sum(weighted, 1) / elements
        squares = tl.full((GROUPS, BLOCK_PARTS), 0.0, tl.float32)
        for start in range(0, parts, BLOCK_PARTS):
            known = group_mask[:, None] & (start + lane < parts)
            count = tl.load(at + (start + lane), mask=known, other=0.0)
            deviation = tl.load(at + (row + start + lane), mask=known, other=0.0) - center[:, None]
            within = tl.load(at + (2 * row + start + lane), mask=known, other=0.0)
            squares += within + count * deviation * deviation
        variance = tl.sum(squares, 1) / elements
    # Spread each group's statistics over its channels: sums of one number and zeros.
    inner = tl.arange(0, BLOCK_N)
    own = (inner // GROUP_SIZE)[:, None] == tl.arange(0, GROUPS)[None, :]
    center = tl.sum(tl.where(own, center[None, :], 0.0), 1)[None, :]
    rstd = tl.sum(tl.where(own, rstd_of(variance, eps)[None, :], 0.0), 1)[None, :]
    chan = tl.program_id(1) * BLOCK_N + inner
    gamma = tl.load(norm_weight + chan, mask=chan < OUT_CHANNELS, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(norm_bias + chan, mask=chan < OUT_CHANNELS, other=0.0).to(tl.float32)[None, :]
    pixel = tl.arange(0, BLOCK_M)
    begin = tl.program_id(0) * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - begin)
    base = (sample * pixels + begin) * OUT_CHANNELS
    for step in tl.range(0, tl.cdiv(count, BLOCK_M), num_stages=NUM_STAGES):
        known = (step * BLOCK_M + pixel < count)[:, None] & (chan < OUT_CHANNELS)[None, :]
        place = base + step * BLOCK_M * OUT_CHANNELS + (pixel[:, None] * OUT_CHANNELS + chan[None, :])
        v = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
        y = normalize(v, center, rstd, gamma, beta, SILU)
        tl.store(normed + place, round_to(y, normed.dtype.element_ty), mask=known)
