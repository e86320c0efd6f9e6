"""sepconv's kernels in both forms, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.conv import test_sepconv
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.ops.conv.kernels import sepconv as sepconv_kernel
from tinysr_kernels.ops.conv.sepconv import Config
from tinysr_kernels.ops.norm.kernels import channel_moments as moments_kernel


class TestSepconvKernels(KernelContract):
    contract = test_sepconv.TestSepconv
    kernels = sepconv_kernel
    # Small blocks, so that these small images have several of each kind and ragged ends.
    configs: ClassVar = {
        "march": Config("march", rows=2, block_m=16, block_k=256, block_n=32, num_warps=4, num_stages=1),
        "tile": Config("tile", rows=1, block_m=16, block_k=32, block_n=64, num_warps=4, num_stages=2),
    }
    mutations: ClassVar = {
        "dropped row, march": ("lower += v * _tap", "lower += 0.0 * v * _tap"),
        "rows mixed up, march": (
            "zero, below, above,\n                True, True, True",
            "zero, above, below,\n                True, True, True",
        ),
        "no row above, march": (
            "zero, above, zero,\n            True, True, False",
            "zero, zero, zero,\n            True, True, False",
        ),
        "stride 1 for 2, march": (
            "chan, height, width, zero, zero, above",
            "chan, height, width, zero, zero, zero",
        ),
        "dropped row, tile": ("for i in tl.static_range(3)", "for i in tl.static_range(2)"),
        "no left border": ("(column >= 0) & (column < limit)", "(column < limit)"),
        "no right border": ("(column >= 0) & (column < limit)", "(column >= 0) & (limit > 0)"),
        "no lower border, march": ("limit = tl.where((row >= 0) & (row < height)", "limit = tl.where((row >= 0)"),
        "no upper border, tile": ("limit = tl.where((row + i >= 0) & (", "limit = tl.where(("),
        "ones outside": (
            "mask=inside[:, None] & (chan[None, :] < channels), other=0.0)",
            "mask=inside[:, None] & (chan[None, :] < channels), other=1.0)",
        ),
        "transposed taps": (
            "tl.load(depthwise + NUMBER * channels + chan",
            "tl.load(depthwise + (NUMBER % 3 * 3 + NUMBER // 3) * channels + chan",
        ),
        "no bias": ("v = acc + beta", "v = acc"),
        "residual always inside": (
            "v = activate(v, ACTIVATION) + other",
            "v = activate(other + v, ACTIVATION)",
        ),
        "no skip": ("if skip is not None:", "if skip is not None and shortcut_c < 0:"),
        "shortcut's columns for skip": ("weight = shortcut_weight + shortcut_c", "weight = shortcut_weight"),
        "enlarged by one": (
            "((row >> 1) - (first >> 1)) * (width // 2) + (column >> 1)",
            "((row >> 1) - (first >> 1)) * (width // 2) + (column >> 1) + 1",
        ),
        "second sample reads the first": (
            "sample = tl.program_id(2).to(tl.int64)\n    chan",
            "sample = tl.program_id(2).to(tl.int64) * 0\n    chan",
        ),
    }


class TestSepconvMomentsKernels(KernelContract):
    contract = test_sepconv.TestSepconvMoments
    kernels = sepconv_kernel
    configs: ClassVar = TestSepconvKernels.configs
    mutations: ClassVar = {
        "the last row alone": (
            "mean += delta * share",
            "mean += delta",
        ),
        "pixels outside counted": (
            "row_mean, row_squares = tile_moments(stored.to(tl.float32), inside, count)",
            "row_mean, row_squares = tile_moments(stored, column >= 0, count)",
        ),
        "pixels after the end counted": (
            "        mean, squares = tile_moments(stored.to(tl.float32), inside, count)",
            "        mean, squares = tile_moments(stored, pixel >= 0, count)",
        ),
        "rows not merged": ("row_squares + delta * delta", "row_squares + 0.0 * delta"),
        "one row's count": ("count *= steps.to(tl.float32)", "count *= 1.0"),
        "deviations from zero": ("v - mean[None, :], 0.0)", "v, 0.0)"),
        "a third of the numbers": ("sample * 3 * outputs * parts", "sample * outputs * parts"),
        "wrong channel": ("outs.to(tl.int64) * parts + part", "outs.to(tl.int64) * parts"),
    }


class TestMergeOfMoments(KernelContract):
    contract = test_sepconv.TestSepconvMoments
    kernels = moments_kernel
    configs: ClassVar = TestSepconvKernels.configs
    mutations: ClassVar = {
        "unweighted": ("weighted += count * (", "weighted += 1.0 * ("),
        "between parts nothing": ("+ count * deviation * deviation", "+ 0.0 * count"),
        "within parts nothing": ("squares += tl.load", "squares += 0.0 * tl.load"),
        "sum for variance": ("tl.sum(squares, 0) / pixels)", "tl.sum(squares, 0))"),
        "swapped": ("scratch_mean + sample * stride + chan, mean)", "scratch_mean + sample * stride + chan, pixels)"),
    }
