"""sepconv_block's launches on every case of the operator."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch

from tests.ops.cases import Arguments
from tests.ops.conv import test_sepconv_block, test_sepconv_kernel
from tests.ops.kernel_contract import KernelContract, to_device
from tinysr_kernels.launch import configs
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.kernels import sepconv as sepconv_kernel


class TestSepconvBlockKernels(KernelContract):
    """Three launches of `sepconv`'s kernels, which its own tests run too."""

    pytestmark = pytest.mark.long
    contract = test_sepconv_block.TestSepconvBlock
    kernels = sepconv_kernel
    configs: ClassVar = test_sepconv_kernel.TestSepconvKernels.configs
    mutations: ClassVar = {
        "a row too few": ("tl.minimum(rows, out_height - top)", "tl.minimum(rows, out_height - top - 1)"),
        "no last row of tiles": (
            "inside = pixel < out_height * out_width",
            "inside = pixel < (out_height - 1) * out_width",
        ),
    }

    def call(self, arguments: Arguments, config: str | None = None) -> Any:
        """The kernels on the device, with everything that they write, h1 and h2 too, filled with NaN."""
        overrides = {} if config is None else {"sepconv_block": self.configs[config]}
        with configs.given(**overrides), torch.inference_mode():
            plan, _ = REGISTRY["sepconv_block"](**{k: to_device(v) for k, v in arguments.items()}).planned()
            for launch in plan.launches:
                launch.arguments["out"].fill_(math.nan)
            return plan.run().cpu()
