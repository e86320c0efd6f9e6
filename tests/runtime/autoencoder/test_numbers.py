"""Accelerated autoencoders against diffusers' own modules: in float64, in float32 rounding, and in 16 bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.runtime.autoencoder.modules import LAYOUTS, autoencoder, both, image_for, is_fused, latent_for, relative

pytestmark = pytest.mark.numeric
layouts = pytest.mark.parametrize("name", LAYOUTS)
qualities = pytest.mark.parametrize("quality", ["exact", "high"])
WIDE = 1e-12
"""Largest relative error in float64: the same function but for rounding."""
EAGER = 2.0
"""Largest error against float64, in eager's own."""
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Errors against float64 that are allowed where eager's happens to be smaller: some eps of the dtype."""


def accelerated(module: Any, quality: str, **options: Any) -> Any:
    return tinysr_kernels.accelerate(copy.deepcopy(module), quality=quality, **options)


@layouts
@qualities
def test_the_same_function(name: str, quality: str) -> None:
    module = autoencoder(name).double()
    fused = accelerated(module, quality)
    image, latent = image_for(module).double(), latent_for(module).double()
    for found, expected in zip(both(fused, image, latent), both(module, image, latent), strict=True):
        assert relative(found, expected) < WIDE
        assert found.dtype == torch.float64
    assert is_fused(fused.encoder)
    assert is_fused(fused.decoder)


def rounded_cases() -> list[Any]:
    """Every layout, quality and dtype, of which few are quick tests."""
    cases = []
    for name in LAYOUTS:
        for quality in ("exact", "high"):
            for dtype in FLOOR:
                quick = quality == "high" and (dtype == torch.float32 or name in ("sd", "tiny"))
                cases.append(pytest.param(name, quality, dtype, marks=[] if quick else pytest.mark.long))
    return cases


@pytest.mark.parametrize(("name", "quality", "dtype"), rounded_cases())
def test_errors_are_those_of_eager(name: str, quality: str, dtype: torch.dtype) -> None:
    module = autoencoder(name).to(dtype)
    fused = accelerated(module, quality)
    image, latent = image_for(module).to(dtype), latent_for(module).to(dtype)
    wanted = both(copy.deepcopy(module).double(), image.double(), latent.double())
    eager = both(module, image, latent)
    for found, plain, exact in zip(both(fused, image, latent), eager, wanted, strict=True):
        assert relative(found, exact) <= max(EAGER * relative(plain, exact), FLOOR[dtype])
        assert (found.dtype, found.stride()) == (plain.dtype, plain.stride())


@qualities
def test_libraries(quality: str) -> None:
    for name in ("sd", "tiny"):
        module = autoencoder(name)
        image, latent = image_for(module), latent_for(module)
        found = both(accelerated(module, quality, backend="library"), image, latent)
        for one, expected in zip(found, both(module, image, latent), strict=True):
            assert relative(one, expected) < 1e-5


@pytest.mark.parametrize(("dtype", "backend"), [(torch.bfloat16, "library"), (torch.float32, "reference")])
def test_what_computes_on_a_cpu(dtype: torch.dtype, backend: str) -> None:
    """16 bits by PyTorch's libraries: the references compute them in float32, half as fast."""
    module = accelerated(autoencoder("tiny").to(dtype), "high")
    module.decode(latent_for(module).to(dtype))
    assert module.decoder.forward._made.backend == backend


@pytest.mark.parametrize("size", [(2, 2), (7, 3), (13, 22)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    for name in ("sd", "widths", "tiny"):
        module = autoencoder(name)
        if name == "widths" and min(size) < 4:
            continue  # diffusers' own module refuses these
        image, latent = image_for(module, *size), latent_for(module, *size)
        fused = accelerated(module, "high")
        for found, expected in zip(both(fused, image, latent), both(module, image, latent), strict=True):
            assert found.shape == expected.shape
            assert relative(found, expected) < 1e-5
        assert is_fused(fused.encoder)


def views(image: Tensor) -> list[Tensor]:
    """The same values in other memory: channels last, every second column, a batch that is expanded."""
    wide = image.new_zeros((*image.shape[:3], 2 * image.shape[3]))
    wide[..., ::2] = image
    return [image.contiguous(memory_format=torch.channels_last), wide[..., ::2], image[:1].expand(2, -1, -1, -1)]


def test_inputs_of_any_layout() -> None:
    module = autoencoder("no attention")
    fused = accelerated(module, "high")
    pairs = zip(views(image_for(module)), views(latent_for(module)), strict=True)
    for image, latent in pairs:
        for found, expected in zip(both(fused, image, latent), both(module, image, latent), strict=True):
            assert relative(found, expected) < 1e-5
            assert found.is_contiguous() == expected.is_contiguous()


def test_computes_in_another_dtype() -> None:
    module = autoencoder("sd3")
    image, latent = image_for(module), latent_for(module)
    expected = both(module, image, latent)
    rough = both(accelerated(module, "high", dtype="bfloat16"), image, latent)
    fine = both(accelerated(module, "high", dtype=torch.float64), image, latent)
    for one, other, wanted in zip(rough, fine, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert 1e-4 < relative(one, wanted) < 0.1
        assert relative(other, wanted) < 1e-5


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_autocast(name: str) -> None:
    """The result has the dtype that autocast gives, and its precision."""
    module = autoencoder(name)
    image, latent = image_for(module), latent_for(module)
    exact = both(copy.deepcopy(module).double(), image.double(), latent.double())
    fused = accelerated(module, "high")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = both(module, image, latent), both(fused, image, latent)
    assert is_fused(fused.decoder)
    for one, plain, wanted in zip(found, expected, exact, strict=True):
        assert (one.dtype, one.shape) == (plain.dtype, plain.shape)
        assert relative(one, wanted) <= max(EAGER * relative(plain, wanted), FLOOR[torch.bfloat16])


@qualities
@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_autocast_reaches_nothing_inside(name: str, quality: str) -> None:
    """The same bits as from a module of that dtype: operators switch it off, and nothing between them heeds it."""
    module = autoencoder(name).bfloat16()
    latent = latent_for(module).bfloat16()
    wanted = accelerated(module, quality).decoder(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = accelerated(module, quality).float().decoder(latent.float())
    assert torch.equal(found, wanted)


def test_statistics_and_attention_are_of_the_whole_image() -> None:
    """A bright corner changes the far one by as much as it does in the plain module."""
    module = autoencoder("sd")
    fused = accelerated(module, "high")
    latent = latent_for(module, 24, 24, 1)
    bright = latent.clone()
    bright[..., :2, :2] += 5
    far = [both(m, image_for(module), z)[1][..., -8:, -8:] for m in (module, fused) for z in (latent, bright)]
    assert relative(far[1], far[0]) > 1e-3
    assert relative(far[3] - far[2], far[1] - far[0]) < 1e-3
