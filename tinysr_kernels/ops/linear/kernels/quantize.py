"""The kernel of quantize_rows and layer_norm_quantize, and the rounding to e4m3 that linear_fp8 shares."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs


@jit
def e4m3(v):  # type: ignore[no-untyped-def]
    """A float32 tile in e4m3: to the nearest, ties to even, beyond 448 to 448; NaN stays."""
    # Triton's own conversion goes by way of float16 on sm_89, which rounds twice.
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [v],
        dtype=tl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@e4m3.interpreted
def _e4m3(v):  # type: ignore[no-untyped-def]
    # The interpreter rounds ties away, drops subnormals and wraps above 448, so the eight bits are put together here.
    bits = v.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(v), 448.0)
    # The exponent, at least that of the subnormals; its lowest digit is 2^(exponent - 3).
    exponent = tl.maximum((bits >> 23) & 255, 121)
    digit = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    # Adding 2^23 leaves no digit behind the point, and rounds to even.
    nearest = tl.minimum((size / digit + 8388608.0 - 8388608.0) * digit, 448.0)
    parts = nearest.to(tl.int32, bitcast=True)
    normal = ((parts >> 20) & 2047) - (120 << 3)
    code = tl.where(nearest < 0.015625, (nearest * 512.0).to(tl.int32), normal)
    code = tl.where(v == v, code, 127) | (bits >> 24) & 128
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@jit
def scaled(v, top):  # type: ignore[no-untyped-def]
    """v / (top / 448) in e4m3; top: the largest magnitude of each row, [ROWS]."""
    return e4m3(v * tl.div_rn(448.0, top)[:, None])


@jit
def quantize(  # type: ignore[no-untyped-def]
    x,  # [rows,width]
    out,  # [rows,width] e4m3
    scale,  # [rows]
    eps,
    smallest,  # what the largest magnitude of a row of zeros is taken for
    rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least width
    NORMALISE: tl.constexpr,
):
    """Grid: blocks of rows. With the norm, mean first, then the squares of what is left: no cancellation."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, COLUMNS)
    known = (row < rows)[:, None] & (inner < width)[None, :]
    at = row[:, None] * width + inner[None, :]
    v = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    if NORMALISE:
        mean = tl.sum(v, 1)[:, None] / width
        deviation = tl.where(known, v - mean, 0.0)
        variance = tl.sum(deviation * deviation, 1)[:, None] / width
        v = deviation * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    top = tl.maximum(tl.max(tl.abs(v), 1), smallest)
    tl.store(out + at, scaled(v, top), mask=known)
    tl.store(scale + row, tl.div_rn(top, 448.0), mask=row < rows)
