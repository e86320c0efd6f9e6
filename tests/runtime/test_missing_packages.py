"""A Python module that is missing is reported as such: not as a fault of the checkpoint."""

from __future__ import annotations

import pytest

import tinysr_kernels
from tinysr_kernels.errors import InputError
from tinysr_kernels.families import FAMILIES


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ModuleNotFoundError("No module named 'PIL'", name="PIL.Image"),
            r"PIL\.Image is not installed: pip install pillow",
        ),
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "pip install triton$"),
        (ImportError("libx.so: cannot open", name="triton._C.libtriton"), "libx.so.*--force-reinstall triton$"),
        (ImportError("cannot import name 'a'"), "cannot import name.*--force-reinstall tinysr-kernels$"),
        (ModuleNotFoundError("No module named 'tinysr_kernels.x'", name="tinysr_kernels.x"), "tinysr-kernels$"),
    ],
)
@pytest.mark.parametrize("step", ["fold", "build"])
def test_a_missing_package(error: ImportError, words: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(FAMILIES["tinysr-unet"]), step, fails)
    with pytest.raises(InputError, match=words):
        tinysr_kernels.compile("demo")
