"""The kernel of layer_norm: a program per few rows, each row read once where it fits, three times where it does not."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, round_to


@jit
def normalise(  # type: ignore[no-untyped-def]
    x,  # [rows,width]
    out,  # [rows,width]
    eps,
    rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether COLUMNS holds a whole row
):
    """Grid: blocks of rows. Mean first, then the squares of what is left: no cancellation."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, COLUMNS)
    there = (row < rows)[:, None]
    at = row[:, None] * width
    if WHOLE:
        known = there & (inner < width)[None, :]
        v = tl.load(x + at + inner[None, :], mask=known, other=0.0).to(tl.float32)
        mean = tl.sum(v, 1)[:, None] / width
        deviation = tl.where(known, v - mean, 0.0)
        variance = tl.sum(deviation * deviation, 1)[:, None] / width
        y = deviation * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        tl.store(out + at + inner[None, :], round_to(y, out.dtype.element_ty), mask=known)
    else:
        total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for start in range(0, width, COLUMNS):
            known = there & (start + inner < width)[None, :]
            total += tl.load(x + at + start + inner[None, :], mask=known, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1)[:, None] / width
        squares = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for start in range(0, width, COLUMNS):
            known = there & (start + inner < width)[None, :]
            v = tl.load(x + at + start + inner[None, :], mask=known, other=0.0).to(tl.float32)
            deviation = tl.where(known, v - mean, 0.0)
            squares += deviation * deviation
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1)[:, None] / width + eps))
        for start in range(0, width, COLUMNS):
            known = there & (start + inner < width)[None, :]
            v = tl.load(x + at + start + inner[None, :], mask=known, other=0.0).to(tl.float32)
            tl.store(out + at + start + inner[None, :], round_to((v - mean) * rstd, out.dtype.element_ty), mask=known)
