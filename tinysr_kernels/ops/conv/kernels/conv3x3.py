"""The kernels of conv3x3 and upsample_conv: an implicit GEMM of a tile of output pixels and a block of outputs.

`conv`: the reduction runs over taps and channels together, k = tap * channels + channel, as the weight lies in memory,
so that a step of BLOCK_K may end one tap and begin the next: 240 channels need no padding to 256. The steps of a 1x1
shortcut follow, read in place from its two tensors. After a nearest x2 upsampling (SCALE = 2) a program computes one of
the four phases of a tile at the low resolution: 2x2 taps, and every other pixel of every other row of the result.
`merge_splits`: where an image is too small to fill the GPU, split-K lets several programs reduce one tile and store
partial sums; this kernel adds them in a fixed order, so that results repeat bit for bit, and applies the epilogue.

Accumulators are float32.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import accumulate_matmul, await_inputs, bias_row, epilogue, round_to, tile_dot
from tinysr_kernels.ops.norm.kernels.channel_moments import group_moments, store_moments, tile_moments
from tinysr_kernels.ops.norm.kernels.norm_silu_prologue import norm_silu


@jit
def _valid_taps(row, column, inside, height, width, KERNEL_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_M] int32: bit i * KERNEL_SIZE + j is 1 if pixel (row + i, column + j) is in the image; 0 unless inside."""
    across = column * 0
    for j in tl.static_range(KERNEL_SIZE):
        across |= tl.where((column + j >= 0) & (column + j < width), 1 << j, 0)
    bits = row * 0
    for i in tl.static_range(KERNEL_SIZE):
        bits |= tl.where((row + i >= 0) & (row + i < height), across << (KERNEL_SIZE * i), 0)
    return tl.where(inside, bits, 0)


