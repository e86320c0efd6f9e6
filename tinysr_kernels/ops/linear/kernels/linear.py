"""The kernels of linear, unpatchify_subtract and patch_embed: a matmul of a block of rows with a block of features.

`linear`: a program computes one or two blocks of features. Two of different width make tiles of 96 or 192 features,
which fill a GPU where powers of two leave part of it idle. With GEGLU the second block holds the gates of the first.
Both blocks share the rows that are loaded. The programs' order is an L2 swizzle: GROUP_M blocks of rows run together,
so that concurrent programs share weights and rows in the cache.
`linear_split`, `merge_splits`: the same with split-K. Few large tiles then fill a GPU, and the second launch has the
epilogue.
`unpatchify_subtract`: the same matmul; its epilogue subtracts the result from the latent at its patches.
`patch_embed`: the patches of the latent are gathered as rows.

Accumulators are float32, rounded once at the end. If the input goes through a LayerNorm first, the epilogue consumes
the statistics of its rows and normalizes the accumulators; a result can return its own (ops/norm/row_moments.py).
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, gelu_tanh, round_to, tile_dot
from tinysr_kernels.ops.norm.kernels.row_moments import merge_row_moments, store_row_moments


@jit
def _gelu(v):  # type: ignore[no-untyped-def]
    """Exact GELU: v times the normal distribution function."""
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@jit
def _matmul(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M,BLOCK_N] float32
    acc2,  # [BLOCK_M,BLOCK_N2] float32
    x,  # [M,K], from the tile's first row on
    weight,  # [N,K]
    rows,  # [BLOCK_M] existing rows of x, counted from the tile's first
    cols,  # [BLOCK_N] existing rows of weight
    cols2,  # [BLOCK_N2] existing rows of weight
    stride,  # elements from one row of x or weight to the next
    K,  # elements to sum over
    SECOND: tl.constexpr,  # whether acc2 is computed
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
):
    """acc + x[rows] @ weight[cols].T, and acc2 + x[rows] @ weight[cols2].T."""
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + rows[:, None] * stride + k[None, :]
    weight_ptrs = weight + cols[None, :] * stride + k[:, None]
    weight2_ptrs = weight + cols2[None, :] * stride + k[:, None]
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_ptrs + start)
            b = tl.load(weight_ptrs + start)
        else:
            k_mask = k < K - start
            a = tl.load(x_ptrs + start, mask=k_mask[None, :], other=0.0)
            b = tl.load(weight_ptrs + start, mask=k_mask[:, None], other=0.0)
        acc = tile_dot(a.to(b.dtype), b, acc)
        if SECOND:
            if EVEN_K:
                b2 = tl.load(weight2_ptrs + start)
            else:
                b2 = tl.load(weight2_ptrs + start, mask=k_mask[:, None], other=0.0)
            acc2 = tile_dot(a.to(b2.dtype), b2, acc2)
    return acc, acc2


@jit
def _vector(values, cols, N):  # type: ignore[no-untyped-def]
    """values[cols] as a row [1,BLOCK_N] in float32, zeros from N on."""
    return tl.load(values + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]


@jit
def _normalize(acc, mean, rstd, weight_sums, cols, N):  # type: ignore[no-untyped-def]
    """The accumulators [BLOCK_M,BLOCK_N] of a matmul, as if its rows had been normalized first."""
    return rstd[:, None] * (acc - mean[:, None] * _vector(weight_sums, cols, N))


@jit
def _epilogue(  # type: ignore[no-untyped-def]
    v,  # [BLOCK_M,BLOCK_N] float32, activated unless the activation is gelu_tanh
    first_row,  # int64
    rows,  # [BLOCK_M] counted from there
    first_col,  # the tile's first feature
    bias,  # [N], or None where it has been added
    residual,  # [M,N] or None
    gate,  # [N] or None
    out,  # [M,N]
    out_moments,  # [M,2,parts] or None
    M,
    N,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,
):
    """The epilogue: bias, activation, gate, residual, rounding, the store of the tile and its statistics."""
    cols = first_col + tl.arange(0, v.shape[1])
    # Only the offset of the first row may need 64 bits; 32 bits from there on take half the registers.
    mask = (rows < M - first_row)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    if bias is not None:
        v += _vector(bias, cols, N)
    if ACTIVATION == "gelu_tanh":
        v = gelu_tanh(v)
    if gate is not None:
        v *= _vector(gate, cols, N)
    if residual is not None:
        v += tl.load(residual + first_row * N + at, mask=mask, other=0.0).to(tl.float32)
    v = round_to(v, out.dtype.element_ty)
    tl.store(out + first_row * N + at, v, mask=mask)
    if out_moments is not None:
        store_row_moments(v, out_moments, first_row, rows, first_col, M, N, PART)


@jit
def _corner(M, N, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first row, int64, and the first feature of this program's tile [BLOCK_M,WIDTH] of a result [M,N]."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, WIDTH)
    first_block = tl.program_id(0) // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(blocks_m - first_block, GROUP_M)
    in_group = tl.program_id(0) % (GROUP_M * blocks_n)
    return (first_block + in_group % group_m).to(tl.int64) * BLOCK_M, in_group // group_m * WIDTH


@jit
def linear(  # type: ignore[no-untyped-def]
    x,  # [M,K]
    weight,  # [N,K], [2*N,K] for geglu
    x2,  # [M,K2] or None
    weight2,  # [N,K2], [2*N,K2] for geglu, or None
    bias,  # [N], [2*N] for geglu, or None
    residual,  # [M,N] or None
    gate,  # [N] or None
    out,  # [M,N]
    row_moments,  # [M,2,parts], statistics of x if it is to be normalized, or None
    weight_sums,  # like bias, or None
    out_moments,  # [M,2,parts] float32, statistics of out, or None
    eps,
    M: extent,
    N,
    K,
    K2,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,  # features of the second block, 0 without one; BLOCK_N for geglu
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K and K2
    GROUP_M: tl.constexpr,  # L2 swizzle: blocks of rows that run together
    PART: tl.constexpr,  # features per mean and squared deviations
    PARTS: tl.constexpr,  # of row_moments, 0 without them
):
    """Grid: all tiles of the result, GROUP_M blocks of rows at a time."""
    await_inputs()
    GEGLU: tl.constexpr = ACTIVATION == "geglu"
    SECOND: tl.constexpr = BLOCK_N2 > 0
    LANES: tl.constexpr = BLOCK_N2 if SECOND else 16
    WIDTH: tl.constexpr = BLOCK_N if GEGLU else BLOCK_N + BLOCK_N2
    first_row, first_col = _corner(M, N, BLOCK_M, WIDTH, GROUP_M)
    rows = tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    cols2 = first_col + (0 if GEGLU else BLOCK_N) + tl.arange(0, LANES)

    # Rows and features beyond the end load the last one, which needs no mask; nothing of them is stored.
    x_rows = tl.minimum(rows, (M - 1 - first_row).to(tl.int32))
    w_rows = tl.minimum(cols, N - 1)
    w_rows2 = tl.minimum(cols2, N - 1)
    if GEGLU:
        w_rows2 += N
    if row_moments is not None:
        mean, rstd = merge_row_moments(row_moments, first_row, x_rows, K, eps, PART, PARTS)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc2 = tl.full((BLOCK_M, LANES), 0.0, tl.float32)
    acc, acc2 = _matmul(acc, acc2, x + first_row * K, weight, x_rows, w_rows, w_rows2, K, K, SECOND, BLOCK_K, EVEN_K)
    if x2 is not None:
        x2 += first_row * K2
        acc, acc2 = _matmul(acc, acc2, x2, weight2, x_rows, w_rows, w_rows2, K2, K2, SECOND, BLOCK_K, EVEN_K)
    if row_moments is not None:
        acc = _normalize(acc, mean, rstd, weight_sums, cols, N)
        if GEGLU:
            acc2 = _normalize(acc2, mean, rstd, weight_sums + N, cols2, N)
        elif SECOND:
            acc2 = _normalize(acc2, mean, rstd, weight_sums, cols2, N)
    if GEGLU:
        if bias is not None:
            acc += _vector(bias, cols, N)
            acc2 += _vector(bias + N, cols2, N)
        acc *= _gelu(acc2)
        _epilogue(acc, first_row, rows, first_col, None, residual, gate, out, out_moments, M, N, ACTIVATION, PART)
    else:
        _epilogue(acc, first_row, rows, first_col, bias, residual, gate, out, out_moments, M, N, ACTIVATION, PART)
        if SECOND:
            first_col += BLOCK_N
            _epilogue(acc2, first_row, rows, first_col, bias, residual, gate, out, out_moments, M, N, ACTIVATION, PART)


@jit
def linear_split(  # type: ignore[no-untyped-def]
    x,  # [M,K]
    weight,  # [N,K]
    scratch_partials,  # [tl.num_programs(1),M,N] float32
    M: extent,
    N,
    K,
    k_per_split,  # a multiple of BLOCK_K; the last part may be shorter
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,  # features of the second block, 0 without one
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    GROUP_M: tl.constexpr,  # L2 swizzle: blocks of rows that run together
):
    """x @ weight.T over one part of K. Grid: all tiles of the result, as in linear; parts of K."""
    await_inputs()
    SECOND: tl.constexpr = BLOCK_N2 > 0
    LANES: tl.constexpr = BLOCK_N2 if SECOND else 16
    first_row, first_col = _corner(M, N, BLOCK_M, BLOCK_N + BLOCK_N2, GROUP_M)
    rows = tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    cols2 = first_col + BLOCK_N + tl.arange(0, LANES)
    # Rows and features beyond the end load the last one, as in linear.
    x_rows = tl.minimum(rows, (M - 1 - first_row).to(tl.int32))
    begin = tl.program_id(1) * k_per_split
    x += first_row * K + begin
    weight += begin
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    acc2 = tl.full((BLOCK_M, LANES), 0.0, tl.float32)
    w_rows, w_rows2 = tl.minimum(cols, N - 1), tl.minimum(cols2, N - 1)
    count = tl.minimum(k_per_split, K - begin)
    acc, acc2 = _matmul(acc, acc2, x, weight, x_rows, w_rows, w_rows2, K, count, SECOND, BLOCK_K, EVEN_K)
    partials = scratch_partials + (tl.program_id(1).to(tl.int64) * M + first_row) * N
    inside = (rows < M - first_row)[:, None]
    tl.store(partials + (rows[:, None] * N + cols[None, :]), acc, mask=inside & (cols < N)[None, :])
    if SECOND:
        tl.store(partials + (rows[:, None] * N + cols2[None, :]), acc2, mask=inside & (cols2 < N)[None, :])


@jit
def merge_splits(  # type: ignore[no-untyped-def]
    scratch_partials,  # [SPLIT_K,M,N] float32
    bias,  # [N] or None
    residual,  # [M,N] or None
    gate,  # [N] or None
    out,  # [M,N]
    out_moments,  # [M,2,parts] float32, statistics of out, or None
    M: extent,
    N,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,  # features per mean and squared deviations
):
    """The sum of the partial sums, in order, and linear's epilogue. Grid: blocks of rows, blocks of features."""
    await_inputs()
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = (rows < M - first_row)[:, None] & (cols < N)[None, :]
    v = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for split in tl.static_range(SPLIT_K):
        partials = scratch_partials + (M.to(tl.int64) * split + first_row) * N
        v += tl.load(partials + (rows[:, None] * N + cols[None, :]), mask=mask, other=0.0)
    _epilogue(v, first_row, rows, first_col, bias, residual, gate, out, out_moments, M, N, ACTIVATION, PART)


