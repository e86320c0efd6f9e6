"""patch_embed's kernel, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.kernel_contract import KernelContract
from tests.ops.linear import test_patch_embed
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.linear.patch_embed import Config


class TestPatchEmbedKernels(KernelContract):
    contract = test_patch_embed.TestPatchEmbed
    kernels = linear_kernel
    configs: ClassVar = {"several blocks": Config(block_m=16, block_n=16, block_k=16, num_warps=4)}
    mutations: ClassVar = {
        "no table": ("acc += tl.load(at, mask=mask", "acc += 0.0 * tl.load(at, mask=mask"),
        "the first sample's table alone": ("(rows % sample_tokens)", "rows"),
        "first step alone": ("tl.static_range(0, K, BLOCK_K)", "tl.static_range(0, BLOCK_K, BLOCK_K)"),
        "rows and columns of a patch swapped": (
            "pixel // PATCH * (across * PATCH) + pixel % PATCH",
            "pixel % PATCH * (across * PATCH) + pixel // PATCH",
        ),
        "channels of another pixel": ("(k % CHANNELS)[None, :]\n        a =", "(k // PATCH)[None, :]\n        a ="),
        "patches overlap": ("across + rows % across * PATCH", "across + rows % across"),
        "pixels for patches": ("rows // across * (PATCH * PATCH) * across", "rows // across * PATCH * across"),
    }


class TestPatchEmbedRowMomentsKernels(KernelContract):
    contract = test_patch_embed.TestPatchEmbedRowMoments
    kernels = linear_kernel
    configs: ClassVar = {"several blocks": Config(block_m=16, block_n=32, block_k=16, num_warps=4)}
    mutations: ClassVar = {
        "moments of the first tile": (
            "tl.arange(0, BLOCK_M), first_col, M, N, PART",
            "tl.arange(0, BLOCK_M), 0, M, N, PART",
        ),
        "moments before the table": (
            "store_row_moments(v, out_moments, first_row, tl",
            "store_row_moments(v * 0.5, out_moments, first_row, tl",
        ),
    }
