"""upsample_conv's kernels in every form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import torch

from tests.ops.conv import test_upsample_conv
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.nets.fold import place
from tinysr_kernels.ops.conv.implicit_gemm import LIBRARY, Config
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.upsample_conv import UpsampleConv


class TestUpsampleConvKernels(KernelContract):
    contract = test_upsample_conv.TestUpsampleConv
    kernels = conv3x3_kernel
    # Small blocks, so that these small images have several of each kind and ragged ends.
    configs: ClassVar = {
        "split-K": Config(
            "tile", block_m=32, tile_width=4, block_n=64, block_k=128, split_k=2, num_warps=4, num_stages=1
        ),
        "whole": Config("tile", block_m=32, tile_width=8, block_n=32, block_k=64, split_k=1, num_warps=4, num_stages=2),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "phases in the other order": ("down = phase // SCALE", "down = phase % SCALE"),
        "the first phase's weight": ("weight + phase * out_channels * depth", "weight + phase * 0"),
        "the first phase's pixels": ("(left * STRIDE + right)) * channels", "(left * STRIDE - PADDING)) * channels"),
        "not interleaved": ("lane % TILE_WIDTH) * SCALE", "lane % TILE_WIDTH)"),
        "dropped tap": ("tl.minimum(end, depth)", "tl.minimum(end, depth - channels)"),
        "no left border": ("(column + j >= 0) & (column + j < width)", "column + j < width"),
        "no lower border": ("(row + i >= 0) & (row + i < height)", "row + i >= 0"),
        "a split lost": ("tl.static_range(SPLIT_K)", "tl.static_range(SPLIT_K - 1)"),
        "no bias": ("v = acc + beta", "v = acc"),
        "relu for silu": ("v = v / (1.0 + tl.exp(-v))", "v = tl.where(v < 0, 0.0, v)"),
    }

    def test_folded_phases_are_not_copied(self) -> None:
        phases = torch.rand(4, 10, 48, 2, 2)
        placed = place({"conv.phases": phases}, torch.device("cpu"), torch.float32)["conv.phases"]
        assert torch.equal(placed, phases)
        plan, _ = UpsampleConv(torch.rand(1, 48, 3, 3), placed).planned()
        assert plan.launches[0].arguments["weight"].data_ptr() == placed.data_ptr()
