"""The kernels of channel_stats, affine_clamp and wavelet_fix, on every case of these operators."""

from __future__ import annotations

from typing import ClassVar

from tests.kernels.kernels import KernelContract
from tests.ops import test_color
from tinysr_kernels.ops import color_kernel, moments_kernel
from tinysr_kernels.ops.color import Config


class TestChannelStatsKernels(KernelContract):
    contract = test_color.TestChannelStats
    kernels = moments_kernel
    configs: ClassVar = {"several blocks": Config(lanes=16, warps=1)}
    mutations: ClassVar = {
        "biased": ("tl.maximum(pixels - CORRECTION, 1.0)", "tl.maximum(pixels, 1.0)"),
        "the first block for all": ("at = (sample * pixels + start) * outputs", "at = (sample * pixels) * outputs"),
        "between blocks nothing": ("+ count * deviation * deviation", "+ 0.0 * count"),
        "pixels behind the end": ("inside = start + lane < pixels", "inside = start + lane < pixels + 1"),
    }


class TestAffineClampKernels(KernelContract):
    contract = test_color.TestAffineClamp
    kernels = color_kernel
    configs: ClassVar = {"several blocks": Config(lanes=16, warps=1)}
    mutations: ClassVar = {
        "one gain": ("gain + sample * channels + chan", "gain + sample * channels + 0 * chan"),
        "the first sample's offset": ("offset + sample * channels + chan", "offset + 0 * sample * channels + chan"),
        "no clamp": ("rounded(unit_range(v), out", "rounded(v, out"),
        "not clamped above": ("tl.where(v > 1, 1.0, v)", "v"),
        "channels of the block": ("((begin + lane) % channels)", "(lane % channels)"),
    }


class TestWaveletFixKernels(KernelContract):
    contract = test_color.TestWaveletFix
    kernels = color_kernel
    configs: ClassVar = {"several blocks": Config(lanes=16, warps=1)}
    mutations: ClassVar = {
        "mean of three": ("(0.5 - 0.25 * step * step)", "(1.0 / 3)"),
        "no dilation across": ("column - DILATION * channels", "column - channels"),
        "no dilation down": ("y + step * DILATION", "y + step"),
        "border of another channel": ("length - channels + chan)", "length - 1)"),
        "the image's own colours": ("tl.load(style + at).to(tl.float32) -", "tl.load(x + at).to(tl.float32) -"),
        "details lost": ("total + tl.load(x + at", "total + 0.0 * tl.load(x + at"),
        "no clamp": ("total = unit_range(total +", "total = (total +"),
        "one sample": ("program_id(2).to(tl.int64) * height", "program_id(2).to(tl.int64) * 0"),
    }
