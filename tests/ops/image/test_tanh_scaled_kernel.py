"""The kernel of tanh_scaled, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.image import test_tanh_scaled
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.ops.image.kernels import tanh_scaled as tanh_scaled_kernel
from tinysr_kernels.ops.image.tanh_scaled import Config


class TestTanhScaledKernels(KernelContract):
    contract = test_tanh_scaled.TestTanhScaled
    kernels = tanh_scaled_kernel
    configs: ClassVar = {"several blocks": Config(block_size=64, num_warps=1)}
    mutations: ClassVar = {
        "no gain": (".to(WIDE) * gain", ".to(WIDE)"),
        "no sign": ("tl.where(u < 0, -v, v)", "v"),
        "no quotient": ("(1.0 - e) / (1.0 + e)", "1.0 - e"),
        "sigmoid": ("tl.exp(-2.0 * tl.abs(u))", "tl.exp(-tl.abs(u))"),
        "the first block": ("tl.program_id(0).to(tl.int64) * BLOCK_SIZE", "tl.program_id(0).to(tl.int64) * 0"),
    }
