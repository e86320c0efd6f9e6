"""The kernels of group_norm in each form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import torch

from tests.ops.cases import Case
from tests.ops.kernel_contract import KernelContract
from tests.ops.norm import test_group_norm
from tinysr_kernels.ops.norm.group_norm import Config
from tinysr_kernels.ops.norm.kernels import group_norm as group_norm_kernel


class TestGroupNormKernels(KernelContract):
    contract = test_group_norm.TestGroupNorm
    kernels = group_norm_kernel
    # Several steps per program and several chunks, with ragged ends of each.
    configs: ClassVar = {
        "single": Config("single", block_m=4, block_n=64, chunks=1, num_warps=4, num_stages=1),
        "split": Config("split", block_m=4, block_n=16, chunks=3, num_warps=4, num_stages=1),
    }
    mutations: ClassVar = {
        "same count for every tile row, single": (
            "((pixels - row + BLOCK_M - 1) // BLOCK_M)",
            "((pixels - row * 0 + BLOCK_M - 1) // BLOCK_M)",
        ),
        "same count for every tile row, split": (
            "((count - row + BLOCK_M - 1) // BLOCK_M)",
            "((count - row * 0 + BLOCK_M - 1) // BLOCK_M)",
        ),
        "tile rows not merged, single": (
            "tl.sum(tl.sum(squares + seen * deviation * deviation, 1), 0)",
            "tl.sum(tl.sum(squares, 1), 0)",
        ),
        "tile rows not merged, split": ("tl.sum(squares + seen * deviation * deviation, 0)", "tl.sum(squares, 0)"),
        "chunks not merged": ("within + count * deviation * deviation", "within"),
        "end of the image counted": (
            "mask = (step * BLOCK_M + row < count)[:, None] &",
            "mask = (step * BLOCK_M + row >= 0)[:, None] &",
        ),
        "swapped groups": ("chan // group_size\n", "(channels - 1 - chan) // group_size\n"),
        "moments of the first sample": ("(sample * 2 + which) * x_channels", "(sample * 0 + which) * x_channels"),
        "skip's moments of the first sample": (
            "(sample * 2 + which) * skip_channels",
            "(sample * 0 + which) * skip_channels",
        ),
        "skip's moments ignored": ("inside & (chan >= x_channels)", "inside & (chan < 0)"),
        "no variance between channels": ("variance + deviation * deviation, 1)", "variance, 1)"),
        "other channels' groups": ("(chan // group_size * group_size)", "(chan // group_size * 0)"),
        "no bias": ("* rstd * weight + bias", "* rstd * weight"),
        "no eps": ("tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance)"),
        "silu always": ("    if SILU:\n", "    if SILU or not SILU:\n"),
        "skip from its second channel": ("(chan[None, :] - x_channels)", "(chan[None, :] - x_channels + 1)"),
        "skip ignored": ("mask & (chan[None, :] >= x_channels)", "mask & (chan[None, :] < 0)"),
        "the first sample's statistics": (
            "group = sample * (channels // group_size)",
            "group = 0 * sample * (channels // group_size)",
        ),
    }

    def test_large_mean_in_many_steps(self) -> None:
        """Means of 50 deviations over many steps and chunks: no cancellation in any form."""
        case = Case("group_norm", "far mean", lambda d: test_group_norm.far_mean(d, 30, 2))
        for config in (None, *self.configs):
            assert self.check(case, torch.float32, config, draws=1), (config, self.found)
