"""The kernel of tanh_scaled, elementwise over dense memory of any layout."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, round_to


@jit
def scale(  # type: ignore[no-untyped-def]
    z,  # [numel]
    out,  # [numel], in the order of z
    gain,
    numel,
    BLOCK_SIZE: tl.constexpr,
):
    """out = tanh(gain * z) by (1 - e) / (1 + e), e = exp(-2 |gain * z|). Grid: blocks of BLOCK_SIZE elements.

    The cancellation of 1 - e near zero is below half a unit in the last place at 1. Float32 results are computed in
    float64, since PyTorch's own float32 results have no larger error than that.
    """
    await_inputs()
    WIDE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float32 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = at < numel
    u = tl.load(z + at, mask=mask, other=0.0).to(WIDE) * gain
    e = tl.exp(-2.0 * tl.abs(u))
    v = (1.0 - e) / (1.0 + e)
    tl.store(out + at, round_to(tl.where(u < 0, -v, v), out.dtype.element_ty), mask=mask)
