"""GroupNorm and SiLU as the prologue of a convolution, from the per-channel statistics of its input."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import activate, await_inputs
from tinysr_kernels.ops.norm.kernels.group_norm import rstd_of


@jit
def _tanh(v):  # type: ignore[no-untyped-def]
    """One special-function instruction, relative error 2^-11, as much as one rounding to half precision."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@_tanh.interpreted
def _tanh_rounded(v):  # type: ignore[no-untyped-def]
    # The interpreter runs no inline assembly. Rounded to 11 bits, this has the error of the instruction.
    exact = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * v))
    bits = exact.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)


@jit
def norm_silu(v, mean, gain, shift, FAST_TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU((v - mean) * gain + shift) in float32; the arguments broadcast.

    FAST_TANH: 0.5 y (1 + tanh(y / 2)), one special-function instruction, as exact as half precision; the quotient
    y / (1 + exp(-y)), which float32 needs, takes two.
    """
    y = (v.to(tl.float32) - mean) * gain + shift
    if FAST_TANH:
        y = 0.5 * y
        y += y * _tanh(y)
    else:
        y = activate(y, "silu")
    return y


@jit
def mean_and_gain(  # type: ignore[no-untyped-def]
    moments,  # [N,2,channels], mean and biased variance per channel
    weight,  # [channels]
    eps,
    sample,  # int64
    chan,  # [BLOCK_N], channels
    channels,
    GROUP_SIZE: tl.constexpr,  # channels per group
    GROUP_BLOCK: tl.constexpr,  # at least GROUP_SIZE
):
    """Mean of each channel's group, and weight / sqrt(variance + eps), both [BLOCK_N] float32.

    All channels of a group have the same number of pixels.
    """
    inner = tl.arange(0, GROUP_BLOCK)
    member = (chan // GROUP_SIZE * GROUP_SIZE)[:, None] + inner[None, :]
    counts = (chan < channels)[:, None] & (inner < GROUP_SIZE)[None, :]
    at = moments + sample * 2 * channels + member
    mean = tl.load(at, mask=counts, other=0.0).to(tl.float32)
    variance = tl.load(at + channels, mask=counts, other=0.0).to(tl.float32)
    center = tl.sum(mean, 1) / GROUP_SIZE
    deviation = tl.where(counts, mean - center[:, None], 0.0)
    rstd = rstd_of(tl.sum(variance + deviation * deviation, 1) / GROUP_SIZE, eps)
    return center, rstd * tl.load(weight + chan, mask=chan < channels, other=0.0).to(tl.float32)


@jit
def store_mean_and_gain(  # type: ignore[no-untyped-def]
    moments,  # [N,2,channels]
    weight,  # [channels]
    scratch_scale,  # [N,2,channels] float32: mean and gain per channel
    eps,
    channels,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of channels, samples."""
    await_inputs()
    chan = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(1).to(tl.int64)
    mean, gain = mean_and_gain(moments, weight, eps, sample, chan, channels, GROUP_SIZE, GROUP_BLOCK)
    at = scratch_scale + sample * 2 * channels + chan
    tl.store(at, mean, mask=chan < channels)
    tl.store(at + channels, gain, mask=chan < channels)
