"""conv3x3's kernels in every form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.ops.cases import CASES
from tests.ops.conv import test_conv3x3
from tests.ops.kernel_contract import KernelContract, KernelMutations
from tinysr_kernels.launch import configs
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.conv_tiles import LIBRARY, Config, few
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.kernels import conv_few as conv_few_kernel
from tinysr_kernels.ops.norm.kernels import channel_moments as moments_kernel
from tinysr_kernels.ops.norm.kernels import norm_silu_prologue as prologue_kernel

FEW = few(7, 3, 64, 2)


class TestConv3x3Kernels(KernelContract):
    contract = test_conv3x3.TestConv3x3
    kernels = conv3x3_kernel
    # Small blocks, so that these small images have several of each kind and ragged ends.
    configs: ClassVar = {
        "shared": Config("tile", pixels=32, columns=4, outputs=64, slice=128, splits=5, warps=4, stages=1),
        "whole": Config("tile", pixels=32, columns=8, outputs=32, slice=32, splits=1, warps=4, stages=2),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "dropped tap": ("tl.minimum(end, DEPTH)", "tl.minimum(end, DEPTH - CHANNELS)"),
        "transposed taps": (
            "(tap // SIDE * width + tap % SIDE) * CHANNELS + k",
            "(tap % SIDE * width + tap // SIDE) * CHANNELS + k",
        ),
        "no right border": ("(column + j >= 0) & (column + j < width)", "column + j >= 0"),
        "no upper border": ("(row + i >= 0) & (row + i < height)", "row + i < height"),
        "no border within a tap": ("seen = ((borders >> tap) & 1) != 0", "seen = borders != 0"),
        "ones outside": ("shift[None, :]), mask=seen, other=0.0", "shift[None, :]), mask=seen, other=1.0"),
        "last outputs for all": ("weight += outs[None, :] * DEPTH", "weight += (outputs - 1 - outs)[None, :] * DEPTH"),
        "one row for the tile": ("(lane // COLUMNS * width + lane % COLUMNS) * (", "(lane % COLUMNS) * ("),
        "stride of 1": ("column * STRIDE - 1 + right", "column - 1 + right"),
        "parts overlap": ("end = begin + share", "end = begin + share * 2"),
        "a part lost": ("tl.static_range(PARTS)", "tl.static_range(PARTS - 1)"),
        "shortcut in every part": ("begin -= tl.cdiv(DEPTH, SLICE) * SLICE", "begin = 0"),
        "no skip": ("if skip is not None:", "if skip is not None and FIRST < 0:"),
        "shortcut's columns for skip": ("shortcut_weight + FIRST,", "shortcut_weight,"),
        "second sample reads the first": (
            "x + ((sample * height + (top",
            "x + ((sample * 0 + (top",
        ),
        "no bias": ("v = acc + beta", "v = acc"),
        "bias always zero": ("mask=outs < outputs, other=0.0).to", "mask=outs < 0, other=0.0).to"),
        "residual always inside": ("v = activate(v, ACTIVATION) + other", "v = activate(v + other, ACTIVATION)"),
    }

    def test_few_results_alone_are_gathered(self) -> None:
        """By the heuristic, and refused where they are not few or a step of 2 apart."""
        operator = REGISTRY["conv3x3"]
        for case in CASES["conv3x3"]:
            arguments = case.arguments(torch.float16)
            plan, choice = operator.plan(**arguments)
            few = plan.result.shape[1] <= 7 and "stride" not in arguments and "shortcut" not in arguments
            assert (choice.config.form == "few") == few
            if not few:
                with configs.given(conv3x3=FEW), pytest.raises(ValueError, match="few"):
                    operator.plan(**arguments)


class TestFewResults(KernelMutations):
    """The form for few results, and what it and the other share: a GroupNorm before."""

    contract = test_conv3x3.TestConv3x3
    kernels = conv_few_kernel
    configs: ClassVar = {}
    mutations: ClassVar = {
        "transposed taps": ("(tap // 3 - 1) * COLUMNS + tap % 3 - 1", "(tap % 3 - 1) * COLUMNS + tap // 3 - 1"),
        "dropped tap": ("(place % RESULTS == result) & (tap < 9)", "(place % RESULTS == result) & (tap < 8)"),
        "no rows' border": ("// across * (ROWS - 2) - 1", "// across * (ROWS - 2)"),
        "no columns' border": ("% across * (COLUMNS - 2) - 1", "% across * (COLUMNS - 2)"),
        "tiles apart": ("% across * (COLUMNS - 2) - 1", "% across * COLUMNS - 1"),
        "the border stored": ("(lane % COLUMNS > 0)", "(lane % COLUMNS >= 0)"),
        "the first slice for all": ("chan = start + tl.arange(0, SLICE)", "chan = tl.arange(0, SLICE)"),
        "the first sample for all": ("base = (sample * height + top)", "base = (0 * sample + top)"),
        "norm of the border": ("tl.where(known, y, 0.0)", "y"),
        "no norm": ("if moments is not None:", "if moments is not None and CHANNELS < 0:"),
        "no norm's bias": (
            "shift = tl.load(norm_bias + chan, mask=there",
            "shift = tl.load(norm_bias + chan, mask=chan < 0",
        ),
        "results swapped": ("outs[None, :] == result, total", "outs[None, :] == RESULTS - 1 - result, total"),
        "other channels' groups": ("(chan // WIDTH * WIDTH)", "(chan // WIDTH * 0)"),
        "between channels nothing": ("variance + deviation * deviation, 1)", "variance, 1)"),
        "moments of the first sample": ("moments + sample * 2 * channels + member", "moments + 0 * sample + member"),
        "no eps": ("/ WIDTH, eps)", "/ WIDTH, 0.0)"),
        "no silu": ("y += y * _tanh(y)", "y += y"),
    }


class TestNormBefore(KernelMutations):
    """A GroupNorm before the implicit product."""

    contract = test_conv3x3.TestConv3x3
    kernels = conv3x3_kernel
    configs: ClassVar = TestConv3x3Kernels.configs
    mutations: ClassVar = {
        "norm of the border": ("tl.where(seen, y, 0.0)", "y"),
        "no gain": ("tl.load(scale + CHANNELS + chan)", "tl.load(scale + chan)"),
        "the first sample's scale": ("scratch_scale + sample * 2 * CHANNELS", "scratch_scale + sample * 0"),
        "the tap's first channels": ("chan = k % CHANNELS", "chan = lane % CHANNELS"),
        "the slice's first channels": ("chan = tl.multiple_of(start % CHANNELS, SLICE) + lane", "chan = lane"),
        "no norm's bias": ("tl.load(norm_bias + chan).to", "0.0 * tl.load(norm_bias + chan).to"),
    }


class TestScales(KernelMutations):
    """What the implicit product takes of the moments."""

    contract = test_conv3x3.TestConv3x3
    kernels = prologue_kernel
    configs: ClassVar = {"shared": TestConv3x3Kernels.configs["shared"]}
    mutations: ClassVar = {
        "mean for gain": ("tl.store(at + channels, gain", "tl.store(at + channels, mean"),
        "the first sample for all": ("scratch_scale + sample * 2", "scratch_scale + sample * 0"),
        "other groups": ("(chan // WIDTH * WIDTH)", "(chan // WIDTH * 0)"),
    }


class TestConv3x3MomentsKernels(KernelContract):
    contract = test_conv3x3.TestConv3x3Moments
    kernels = conv3x3_kernel
    configs: ClassVar = TestConv3x3Kernels.configs
    mutations: ClassVar = {
        "pixels outside counted": ("tile_moments(stored.to(tl.float32), inside)", "tile_moments(stored, lane >= 0)"),
        "the first tile's place for all": ("sample, tile * PHASES + phase, tiles", "sample, phase, tiles"),
    }


class TestMomentsOfStoredResults(KernelContract):
    """Where a reduction is shared or a library computes, one more launch takes the moments."""

    contract = test_conv3x3.TestConv3x3Moments
    kernels = moments_kernel
    configs: ClassVar = TestConv3x3Kernels.configs
    mutations: ClassVar = {
        "the first block for all": ("at = (sample * pixels + start) * outputs", "at = (sample * pixels) * outputs"),
        "the first sample for all": ("at = (sample * pixels + start)", "at = (0 * sample * pixels + start)"),
        "pixels behind the end": ("inside = start + lane < pixels", "inside = start + lane < pixels + 1"),
    }
