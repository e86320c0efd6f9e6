"""The kernel of clamp_image, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.image import test_clamp_image
from tests.ops.image.color_kernel import ColorKernelContract
from tinysr_kernels.ops.image.clamp_image import Config
from tinysr_kernels.ops.image.kernels import clamp_image as clamp_image_kernel


class TestClampImageKernels(ColorKernelContract):
    contract = test_clamp_image.TestClampImage
    kernels = clamp_image_kernel
    configs: ClassVar = {"several blocks": Config(block_size=16, num_warps=1)}
    mutations: ClassVar = {
        "no clamp": ("image_value(unit_range(v), out", "image_value(v, out"),
        "the first row": ("y.to(tl.int64) * row_stride\n    out", "y.to(tl.int64) * 0\n    out"),
        "one sample": ("x += sample * sample_stride", "x += sample * 0"),
        "one channel": ("(offs % channels).to(tl.int64) * channel_stride", "(offs % 1).to(tl.int64) * channel_stride"),
    }
    flag_mutations: ClassVar = {
        "of the last block": (
            'bad += tl.where(tl.abs(v) < float("inf"), 0, 1)\n        tl.store',
            'bad = tl.where(tl.abs(v) < float("inf"), 0, 1)\n        tl.store',
        ),
        "never": (
            "mask=mask)\n    tl.store(finite + sample * height + y, tl.sum(bad, 0) == 0)",
            "mask=mask)\n    tl.store(finite + sample * height + y, tl.sum(bad, 0) >= 0)",
        ),
        "of the first row": (
            "mask=mask)\n    tl.store(finite + sample * height + y,",
            "mask=mask)\n    tl.store(finite + sample * height + 0 * y,",
        ),
    }
