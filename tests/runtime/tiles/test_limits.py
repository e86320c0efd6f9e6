"""What runs follows from the image, the model and limits that are stated, never from the memory that is free."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.runtime.test_runner import photo, running, tinysr, unet
from tinysr_kernels.errors import OutOfMemory
from tinysr_kernels.nets import Network
from tinysr_kernels.nets.unet_sr import UNetSR
from tinysr_kernels.runtime.device import host_memory
from tinysr_kernels.runtime.tiles import limits as limits_module
from tinysr_kernels.runtime.tiles.limits import GPU_SHARE, HOST_SHARE, UNLIMITED, Limits, memory_class, rung

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture(scope="module")
def pixel() -> Network:
    return unet(torch.float32)


@pytest.fixture(scope="module")
def latent() -> Network:
    return tinysr(torch.float32)[0]


def test_the_total_memory_decides_coarsely_and_the_free_memory_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slightly more memory, or any other free memory, changes neither the limit nor a bit of the result."""
    lr = photo(80, 70)[0].permute(1, 2, 0).numpy()
    monkeypatch.setattr(limits_module, "HOST_SHARE", 1 / 256)  # so that the image is larger than what runs whole
    results = []
    for total, free in ((16.0, 12), (16.064, 12), (15.99 * 1.4, 12), (16.0, 0.1), (16.0, 15.9)):
        monkeypatch.setattr(limits_module, "total_memory", lambda total=total: int(total * GIB))
        monkeypatch.setattr(host_memory, "available_memory", lambda free=free: int(free * GIB))
        model = tinysr_kernels.compile("demo", device="cpu")
        results.append((model.info()["whole_image_pixels"], model(lr)))
    assert {pixels for pixels, _ in results} == {results[0][0]}
    assert 64 * 64 < results[0][0] < 80 * 70  # so the image ran in tiles
    assert all(np.array_equal(each, results[0][1]) for _, each in results)


def test_classes_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # what machines and cards of 8, 16, 24, 48 and 80 GiB report
    for reported, expected in ((7.7, 6), (15.6, 12), (23.5, 16), (47.4, 32), (79.1, 64), (24.0, 24), (0.4, 0.375)):
        monkeypatch.setattr(limits_module, "total_memory", lambda reported=reported: int(reported * GIB))
        assert memory_class(CPU) == expected * GIB
    properties = type("Properties", (), {"total_memory": int(139.7 * GIB)})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert memory_class(torch.device("cuda", 0)) == 128 * GIB
    monkeypatch.setattr(limits_module, "total_memory", lambda: None)
    assert memory_class(CPU) is None
    assert [rung(number) for number in (1, 2, 3, 4, 5, 6, 7, 8, 47, 48, 63, 64)] == [
        *(1, 2, 3, 4, 4, 6, 6, 8, 32, 48, 48, 64)
    ]


def test_the_limits_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "total_memory", lambda: 16 * GIB)
    model = tinysr_kernels.compile("demo", device="cpu")
    calls, network = model.launches, model.network
    per_pixel = limits_module.bytes_per_pixel(calls, 128 * 128)
    assert per_pixel > 1000
    info = model.info()
    assert (info["tile"], info["whole_image_pixels"]) == (None, int(16 * GIB * HOST_SHARE / per_pixel))
    assert "whole_image_pixels" not in tinysr_kernels.describe("demo")  # it is the machine's, not the checkpoint's
    # only the kernels compute the same bits in any batch
    assert Limits.of(network, calls, 128 * 128, CPU, "reference", None).images(1) == 1
    assert Limits.of(network, calls, 128 * 128, CPU, "triton", None).images(1) > 1000
    properties = type("Properties", (), {"total_memory": 16 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = Limits.of(network, calls, 128 * 128, torch.device("cuda", 0), "triton", None)
    assert (gpu.pixels, gpu.tile_batch) == (int(16 * GIB * GPU_SHARE / per_pixel), 8)
    monkeypatch.setattr(limits_module, "total_memory", lambda: None)
    assert Limits.of(network, calls, 128 * 128, CPU, "reference", 48) == Limits(48, UNLIMITED, batch_pixels=1)


def test_limits_decide_about_tiles(pixel: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    forward = UNetSR.forward

    def spy(self: UNetSR, x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[2:]))
        return forward(self, x)

    monkeypatch.setattr(UNetSR, "forward", spy)
    monkeypatch.setattr(limits_module, "SMALLEST_TILE", 16)
    # 25 and 30 pixels a side fit: the tiles are the same 24
    for side, expected in ((10**3, (24, 40)), (25, (24, 24)), (30, (24, 24)), (1, (16, 16))):
        sizes.clear()
        running(pixel, limits=Limits(pixels=side * side))(photo(24, 40))
        assert set(sizes) == {expected}


def test_limits_get_smaller_step_by_step_to_an_error(pixel: Network, latent: Network) -> None:
    first = limits = Limits(tile_batch=4)
    # whole, then ever smaller tiles, batches of tiles first
    steps = ["2 images", "1 images", "tiles of 256x256", "2 tiles", "1 tiles", "tiles of 192x192", "tiles of 128x128"]
    shapes = [(4, 3, 400, 400), (2, 3, 400, 400), *[(1, 3, 400, 400)] * 8]
    for shape, expected in zip(shapes, [*steps, "tiles of 96x96", "tiles of 64x64", ""], strict=True):
        if expected:
            limits, text = limits.smaller(pixel, shape, CPU, "no room")
            assert expected in text
            continue
        with pytest.raises(OutOfMemory, match="64x64 pixels, the smallest, needs more than"):
            limits.smaller(pixel, shape, CPU, "no room")
    assert limits.images(400 * 400) == 1
    assert first == Limits(tile_batch=4)  # the model's own stay
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.pixels = 1  # type: ignore[misc]
    with pytest.raises(OutOfMemory, match=r"tile of 100x100 pixels, the size asked for, .*use a tile below 100"):
        Limits(tile=100).smaller(pixel, (1, 3, 400, 400), CPU, "no room")  # an explicit setting stays

    limits = Limits()
    for expected in ("4 windows", "2 windows", "1 windows", "672x672", "416x416", "288x288"):
        limits, text = limits.smaller(latent, (1, 3, 64, 64), CPU, "no room")
        assert expected in text
    with pytest.raises(OutOfMemory, match="288x288"):
        limits.smaller(latent, (1, 3, 64, 64), CPU, "no room")


@pytest.mark.parametrize("size", [(1, 1), (9, 7), (24, 18), (33, 65)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batches_equal_single_images_bit_for_bit(size: tuple[int, int], dtype: torch.dtype) -> None:
    model = tinysr_kernels.compile("demo", device="cpu")
    lr = photo(*size, batch=3)
    lr = lr if dtype == torch.uint8 else lr / 255
    assert torch.equal(model(lr), torch.stack([model(one) for one in lr]))
