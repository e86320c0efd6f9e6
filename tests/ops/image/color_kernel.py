"""What the kernels of the color fixes owe beyond all kernels: flags as a second result, and images in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.ops.cases import CASES
from tests.ops.contract import relaid
from tests.ops.image.color import ColorContract
from tests.ops.kernel_contract import KernelContract, mutated


class ColorKernelContract(KernelContract):
    """What the color fixes have in common: flags as a second result, and images in bytes."""

    contract: ClassVar[type[ColorContract]]
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
