"""Results of another size than the network's: the arithmetic of sizes, and every kind of image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinysr_kernels
from tests.runtime import sample_images as samples
from tests.runtime.sample_images import SCALE, bicubic
from tinysr_kernels.errors import InputError, OutOfMemory
from tinysr_kernels.runtime.device import host_memory
from tinysr_kernels.runtime.dispatch import upscale_image
from tinysr_kernels.runtime.images.scaling import NATIVE, Target, resample


@pytest.fixture(scope="module")
def demo() -> tinysr_kernels.CompiledSR:
    return tinysr_kernels.compile("demo", device="cpu")


def resized(image: Any, target: Target, network: Any = bicubic) -> Any:
    return upscale_image(image, network, SCALE, target=target)


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(
    ("target", "size", "expected"),
    [
        (Target(), (5, 7), (20, 28)),
        (Target(scale=1.5), (3, 5), (5, 8)),  # 4.5 and 7.5: halves up
        (Target(scale=0.145), (100, 10), (15, 1)),  # 14.5 as it is written, 14.499999999999998 in binary
        (Target(scale=0.001), (100, 10), (1, 1)),
        (Target(scale=8), (3, 5), (24, 40)),
        (Target(scale=np.float32(1.5)), (2, 2), (3, 3)),
        (Target(size=(7, 9)), (3, 5), (7, 9)),
        (Target(size=[np.int64(24), 1]), (3, 5), (24, 1)),
        (Target(longest=100), (30, 40), (75, 100)),
        (Target(longest=25), (40, 10), (25, 6)),  # 6.25
        (Target(longest=2), (1000, 1), (2, 1)),
        (Target(longest=8), (1, 1), (8, 8)),
    ],
)
def test_sizes(target: Target, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target.output(*size, 4) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale must be a number above 0"),
        ({"scale": -2}, "scale"),
        ({"scale": 8.01}, "at most 8"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"scale": True}, "scale"),
        ({"scale": "2"}, "scale"),
        ({"scale": 10**400}, "scale"),
        ({"scale": 1 + 0j}, "scale"),
        ({"scale": 10**5000}, "thousands of digits"),
        ({"size": (10**5000, 1)}, "thousands of digits"),
        ({"longest": 1 << 31}, "longest"),
        ({"size": (0, 4)}, "width must be a whole number"),
        ({"size": (4, -1)}, "height"),
        ({"size": (4, 4.5)}, "height"),
        ({"size": (4,)}, r"\(width, height\)"),
        ({"size": "4x"}, r"\(width, height\)"),
        ({"size": 4}, r"\(width, height\)"),
        ({"longest": 0}, "longest"),
        ({"longest": 1.5}, "longest"),
        ({"scale": 2, "size": (4, 4)}, "scale and size exclude"),
        ({"scale": 2, "longest": 4}, "scale and longest exclude"),
    ],
)
def test_what_is_no_size_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Target(**arguments)


def test_absurd_sizes_are_refused_for_the_image_they_are_for(demo: tinysr_kernels.CompiledSR) -> None:
    for target in (Target(size=(25, 5)), Target(size=(3, 41)), Target(longest=41)):
        with pytest.raises(InputError, match=r"3x5 cannot become .*the most is 8 times per side, 24x40"):
            target.output(3, 5, 4)
    with pytest.raises(InputError, match="cannot become"):
        demo(pixels(2, 2), size=(1 << 30, 1 << 30))
    with pytest.raises(InputError, match="exclude each other"):
        demo(pixels(2, 2), scale=2, size=(4, 4))
    with pytest.raises(InputError, match="exclude each other"):
        demo.stream([], scale=2, longest=4)


def test_the_resize_is_pillow_s() -> None:
    generator = np.random.default_rng(0)
    plane = generator.random((64, 48)).astype(np.float32)
    for size in ((30, 17), (48, 10), (100, 100), (1, 1), (47, 65)):
        expected = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
        found = resample(torch.from_numpy(plane)[None, None], size)[0, 0].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    image = torch.rand(1, 3, 5, 4)
    assert resample(image, (4, 5)) is image


KINDS = {
    "uint8": pixels(10, 8),
    "gray": pixels(10, 8, 1)[..., 0],
    "gray alpha": pixels(10, 8, 2),
    "rgba": pixels(10, 8, 4),
    "opaque rgba": np.concatenate([pixels(10, 8), np.full((10, 8, 1), 255, np.uint8)], -1),
    "uint16": pixels(10, 8).astype(np.uint16) * 257,
    "uint16 rgba": pixels(10, 8, 4).astype(np.uint16) * 257,
    "float32": (pixels(10, 8) / 255).astype(np.float32),
    "float64": pixels(10, 8) / 255,
    "float16": (pixels(10, 8) / 255).astype(np.float16),
    "batch": np.stack([pixels(10, 8), pixels(10, 8)[::-1]]),
}


TARGETS = (Target(scale=1.5), Target(size=(21, 7)), Target(scale=6), Target(longest=9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_arrays_of_every_kind(kind: str, target: Target) -> None:
    """The network's image, resized in floating point: within a rounding of the resized float result."""
    array = KINDS[kind]
    found = resized(array, target)
    width, height = target.output(8, 10, SCALE)
    assert found.dtype == array.dtype
    rows = 1 if kind == "batch" else 0
    assert found.shape[rows : rows + 2] == (height, width)
    assert found.shape[rows + 2 :] == array.shape[rows + 2 :]
    top = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    exact = resized(array.astype(np.float64) / top, target)
    step = {"f2": 2**-10, "f4": 1e-6, "f8": 1e-12, "u1": 0.51 / 255, "u2": 0.6 / 65535}[array.dtype.str[1:]]
    assert np.abs(found.astype(np.float64) / top - exact).max() <= step


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_kind(dtype: torch.dtype) -> None:
    array = torch.from_numpy(pixels(10, 8)).permute(2, 0, 1)
    tensor = array if dtype == torch.uint8 else (array / 255).to(dtype)
    found = resized(tensor, Target(size=(21, 7)))
    assert (found.dtype, tuple(found.shape), found.is_inference()) == (dtype, (3, 7, 21), False)
    out = torch.empty((3, 7, 21), dtype=dtype)
    assert upscale_image(tensor, bicubic, SCALE, out=out, target=Target(size=(21, 7))) is out
    assert torch.equal(out, found)
    with pytest.raises(InputError, match=r"out must be .*\(3, 7, 21\)"):
        upscale_image(tensor, bicubic, SCALE, out=torch.empty((3, 40, 32), dtype=dtype), target=Target(size=(21, 7)))


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "La", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I")


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode(mode: str) -> None:
    picture = samples.sample_image(mode, 10, 8)
    native, found = upscale_image(picture, bicubic, SCALE), resized(picture, Target(scale=2.5))
    assert found.mode == native.mode
    assert found.size == (25, 20)


