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
    configs: ClassVar = {"several blocks": Config(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=1)}
    mutations: ClassVar = {
        "added": ("other=0.0).to(tl.float32) - acc", "other=0.0).to(tl.float32) + acc"),
        "no bias": ("acc += _vector(bias, cols, N)\n    # The", "acc += 0.0 * _vector(bias, cols, N)\n    # The"),
        "columns for rows": ("top[:, None] + (pixel // PATCH)", "top[:, None] + (pixel % PATCH)"),
        "channels first": ("pixel = cols // CHANNELS", "pixel = cols % (PATCH * PATCH)"),
        "tokens by column": ("top = rows // across * PATCH", "top = rows % across * PATCH"),
        "the first tokens": ("t + first_row * K, weight", "t, weight"),
        "not normalized": (
            "acc = _normalize(acc, mean, rstd, weight_sums, cols, N)\n    if bias",
            "acc = acc\n    if bias",
        ),
        "first step alone": ("for start in range(0, K, BLOCK_K):", "for start in range(0, BLOCK_K, BLOCK_K):"),
    }
