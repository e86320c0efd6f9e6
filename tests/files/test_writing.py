"""Writing image files: metadata is preserved, formats store what they support, outputs are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.runtime import sample_images
from tests.runtime.sample_images import bytes_of, enlarge_file, exif, noise, put, repeated, sample_image
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.encode import Encoding, has_alpha, unsupported_reason, writable
from tinysr_kernels.files.picture_io import read_image, write_image
from tinysr_kernels.files.writing.png import encode_png
from tinysr_kernels.runtime.images.metadata import Metadata, collect

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6" tiff:ImageWidth="9">'
    b"<exif:PixelYDimension>7</exif:PixelYDimension></r></x:xmpmeta>"
)


# Metadata


@pytest.mark.parametrize("source", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("target", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("is_16bit", [False, True])
def test_metadata_is_preserved(tmp_path, source, target, is_16bit):
    profile = sample_images.matrix_profile()
    expected = Metadata(exif=exif().tobytes(), xmp=XMP, icc=profile, dpi=(300, 300))
    write_image(tmp_path / f"a{source}", noise(9, 7, 3, "uint16" if is_16bit else "uint8"), expected)
    enlarge_file(tmp_path / f"a{source}", tmp_path / f"b{target}")
    with Image.open(tmp_path / f"b{target}") as image:
        image.load()
        found = image.getexif()
        assert image.size == (36, 28)
        assert found.get(0x0112, 1) == 1
        assert found[0x010F] == "maker"
        assert found.get_ifd(0x8769)[0xA002] == 36
        assert found.get_ifd(0x8769)[0xA003] == 28
        assert found.get_ifd(0x8825)[1] == "N"
        assert image.info["icc_profile"] == profile
        if ".webp" not in (source, target):  # WebP cannot store a resolution
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        packet = collect(image).xmp
        assert packet is not None
        assert b'tiff:Orientation="6"' not in packet
        assert b'tiff:ImageWidth="36"' in packet
        assert b"<exif:PixelYDimension>28<" in packet


def test_stripping_keeps_the_profile(tmp_path):
    expected = Metadata(exif=exif(1).tobytes(), xmp=XMP, icc=sample_images.matrix_profile(), dpi=(300, 300))
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        write_image(tmp_path / f"a{suffix}", noise(4, 5), expected, Encoding(strip=True))
        with Image.open(tmp_path / f"a{suffix}") as image:
            image.load()
            found = collect(image)
        assert found.icc == expected.icc
        assert found.xmp is None
        assert found.dpi is None
        assert found.exif is None or b"maker" not in found.exif


def test_storage_tags_of_a_tiff_are_not_copied(tmp_path):
    write_image(tmp_path / "a.tif", noise(4, 5), Metadata(exif=exif(1).tobytes()))
    enlarge_file(tmp_path / "a.tif", tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert not {256, 257, 258, 259, 273, 277, 278, 279, 317} & set(image.getexif())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_corrupt_exif_is_dropped_with_a_notice(tmp_path, caplog):
    path = put(tmp_path, "a.jpg", bytes_of(sample_image("RGB", 8, 8), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"))
    enlarge_file(path, tmp_path / "b.jpg")
    assert read_image(tmp_path / "b.jpg").size == (32, 32)


def test_too_long_metadata_is_dropped_from_jpeg_with_a_notice(tmp_path, caplog):
    long = Image.Exif()
    long[0x9286] = b"x" * 70000
    write_image(tmp_path / "a.jpg", noise(4, 5), Metadata(exif=long.tobytes(), xmp=b"<x>" + b"x" * 70000))
    assert "EXIF is too long" in caplog.text
    assert "XMP is too long" in caplog.text
    assert read_image(tmp_path / "a.jpg").size == (5, 4)


def test_a_gray_profile_is_applied_where_the_format_is_rgb_only(tmp_path):
    expected = Metadata(icc=sample_images.gray_profile(1.0))
    write_image(tmp_path / "a.webp", np.full((4, 5, 1), 128, np.uint8), expected, Encoding(lossless=True))
    with Image.open(tmp_path / "a.webp") as image:
        assert "icc_profile" not in image.info
        assert image.convert("RGB").getpixel((0, 0)) == (188, 188, 188)  # linear 128/255 in sRGB


# Writing


@pytest.mark.parametrize("mode", sorted(sample_images.MODES))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".avif"])
def test_every_mode_is_written_or_refused(tmp_path, mode, suffix):
    if not writable(suffix):
        pytest.skip("this Pillow lacks the format")
    image = sample_image(mode, 9, 7)
    path = tmp_path / f"a{suffix}"
    reason = unsupported_reason(suffix, image.size, has_alpha(image))
    if reason:
        with pytest.raises(InputError, match="write PNG instead"):
            write_image(path, image)
        assert not path.exists()
    else:
        write_image(path, image)
        assert read_image(path).size == (9, 7)


def test_opaque_alpha_is_dropped_for_jpeg(tmp_path):
    pixels = noise(5, 6, 4)
    pixels[..., 3] = 255
    write_image(tmp_path / "a.jpg", Image.fromarray(pixels))
    assert read_image(tmp_path / "a.jpg").mode == "RGB"


@pytest.mark.parametrize(("suffix", "longest"), [(".jpg", 65500), (".webp", 16383)])
def test_the_limits_are_those_of_the_encoders(tmp_path, suffix, longest):
    assert unsupported_reason(suffix, (longest, 1), False) is None
    write_image(tmp_path / f"a{suffix}", Image.new("RGB", (longest, 1)))
    assert unsupported_reason(suffix, (1, longest + 1), False)
    with pytest.raises(InputError, match=str(longest)):
        write_image(tmp_path / f"b{suffix}", Image.new("RGB", (1, longest + 1)))


def test_quality_and_subsampling(tmp_path):
    image = Image.fromarray(noise(64, 64))
    sizes = {}
    for quality in (30, 95):
        write_image(tmp_path / "a.jpg", image, None, Encoding(quality=quality))
        sizes[quality] = (tmp_path / "a.jpg").stat().st_size
    assert sizes[30] < sizes[95]
    with Image.open(tmp_path / "a.jpg") as read:
        assert {layer[1:3] for layer in read.layer} == {(1, 1)}  # 4:4:4
    write_image(tmp_path / "a.webp", image, None, Encoding(lossless=True))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.webp").image), np.asarray(image))


def test_unknown_suffixes_are_refused(tmp_path):
    for name in ("a.xyz", "a", "a.gif"):
        with pytest.raises(InputError, match="cannot write"):
            write_image(tmp_path / name, noise(2, 2))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="mode F"):
        write_image(tmp_path / "a.png", Image.new("F", (2, 2)))


def test_srgb_images_skip_the_conversion_and_keep_the_profile(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = noise(5, 6)
    write_image(tmp_path / "a.png", pixels, Metadata(icc=profile))
    enlarge_file(tmp_path / "a.png", tmp_path / "b.png")
    found = read_image(tmp_path / "b.png")
    assert found.metadata.icc == profile
    assert np.array_equal(np.asarray(found.image), repeated(pixels))


def test_reading_does_not_keep_files_open(tmp_path):
    for name, data in (
        ("a.png", encode_png(noise(4, 4, 3, "uint16"), Metadata())),
        ("a.jpg", bytes_of(sample_image("RGB", 4, 4), "JPEG")),
    ):
        read_image(put(tmp_path, name, data))
    if Path("/proc/self/fd").exists():
        names = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
        assert not [name for name in names if name.startswith(str(tmp_path))]
