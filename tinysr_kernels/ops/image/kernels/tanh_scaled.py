"""The kernel of tanh_scaled: lanes are single numbers, in whatever order they lie in memory."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, round_to


@jit
def scale(  # type: ignore[no-untyped-def]
    z,  # [numbers]
    out,  # like z
    gain,
    numbers,
    LANES: tl.constexpr,
):
    """Grid: blocks of LANES numbers.

    What 1 - exp(-2u) loses near zero is less than half a result's last digit at 1; results in float32 are computed in
    float64, as PyTorch's own have no more than that.
    """
    await_inputs()
    WIDE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float32 else tl.float32
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    known = at < numbers
    u = tl.load(z + at, mask=known, other=0.0).to(WIDE) * gain
    e = tl.exp(-2.0 * tl.abs(u))
    v = (1.0 - e) / (1.0 + e)
    tl.store(out + at, round_to(tl.where(u < 0, -v, v), out.dtype.element_ty), mask=known)
