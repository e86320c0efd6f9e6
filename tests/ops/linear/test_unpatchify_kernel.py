"""unpatchify_subtract's kernel, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.kernel_contract import KernelContract
from tests.ops.linear import test_unpatchify
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.linear.unpatchify import Config


class TestUnpatchifyKernels(KernelContract):
    contract = test_unpatchify.TestUnpatchifySubtract
    kernels = linear_kernel
    configs: ClassVar = {"several blocks": Config(rows=16, columns=16, slice=32, warps=4, stages=1)}
    mutations: ClassVar = {
        "added": ("other=0.0).to(tl.float32) - acc", "other=0.0).to(tl.float32) + acc"),
        "no bias": ("acc += _vector(bias, column, FEATURES)", "acc += 0.0 * _vector(bias, column, FEATURES)"),
        "columns for rows": ("down[:, None] + (pixel // PATCH)", "down[:, None] + (pixel % PATCH)"),
        "channels first": ("pixel = column // CHANNELS", "pixel = column % (PATCH * PATCH)"),
        "tokens by column": ("down = row // across * PATCH", "down = row % across * PATCH"),
        "the first tokens": ("t + first_row * depth, weight", "t, weight"),
        "not normalised": ("_normalised(acc, mean, rstd, weight_sums, column, FEATURES)", "acc"),
        "first slice alone": ("for start in range(0, depth, SLICE):", "for start in range(0, SLICE, SLICE):"),
    }
