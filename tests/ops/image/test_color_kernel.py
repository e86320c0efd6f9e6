"""The kernels of adain_fix, wavelet_fix and clamp_image, on every case of these operators."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.ops.cases import CASES
from tests.ops.contract import relaid
from tests.ops.image import test_color
from tests.ops.kernel_contract import KernelContract, mutated
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.image import color
from tinysr_kernels.ops.image.color import Config
from tinysr_kernels.ops.image.kernels import color as color_kernel
from tinysr_kernels.ops.image.kernels import resize as resize_kernel


class ColorKernelContract(KernelContract):
    """What the color fixes have in common: flags beside the image, and bytes."""

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
    kernels = color_kernel
    configs: ClassVar = {"several blocks": Config(lanes=256, warps=1, parts=16)}
    mutations: ClassVar = {
        "the first block for all": (
            "pixel = block // CHANNELS * LANES + rest // CHANNELS",
            "pixel = block * 0 + rest // CHANNELS",
        ),
        "one turn": ("turns = (blocks - part + parts - 1) // parts", "turns = 1"),
        "a lane's channel": (
            "own = chan == c\n        count = tl.sum(tl.where(own, seen, 0.0), 0)\n        mean",
            "own = chan == c % 1\n        count = tl.sum(tl.where(own, seen, 0.0), 0)\n        mean",
        ),
        "behind the end": ("deviation = tl.where(known, v - mean, 0.0)", "deviation = v - mean"),
        "measured without clamp": ("unit_range(v), float", "v, float"),
        "style in x's place": ("scratch + CHANNELS * most + part - x_parts", "scratch + part - x_parts"),
        "between parts nothing": ("+ count * deviation * deviation", "+ 0.0 * count"),
        "means of the first part": ("mean = (first + shift) * scale", "mean = first * scale"),
        "biased": ("tl.maximum(total - 1.0, 1.0)", "total"),
        "bytes as they are": ("tl.where(which < CHANNELS, 1.0, unit)", "tl.where(which < CHANNELS, 1.0, 1.0)"),
        "no eps": ("variance * scale * scale + eps", "variance * scale * scale + 0.0 * eps"),
        "no least": ("tl.maximum(_pick(spread, which, c), least)", "tl.maximum(_pick(spread, which, c), 0.0 * least)"),
        "x's own mean": ("_pick(mean, which, CHANNELS + c), target)", "_pick(mean, which, c), target)"),
        "the first sample's parts": (
            "row = scratch_moments + sample * 3 * kind_step",
            "row = scratch_moments + sample * 0 * kind_step",
        ),
        "the first sample": (
            "image = x + sample * sample_stride\n    v, known",
            "image = x + sample * 0\n    v, known",
        ),
        "channels of the block": ("rest % CHANNELS + tl.arange", "0 * rest + tl.arange"),
        "a pixel too many": (
            "known = at < tl.full((), CHANNELS, tl.int64) * pixels",
            "known = at <= tl.full((), CHANNELS, tl.int64) * pixels",
        ),
        "rows apart": ("(row + down).to(tl.int64)", "(row + 0 * down).to(tl.int64)"),
        "mapped without clamp": ("    if CLAMP:\n        v = unit_range(v)\n    v = unit_range", "    v = unit_range"),
        "no clamp": ("unit_range((v - middle) * gain + target)", "((v - middle) * gain + target)"),
    }

    flag_mutations: ClassVar = {
        "lost in the clamp": ('tl.abs(v) < float("inf"), unit_range', "tl.abs(v) >= 0.0, unit_range"),
        "never": ("tl.sum(good, 0) == 0", "tl.sum(good, 0) >= 0"),
        "of the style": ("(which >= CHANNELS) |", "(which < CHANNELS) |"),
        "of the first channel": ("(which >= CHANNELS) |", "(which >= 1) |"),
    }

    def test_statistics_far_from_zero(self) -> None:
        """Means of 50 deviations, over parts of one block and of several."""
        for config in (None, *self.configs):
            assert self.check(test_color.FAR_FROM_ZERO, torch.float32, config), (config, self.found)

    def test_two_launches_and_a_bounded_number_of_parts(self) -> None:
        """Whatever the sizes and the layouts, and nothing beside them."""
        for size, small in (((512, 512), (128, 128)), ((4096, 4096), (1024, 1024)), ((16, 20000), (4, 5000))):
            x = torch.empty(1, 3, *size, dtype=torch.float16, device="meta")
            style = torch.empty(1, 3, *small, dtype=torch.uint8, device="meta")
            plan, _ = REGISTRY["adain_fix"].plan(x, style, 1e-5, 0.0, True, torch.uint8)
            assert plan.kernels == 2
            parts = plan.launches[0].arguments["x_parts"]
            assert parts <= color.MOST_PARTS
            lanes = plan.launches[0].arguments["LANES"]
            assert parts % 3 == 0 or parts * lanes >= x.numel()


class TestWaveletFixKernels(ColorKernelContract):
    contract = test_color.TestWaveletFix
    kernels = color_kernel
    configs: ClassVar = {"several blocks": Config(lanes=16, warps=1)}
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
            ("unit_range(v) - unit_range(taken)", "v - unit_range(taken)"),
            ("unit_range(v) - unit_range(taken)", "unit_range(v) - taken"),
            ("unit_range(v) - unit_range(taken)", "unit_range(v)"),
            ("base += sample * base_sample_stride", "base += 0 * sample * base_sample_stride"),
            ("(lane // channels).to(tl.int64) * base_column", "(lane // channels).to(tl.int64) * 0 * base_column"),
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
    kernels = color_kernel
    configs: ClassVar = {"several blocks": Config(lanes=16, warps=1)}
    mutations: ClassVar = {
        "no clamp": ("image_value(unit_range(v), out", "image_value(v, out"),
        "the first row": ("y.to(tl.int64) * row_stride\n    out", "y.to(tl.int64) * 0\n    out"),
        "one sample": ("x += sample * sample_stride", "x += sample * 0"),
        "one channel": ("(lane % channels).to(tl.int64) * channel_stride", "(lane % 1).to(tl.int64) * channel_stride"),
    }
    flag_mutations: ClassVar = {
        "of the last block": (
            'bad += tl.where(tl.abs(v) < float("inf"), 0, 1)\n        tl.store',
            'bad = tl.where(tl.abs(v) < float("inf"), 0, 1)\n        tl.store',
        ),
        "never": (
            "mask=known)\n    tl.store(finite + sample * height + y, tl.sum(bad, 0) == 0)",
            "mask=known)\n    tl.store(finite + sample * height + y, tl.sum(bad, 0) >= 0)",
        ),
        "of the first row": (
            "mask=known)\n    tl.store(finite + sample * height + y,",
            "mask=known)\n    tl.store(finite + sample * height + 0 * y,",
        ),
    }
