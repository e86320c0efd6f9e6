"""sepconv_block's launches on every case of the operator: whole images, and strips that leave the same bits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch

from tests.ops.cases import Arguments, Case
from tests.ops.conv import test_sepconv_block
from tests.ops.kernel_contract import KernelContract, rows_alike, to_device
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.kernels import sepconv as sepconv_kernel
from tinysr_kernels.ops.conv.sepconv_block import Config

MARCH = Config(0, "march", rows=2, pixels=16, channels=256, outputs=32, warps=4, stages=1)
TILE = Config(0, "tile", rows=1, pixels=16, channels=32, outputs=64, warps=4, stages=1)


class TestSepconvBlockKernels(KernelContract):
    contract = test_sepconv_block.TestSepconvBlock
    kernels = sepconv_kernel
    configs: ClassVar = {
        "march": MARCH,
        "march, strips of 3": dataclasses.replace(MARCH, strip=3),
        "tile, strips of 4": dataclasses.replace(TILE, strip=4),
    }
    mutations: ClassVar = {
        "strips from the top": ("top = first_row + (", "top = ("),
        "a row too few": ("tl.minimum(ROWS, end_row - top)", "tl.minimum(ROWS, end_row - top - 1)"),
        "tiles from the top": ("begin = first_row * out_width", "begin = 0 * first_row"),
        "the other strip's pixels": ("inside = pixel < end_row * out_width", "inside = pixel < first_row * out_width"),
    }

    def call(self, arguments: Arguments, config: str | None = None) -> Any:
        """The kernels on the device, with everything that they write, the images in between too, filled with NaN."""
        chosen = {} if config is None else {"sepconv_block": self.configs[config]}
        with configs.given(**chosen), torch.inference_mode():
            plan = REGISTRY["sepconv_block"].plan(**{k: to_device(v) for k, v in arguments.items()})[0]
            for launch in plan.launches:
                launch.arguments["out"].fill_(math.nan)
            return plan.run().cpu()

    @pytest.mark.parametrize("form", [MARCH, TILE], ids=["march", "tile"])
    def test_strips_leave_the_same_bits(self, case: Case, form: Config) -> None:
        arguments = {k: to_device(v) for k, v in case.arguments(torch.float16).items()}
        found = []
        for strip in (0, 1, 4):
            chosen = dataclasses.replace(form, strip=strip)
            with configs.given(sepconv_block=chosen), torch.inference_mode(), rows_alike():
                found.append(REGISTRY["sepconv_block"].plan(**arguments)[0].run().cpu())
        assert all(torch.equal(one, found[0]) for one in found)


def test_strips_are_offered_and_not_chosen() -> None:
    """The heuristic takes three launches of whole images, as many as without the operator."""
    x = torch.empty(1, 64, 512, 512, dtype=torch.float16, device="meta")
    convolution = (torch.empty(64, 3, 3, device="meta"), torch.empty(64, 64, dtype=x.dtype, device="meta"), None)
    operator = REGISTRY["sepconv_block"]
    plan, choice = operator.plan(x, *convolution * 3)
    assert (choice.config.strip, len(plan.launches)) == (0, 3)
    assert operator.kernels is not None
    offered = {one.strip for one in operator.kernels.space(GPUS[90], x=x)}
    assert offered == {0, 64, 128, 256}
    with configs.given(sepconv_block=dataclasses.replace(choice.config, strip=128)):
        assert len(operator.plan(x, *convolution * 3)[0].launches) == 12
