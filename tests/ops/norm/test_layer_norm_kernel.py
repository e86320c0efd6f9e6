"""The kernel of layer_norm on whole rows and on rows in steps, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.kernel_contract import KernelContract
from tests.ops.norm import test_layer_norm
from tinysr_kernels.ops.norm.kernels import layer_norm as layer_norm_kernel
from tinysr_kernels.ops.norm.layer_norm import Config


class TestLayerNormKernels(KernelContract):
    contract = test_layer_norm.TestLayerNorm
    kernels = layer_norm_kernel
    configs: ClassVar = {
        "rows": Config(block_m=4, block_n=256, num_warps=4),
        "steps": Config(block_m=2, block_n=16, num_warps=4),
    }
    mutations: ClassVar = {
        "masked columns counted": ("tl.where(mask, v - mean, 0.0)\n        variance", "v - mean\n        variance"),
        "masked columns counted in steps": (
            "tl.where(mask, v - mean, 0.0)\n            squares",
            "(v - mean)\n            squares",
        ),
        "the first step alone": ("total += tl.load", "total = tl.load"),
        "no eps": ("tl.div_rn(1.0, tl.sqrt_rn(variance + eps))", "tl.div_rn(1.0, tl.sqrt_rn(variance))"),
        "mean not subtracted": ("round_to((v - mean) * rstd,", "round_to(v * rstd,"),
        "rows mixed": ("at = row[:, None] * width", "at = (row // 2)[:, None] * width"),
    }
