"""The kernel of linear_fp8 and linear_fp8_quantized: a matmul of a block of rows with a block of features, in e4m3.

Each step of the reduction is a matmul with accumulators of its own; they are scaled by the rows' scales and added to
the float32 accumulators of the steps before. The scale in between keeps the compiler from letting the tensor cores
accumulate across steps, with fewer bits. The order of programs is an L2 swizzle, as in kernels/linear.py.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, gelu_tanh, round_to, tile_dot
from tinysr_kernels.ops.linear.kernels.quantize import scaled


@jit
def linear_fp8(  # type: ignore[no-untyped-def]
    x,  # [M,K] e4m3
    x_scale,  # [M,groups]
    weight,  # [N,K] e4m3
    weight_scale,  # [N]
    bias,  # [N] or None
    residual,  # [M,N] or None
    out,  # [M,N], e4m3 if there is an out_scale
    out_scale,  # [M,N / BLOCK_N] or None
    smallest,  # lower bound of the largest magnitude of a row, for rows of zeros
    M,
    N,
    K,
    groups,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # with out_scale the features per scale, a divisor of N
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,  # elements of a row per scale, a multiple of BLOCK_K; 0 for one scale per row
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides K
    GROUP_M: tl.constexpr,  # L2 swizzle: blocks of rows that run together
):
    """Grid: all tiles of the result, GROUP_M blocks of rows at a time."""
    await_inputs()
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_block = tl.program_id(0) // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(blocks_m - first_block, GROUP_M)
    in_group = tl.program_id(0) % (GROUP_M * blocks_n)
    first_row = (first_block + in_group % group_m).to(tl.int64) * BLOCK_M
    block_n = in_group // group_m
    rows = tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and features beyond the end load the last one, which needs no mask; nothing of them is stored.
    x_rows = tl.minimum(rows, (M - 1 - first_row).to(tl.int32))
    w_rows = tl.minimum(cols, N - 1)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + first_row * K + x_rows[:, None] * K + k[None, :]
    weight_ptrs = weight + w_rows[None, :] * K + k[:, None]
    scale_ptrs = x_scale + first_row * groups + x_rows * groups
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if GROUP_K == 0:
        scale = tl.load(scale_ptrs).to(tl.float32)[:, None]
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_ptrs + start)
            b = tl.load(weight_ptrs + start)
        else:
            k_mask = k < K - start
            a = tl.load(x_ptrs + start, mask=k_mask[None, :], other=0.0)
            b = tl.load(weight_ptrs + start, mask=k_mask[:, None], other=0.0)
        partial = tile_dot(a, b, tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32))
        if GROUP_K > 0:
            acc += partial * tl.load(scale_ptrs + start // GROUP_K).to(tl.float32)[:, None]
        else:
            acc += partial * scale

    row_mask = rows < M - first_row
    col_mask = cols < N
    v = acc * tl.load(weight_scale + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_tanh":
        v = gelu_tanh(v)
    # Only the offset of the first row may need 64 bits; 32 bits from there on take half the registers.
    at = rows[:, None] * N + cols[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    if residual is not None:
        v += tl.load(residual + first_row * N + at, mask=mask, other=0.0).to(tl.float32)
    if out_scale is not None:
        top = tl.maximum(tl.max(tl.abs(v), 1), smallest)
        tl.store(out + first_row * N + at, scaled(v, top), mask=mask)
        tl.store(out_scale + (first_row + rows) * blocks_n + block_n, tl.div_rn(top, 448.0), mask=row_mask)
    else:
        tl.store(out + first_row * N + at, round_to(v, out.dtype.element_ty), mask=mask)