def test_color_spaces_and_transparency_go_through_the_same_resize() -> None:
    """A flat image keeps its colors exactly, and what is transparent leaves no dark rim."""
    picture = Image.new("RGB", (12, 9), (10, 200, 60))
    picture.info["icc_profile"] = samples.matrix_profile()
    found = np.asarray(resized(picture, Target(scale=1.7)))
    assert np.abs(found.astype(int) - (10, 200, 60)).max() <= 1
    square = np.zeros((16, 16, 4), np.uint8)
    square[4:12, 4:12] = (255, 255, 255, 255)
    shrunk = resized(square, Target(scale=0.7))
    assert (shrunk[shrunk[..., 3] > 0][:, :3] >= 254).all()


def test_orientation_and_metadata_follow_the_size() -> None:
    picture = Image.fromarray(pixels(4, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769).update({0xA002: 12, 0xA003: 4})
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif.tobytes())
    # upright it is 4x12, for which 16x96 is no more than 8 times
    found = resized(Image.open(stream), Target(size=(16, 96)))
    assert found.size == (16, 96)
    written = Image.Exif()
    written.load(found.info["exif"])
    assert written.get_ifd(0x8769)[0xA002] == 16
    assert written.get_ifd(0x8769)[0xA003] == 96
    with pytest.raises(InputError, match="4x12 cannot become 96x16"):
        resized(Image.open(stream), Target(size=(96, 16)))


def test_the_network_s_own_factor_costs_nothing(demo: tinysr_kernels.CompiledSR) -> None:
    """Asked for in any of the ways, the bits are those of the plain call, through the same path for bytes."""
    image = pixels(9, 14)
    expected = demo(image)
    for target in ({"scale": 4}, {"scale": 4.0}, {"size": (56, 36)}, {"longest": 56}):
        assert np.array_equal(demo(image, **target), expected)
    assert Target(scale=4).output(9, 14, 4) == NATIVE.output(9, 14, 4)


def test_the_compiled_model_at_other_scales(demo: tinysr_kernels.CompiledSR) -> None:
    image = pixels(16, 20)
    exact = demo(image.astype(np.float32) / 255)
    expected = np.asarray(resample(torch.from_numpy(exact).permute(2, 0, 1)[None], (30, 24))[0].permute(1, 2, 0))
    for found in (demo(image, scale=1.5), next(iter(demo.stream([image], scale=1.5)))):
        assert found.shape == (24, 30, 3)
        assert np.abs(found - 255 * expected.clip(0, 1)).max() <= 0.51
    # the whole is nearer to the photograph's own mean than any filter could move it
    assert abs(float(found.mean()) - float(image.mean())) < 8


def test_the_memory_of_a_large_target_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1_000_000_000)
    host_memory.check_size(1000, 1000, 4)
    with pytest.raises(OutOfMemory, match=r"upscaled by 4 and resized to 8000x8000 needs about 3\.2 GB"):
        host_memory.check_size(1000, 1000, 4, result=(8000, 8000))
