"""The kernel of resize_bicubic, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.image import test_resize
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.ops.image.kernels import resize as resize_kernel
from tinysr_kernels.ops.image.resize import Config


class TestResizeKernels(KernelContract):
    contract = test_resize.TestResizeBicubic
    kernels = resize_kernel
    configs: ClassVar = {"several blocks": Config(block_n=16, block_m=2, num_warps=1)}
    mutations: ClassVar = {
        "other kernel": ("w0 = A * t", "w0 = -0.6 * t"),
        "torch's kernel for Pillow": ("-0.5 if PILLOW else -0.75", "-0.75"),
        "columns outside": ("w0, w1, w2, w3, left, width)", "w0, w1, w2, w3, 5, 99)"),
        "rows outside": ("v0, v1, v2, v3, top + step, height)", "v0, v1, v2, v3, 5, 99)"),
        "not renormalized across": ("v / (across * down)", "v / (0.0 * across + down)"),
        "not renormalized down": ("v / (across * down)", "v / (across + 0.0 * down)"),
        "not clamped": ("            if CLAMP:\n", "            if CLAMP and PILLOW and FACTOR == 99:\n"),
        "border": (
            "tl.minimum(tl.maximum(row, 0), height - 1)",
            "tl.minimum(row * row, height - 1)",
        ),
        "the next column": ("c2 = tl.minimum(left + 1, width - 1)", "c2 = tl.minimum(left + 2, width - 1)"),
        "no scale": ("v * mul + add", "v + add"),
        "no offset": ("v * mul + add", "v * mul"),
        "a row lost": ("        upper = lower\n", "        upper = upper\n"),
        "half a pixel off": ("column = offs_n // channels - HALF", "column = offs_n // channels"),
        "one channel": (
            "(offs_n % channels).to(tl.int64) * channel_stride",
            "(offs_n % 1).to(tl.int64) * channel_stride",
        ),
        "one sample": ("x += sample * sample_stride", "x += 0 * sample * sample_stride"),
    }
