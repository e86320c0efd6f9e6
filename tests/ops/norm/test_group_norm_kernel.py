"""group_norm's kernels in both forms, on every case of the operator."""

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
    # Several steps a program, several chunks, ragged ends of each.
    configs: ClassVar = {
        "single": Config("single", pixels=4, channels=64, chunks=1, warps=4, stages=1),
        "split": Config("split", pixels=4, channels=16, chunks=3, warps=4, stages=1),
    }
    mutations: ClassVar = {
        "lanes counted alike, single": (
            "((pixels - lane + PIXELS - 1) // PIXELS)",
            "((pixels - lane * 0 + PIXELS - 1) // PIXELS)",
        ),
        "lanes counted alike, split": (
            "((count - lane + PIXELS - 1) // PIXELS)",
            "((count - lane * 0 + PIXELS - 1) // PIXELS)",
        ),
        "lanes not merged, single": (
            "tl.sum(tl.sum(squares + seen * deviation * deviation, 1), 0)",
            "tl.sum(tl.sum(squares, 1), 0)",
        ),
        "lanes not merged, split": ("tl.sum(squares + seen * deviation * deviation, 0)", "tl.sum(squares, 0)"),
        "chunks not merged": ("within + count * deviation * deviation", "within"),
        "end of the image counted": (
            "known = (step * PIXELS + lane < count)[:, None] &",
            "known = (step * PIXELS + lane >= 0)[:, None] &",
        ),
        "swapped groups": ("chan // width\n", "(channels - 1 - chan) // width\n"),
        "moments of the first sample": ("(sample * 2 + which) * first_depth", "(sample * 0 + which) * first_depth"),
        "skip's moments of the first sample": (
            "(sample * 2 + which) * second_depth",
            "(sample * 0 + which) * second_depth",
        ),
        "skip's moments never": ("there & (chan >= first_depth)", "there & (chan < 0)"),
        "between channels nothing": ("variance + deviation * deviation, 1)", "variance, 1)"),
        "other channels' groups": ("(chan // width * width)", "(chan // width * 0)"),
        "no bias": ("* rstd * weight + bias", "* rstd * weight"),
        "no eps": ("tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance)"),
        "silu always": ("    if SILU:\n", "    if SILU or not SILU:\n"),
        "skip from its second channel": ("(chan[None, :] - first_depth)", "(chan[None, :] - first_depth + 1)"),
        "skip never": ("known & (chan[None, :] >= first_depth)", "known & (chan[None, :] < 0)"),
        "the first sample's statistics": (
            "group = sample * (channels // width)",
            "group = 0 * sample * (channels // width)",
        ),
    }

    def test_large_mean_in_many_steps(self) -> None:
        """Means of 50 deviations over many steps and chunks: no cancellation in either form."""
        case = Case("group_norm", "far mean", lambda d: test_group_norm.far_mean(d, 30, 2))
        for config in (None, *self.configs):
            assert self.check(case, torch.float32, config, draws=1), (config, self.found)
