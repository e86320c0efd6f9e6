"""Models whose backend is PyTorch's libraries: what they give, say of themselves, and keep when they are stored."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tinysr_kernels
from benchmarks.subjects.models import image
from tests.runtime.test_runner import half_or_wider, photo, running
from tinysr_kernels.launch import backend
from tinysr_kernels.launch.backend import using
from tinysr_kernels.runtime import arguments, compiling
from tinysr_kernels.runtime.compiled import CompiledSR

CUDA = torch.device("cuda", 0)
HALF_A_STEP = 0.5 / 255


def demo(dtype: str, **options: Any) -> CompiledSR:
    return tinysr_kernels.compile("demo", device="cpu", dtype=dtype, **options)


@pytest.fixture(scope="module")
def library() -> CompiledSR:
    return demo("bfloat16", backend="library")


@pytest.fixture(scope="module")
def rgb() -> torch.Tensor:
    return image(20, 28)[0].float() / 255


@pytest.mark.numeric
@pytest.mark.parametrize("options", [{}, {"color_fix": "wavelet"}, {"color_fix": "none"}, {"tile": 16}], ids=str)
def test_the_same_picture(options: dict[str, Any], rgb: torch.Tensor) -> None:
    """float32 as exact as the reference, bfloat16 to half a step of 256, however the image is cut and fixed."""
    expected = demo("float32", backend="reference", **options)(rgb)
    assert (demo("float32", backend="library", **options)(rgb) - expected).abs().max() < 1e-5
    difference = demo("bfloat16", backend="library", **options)(rgb) - expected
    assert difference.square().mean().sqrt() < HALF_A_STEP


def test_what_it_says_of_itself(library: CompiledSR) -> None:
    info = library.info()
    assert (info["backend"], info["dtype"]) == ("library", "bfloat16")
    sources = info["launch_configurations"]
    assert sources["library"] > len([call for call in library.launches if call.source == "library"])
    assert sum(sources.values()) == info["launches_per_image"]
    assert not info["programmatic_dependent_launch"]


def test_it_repeats_itself(library: CompiledSR, rgb: torch.Tensor) -> None:
    """Bit for bit; whatever backend the caller's thread uses."""
    first = library(rgb)
    with using("reference"):
        assert torch.equal(library(rgb), first)


def test_it_is_kept_when_stored(library: CompiledSR, rgb: torch.Tensor, tmp_path: Path) -> None:
    copied = pickle.loads(pickle.dumps(library))
    assert (copied.backend, copied.dtype) == ("library", torch.bfloat16)
    library.save(tmp_path / "folded.safetensors")
    again = tinysr_kernels.compile(tmp_path / "folded.safetensors", device="cpu", dtype="bfloat16", backend="library")
    assert torch.equal(again(rgb), library(rgb))


def test_an_overflow_of_float16_is_recomputed() -> None:
    """As with kernels: in bfloat16, by the libraries too."""
    model = running(half_or_wider(1e6), dtype=torch.float16)
    model._backend = "library"
    result = model(photo(8, 8))
    assert torch.isfinite(result.float()).all()
    assert model.retries == 1


# On GPUs.


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of compute capability 7.5."""
    for cached in (backend._capability, arguments.has_bfloat16):
        cached.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    yield
    for cached in (backend._capability, arguments.has_bfloat16):
        cached.cache_clear()


def test_dtypes_on_a_gpu_without_bfloat16(turing: None) -> None:
    """float16 takes its place unless somebody asks for it."""
    assert arguments.choose_dtype(None, "adcsr", CUDA) == torch.float16
    assert arguments.choose_dtype(None, "tinysr-dit", CUDA) == torch.float16
    assert arguments.choose_dtype("bfloat16", "adcsr", CUDA) == torch.bfloat16
    assert arguments.choose_dtype(None, "adcsr", torch.device("cpu")) == torch.float32


def test_why_it_was_chosen_is_told_once(
    turing: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only where nobody asked for it."""
    monkeypatch.setattr(compiling, "choose_backend", lambda name, device: backend.choose_backend(name, CUDA))
    monkeypatch.setattr(compiling, "obstacle", lambda device: backend.obstacle(CUDA))
    with caplog.at_level(logging.WARNING):
        for name in ("library", "auto"):
            assert demo("float32", backend=name).backend == "library"
    (record,) = (r for r in caplog.records if "kernels cannot run" in r.message)
    assert "Some GPU has compute capability 7.5, needed is 8.0" in record.message
