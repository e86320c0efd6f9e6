"""upsample_conv's kernels in every form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import torch

from tests.ops.conv import test_upsample_conv
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.nets.fold import place
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.conv_tiles import LIBRARY, Config
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel


class TestUpsampleConvKernels(KernelContract):
    contract = test_upsample_conv.TestUpsampleConv
    kernels = conv3x3_kernel
    # Small blocks, so that these small images have several of each kind and ragged ends.
    configs: ClassVar = {
        "shared": Config("tile", pixels=32, columns=4, outputs=64, slice=128, splits=2, warps=4, stages=1),
        "whole": Config("tile", pixels=32, columns=8, outputs=32, slice=64, splits=1, warps=4, stages=2),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "phases in the other order": ("down = phase // ENLARGE", "down = phase % ENLARGE"),
        "the first phase's weight": ("weight + phase * RESULTS * DEPTH", "weight + phase * 0"),
        "the first phase's pixels": ("(left * STRIDE - 1 + right)) * CHANNELS", "(left * STRIDE - 1)) * CHANNELS"),
        "not interleaved": ("lane % COLUMNS) * ENLARGE", "lane % COLUMNS)"),
        "dropped tap": ("tl.minimum(end, DEPTH)", "tl.minimum(end, DEPTH - CHANNELS)"),
        "no left border": ("(column + j >= 0) & (column + j < width)", "column + j < width"),
        "no lower border": ("(row + i >= 0) & (row + i < height)", "row + i >= 0"),
        "a part lost": ("tl.static_range(PARTS)", "tl.static_range(PARTS - 1)"),
        "no bias": ("v = acc + beta", "v = acc"),
        "relu for silu": ("v = v / (1.0 + tl.exp(-v))", "v = tl.where(v < 0, 0.0, v)"),
    }

    def test_folded_phases_are_not_copied(self) -> None:
        phases = torch.rand(4, 10, 48, 2, 2)
        placed = place({"conv.phases": phases}, torch.device("cpu"), torch.float32)["conv.phases"]
        assert torch.equal(placed, phases)
        plan, _ = REGISTRY["upsample_conv"].plan(torch.rand(1, 48, 3, 3), placed)
        assert plan.launches[0].arguments["weight"].data_ptr() == placed.data_ptr()