@jit
def _accumulate_taps(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M,BLOCK_N] float32
    x,  # points at the first tap of the tile's first pixel
    offset,  # [BLOCK_M], elements from there to each pixel's first tap
    valid_taps,  # [BLOCK_M], bits as of `_valid_taps`
    weight,  # [out_channels,KERNEL_SIZE,KERNEL_SIZE,channels]
    outs,  # [BLOCK_N], output channels
    out_channels,
    width,  # of the image
    begin,  # the first k, a multiple of BLOCK_K
    end,  # one past the last k
    scale,  # [2,channels] float32, mean and gain per channel of a norm prologue, or None
    norm_bias,  # [channels] or None
    channels,
    reciprocal,  # 2^30 / channels, rounded up
    KERNEL_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FAST_TANH: tl.constexpr,
):
    """acc + patches @ weight.T over k from begin to end, with GroupNorm and SiLU as a prologue if there is a scale."""
    depth = KERNEL_SIZE * KERNEL_SIZE * channels
    lane = tl.arange(0, BLOCK_K)
    n_mask = outs[None, :] < out_channels
    weight += outs[None, :] * depth + lane[:, None]
    offset = offset[:, None]
    valid_taps = valid_taps[:, None]
    for start in range(begin, end, BLOCK_K):
        k = start + lane
        # k // channels, in two instructions: the loop waits for its addresses.
        tap = tl.umulhi(4 * k, reciprocal)
        if ALIGNED:
            tap = tl.max_constancy(tap, 16)
        # Below `channels` past the last tap too: a norm prologue is loaded without a mask.
        chan = k - tap * channels
        # The bit after the last tap's is always 0.
        tap = tl.minimum(tap, KERNEL_SIZE * KERNEL_SIZE)
        shift = (tap // KERNEL_SIZE * width + tap % KERNEL_SIZE) * channels + chan
        valid = ((valid_taps >> tap[None, :]) & 1) != 0
        a = tl.load(x + (offset + shift[None, :]), mask=valid, other=0.0)
        b = tl.load(weight + start, mask=n_mask & (k[:, None] < depth), other=0.0)
        if scale is not None:
            mean, gain = tl.load(scale + chan)[None, :], tl.load(scale + channels + chan)[None, :]
            y = norm_silu(a, mean, gain, tl.load(norm_bias + chan).to(tl.float32)[None, :], FAST_TANH)
            # The zero padding follows the norm.
            a = round_to(tl.where(valid, y, 0.0), b.dtype)
        acc = tile_dot(a.to(b.dtype), b, acc)
    return acc


@jit
def conv(  # type: ignore[no-untyped-def]
    x,  # [N,height,width,channels]
    weight,  # [out_channels,3,3,channels], or the phases [4,out_channels,2,2,channels] if SCALE is 2
    bias,  # [out_channels] or None
    residual,  # like out, or None
    shortcut,  # [N,out_height,out_width,shortcut_c] or None
    skip,  # [N,out_height,out_width,skip_c] or None
    shortcut_weight,  # [out_channels,shortcut_c+skip_c] or None
    out,  # [N,out_height,out_width,out_channels]
    scratch_partials,  # [splits,N,out_height,out_width,out_channels] float32, partial sums for `merge_splits`, or None
    scratch_scale,  # [N,2,channels] float32, mean and gain per channel of a GroupNorm and SiLU prologue, or None
    norm_bias,  # [channels], the GroupNorm's bias, or None
    scratch_moments,  # [N,3,out_channels // GROUP_SIZE,tiles * phases] float32, statistics per tile, or None
    height: extent,
    width: extent,
    out_height: extent,
    out_width: extent,
    k_per_split,  # reduction length per split, a multiple of BLOCK_K
    channels,
    reciprocal: extent,  # 2^30 / channels, rounded up
    out_channels,  # channels of out, the constant OUT_CHANNELS if that is not 0
    shortcut_c,  # channels of shortcut
    skip_c,  # channels of skip
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,  # zeros above and left of the image; below and right of it as many as the last tap needs
    SCALE: tl.constexpr,  # 1, or 2 after a nearest x2 upsampling
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output pixels per tile
    TILE_WIDTH: tl.constexpr,  # columns of the tile, which has BLOCK_M // TILE_WIDTH rows
    BLOCK_N: tl.constexpr,  # output channels per program
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether channels is a multiple of 16
    OUT_CHANNELS: tl.constexpr,
    FAST_TANH: tl.constexpr,  # whether SiLU may be as inexact as half precision
    GROUP_SIZE: tl.constexpr,  # adjacent channels per entry of scratch_moments: 1, or a group that divides BLOCK_N
):
    """Grid: tiles in reading order, times blocks of output channels and phases; splits of the reduction; samples."""
    await_inputs()
    if OUT_CHANNELS > 0:
        out_channels = OUT_CHANNELS
    KERNEL_SIZE: tl.constexpr = 4 - SCALE
    PHASES: tl.constexpr = SCALE * SCALE
    depth = KERNEL_SIZE * KERNEL_SIZE * channels
    # Adjacent programs read the same pixels, so that they find them in the L2.
    blocks = tl.cdiv(out_channels, BLOCK_N) * PHASES
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks
    across = tl.cdiv(out_width, SCALE * TILE_WIDTH)
    top = tile // across * (BLOCK_M // TILE_WIDTH)
    left = tile % across * TILE_WIDTH
    phase = block % PHASES
    down = phase // SCALE
    right = phase % SCALE
    outs = block // PHASES * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)

    lane = tl.arange(0, BLOCK_M)
    row = top + lane // TILE_WIDTH
    column = left + lane % TILE_WIDTH
    inside = (row * SCALE < out_height) & (column * SCALE < out_width)
    # Only the tile's own offset may need 64 bits; 32-bit offsets within it take half the registers.
    base = (sample * out_height + (top * SCALE + down)) * out_width + (left * SCALE + right)
    pixel = (lane // TILE_WIDTH * out_width + lane % TILE_WIDTH) * SCALE
    begin = split * k_per_split
    end = begin + k_per_split
    # The first tap's pixel relative to the output pixel's.
    down -= PADDING
    right -= PADDING
    acc = _accumulate_taps(
        tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32),
        x + ((sample * height + (top * STRIDE + down)) * width + (left * STRIDE + right)) * channels,
        (lane // TILE_WIDTH * width + lane % TILE_WIDTH) * (STRIDE * channels),
        _valid_taps(row * STRIDE + down, column * STRIDE + right, inside, height, width, KERNEL_SIZE),
        weight + phase * out_channels * depth,
        outs,
        out_channels,
        width,
        begin,
        tl.minimum(end, depth),
        None if scratch_scale is None else scratch_scale + sample * 2 * channels,
        norm_bias,
        channels,
        reciprocal,
        KERNEL_SIZE,
        ALIGNED,
        BLOCK_K,
        FAST_TANH,
    )
    if shortcut is not None:
        # The shortcut's steps follow those of the taps, and the skip's follow the shortcut's.
        begin -= tl.cdiv(depth, BLOCK_K) * BLOCK_K
        end -= tl.cdiv(depth, BLOCK_K) * BLOCK_K
        acc = accumulate_matmul(
            acc,
            shortcut + base * shortcut_c,
            shortcut_weight,
            pixel,
            inside,
            outs,
            out_channels,
            tl.maximum(begin, 0),
            tl.minimum(end, shortcut_c),
            shortcut_c,
            shortcut_c + skip_c,
            BLOCK_K,
        )
        if skip is not None:
            begin -= tl.cdiv(shortcut_c, BLOCK_K) * BLOCK_K
            end -= tl.cdiv(shortcut_c, BLOCK_K) * BLOCK_K
            acc = accumulate_matmul(
                acc,
                skip + base * skip_c,
                shortcut_weight + shortcut_c,
                pixel,
                inside,
                outs,
                out_channels,
                tl.maximum(begin, 0),
                tl.minimum(end, skip_c),
                skip_c,
                shortcut_c + skip_c,
                BLOCK_K,
            )
    known = inside[:, None] & (outs[None, :] < out_channels)
    at = pixel[:, None] * out_channels + outs[None, :]
    if scratch_partials is not None:
        samples = tl.num_programs(2).to(tl.int64)
        first = split * samples * out_height * out_width + base
        tl.store(scratch_partials + first * out_channels + at, acc, mask=known)
    else:
        beta = bias_row(bias, outs, out_channels, BLOCK_N)
        stored = epilogue(acc, beta, residual, out, base * out_channels, at, known, ACTIVATION, ACTIVATE_RESIDUAL)
        if scratch_moments is not None:
            down = tl.minimum(tl.cdiv(out_height, SCALE) - top, BLOCK_M // TILE_WIDTH)
            count = (down * tl.minimum(tl.cdiv(out_width, SCALE) - left, TILE_WIDTH)).to(tl.float32)
            mean, squares = tile_moments(stored.to(tl.float32), inside, count)
            tiles = tl.num_programs(0) // tl.cdiv(out_channels, BLOCK_N)
            if GROUP_SIZE > 1:
                mean, squares = group_moments(count, mean, squares, GROUP_SIZE)
                outs = block // PHASES * (BLOCK_N // GROUP_SIZE) + tl.arange(0, BLOCK_N // GROUP_SIZE)
                count *= GROUP_SIZE
            number = tile * PHASES + phase
            groups = out_channels // GROUP_SIZE
            store_moments(scratch_moments, sample, number, tiles, outs, groups, count, mean, squares)


@jit
def merge_splits(  # type: ignore[no-untyped-def]
    scratch_partials,  # [SPLIT_K,N,pixels,OUT_CHANNELS], partial sums
    bias,  # [OUT_CHANNELS] or None
    residual,  # [N,pixels,OUT_CHANNELS] or None
    out,  # [N,pixels,OUT_CHANNELS]; scratch_partials itself for an epilogue in place (SPLIT_K = 1)
    pixels: extent,
    OUT_CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of BLOCK_M pixels, times blocks of output channels; samples."""
    await_inputs()
    blocks = tl.cdiv(OUT_CHANNELS, BLOCK_N)
    outs = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) // blocks * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    samples = tl.num_programs(1).to(tl.int64)
    base = (tl.program_id(1).to(tl.int64) * pixels + start) * OUT_CHANNELS
    known = (start + lane < pixels)[:, None] & (outs[None, :] < OUT_CHANNELS)
    at = lane[:, None] * OUT_CHANNELS + outs[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for split in tl.static_range(SPLIT_K):
        first = samples * split * pixels * OUT_CHANNELS + base
        acc += tl.load(scratch_partials + first + at, mask=known, other=0.0).to(tl.float32)
    beta = bias_row(bias, outs, OUT_CHANNELS, BLOCK_N)
    epilogue(acc, beta, residual, out, base, at, known, ACTIVATION, ACTIVATE_RESIDUAL)
