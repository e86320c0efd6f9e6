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
    configs: ClassVar = {"several blocks": Config(rows=16, columns=16, slice=16, warps=4)}
    mutations: ClassVar = {
        "no table": ("acc += tl.load(at, mask=known", "acc += 0.0 * tl.load(at, mask=known"),
        "the first sample's table alone": ("(row % sample_tokens)", "row"),
        "first slice alone": ("tl.static_range(0, DEPTH, SLICE)", "tl.static_range(0, SLICE, SLICE)"),
        "rows and columns of a patch swapped": (
            "pixel // PATCH * (across * PATCH) + pixel % PATCH",
            "pixel % PATCH * (across * PATCH) + pixel // PATCH",
        ),
        "channels of another pixel": ("(k % CHANNELS)[None, :]\n        rows", "(k // PATCH)[None, :]\n        rows"),
        "patches overlap": ("across + row % across * PATCH", "across + row % across"),
        "pixels for patches": ("row // across * (PATCH * PATCH) * across", "row // across * PATCH * across"),
    }


class TestPatchEmbedRowMomentsKernels(KernelContract):
    contract = test_patch_embed.TestPatchEmbedRowMoments
    kernels = linear_kernel
    configs: ClassVar = {"several blocks": Config(rows=16, columns=32, slice=16, warps=4)}
    mutations: ClassVar = {
        "moments of the first tile": (
            "tl.arange(0, ROWS), begin, tokens, features",
            "tl.arange(0, ROWS), 0, tokens, features",
        ),
        "moments before the table": (
            "store_moments(v, out_moments, first_row, tl",
            "store_moments(v * 0.5, out_moments, first_row, tl",
        ),
    }
