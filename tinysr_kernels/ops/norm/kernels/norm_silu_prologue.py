"""GroupNorm and SiLU of a convolution's input on its way into the product, from the moments of its channels."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import activate, await_inputs
from tinysr_kernels.ops.norm.kernels.group_norm import rstd_of


@jit
def _tanh(v):  # type: ignore[no-untyped-def]
    """One special-function instruction, to a relative error of 2^-11: a rounding to half precision errs as much."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@_tanh.interpreted
def _tanh_rounded(v):  # type: ignore[no-untyped-def]
    # The interpreter knows no assembly. Rounded to 11 digits, the tanh of this errs as much as the instruction's.
    exact = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * v))
    bits = exact.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)


@jit
def norm_silu(v, mean, gain, shift, QUICK: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU((v - mean) * gain + shift) in float32; everything broadcasts. QUICK: to half precision's digits.

    0.5 y (1 + tanh(y / 2)) takes one special function, where the quotient y / (1 + exp(-y)), which float32 needs,
    takes two.
    """
    y = (v.to(tl.float32) - mean) * gain + shift
    if QUICK:
        y = 0.5 * y
        y += y * _tanh(y)
    else:
        y = activate(y, "silu")
    return y


@jit
def mean_and_gain(  # type: ignore[no-untyped-def]
    moments,  # [N,2,channels], mean and variance
    weight,  # [channels]
    eps,
    sample,  # int64
    chan,  # [CHANNELS]
    channels,
    WIDTH: tl.constexpr,  # channels of a group
    MEMBERS: tl.constexpr,  # at least WIDTH
):
    """The mean of each channel's group, and weight / sqrt(variance + eps) [CHANNELS]; all channels count alike."""
    inner = tl.arange(0, MEMBERS)
    member = (chan // WIDTH * WIDTH)[:, None] + inner[None, :]
    counts = (chan < channels)[:, None] & (inner < WIDTH)[None, :]
    at = moments + sample * 2 * channels + member
    mean = tl.load(at, mask=counts, other=0.0).to(tl.float32)
    variance = tl.load(at + channels, mask=counts, other=0.0).to(tl.float32)
    center = tl.sum(mean, 1) / WIDTH
    deviation = tl.where(counts, mean - center[:, None], 0.0)
    rstd = rstd_of(tl.sum(variance + deviation * deviation, 1) / WIDTH, eps)
    return center, rstd * tl.load(weight + chan, mask=chan < channels, other=0.0).to(tl.float32)


@jit
def scale(  # type: ignore[no-untyped-def]
    moments,  # [N,2,channels]
    weight,  # [channels]
    scratch_scale,  # [N,2,channels] float32: mean and gain of each channel
    eps,
    channels,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid: blocks of channels, samples."""
    await_inputs()
    chan = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(1).to(tl.int64)
    mean, gain = mean_and_gain(moments, weight, eps, sample, chan, channels, WIDTH, MEMBERS)
    at = scratch_scale + sample * 2 * channels + chan
    tl.store(at, mean, mask=chan < channels)
    tl.store(at + channels, gain, mask=chan < channels)
