"""The kernels of convolutions that normalize their result, in every form, on every case of the operators."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.ops.cases import CASES
from tests.ops.conv import test_conv_norm
from tests.ops.kernel_contract import KernelContract, KernelMutations
from tinysr_kernels.ops.conv import conv_norm
from tinysr_kernels.ops.conv.conv_norm import Config
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.kernels import conv_norm as conv_norm_kernel
from tinysr_kernels.ops.norm.kernels import channel_moments as moments_kernel

# Small blocks, so that these small images have several of each kind and ragged ends.
WARPS = {"num_warps": 4, "num_stages": 1}
SPLIT_K = {"block_m": 32, "tile_width": 4, "block_n": 64, "block_k": 128, "split_k": 2, **WARPS}
WHOLE = {"block_m": 32, "tile_width": 8, "block_n": 32, "block_k": 64, "split_k": 1, **WARPS, "num_stages": 2}
NORM = {"norm_block_n": 16, "norm_chunks": 3, "norm_num_warps": 4, "norm_num_stages": 1}


class TestConv3x3NormKernels(KernelContract):
    contract = test_conv_norm.TestConv3x3Norm
    kernels = conv_norm_kernel
    configs: ClassVar = {
        "split-K": Config("tile", **SPLIT_K, norm_form="group", norm_block_m=64, **NORM),
        "split-K, in steps": Config("tile", **SPLIT_K, norm_form="group", norm_block_m=8, **NORM),
        "tiles": Config("tile", **WHOLE, norm_form="tiles", norm_block_m=4, **NORM),
        "tiles after split-K": Config("tile", **SPLIT_K, norm_form="tiles", norm_block_m=4, **NORM),
        "split": Config("tile", **WHOLE, norm_form="split", norm_block_m=4, **NORM),
        "library": Config("library", 1, 1, 1, 1, 1, 1, 1, norm_form="group", norm_block_m=4, **NORM),
    }
    mutations: ClassVar = {
        "a split lost": ("tl.static_range(SPLIT_K)", "tl.static_range(SPLIT_K - 1)"),
        "the first sample's sums": ("(split * split_size + start * OUT_CHANNELS)", "(split * split_size + 0 * start)"),
        "no bias": ("beta = tl.load(bias + chan, mask=front", "beta = tl.load(bias + chan, mask=chan < 0"),
        "skip never": ("other = known & (chan[None, :] >= OUT_CHANNELS)", "other = known & (chan[None, :] < 0)"),
        "skip from its second channel": ("(chan[None, :] - OUT_CHANNELS)", "(chan[None, :] - OUT_CHANNELS + 1)"),
        "other channels counted": (
            "seen = tl.where(inner < GROUP_SIZE, 1.0, 0.0)",
            "seen = tl.where(inner < BLOCK_N, 1.0, 0.0)",
        ),
        "lanes counted alike": (
            "((pixels - lane + BLOCK_M - 1) // BLOCK_M)",
            "((pixels - lane * 0 + BLOCK_M - 1) // BLOCK_M)",
        ),
        "lanes not merged": ("squares + seen * deviation * deviation, 1)", "squares, 1)"),
        "the next group's weight": (
            "gamma = tl.load(norm_weight + chan, mask=inner",
            "gamma = tl.load(norm_weight + inner, mask=inner",
        ),
        "the first step for all": ("start = sample + step * BLOCK_M\n", "start = sample\n"),
        "the first tiles alone": ("elements = tl.maximum(tl.sum(total, 1), 1.0)", "elements = total.shape[1] * 1.0"),
        "another tile's mean": (
            "at + (row + start + lane), mask=known, other=0.0) - first",
            "at + row, mask=known, other=0.0) - first",
        ),
        "between tiles nothing": ("within + count * deviation * deviation", "within"),
        "the first sample's tiles": ("sample * 3 * groups * parts", "sample * 0"),
        "groups in the other order": (
            "own = (inner // GROUP_SIZE)[:, None] ==",
            "own = (GROUPS - 1 - inner // GROUP_SIZE)[:, None] ==",
        ),
        "the first chunk for all": (
            "base = (sample * pixels + begin) * OUT_CHANNELS",
            "base = (sample * pixels) * OUT_CHANNELS",
        ),
        "the end of the image": (
            "count = tl.minimum(chunk_pixels, pixels - begin)",
            "count = tl.minimum(chunk_pixels, pixels - begin) - 1",
        ),
    }

    @pytest.mark.parametrize("most", [0, 512])
    def test_many_tiles_are_merged_before(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same numbers, whether a launch or each program merges the tiles' statistics."""
        monkeypatch.setattr(conv_norm, "MAX_TILES", most)
        for case in CASES["conv3x3_norm"]:
            assert self.check(case, torch.float16, "tiles"), self.found

    def test_many_tiles_of_the_wrong_group(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        """The test above can fail: the mean in the place of the variance is caught."""
        monkeypatch.setattr(conv_norm, "MAX_TILES", 0)
        monkeypatch.setitem(self.mutations, "swapped", ("tl.load(at + groups, mask", "tl.load(at, mask"))
        self.test_mutations_are_caught("swapped", tmp_path, monkeypatch)


class TestMomentsOfGroups(KernelMutations):
    """The statistics per group that the convolution stores of its tiles."""

    contract = test_conv_norm.TestConv3x3Norm
    kernels = conv3x3_kernel
    configs: ClassVar = {"tiles": TestConv3x3NormKernels.configs["tiles"]}
    mutations: ClassVar = {
        "pixels of one channel": ("count *= GROUP_SIZE", "count *= 1"),
        "the first block's place for all": (
            "outs = block // PHASES * (BLOCK_N // GROUP_SIZE)",
            "outs = 0 * (BLOCK_N // GROUP_SIZE)",
        ),
        "between channels nothing": ("within + count * tl.sum(deviation * deviation, 1)", "within"),
    }


class TestUpsampleConvNormKernels(KernelContract):
    contract = test_conv_norm.TestUpsampleConvNorm
    kernels = conv3x3_kernel
    configs: ClassVar = TestConv3x3NormKernels.configs
    mutations: ClassVar = {
        "one place for all phases": ("number = tile * PHASES + phase", "number = tile * PHASES"),
        "dropped tap": ("tl.minimum(end, depth)", "tl.minimum(end, depth - channels)"),
    }


class TestMomentsOfChannels(KernelMutations):
    """Statistics per channel, where group sizes are no powers of two."""

    contract = test_conv_norm.TestUpsampleConvNorm
    kernels = moments_kernel
    configs: ClassVar = {"tiles": TestConv3x3NormKernels.configs["tiles"]}
    mutations: ClassVar = {
        "the first sample for all": (
            "at = scratch_moments + (sample * 3 * channels + chan)",
            "at = scratch_moments + (0 * sample + chan)",
        ),
    }
