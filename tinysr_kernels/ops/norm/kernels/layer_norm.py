"""The kernel of layer_norm: BLOCK_M rows per program.

A row that fits a tile is read once, a longer one three times: for the mean, for the variance and for the result.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, round_to


@jit
def normalize(  # type: ignore[no-untyped-def]
    x,  # [rows,width]
    out,  # [rows,width]
    eps,
    rows: extent,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # whether BLOCK_N covers a row
):
    """Grid: blocks of BLOCK_M rows. The mean first, then the squared deviations from it: no cancellation."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None]
    at = row[:, None] * width
    if WHOLE_ROW:
        mask = inside & (inner < width)[None, :]
        v = tl.load(x + at + inner[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(v, 1)[:, None] / width
        deviation = tl.where(mask, v - mean, 0.0)
        variance = tl.sum(deviation * deviation, 1)[:, None] / width
        y = deviation * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        tl.store(out + at + inner[None, :], round_to(y, out.dtype.element_ty), mask=mask)
    else:
        total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for start in range(0, width, BLOCK_N):
            mask = inside & (start + inner < width)[None, :]
            total += tl.load(x + at + start + inner[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1)[:, None] / width
        squares = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for start in range(0, width, BLOCK_N):
            mask = inside & (start + inner < width)[None, :]
            v = tl.load(x + at + start + inner[None, :], mask=mask, other=0.0).to(tl.float32)
            deviation = tl.where(mask, v - mean, 0.0)
            squares += deviation * deviation
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1)[:, None] / width + eps))
        for start in range(0, width, BLOCK_N):
            mask = inside & (start + inner < width)[None, :]
            v = tl.load(x + at + start + inner[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(out + at + start + inner[None, :], round_to((v - mean) * rstd, out.dtype.element_ty), mask=mask)