@jit
def unpatchify_subtract(  # type: ignore[no-untyped-def]
    t,  # [M,K], the tokens of all samples
    weight,  # [PATCH*PATCH*CHANNELS,K]
    bias,  # [PATCH*PATCH*CHANNELS] or None
    z,  # [batch,height,width,CHANNELS]
    out,  # like z
    row_moments,  # [M,2,parts], statistics of t if it is to be normalized, or None
    weight_sums,  # like bias, or None
    eps,
    M: extent,
    across: extent,  # tokens per row of the image
    K,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    PART: tl.constexpr,  # features per mean and squared deviations
    PARTS: tl.constexpr,  # of row_moments, 0 without them
):
    """Grid: blocks of tokens, blocks of features."""
    await_inputs()
    N: tl.constexpr = PATCH * PATCH * CHANNELS
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = tl.minimum(cols, N - 1)
    t_rows = tl.minimum(tl.arange(0, BLOCK_M), (M - 1 - first_row).to(tl.int32))
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if row_moments is not None:
        mean, rstd = merge_row_moments(row_moments, first_row, t_rows, K, eps, PART, PARTS)
    acc, _ = _matmul(acc, acc, t + first_row * K, weight, t_rows, w_rows, w_rows, K, K, False, BLOCK_K, EVEN_K)
    if row_moments is not None:
        acc = _normalize(acc, mean, rstd, weight_sums, cols, N)
    if bias is not None:
        acc += _vector(bias, cols, N)
    # The rows of tokens of consecutive samples follow each other, as the rows of pixels do.
    top = rows // across * PATCH
    left = rows % across * PATCH
    pixel = cols // CHANNELS
    y = top[:, None] + (pixel // PATCH)[None, :]
    x = left[:, None] + (pixel % PATCH)[None, :]
    at = (y * (across * PATCH) + x) * CHANNELS + (cols % CHANNELS)[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    v = tl.load(z + at, mask=mask, other=0.0).to(tl.float32) - acc
    tl.store(out + at, round_to(v, out.dtype.element_ty), mask=mask)


@jit
def patch_embed(  # type: ignore[no-untyped-def]
    z,  # [batch,height,width,CHANNELS]
    weight,  # [N,PATCH,PATCH,CHANNELS]
    table,  # [sample_tokens,N]
    out,  # [M,N], the tokens of all samples
    out_moments,  # [M,2,parts] float32, statistics of out, or None
    M,
    sample_tokens,  # tokens per sample
    across,  # tokens per row of the image
    N,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,  # features per mean and squared deviations
):
    """Grid: blocks of tokens, blocks of features."""
    await_inputs()
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    corner = rows // across * (PATCH * PATCH) * across + rows % across * PATCH
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        # Pixel by pixel, all channels of each, as the latent is in memory.
        k = start + tl.arange(0, BLOCK_K)
        pixel = k // CHANNELS
        shift = pixel // PATCH * (across * PATCH) + pixel % PATCH
        at = (corner[:, None] + shift[None, :]) * CHANNELS + (k % CHANNELS)[None, :]
        a = tl.load(z + at, mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        at = weight + cols[None, :] * K + k[:, None]
        b = tl.load(at, mask=(cols < N)[None, :] & (k < K)[:, None], other=0.0)
        acc = tile_dot(a.to(b.dtype), b, acc)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    at = table + (rows % sample_tokens)[:, None] * N + cols[None, :]
    acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    v = round_to(acc, out.dtype.element_ty)
    tl.store(out + rows[:, None] * N + cols[None, :], v, mask=mask)
    if out_moments is not None:
        store_row_moments(v, out_moments, first_row, tl.arange(0, BLOCK_M), first_col, M, N, PART)
