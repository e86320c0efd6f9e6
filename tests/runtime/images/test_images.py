"""In-memory images of all types: same type, correct size, exact where the network is exact."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.runtime.sample_images import MODES, SCALE, bicubic, nearest, noise, repeated, sample_image
from tinysr_kernels.errors import InputError, OutOfMemory, TinySRError
from tinysr_kernels.runtime.device import host_memory
from tinysr_kernels.runtime.dispatch import upscale_image
from tinysr_kernels.runtime.images import arrays
from tinysr_kernels.runtime.images.alpha import bleed, enlarge_alpha
from tinysr_kernels.runtime.images.metadata import Metadata
from tinysr_kernels.runtime.images.pil import upscale_loaded

sides = st.integers(1, 60)


def up(image, **options):
    return upscale_image(image, nearest, SCALE, **options)


@given(mode=st.sampled_from(sorted(MODES)), width=sides, height=sides, network=st.sampled_from([nearest, bicubic]))
def test_pil_modes(mode, width, height, network):
    image = sample_image(mode, width, height)
    result = upscale_image(image, network, SCALE)
    assert (result.mode, result.size) == (MODES[mode], (SCALE * width, SCALE * height))


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_pil_values_are_exact(mode):
    image = sample_image(mode, 9, 5)
    assert up(image).tobytes() == image.resize((36, 20), Image.Resampling.NEAREST).tobytes()


def test_bilevel_and_palette_keep_their_colors():
    bilevel = sample_image("1", 8, 6)
    assert np.array_equal(np.asarray(up(bilevel)), repeated(np.asarray(bilevel.convert("L"))))
    palette = sample_image("P", 8, 6)
    assert np.array_equal(np.asarray(up(palette)), repeated(np.asarray(palette.convert("RGB"))))


@given(
    dtype=st.sampled_from(["uint8", "uint16", ">u2", "float16", "float32", ">f4", "float64"]),
    channels=st.sampled_from([None, 1, 2, 3, 4]),
    batch=st.sampled_from([None, 1, 3]),
    height=sides,
    width=sides,
)
def test_numpy_dtypes_and_layouts(dtype, channels, batch, height, width):
    image = noise(height, width, channels or 1, np.dtype(dtype).newbyteorder("=").name).astype(dtype)
    if channels is None:
        image, batch = image[..., 0], None
    if batch is not None:
        image = np.stack([image] * batch)
    result = up(image)
    axis = 0 if batch is None else 1
    expected = list(image.shape)
    expected[axis] *= SCALE
    expected[axis + 1] *= SCALE
    assert result.shape == tuple(expected)
    assert result.dtype == image.dtype
    if channels in (None, 1, 3) and image.dtype.kind == "u":
        assert np.array_equal(result, image.repeat(SCALE, axis).repeat(SCALE, axis + 1))


@given(
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    batch=st.sampled_from([None, 1, 3]),
    height=sides,
    width=sides,
)
def test_torch_dtypes_and_ranks(dtype, batch, height, width):
    shape = (3, height, width) if batch is None else (batch, 3, height, width)
    image = torch.rand(shape) if dtype.is_floating_point else torch.randint(0, 256, shape)
    image = image.to(dtype)
    result = up(image)
    assert result.dtype == dtype
    assert torch.equal(result, image.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2))


def test_strides_and_read_only_memory_do_not_matter():
    pixels = noise(6, 7)
    flipped = pixels[::-1, ::-1]
    assert np.array_equal(up(flipped), repeated(np.ascontiguousarray(flipped)))
    frozen = pixels.copy()
    frozen.flags.writeable = False
    assert np.array_equal(up(frozen), repeated(pixels))
    tensor = torch.rand(7, 6, 3).permute(2, 0, 1)[:, ::2]
    assert torch.equal(up(tensor), nearest(tensor[None])[0])


def test_results_have_no_gradient_and_are_no_inference_tensors():
    image = torch.rand(3, 4, 5, requires_grad=True)
    result = up(image)
    assert not result.requires_grad
    assert not result.is_inference()
    weight = torch.ones(1, requires_grad=True)
    (result * weight).sum().backward()
    assert weight.grad is not None
    assert not up(torch.zeros(3, 4, 5, dtype=torch.uint8)).is_inference()


def test_the_network_sees_float32_or_float64_rgb():
    seen = []

    def spy(rgb):
        seen.append((rgb.dtype, rgb.shape, rgb.is_contiguous(), float(rgb.min()) >= 0, float(rgb.max()) <= 1))
        return nearest(rgb)

    for image in (noise(3, 4, 1)[..., 0], noise(3, 4, 4), noise(3, 4, 3, "float16"), torch.rand(3, 3, 4)):
        upscale_image(image, spy, SCALE)
    upscale_image(noise(3, 4, 3, "float64"), spy, SCALE)
    assert seen == [(torch.float32, (1, 3, 3, 4), True, True, True)] * 4 + [
        (torch.float64, (1, 3, 3, 4), True, True, True)
    ]


def test_integers_are_rounded_to_nearest_once():
    def between(rgb):
        return (nearest(rgb) * 255 + 0.6) / 255

    assert upscale_image(np.full((2, 2, 3), 7, np.uint8), between, SCALE).max() == 8
    # Also when rounding works in strips.
    pixels = noise(64, 8)
    whole = up(pixels)
    before = arrays._STRIP_PIXELS
    arrays._STRIP_PIXELS = 100
    try:
        assert np.array_equal(up(pixels), whole)
    finally:
        arrays._STRIP_PIXELS = before


def test_small_overshoot_is_clamped():
    image = np.array([[[-0.0009, 0.5, 1.0009]]], np.float32)
    result = up(image)
    assert result.min() == 0
    assert result.max() == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 8, 9), np.uint8), "channels first"),
        (np.zeros((2, 3, 8, 9), np.uint8), "channels first"),
        (np.zeros((5, 8, 9), np.uint8), r"image\[\.\.\., None\]"),
        (np.zeros((2, 5, 8, 9), np.uint8), "1 to 4 channels"),
        (np.zeros(8, np.uint8), "1 dimensions"),
        (np.zeros((1, 1, 2, 2, 3), np.uint8), "5 dimensions"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 3), np.int64), "found int64"),
        (np.zeros((4, 4, 3), bool), "found bool"),
        (np.full((4, 4, 3), 200.0, np.float32), "divide by 255"),
        (np.full((4, 4, 3), 60000.0, np.float32), "divide by 65535"),
        (np.full((4, 4, 3), -0.5, np.float32), r"from \[-1, 1\]"),
        (np.full((4, 4, 3), -7.0, np.float32), "from -7 to -7"),
        (np.full((4, 4, 3), np.nan, np.float64), "NaN"),
        (np.full((4, 4, 3), np.inf, np.float16), "infinities"),
        (torch.zeros(8, 9, 3), r"permute\(2, 0, 1\)"),
        (torch.zeros(2, 8, 9, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(1, 8, 9), "gray"),
        (torch.zeros(4, 8, 9), "alpha"),
        (torch.zeros(5, 8, 9), r"\(5, 8, 9\)"),
        (torch.zeros(8, 9), "2 dimensions"),
        (torch.zeros(3, 0, 9), "empty"),
        (torch.zeros(0, 3, 8, 9), "empty"),
        (torch.zeros(3, 8, 9, dtype=torch.int32), "found torch.int32"),
        (torch.zeros(3, 8, 9, dtype=torch.complex64), "found torch.complex64"),
        (torch.full((3, 8, 9), 255.0), "divide by 255"),
        (torch.full((3, 8, 9), float("nan"), dtype=torch.bfloat16), "NaN"),
        (torch.zeros(3, 8, 9).to_sparse(), "dense"),
        (torch.zeros(3, 8, 9, device="meta"), "with data"),
        ("photo.png", "PIL.Image.open"),
        (Path("photo.png"), "PIL.Image.open"),
        ([np.zeros((4, 4, 3), np.uint8)], "one by one"),
        (None, "NoneType"),
        (sample_image("L", 4, 4).convert("F"), "mode F"),
        (Image.new("I", (2, 2), 70000), "70000"),
        (Image.new("I", (2, 2), -1), "-1"),
        (Image.new("RGB", (0, 5)), "0x5"),
    ],
)
def test_refusals_state_a_remedy(image, message):
    with pytest.raises(InputError, match=message):
        up(image)


def test_a_wrong_output_size_of_the_network_is_an_error():
    with pytest.raises(TinySRError, match=r"expected a result of shape \(1, 3, 12, 16\).*found \(1, 3, 6, 8\)"):
        upscale_image(noise(3, 4), lambda rgb: rgb.repeat(1, 1, 2, 2), SCALE)


def test_a_decoded_image_without_rows_is_refused():
    """Damaged files of some formats decode to one."""
    with pytest.raises(InputError, match="found an image of 8x0"):
        upscale_loaded(Image.new("RGB", (8, 0)), Metadata(), nearest, SCALE)


# Size limits


def test_pixel_limit_and_memory(monkeypatch):
    with pytest.raises(InputError, match="12 pixels, the limit is 11"):
        up(noise(3, 4), max_pixels=11)
    up(noise(3, 4), max_pixels=12)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 10_000_000)
    with pytest.raises(OutOfMemory, match=r"0\.7 GB .* 0\.0 GB are free"):
        up(Image.new("L", (1100, 1000)))
    monkeypatch.setattr(host_memory, "available_memory", lambda: None)
    host_memory.check_size(100_000, 100_000, 4)


def test_available_memory_is_plausible():
    free = host_memory.available_memory()
    assert free is None or 0 <= free < 1 << 50


# Alpha


def test_opaque_alpha_is_skipped_and_exact(monkeypatch):
    monkeypatch.setattr(arrays, "enlarge_alpha", None)  # would fail if it were called
    pixels = noise(5, 6, 4)
    pixels[..., 3] = 255
    assert np.array_equal(up(pixels), repeated(pixels))
    assert up(Image.fromarray(pixels)).getchannel("A").getextrema() == (255, 255)
    floats = noise(5, 6, 2, "float32")
    floats[..., 1] = 1
    assert (up(floats)[..., 1] == 1).all()


@given(height=sides, width=sides, seed=st.integers(0, 99))
def test_a_mask_stays_in_range_and_keeps_its_size(height, width, seed):
    mask = torch.from_numpy(noise(height, width, 1, seed=seed) > 127).float().permute(2, 0, 1)[None]
    result = enlarge_alpha(mask, SCALE)
    assert result.shape == (1, 1, SCALE * height, SCALE * width)
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


def test_hidden_colors_do_not_bleed_into_visible_pixels():
    pixels = np.zeros((12, 12, 4), np.uint8)
    pixels[...] = (0, 255, 0, 0)
    pixels[4:8, 4:8] = (200, 30, 10, 255)
    result = upscale_image(pixels, bicubic, SCALE)
    assert (abs(result[..., :3].astype(int) - (200, 30, 10)) <= 1).all()
    assert result[24, 24, 3] == 255
    assert result[0, 0, 3] == 0


@given(height=sides, width=sides, seed=st.integers(0, 99), share=st.floats(0, 1))
def test_bleeding_keeps_visible_pixels_and_their_range(height, width, seed, share):
    generator = torch.Generator().manual_seed(seed)
    color = torch.rand((2, 3, height, width), generator=generator)
    alpha = torch.rand((2, 1, height, width), generator=generator) * (
        torch.rand((2, 1, height, width), generator=generator) < share
    )
    result = bleed(color, alpha)
    visible = (alpha > 0).expand_as(color)
    assert torch.equal(result[visible], color[visible])
    for index in range(2):
        seen = color[index][visible[index]]
        if len(seen) == 0:
            assert torch.equal(result[index], color[index])
        else:
            assert float(result[index].min()) >= float(seen.min()) - 1e-5
            assert float(result[index].max()) <= float(seen.max()) + 1e-5


@pytest.mark.parametrize(("mode", "key", "expected"), [("L", 7, "LA"), ("RGB", (7, 8, 9), "RGBA")])
def test_a_transparent_color_becomes_alpha(mode, key, expected):
    image = Image.new(mode, (7, 7), key)
    image.putpixel((3, 3), 200 if mode == "L" else (200, 100, 50))
    image.info["transparency"] = key
    alpha = np.asarray(up(image).getchannel("A"))
    assert up(image).mode == expected
    assert alpha[0, 0] == 0
    assert alpha[13:15, 13:15].min() > 200


def test_premultiplied_modes_come_back_premultiplied():
    image = sample_image("RGBa", 6, 6)
    result = up(image)
    color, alpha = np.asarray(result)[..., :3], np.asarray(result)[..., 3:]
    assert (color <= alpha).all()


# Orientation and metadata


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_its_tag_removed(orientation):
    upright = Image.fromarray(noise(3, 5))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions that undo each orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    exif.get_ifd(0x8769)[0xA002] = 1
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif, dpi=(300, 300))
    result = up(Image.open(stream))
    assert np.array_equal(np.asarray(result), repeated(np.asarray(upright)))
    assert 0x0112 not in result.getexif()
    assert result.getexif()[0x010F] == "maker"
    assert result.getexif().get_ifd(0x8769)[0xA002] == 20
    assert result.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_the_input_image_is_not_modified():
    image = sample_image("RGB", 5, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    before = image.tobytes()
    up(image)
    assert image.tobytes() == before
    assert image.getexif()[0x0112] == 6


# Frames


def animation(count: int = 3, form: str = "GIF") -> Image.Image:
    frames = [Image.new("RGB", (6, 4), (80 * index, 0, 0)) for index in range(count)]
    stream = io.BytesIO()
    frames[0].save(stream, form, save_all=True, append_images=frames[1:])
    return Image.open(stream)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused_with_their_count(form):
    with pytest.raises(InputError, match="3 frames"):
        up(animation(form=form))
    assert up(animation(form=form), frame=2).convert("RGB").getpixel((0, 0))[0] == pytest.approx(160, abs=8)
    with pytest.raises(InputError, match="frame 3 is out of range; the frames are 0 to 2"):
        up(animation(form=form), frame=3)
    assert up(animation(1, form)).size == (24, 16)


def test_previews_inside_a_file_are_dropped(caplog):
    stream = io.BytesIO()
    Image.new("RGB", (6, 4)).save(stream, "MPO", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    assert up(Image.open(stream)).size == (24, 16)
    assert "preview" in caplog.text


def test_frame_is_refused_for_arrays() -> None:
    with pytest.raises(InputError, match=r"frame=1 .* index the ndarray"):
        upscale_image(np.zeros((2, 4, 4, 3), np.uint8), nearest, SCALE, frame=1)
