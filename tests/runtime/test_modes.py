"""The caller's defaults and modes of PyTorch change neither what compiles nor a bit of a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinysr_kernels
from tests.layouts.adcsr import write_adcsr
from tests.layouts.tinysr import write_tinysr
from tests.runtime import sample_images as samples


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "default device": lambda: default_device("meta"),
    "device block": lambda: torch.device("meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
}


def tagged(mode: str, profile: bytes) -> Image.Image:
    picture = samples.sample_image(mode, 8, 7)
    picture.info["icc_profile"] = profile
    return picture


def images() -> dict[str, Any]:
    """One of each way through the code."""
    pixels = samples.noise(7, 8)
    return {
        "bytes": pixels,
        "alpha": samples.noise(7, 8, 4),
        "uint16": samples.noise(7, 8, 3, "uint16"),
        "float64": samples.noise(7, 8, 3, "float64"),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        "batch": torch.from_numpy(samples.noise(20, 20)).permute(2, 0, 1),
        "half": (torch.from_numpy(pixels).permute(2, 0, 1) / 255).half(),
        "profile": tagged("RGBA", samples.matrix_profile()),
        "table": tagged("RGB", samples.table_profile()),
        "gray": samples.sample_image("I;16", 8, 7),
        "tiles": samples.noise(20, 20),
    }


IMAGES = images()


def results(model: tinysr_kernels.CompiledSR) -> list[np.ndarray]:
    found = [np.asarray(model(image)) for image in IMAGES.values()]
    found.append(np.asarray(model(IMAGES["profile"], scale=1.7)))
    found += [model.enlarge(IMAGES[kind][None]).numpy() for kind in ("tensor", "batch")]
    return [*found, *model.stream([samples.noise(8, 7)])]


@pytest.fixture(scope="module")
def plain() -> list[np.ndarray]:
    return results(tinysr_kernels.compile("demo", device="cpu", tile=16))


@pytest.mark.parametrize("mode", MODES)
def test_the_caller_s_modes_change_nothing(mode: str, plain: list[np.ndarray]) -> None:
    with MODES[mode]():
        model = tinysr_kernels.compile("demo", device="cpu", tile=16)
        model.warmup([(4, 4)])
        found = results(model)
    assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))
    assert not torch.is_inference(model(torch.zeros(3, 4, 4)))


@pytest.mark.parametrize("mode", ["default device", "default float16", "autocast"])
@pytest.mark.parametrize("layout", ["tinysr", "bin", "adcsr"])
def test_every_family_compiles_under_the_caller_s_defaults(mode: str, layout: str, tmp_path: Path) -> None:
    if layout == "adcsr":
        write_adcsr(tmp_path)
    else:
        write_tinysr(tmp_path, lora=5, as_bin=layout == "bin")
    image = samples.noise(20, 37)
    expected = tinysr_kernels.compile(tmp_path, device="cpu")(image)
    with MODES[mode]():
        found = tinysr_kernels.compile(tmp_path, device="cpu")(image)
    assert np.array_equal(found, expected)
