"""ICC profiles: the network sees sRGB, the result is in the image's color space, corrupt profiles are noticed."""

from __future__ import annotations

import io
import logging
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tests.runtime import sample_images as samples
from tests.runtime.sample_images import SCALE, nearest, noise, repeated, sample_image
from tinysr_kernels.runtime.dispatch import upscale_image
from tinysr_kernels.runtime.images import arrays
from tinysr_kernels.runtime.images.color import icc


def up(image):
    return upscale_image(image, nearest, SCALE)


def tagged(image: Image.Image, profile: bytes) -> Image.Image:
    image.info["icc_profile"] = profile
    return image


@pytest.mark.parametrize("tone", [samples.SRGB_CURVE, samples.curve(2.2), samples.curve(1.8), samples.curve(1)])
def test_matrix_profiles_agree_with_littlecms(tone):
    profile = samples.matrix_profile(tone=tone)
    space = icc.parse_profile(profile)
    assert space is not None
    image = Image.fromarray(noise(32, 32))
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    expected = np.asarray(ImageCms.profileToProfile(image, source, srgb)).astype(int)
    planes = torch.from_numpy(np.asarray(image).astype(np.float64) / 255).permute(2, 0, 1)[None]
    found = (space.to_srgb(planes)[0].permute(1, 2, 0) * 255).round().numpy()
    # littlecms uses 16-bit fixed point: an error of one 8-bit step, more where a curve is steep.
    assert abs(found - expected).max() <= 2
    assert (abs(found - expected) <= 1).mean() > 0.99


@given(gamma=st.floats(1, 3), gray=st.booleans())
def test_the_round_trip_is_exact_to_16_bits(gamma, gray):
    profile = samples.gray_profile(gamma) if gray else samples.matrix_profile(samples.SRGB, samples.curve(gamma))
    space = icc.parse_profile(profile)
    assert space is not None
    # Up to just below white: the rounded colorants of the profile sum to white with an error of 2e-4.
    values = torch.linspace(0, 0.999, 4097, dtype=torch.float64).expand(1, 3, 1, -1)
    assert float((space.from_srgb(space.to_srgb(values)) - values).abs().max()) < 1 / 65535


def test_srgb_is_recognized():
    own = icc.parse_profile(samples.matrix_profile(samples.SRGB))
    lcms = icc.parse_profile(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    wide = icc.parse_profile(samples.matrix_profile())
    assert own is not None
    assert own.is_srgb()
    assert lcms is not None
    assert lcms.is_srgb()
    assert wide is not None
    assert not wide.is_srgb()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16", "P"])
def test_wide_gamut_images_keep_values_and_profile(mode):
    profile = samples.matrix_profile()
    image = tagged(sample_image(mode, 12, 9), profile)
    result = up(image)
    assert result.info["icc_profile"] == profile
    if mode in ("L", "I;16"):
        before, after = (np.asarray(each).astype(int) for each in (image, result))
        assert abs(after - repeated(before)).max() <= 1


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_out_of_gamut_colors_are_preserved(color):
    profile = samples.matrix_profile()
    assert up(tagged(Image.new("RGB", (3, 2), color), profile)).getcolors() == [(12 * 8, color)]
    space = icc.parse_profile(profile)
    pixels16 = np.full((3, 2, 3), np.array(color) * 257, np.uint16)
    result = arrays.enlarge_pixels(pixels16[None], nearest, SCALE, space=space)[0]
    assert abs(result.astype(int) - repeated(pixels16)).max() <= 1


def test_the_network_sees_srgb():
    seen = []

    def spy(rgb):
        seen.append(rgb)
        return nearest(rgb)

    upscale_image(tagged(Image.new("L", (2, 2), 128), samples.gray_profile(1.0)), spy, SCALE)
    assert float(seen[0].mean()) == pytest.approx(0.7365, abs=1e-3)  # linear 128/255 in sRGB


def test_table_profiles_are_applied_by_littlecms():
    profile = samples.table_profile()
    image = tagged(Image.new("RGB", (4, 3), (120, 120, 120)), profile)
    result = up(image)
    assert result.info["icc_profile"] == profile
    assert abs(np.asarray(result).astype(int) - 120).max() <= 3
    transparent = tagged(Image.new("RGBA", (4, 3), (120, 120, 120, 99)), profile)
    assert up(transparent).getpixel((0, 0))[3] == 99


def test_cmyk_is_converted_once_with_a_notice(caplog):
    plain = up(sample_image("CMYK", 5, 4))
    assert plain.mode == "RGB"
    tagged_result = up(tagged(Image.new("CMYK", (4, 3), (0, 0, 0, 128)), samples.table_profile(b"CMYK")))
    assert "icc_profile" not in tagged_result.info
    assert abs(tagged_result.getpixel((0, 0))[0] - 118) <= 3  # L* = 50
    assert caplog.text.count("CMYK was converted") == 2


@pytest.mark.parametrize(
    "profile",
    [
        b"x",
        b"\0" * 400,
        samples.matrix_profile()[:200],
        samples.matrix_profile(tone=b"curv\0\0\0\0\xff\xff\xff\xff"),
        samples.matrix_profile(tone=b"para\0\0\0\0\0\x09\0\0"),
        samples.matrix_profile(((0, 0, 0),) * 3),
        samples.table_profile(both_ways=False),
    ],
)
def test_a_corrupt_profile_is_treated_as_srgb_with_one_notice(profile, caplog):
    image = tagged(sample_image("RGB", 4, 3), profile)
    assert np.array_equal(np.asarray(up(image)), repeated(np.asarray(image)))
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert "sRGB" in caplog.text


@given(data=st.data())
def test_corrupt_profiles_raise_only_profile_errors(data):
    profile = bytearray(samples.matrix_profile())
    for _ in range(data.draw(st.integers(1, 6))):
        profile[data.draw(st.integers(0, len(profile) - 1))] = data.draw(st.integers(0, 255))
    with suppress(icc.ProfileError):
        icc.parse_profile(bytes(profile[: data.draw(st.integers(0, len(profile)))]))
