"""The kernels of adain_fix, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import torch

from tests.ops.image import test_adain
from tests.ops.image.color_kernel import ColorKernelContract
from tinysr_kernels.ops.image.adain import MAX_PARTS, AdaINFix, Config
from tinysr_kernels.ops.image.kernels import adain as adain_kernel


class TestAdainFixKernels(ColorKernelContract):
    contract = test_adain.TestAdainFix
    kernels = adain_kernel
    configs: ClassVar = {"several blocks": Config(block_size=256, num_warps=1, part_block_size=16)}
    mutations: ClassVar = {
        "the first block for all": (
            "pixel = block // CHANNELS * BLOCK_SIZE + rest // CHANNELS",
            "pixel = block * 0 + rest // CHANNELS",
        ),
        "one step": ("steps = (blocks - part + parts - 1) // parts", "steps = 1"),
        "channel of an element": (
            "own = chan == c\n        count = tl.sum(tl.where(own, seen, 0.0), 0)\n        mean",
            "own = chan == c % 1\n        count = tl.sum(tl.where(own, seen, 0.0), 0)\n        mean",
        ),
        "past the end": ("deviation = tl.where(mask, v - mean, 0.0)", "deviation = v - mean"),
        "measured without clamp": ("unit_range(v), float", "v, float"),
        "style in x's place": ("scratch + CHANNELS * max_parts + part - x_parts", "scratch + part - x_parts"),
        "no variance between parts": ("+ count * deviation * deviation", "+ 0.0 * count"),
        "means of the first part": ("mean = (first + shift) * scale", "mean = first * scale"),
        "biased": ("tl.maximum(total - 1.0, 1.0)", "total"),
        "bytes as they are": ("tl.where(index < CHANNELS, 1.0, style_scale)", "tl.where(index < CHANNELS, 1.0, 1.0)"),
        "no eps": ("variance * scale * scale + eps", "variance * scale * scale + 0.0 * eps"),
        "no least": ("tl.maximum(_pick(std, index, c), least)", "tl.maximum(_pick(std, index, c), 0.0 * least)"),
        "x's own mean": ("_pick(mean, index, CHANNELS + c), style_mean)", "_pick(mean, index, c), style_mean)"),
        "the first sample's parts": (
            "row = scratch_moments + sample * 3 * kind_step",
            "row = scratch_moments + sample * 0 * kind_step",
        ),
        "the first sample": (
            "image = x + sample * sample_stride\n    v, mask",
            "image = x + sample * 0\n    v, mask",
        ),
        "channels of the block": ("rest % CHANNELS + tl.arange", "0 * rest + tl.arange"),
        "a pixel too many": (
            "mask = at < tl.full((), CHANNELS, tl.int64) * pixels",
            "mask = at <= tl.full((), CHANNELS, tl.int64) * pixels",
        ),
        "rows apart": ("(row + down).to(tl.int64)", "(row + 0 * down).to(tl.int64)"),
        "mapped without clamp": ("    if CLAMP:\n        v = unit_range(v)\n    v = unit_range", "    v = unit_range"),
        "no clamp": ("unit_range((v - center) * gain + style_mean)", "((v - center) * gain + style_mean)"),
    }

    flag_mutations: ClassVar = {
        "lost in the clamp": ('tl.abs(v) < float("inf"), unit_range', "tl.abs(v) >= 0.0, unit_range"),
        "never": ("tl.sum(bad, 0) == 0", "tl.sum(bad, 0) >= 0"),
        "of the style": ("(index >= CHANNELS) |", "(index < CHANNELS) |"),
        "of the first channel": ("(index >= CHANNELS) |", "(index >= 1) |"),
    }

    def test_statistics_far_from_zero(self) -> None:
        """Means of 50 deviations, over parts of one block and of several."""
        for config in (None, *self.configs):
            assert self.check(test_adain.FAR_FROM_ZERO, torch.float32, config, draws=1), (config, self.found)

    def test_two_launches_and_a_bounded_number_of_parts(self) -> None:
        """For any sizes and layouts, without copies."""
        for size, small in (((512, 512), (128, 128)), ((4096, 4096), (1024, 1024)), ((16, 20000), (4, 5000))):
            x = torch.empty(1, 3, *size, dtype=torch.float16, device="meta")
            style = torch.empty(1, 3, *small, dtype=torch.uint8, device="meta")
            plan, _ = AdaINFix(x, style, 1e-5, 0.0, True, torch.uint8).planned()
            assert plan.kernels == 2
            parts = plan.launches[0].arguments["x_parts"]
            assert parts <= MAX_PARTS
            block_size = plan.launches[0].arguments["BLOCK_SIZE"]
            assert parts % 3 == 0 or parts * block_size >= x.numel()
