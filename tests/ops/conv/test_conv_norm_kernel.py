"""The kernels of convolutions that normalise their result, in every form, on every case of the operators."""

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
SHARED = {"pixels": 32, "columns": 4, "outputs": 64, "slice": 128, "splits": 2, "warps": 4, "stages": 1}
WHOLE = {"pixels": 32, "columns": 8, "outputs": 32, "slice": 64, "splits": 1, "warps": 4, "stages": 2}
NORM = {"norm_channels": 16, "norm_chunks": 3, "norm_warps": 4, "norm_stages": 1}


class TestConv3x3NormKernels(KernelContract):
    contract = test_conv_norm.TestConv3x3Norm
    kernels = conv_norm_kernel
    configs: ClassVar = {
        "shared": Config("tile", **SHARED, norm_form="group", norm_pixels=64, **NORM),
        "shared, in steps": Config("tile", **SHARED, norm_form="group", norm_pixels=8, **NORM),
        "tiles": Config("tile", **WHOLE, norm_form="tiles", norm_pixels=4, **NORM),
        "tiles of a shared reduction": Config("tile", **SHARED, norm_form="tiles", norm_pixels=4, **NORM),
        "split": Config("tile", **WHOLE, norm_form="split", norm_pixels=4, **NORM),
        "library": Config("library", 1, 1, 1, 1, 1, 1, 1, norm_form="group", norm_pixels=4, **NORM),
    }
    mutations: ClassVar = {
        "a part lost": ("tl.static_range(PARTS)", "tl.static_range(PARTS - 1)"),
        "the first sample's sums": ("(part * part_size + start * RESULTS)", "(part * part_size + 0 * start)"),
        "no bias": ("beta = tl.load(bias + chan, mask=front", "beta = tl.load(bias + chan, mask=chan < 0"),
        "skip never": ("other = known & (chan[None, :] >= RESULTS)", "other = known & (chan[None, :] < 0)"),
        "skip from its second channel": ("(chan[None, :] - RESULTS)", "(chan[None, :] - RESULTS + 1)"),
        "other channels counted": (
            "seen = tl.where(inner < WIDTH, 1.0, 0.0)",
            "seen = tl.where(inner < CHANNELS, 1.0, 0.0)",
        ),
        "lanes counted alike": (
            "((pixels - lane + PIXELS - 1) // PIXELS)",
            "((pixels - lane * 0 + PIXELS - 1) // PIXELS)",
        ),
        "lanes not merged": ("squares + seen * deviation * deviation, 1)", "squares, 1)"),
        "the next group's weight": (
            "gamma = tl.load(gain + chan, mask=inner",
            "gamma = tl.load(gain + inner, mask=inner",
        ),
        "the first step for all": ("start = sample + step * PIXELS\n", "start = sample\n"),
        "the first tiles alone": ("elements = tl.maximum(tl.sum(total, 1), 1.0)", "elements = total.shape[1] * 1.0"),
        "another tile's mean": (
            "at + (row + start + lane), mask=known, other=0.0) - first",
            "at + row, mask=known, other=0.0) - first",
        ),
        "between tiles nothing": ("within + count * deviation * deviation", "within"),
        "the first sample's tiles": ("sample * 3 * groups * parts", "sample * 0"),
        "groups in the other order": (
            "own = (inner // WIDTH)[:, None] ==",
            "own = (GROUPS - 1 - inner // WIDTH)[:, None] ==",
        ),
        "the first chunk for all": ("base = (sample * pixels + begin) * RESULTS", "base = (sample * pixels) * RESULTS"),
        "the end of the image": (
            "count = tl.minimum(chunk, pixels - begin)",
            "count = tl.minimum(chunk, pixels - begin) - 1",
        ),
    }

    @pytest.mark.parametrize("most", [0, 512])
    def test_many_tiles_are_merged_before(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same numbers, whether a launch or each program puts the tiles together."""
        monkeypatch.setattr(conv_norm, "MOST_TILES", most)
        for case in CASES["conv3x3_norm"]:
            assert self.check(case, torch.float16, "tiles"), self.found

    def test_many_tiles_of_the_wrong_group(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        """What the test above rests on: the variance in the place of the mean is found out."""
        monkeypatch.setattr(conv_norm, "MOST_TILES", 0)
        monkeypatch.setitem(self.mutations, "swapped", ("tl.load(at + groups, mask", "tl.load(at, mask"))
        self.test_mutations_are_caught("swapped", tmp_path, monkeypatch)


class TestMomentsOfGroups(KernelMutations):
    """What the convolution leaves of its tiles."""

    contract = test_conv_norm.TestConv3x3Norm
    kernels = conv3x3_kernel
    configs: ClassVar = {"tiles": TestConv3x3NormKernels.configs["tiles"]}
    mutations: ClassVar = {
        "pixels of one channel": ("count *= WIDTH", "count *= 1"),
        "the first block's place for all": (
            "outs = block // PHASES * (OUTPUTS // WIDTH)",
            "outs = 0 * (OUTPUTS // WIDTH)",
        ),
        "between channels nothing": ("within + count * tl.sum(deviation * deviation, 1)", "within"),
    }


class TestUpsampleConvNormKernels(KernelContract):
    contract = test_conv_norm.TestUpsampleConvNorm
    kernels = conv3x3_kernel
    configs: ClassVar = TestConv3x3NormKernels.configs
    mutations: ClassVar = {
        "one place for all phases": ("sample, tile * PHASES + phase, tiles", "sample, tile * PHASES, tiles"),
        "dropped tap": ("tl.minimum(end, DEPTH)", "tl.minimum(end, DEPTH - CHANNELS)"),
    }


class TestMomentsOfChannels(KernelMutations):
    """Where groups are no powers of two, channel by channel."""

    contract = test_conv_norm.TestUpsampleConvNorm
    kernels = moments_kernel
    configs: ClassVar = {"tiles": TestConv3x3NormKernels.configs["tiles"]}
    mutations: ClassVar = {
        "the first sample for all": (
            "at = scratch_moments + (sample * 3 * channels + chan)",
            "at = scratch_moments + (0 * sample + chan)",
        ),
    }
