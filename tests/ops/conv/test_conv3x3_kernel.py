"""conv3x3's kernels in every form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.ops.cases import CASES, Case
from tests.ops.conv import test_conv3x3
from tests.ops.kernel_contract import DRAWS, KernelContract, KernelMutations
from tinysr_kernels.launch import configs
from tinysr_kernels.ops.conv.conv3x3 import Conv3x3
from tinysr_kernels.ops.conv.implicit_gemm import LIBRARY, Config
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.kernels import conv_few as conv_few_kernel
from tinysr_kernels.ops.norm.kernels import channel_moments as moments_kernel
from tinysr_kernels.ops.norm.kernels import norm_silu_prologue as prologue_kernel

FEW = Config("few", block_m=256, tile_width=16, block_n=32, block_k=32, split_k=1, num_warps=8, num_stages=1)


class TestConv3x3Kernels(KernelContract):
    contract = test_conv3x3.TestConv3x3
    kernels = conv3x3_kernel
    # Small blocks, so that these small images have several of each kind and ragged ends.
    configs: ClassVar = {
        "split-K": Config(
            "tile", block_m=32, tile_width=4, block_n=64, block_k=128, split_k=5, num_warps=4, num_stages=1
        ),
        "whole": Config("tile", block_m=32, tile_width=8, block_n=32, block_k=32, split_k=1, num_warps=4, num_stages=2),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "dropped tap": ("tl.minimum(end, depth)", "tl.minimum(end, depth - channels)"),
        "transposed taps": (
            "(tap // KERNEL_SIZE * width + tap % KERNEL_SIZE) * channels + chan",
            "(tap % KERNEL_SIZE * width + tap // KERNEL_SIZE) * channels + chan",
        ),
        "taps end late": ("tl.umulhi(4 * k, reciprocal)", "tl.umulhi(4 * k, reciprocal - 1)"),
        "padding on both sides of rows": ("down -= PADDING", "down -= 1"),
        "padding on both sides of columns": ("right -= PADDING", "right -= 1"),
        "no right border": ("(column + j >= 0) & (column + j < width)", "column + j >= 0"),
        "no upper border": ("(row + i >= 0) & (row + i < height)", "row + i < height"),
        "no border within a tap": ("valid = ((valid_taps >> tap[None, :]) & 1) != 0", "valid = valid_taps != 0"),
        "ones outside": ("shift[None, :]), mask=valid, other=0.0", "shift[None, :]), mask=valid, other=1.0"),
        "outputs reversed": (
            "weight += outs[None, :] * depth",
            "weight += (out_channels - 1 - outs)[None, :] * depth",
        ),
        "one row for the tile": ("(lane // TILE_WIDTH * width + lane % TILE_WIDTH) * (", "(lane % TILE_WIDTH) * ("),
        "stride of 1": ("column * STRIDE + right", "column + right"),
        "splits overlap": ("end = begin + k_per_split", "end = begin + k_per_split * 2"),
        "a split lost": ("tl.static_range(SPLIT_K)", "tl.static_range(SPLIT_K - 1)"),
        "shortcut in every split": ("begin -= tl.cdiv(depth, BLOCK_K) * BLOCK_K", "begin = 0"),
        "no skip": ("if skip is not None:", "if skip is not None and shortcut_c < 0:"),
        "shortcut's columns for skip": ("shortcut_weight + shortcut_c,", "shortcut_weight,"),
        "second sample reads the first": (
            "x + ((sample * height + (top",
            "x + ((sample * 0 + (top",
        ),
        "no bias": ("v = acc + beta", "v = acc"),
        "bias always zero": ("mask=outs < outputs, other=0.0).to", "mask=outs < 0, other=0.0).to"),
        "residual always inside": ("v = activate(v, ACTIVATION) + other", "v = activate(v + other, ACTIVATION)"),
    }

    def test_the_form_for_few_outputs(self) -> None:
        """Chosen by the heuristic for narrow loads; refused for more outputs, stride 2 and a shortcut."""
        for case in CASES["conv3x3"]:
            arguments = case.arguments(torch.float16)
            call = Conv3x3(**arguments)
            plan, choice = call.planned()
            few = plan.result.shape[1] <= 7 and "stride" not in arguments and "shortcut" not in arguments
            wide = arguments["x"].shape[1] % 8 == 0
            assert (choice.config.form == "few") == (few and not wide)
            if not few:
                with configs.given(conv3x3=FEW), pytest.raises(ValueError, match="few needs at most 7 outputs"):
                    call.planned()


class TestFewOutputs(KernelMutations):
    """The form for few outputs, and what it shares with the implicit GEMM: the norm prologue."""

    contract = test_conv3x3.TestConv3x3
    kernels = conv_few_kernel
    configs: ClassVar = {}
    mutations: ClassVar = {
        "transposed taps": ("(tap // 3 - 1) * TILE_WIDTH + tap % 3 - 1", "(tap % 3 - 1) * TILE_WIDTH + tap // 3 - 1"),
        "dropped tap": (
            "(gemm_column % OUT_CHANNELS == output) & (tap < 9)",
            "(gemm_column % OUT_CHANNELS == output) & (tap < 8)",
        ),
        "no rows' border": ("// across * (TILE_HEIGHT - 2) - 1", "// across * (TILE_HEIGHT - 2)"),
        "no columns' border": ("% across * (TILE_WIDTH - 2) - 1", "% across * (TILE_WIDTH - 2)"),
        "tiles apart": ("% across * (TILE_WIDTH - 2) - 1", "% across * TILE_WIDTH - 1"),
        "the border stored": ("(lane % TILE_WIDTH > 0)", "(lane % TILE_WIDTH >= 0)"),
        "the first channels for all": ("chan = start + tl.arange(0, BLOCK_K)", "chan = tl.arange(0, BLOCK_K)"),
        "the first sample for all": ("base = (sample * height + top)", "base = (0 * sample + top)"),
        "norm of the border": ("tl.where(known, y, 0.0)", "y"),
        "no norm": ("if norm_moments is not None:", "if norm_moments is not None and CHANNELS < 0:"),
        "no norm's bias": (
            "shift = tl.load(norm_bias + chan, mask=k_mask",
            "shift = tl.load(norm_bias + chan, mask=chan < 0",
        ),
        "outputs swapped": ("outs[None, :] == output, total", "outs[None, :] == OUT_CHANNELS - 1 - output, total"),
        "other channels' groups": ("(chan // GROUP_SIZE * GROUP_SIZE)", "(chan // GROUP_SIZE * 0)"),
        "channels for groups": ("(chan // GROUP_SIZE * GROUP_SIZE)", "chan"),
        "between channels nothing": ("variance + deviation * deviation, 1)", "variance, 1)"),
        "moments of the first sample": ("moments + sample * 2 * channels + member", "moments + 0 * sample + member"),
        "no eps": ("/ GROUP_SIZE, eps)", "/ GROUP_SIZE, 0.0)"),
    }

    def check(self, case: Case, dtype: torch.dtype, config: str | None, draws: int = DRAWS) -> bool:
        """In float32, for which the heuristic chooses this form where it applies; other cases pass."""
        choice = Conv3x3(**case.arguments(torch.float32)).planned()[1]
        return choice.config.form != "few" or super().check(case, torch.float32, config, draws)


class TestNormPrologue(KernelMutations):
    """A GroupNorm before the implicit GEMM."""

    contract = test_conv3x3.TestConv3x3
    kernels = conv3x3_kernel
    configs: ClassVar = TestConv3x3Kernels.configs
    mutations: ClassVar = {
        "norm of the border": ("tl.where(valid, y, 0.0)", "y"),
        "no gain": ("tl.load(scale + channels + chan)", "tl.load(scale + chan)"),
        "the first sample's scale": ("scratch_scale + sample * 2 * channels", "scratch_scale + sample * 0"),
        "the tap's first channels": ("chan = k - tap * channels", "chan = lane % channels"),
        "no norm's bias": ("tl.load(norm_bias + chan).to", "0.0 * tl.load(norm_bias + chan).to"),
        "no silu": ("y += y * _tanh(y)", "y += y"),
        "sigmoid of twice as much": ("y += y * _tanh(y)", "y += y * _tanh(2.0 * y)"),
    }


class TestMeanAndGain(KernelMutations):
    """Mean and gain per channel, which the implicit GEMM's prologue consumes."""

    contract = test_conv3x3.TestConv3x3
    kernels = prologue_kernel
    configs: ClassVar = {"split-K": TestConv3x3Kernels.configs["split-K"]}
    mutations: ClassVar = {
        "mean for gain": ("tl.store(at + channels, gain", "tl.store(at + channels, mean"),
        "the first sample for all": ("scratch_scale + sample * 2", "scratch_scale + sample * 0"),
        "other groups": ("(chan // GROUP_SIZE * GROUP_SIZE)", "(chan // GROUP_SIZE * 0)"),
        "channels for groups": ("(chan // GROUP_SIZE * GROUP_SIZE)", "chan"),
        "between channels nothing": ("variance + deviation * deviation, 1)", "variance, 1)"),
        "moments of the first sample": ("moments + sample * 2 * channels + member", "moments + 0 * sample + member"),
        "no eps": ("/ GROUP_SIZE, eps)", "/ GROUP_SIZE, 0.0)"),
    }


class TestConv3x3MomentsKernels(KernelContract):
    contract = test_conv3x3.TestConv3x3Moments
    kernels = conv3x3_kernel
    configs: ClassVar = TestConv3x3Kernels.configs
    mutations: ClassVar = {
        "pixels outside counted": (
            "tile_moments(stored.to(tl.float32), inside, count)",
            "tile_moments(stored, lane >= 0, count)",
        ),
        "whole tiles counted": ("inside, count)", "inside, BLOCK_M * 1.0)"),
        "the first tile's place for all": ("number = tile * PHASES + phase", "number = phase"),
    }


class TestMomentsOfStoredResults(KernelContract):
    """With split-K or the library, one more launch computes the statistics."""

    pytestmark = pytest.mark.long

    contract = test_conv3x3.TestConv3x3Moments
    kernels = moments_kernel
    configs: ClassVar = TestConv3x3Kernels.configs
    mutations: ClassVar = {
        "the first block for all": ("at = (sample * pixels + start) * outputs", "at = (sample * pixels) * outputs"),
        "the first sample for all": ("at = (sample * pixels + start)", "at = (0 * sample * pixels + start)"),
        "pixels past the end": ("inside = start + lane < pixels", "inside = start + lane < pixels + 1"),
    }
