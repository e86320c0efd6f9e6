"""The kernels of adain_fix, wavelet_fix and clamp_image, on every case of the operators."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.ops.cases import CASES
from tests.ops.contract import errors, relaid
from tests.ops.image import test_color
from tests.ops.kernel_contract import KernelContract, mutated
from tinysr_kernels.ops.image import adain, clamp_image, wavelet
from tinysr_kernels.ops.image.kernels import adain as adain_kernel
from tinysr_kernels.ops.image.kernels import clamp_image as clamp_image_kernel
from tinysr_kernels.ops.image.kernels import resize as resize_kernel
from tinysr_kernels.ops.image.kernels import wavelet as wavelet_kernel


class ColorKernelContract(KernelContract):
    """What the color fixes have in common: flags as a second result, and images in bytes."""

    contract: ClassVar[type[test_color.ColorContract]]
    flag_mutations: ClassVar[dict[str, tuple[str, str]]]  # as `mutations`, for what only `test_flags` can see

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "flag_mutation" in metafunc.fixturenames:
            metafunc.parametrize("flag_mutation", list(self.flag_mutations))

    def test_flag_mutations_are_caught(
        self, flag_mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with mutated(self.kernels, *self.flag_mutations[flag_mutation], tmp_path) as wrong:
            for name, value in vars(wrong).items():
                if name in vars(self.kernels) and type(value).__name__ == "Kernel":
                    monkeypatch.setattr(self.kernels, name, value)
            with pytest.raises(AssertionError):
                self.test_flags()

    def test_bytes(self) -> None:
        for config in (None, *self.configs):
            self.contract().check_bytes(lambda arguments, config=config: self.call(arguments, config))

    def test_flags(self) -> None:
        for config in (None, *self.configs):
            self.contract().check_flags(lambda arguments, config=config: self.call(arguments, config))

    def test_cropped_image(self) -> None:
        """Rows that lie apart, as of an image that was padded, give the bits of the image alone."""
        for case in CASES[self.contract.op]:
            arguments = case.arguments(torch.float16)
            x = relaid(relaid(arguments["x"], "sliced"), "channels_last")
            wide = torch.full((x.shape[0], x.shape[2] + 2, x.shape[3] + 3, x.shape[1]), torch.nan, dtype=x.dtype)
            cropped = wide.permute(0, 3, 1, 2)[:, :, : x.shape[2], : x.shape[3]]
            cropped.copy_(x)
            for got, want in zip(self.call({**arguments, "x": cropped}), self.call(arguments), strict=True):
                assert torch.equal(got, want)


class TestAdainFixKernels(ColorKernelContract):
    contract = test_color.TestAdainFix
    kernels = adain_kernel
    configs: ClassVar = {"several blocks": adain.Config(block_size=256, num_warps=1, part_block_size=16)}
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
        arguments, wide = test_color.far_from_zero()
        exact, eager = test_color.adain_oracle(**wide), test_color.adain_eager(**arguments)
        for config in (None, *self.configs):
            found = errors(self.call(arguments, config), exact)
            assert all(mine <= 2 * theirs for mine, theirs in zip(found, errors(eager, exact), strict=True)), config

    def test_two_launches_and_a_bounded_number_of_parts(self) -> None:
        """For any sizes and layouts, without copies."""
        for size, small in (((512, 512), (128, 128)), ((4096, 4096), (1024, 1024)), ((16, 20000), (4, 5000))):
            x = torch.empty(1, 3, *size, dtype=torch.float16, device="meta")
            style = torch.empty(1, 3, *small, dtype=torch.uint8, device="meta")
            plan, _ = adain.AdaINFix(x, style, 1e-5, 0.0, True, torch.uint8).planned()
            assert plan.kernels == 2
            parts = plan.launches[0].arguments["x_parts"]
            assert parts <= adain.MAX_PARTS
            block_size = plan.launches[0].arguments["BLOCK_SIZE"]
            assert parts % 3 == 0 or parts * block_size >= x.numel()


class TestWaveletFixKernels(ColorKernelContract):
    contract = test_color.TestWaveletFix
    kernels = wavelet_kernel
    configs: ClassVar = {"several blocks": wavelet.Config(block_size=16, num_warps=1)}
    mutations: ClassVar = {
        "mean of three": ("(0.5 - 0.25 * step * step)", "(1.0 / 3)"),
        "no dilation across": ("column - DILATION * channels", "column - channels"),
        "no dilation down": ("y + step * DILATION", "y + step"),
        "border of another channel": ("length - channels + chan)", "length - 1)"),
        "details lost": ("unit_range(unit_range(v) + total)", "unit_range(unit_range(0.0 * v) + total)"),
        "not clamped before": ("unit_range(unit_range(v) + total)", "unit_range(v + total)"),
        "no clamp": ("unit_range(unit_range(v) + total)", "unit_range(v) + total"),
        "one sample": ("program_id(2).to(tl.int64)\n    bad", "program_id(2).to(tl.int64) * 0\n    bad"),
    }

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("unit_range(v) - unit_range(other)", "v - unit_range(other)"),
            ("unit_range(v) - unit_range(other)", "unit_range(v) - other"),
            ("unit_range(v) - unit_range(other)", "unit_range(v)"),
            ("base += sample * base_sample_stride", "base += 0 * sample * base_sample_stride"),
            ("(offs_n // channels).to(tl.int64) * base_column", "(offs_n // channels).to(tl.int64) * 0 * base_column"),
        ],
    )
    def test_the_first_launch(self, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Mutations of what resize_kernel does for this operator alone."""
        monkeypatch.setattr(self, "kernels", resize_kernel, raising=False)
        monkeypatch.setattr(self, "mutations", {"one": (old, new)}, raising=False)
        self.test_mutations_are_caught("one", tmp_path, monkeypatch)

    flag_mutations: ClassVar = {
        "never": (
            "if x is not None:\n        tl.store(finite",
            "if x is not None and height < 0:\n        tl.store(finite",
        ),
        "of the clamped": (
            "total = unit_range(unit_range(v) + total)",
            "total = unit_range(v)\n            bad = bad * 0",
        ),
    }


class TestClampImageKernels(ColorKernelContract):
    contract = test_color.TestClampImage
    kernels = clamp_image_kernel
    configs: ClassVar = {"several blocks": clamp_image.Config(block_size=16, num_warps=1)}
    mutations: ClassVar = {
        "no clamp": ("image_value(unit_range(v), out", "image_value(v, out"),
        "the first row": ("y.to(tl.int64) * row_stride\n    out", "y.to(tl.int64) * 0\n    out"),
        "one sample": ("x += sample * sample_stride", "x += sample * 0"),
        "one channel": ("(offs % channels).to(tl.int64) * channel_stride", "(offs % 1).to(tl.int64) * channel_stride"),
    }
    flag_mutations: ClassVar = {
        "of the last block": (
            'bad += tl.where(tl.abs(v) < float("inf"), 0, 1)\n        tl.store',
            'bad = tl.where(tl.abs(v) < float("inf"), 0, 1)\n        tl.store',
        ),
        "never": (
            "mask=mask)\n    tl.store(finite + sample * height + y, tl.sum(bad, 0) == 0)",
            "mask=mask)\n    tl.store(finite + sample * height + y, tl.sum(bad, 0) >= 0)",
        ),
        "of the first row": (
            "mask=mask)\n    tl.store(finite + sample * height + y,",
            "mask=mask)\n    tl.store(finite + sample * height + 0 * y,",
        ),
    }
