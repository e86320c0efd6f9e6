"""The kernels of wavelet_fix, on every case of the operator."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from tests.ops.image import test_wavelet
from tests.ops.image.color_kernel import ColorKernelContract
from tinysr_kernels.ops.image.kernels import resize as resize_kernel
from tinysr_kernels.ops.image.kernels import wavelet as wavelet_kernel
from tinysr_kernels.ops.image.wavelet import Config


class TestWaveletFixKernels(ColorKernelContract):
    contract = test_wavelet.TestWaveletFix
    kernels = wavelet_kernel
    configs: ClassVar = {"several blocks": Config(block_size=16, num_warps=1)}
    mutations: ClassVar = {
        "mean of three": ("(0.5 - 0.25 * step * step)", "(1.0 / 3)"),
        "no dilation across": ("column - DILATION * channels", "column - channels"),
        "no dilation down": ("y + step * DILATION", "y + step"),
        "border of another channel": ("length - channels + chan)", "length - 1)"),
        "details lost": ("unit_range(unit_range(v) + total)", "unit_range(unit_range(0.0 * v) + total)"),
        "not clamped before": ("unit_range(unit_range(v) + total)", "unit_range(v + total)"),
        "no clamp": ("unit_range(unit_range(v) + total)", "unit_range(v) + total"),
        "one sample": ("program_id(1).to(tl.int64)\n    bad", "program_id(1).to(tl.int64) * 0\n    bad"),
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
