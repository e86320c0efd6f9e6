"""sepconv's kernels in both forms, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.kernels.kernels import KernelContract
from tests.ops import test_sepconv
from tinysr_kernels.ops import sepconv_kernel
from tinysr_kernels.ops.sepconv import Config


class TestSepconvKernels(KernelContract):
    contract = test_sepconv.TestSepconv
    kernels = sepconv_kernel
    # Small blocks, so that these small images have several of each kind and ragged ends.
    configs: ClassVar = {
        "march": Config("march", rows=2, pixels=16, channels=256, outputs=32, warps=4, stages=1),
        "tile": Config("tile", rows=1, pixels=16, channels=32, outputs=64, warps=4, stages=2),
    }
    mutations: ClassVar = {
        "dropped tap, march": (
            "done = above + left * c0 + middle * c1 + right * c2",
            "done = above + left * c0 + middle * c1",
        ),
        "rows mixed up, march": (
            "    if STRIDE == 1:\n            above = below + left * b0",
            "    if STRIDE == 1:\n            above = left * b0",
        ),
        "dropped row, tile": ("for i in tl.static_range(3)", "for i in tl.static_range(2)"),
        "no left border": ("& (column >= 0) & (column < width)", "& (column < width)"),
        "no lower border": ("(row >= 0) & (row < height)", "(row >= 0)"),
        "ones outside": (
            "mask=inside[:, None] & (chan[None, :] < channels), other=0.0).to",
            "mask=inside[:, None] & (chan[None, :] < channels), other=1.0).to",
        ),
        "transposed taps": ("at = depthwise + chan * 9 + ROW * 3", "at = depthwise + chan * 9 + ROW"),
        "no bias": ("v = acc + beta", "v = acc"),
        "residual always inside": (
            "v = activate(v, ACTIVATION) + other.to(tl.float32)",
            "v = activate(v + other.to(tl.float32), ACTIVATION)",
        ),
        "no skip": ("if skip is not None:", "if skip is not None and first_depth < 0:"),
        "shortcut's columns for skip": ("weight = shortcut_weight + first_depth", "weight = shortcut_weight"),
        "enlarged by one": (
            "((row >> 1) - (first >> 1)) * (width // 2) + (column >> 1)",
            "((row >> 1) - (first >> 1)) * (width // 2) + (column >> 1) + 1",
        ),
        "second sample reads the first": (
            "sample = tl.program_id(2).to(tl.int64)\n    chan",
            "sample = tl.program_id(2).to(tl.int64) * 0\n    chan",
        ),
    }
