"""conv3x3's kernels in every form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.kernels.kernels import KernelContract
from tests.ops import test_conv3x3
from tinysr_kernels.ops import conv3x3_kernel, moments_kernel
from tinysr_kernels.ops.conv_tiles import LIBRARY, Config


class TestConv3x3Kernels(KernelContract):
    contract = test_conv3x3.TestConv3x3
    kernels = conv3x3_kernel
    # Small blocks, so that these small images have several of each kind and ragged ends.
    configs: ClassVar = {
        "shared": Config("tile", pixels=32, columns=4, outputs=64, slice=128, splits=2, warps=4, stages=1),
        "whole": Config("tile", pixels=32, columns=8, outputs=32, slice=64, splits=1, warps=4, stages=2),
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
        "no border within a tap": ("mask=((borders >> tap) & 1) != 0, other", "mask=borders != 0, other"),
        "ones outside": ("mask=seen, other=0.0", "mask=seen, other=1.0"),
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


class TestConv3x3MomentsKernels(KernelContract):
    contract = test_conv3x3.TestConv3x3Moments
    kernels = conv3x3_kernel
    configs: ClassVar = TestConv3x3Kernels.configs
    mutations: ClassVar = {
        "pixels outside counted": ("of_tile(stored.to(tl.float32), inside)", "of_tile(stored, lane >= 0)"),
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
