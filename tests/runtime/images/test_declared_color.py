"""Colors declared without an ICC profile: the network sees the right sRGB, and the result means the same colors."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from tests.runtime.images.raw_files import bmp_v4, jp2, png, with_nclx
from tests.runtime.sample_images import SCALE, bytes_of, nearest
from tinysr_kernels.runtime.dispatch import upscale_image
from tinysr_kernels.runtime.images.color import icc
from tinysr_kernels.runtime.images.color.h273 import PRIMARIES, TRANSFERS, Label

# From the standards, written anew: xy of red, green, blue; all with the white D65.
SRGB = np.array([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06]])
P3 = np.array([[0.68, 0.32], [0.265, 0.69], [0.15, 0.06]])
ADOBE = np.array([[0.64, 0.33], [0.21, 0.71], [0.15, 0.06]])
BT2020 = np.array([[0.708, 0.292], [0.17, 0.797], [0.131, 0.046]])
D65 = np.array([0.3127 / 0.329, 1, 0.3583 / 0.329])
LINEAR = np.array([0.22, 0.36, 0.27])  # linear sRGB, inside all of these


def to_xyz(points: np.ndarray) -> np.ndarray:
    columns = np.concatenate([points, 1 - points.sum(1, keepdims=True)], 1).T
    return columns * np.linalg.solve(columns, D65)


def srgb_curve(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def bt709_curve(light: np.ndarray) -> np.ndarray:
    return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


def encoded(points: np.ndarray, curve: Callable[[np.ndarray], np.ndarray], top: int = 255) -> np.ndarray:
    """A patch of the color in another space, as integers [6,8,3]."""
    values = curve(np.linalg.solve(to_xyz(points), to_xyz(SRGB) @ LINEAR))
    return np.broadcast_to(np.round(values * top).astype(np.uint8 if top == 255 else np.uint16), (6, 8, 3))


def power(gamma: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda light: light ** (1 / gamma)


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100000))


def chrm(points: np.ndarray) -> tuple[bytes, bytes]:
    numbers = [0.3127, 0.329, *points.ravel()]
    return b"cHRM", struct.pack(">8I", *(round(number * 100000) for number in numbers))


def cicp(primaries: int, transfer: int, matrix: int = 0, full: int = 1) -> tuple[bytes, bytes]:
    return b"cICP", bytes([primaries, transfer, matrix, full])


def avif(primaries: int, transfer: int, pixels: np.ndarray) -> bytes:
    return with_nclx(bytes_of(Image.fromarray(pixels), "AVIF", quality=100, subsampling="4:4:4"), primaries, transfer)


def tiff(pixels: np.ndarray, points: np.ndarray, table: np.ndarray | None) -> bytes:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[318], tags[319] = (0.3127, 0.329), tuple(points.ravel())
    if table is not None:
        tags.tagtype[301] = 3
        tags[301] = tuple(np.tile(np.round(table * 65535).astype(int), 3))
    return bytes_of(Image.fromarray(pixels), "TIFF", tiffinfo=tags)


def with_exif(form: str, pixels: np.ndarray, space: int, index: str | None) -> bytes:
    exif = Image.Exif()
    exif[0x8769] = {0xA001: space} | ({0xA005: {1: index}} if index else {})
    return bytes_of(Image.fromarray(pixels), form, exif=exif, quality=100)


def jpeg2000(pixels: np.ndarray, color: bytes) -> bytes:
    stream = bytes_of(Image.fromarray(pixels), "JPEG2000", no_jp2=True, irreversible=False)
    return jp2(stream, color, pixels.shape[1], pixels.shape[0], 3)


LEVELS = np.linspace(0, 1, 256)
PATCHES: dict[str, Callable[[], bytes]] = {
    "gAMA 1.0": lambda: png(encoded(SRGB, power(1)), gama(1)),
    "gAMA 1/1.8": lambda: png(encoded(SRGB, power(1.8)), gama(1 / 1.8)),
    "gAMA 1/1.8, after a text": lambda: png(encoded(SRGB, power(1.8)), (b"tEXt", b"gAMA\x000"), gama(1 / 1.8)),
    "gAMA and cHRM": lambda: png(encoded(P3, power(1.8)), chrm(P3), gama(1 / 1.8)),
    "cHRM alone": lambda: png(encoded(ADOBE, srgb_curve), chrm(ADOBE)),
    "gAMA in 16 bits": lambda: png(encoded(BT2020, power(1), 65535), chrm(BT2020), gama(1)),
    "sRGB goes before gAMA": lambda: png(encoded(SRGB, srgb_curve), gama(1), chrm(P3), (b"sRGB", b"\0")),
    "cICP P3": lambda: png(encoded(P3, srgb_curve), cicp(12, 13)),
    "cICP BT.2020": lambda: png(encoded(BT2020, bt709_curve), cicp(9, 14)),
    "cICP linear": lambda: png(encoded(SRGB, power(1)), cicp(1, 8)),
    "cICP goes before all": lambda: png(encoded(P3, srgb_curve), cicp(12, 13), gama(1), chrm(BT2020), (b"sRGB", b"\0")),
    "an invalid cICP is ignored": lambda: png(encoded(SRGB, power(1)), cicp(12, 13, matrix=1), gama(1)),
    "AVIF P3": lambda: avif(12, 13, encoded(P3, srgb_curve)),
    "AVIF BT.2020": lambda: avif(9, 1, encoded(BT2020, bt709_curve)),
    "AVIF gamma 2.2": lambda: avif(1, 4, encoded(SRGB, power(2.2))),
    "AVIF unspecified": lambda: avif(2, 2, encoded(SRGB, srgb_curve)),
    "TIFF chromaticities": lambda: tiff(encoded(ADOBE, power(2.2)), ADOBE, None),
    "TIFF transfer function": lambda: tiff(encoded(P3, power(1.8)), P3, LEVELS**1.8),
    "BMP calibrated": lambda: bmp_v4(encoded(P3, power(1.8)), to_xyz(P3).T, 1.8),
    "BMP without endpoints": lambda: bmp_v4(encoded(SRGB, srgb_curve), np.zeros((3, 3)), 0),
    "BMP profile": lambda: bmp_v4(
        encoded(P3, srgb_curve), np.zeros((3, 3)), 0, Label(12, 13).profile(gray=False) or b""
    ),
    "Adobe RGB in JPEG": lambda: with_exif("JPEG", encoded(ADOBE, power(563 / 256)), 0xFFFF, "R03"),
    "Adobe RGB as ColorSpace 2": lambda: with_exif("WEBP", encoded(ADOBE, power(563 / 256)), 2, None),
    "uncalibrated, not R03": lambda: with_exif("JPEG", encoded(SRGB, srgb_curve), 0xFFFF, "R98"),
    "JPEG 2000 sRGB": lambda: jpeg2000(encoded(SRGB, srgb_curve), struct.pack(">BBBI", 1, 0, 0, 16)),
    "JPEG 2000 profile": lambda: jpeg2000(
        encoded(P3, srgb_curve), b"\2\0\0" + (Label(12, 13).profile(gray=False) or b"")
    ),
    "JPEG 2000 code points": lambda: jpeg2000(
        encoded(P3, srgb_curve), struct.pack(">BBBHHHB", 5, 0, 0, 12, 13, 0, 128)
    ),
}


def means(image: Image.Image) -> np.ndarray:
    """The sRGB mean of an image through LittleCMS, by its profile alone."""
    pixels = image if image.mode == "L" else image.convert("RGB")
    if "icc_profile" in image.info:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        pixels = ImageCms.profileToProfile(pixels, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(pixels).reshape(-1, 3).mean(0) / 255


@pytest.mark.parametrize("name", PATCHES)
def test_the_network_sees_srgb_and_the_result_means_the_same(name):
    if "AVIF" in name and not features.check("avif"):
        pytest.skip("this Pillow lacks the format")
    seen = []

    def spy(rgb):
        seen.append(rgb.double().mean((0, 2, 3)).numpy())
        return nearest(rgb)

    with Image.open(io.BytesIO(PATCHES[name]())) as image:
        result = upscale_image(image, spy, SCALE)
    expected = srgb_curve(LINEAR)
    # Half a step of 8 bits, in a linear encoding up to 2 steps of sRGB; YCbCr in 8 bits costs as much again.
    lossy = any(word in name for word in ("AVIF", "JPEG", "ColorSpace", "uncalibrated"))
    bound = 0.014 if lossy else 0.006
    assert abs(seen[0] - expected).max() < bound
    assert abs(means(result) - expected).max() < bound + 0.002


def test_cmyk_with_adobe_rgb_in_its_exif_gets_no_rgb_profile(caplog):
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 2}
    image = Image.open(io.BytesIO(bytes_of(Image.new("CMYK", (4, 3), (0, 0, 0, 128)), "JPEG", exif=exif)))
    result = upscale_image(image, nearest, SCALE)
    assert "icc_profile" not in result.info
    assert [record.message for record in caplog.records] == ["CMYK was converted to RGB"]


def test_gray_images_get_a_gray_profile():
    patch = np.full((4, 5, 1), round(0.25 * 255), np.uint8)
    result = upscale_image(Image.open(io.BytesIO(png(patch, gama(1)))), nearest, SCALE)
    assert result.mode == "L"
    assert result.getpixel((0, 0)) == patch[0, 0, 0]
    assert result.info["icc_profile"][16:20] == b"GRAY"
    assert abs(means(result) - 0.537).max() < 0.004  # linear 0.25 in sRGB


@pytest.mark.parametrize("chunks", [(gama(0.45455),), (gama(0.45455), chrm(SRGB)), (chrm(SRGB),), (cicp(1, 13),)])
def test_what_means_srgb_adds_no_profile(chunks):
    pixels = np.arange(3 * 6 * 8, dtype=np.uint8).reshape(6, 8, 3)
    result = upscale_image(Image.open(io.BytesIO(png(pixels, *chunks))), nearest, SCALE)
    assert result.info == {}
    assert np.array_equal(np.asarray(result), pixels.repeat(SCALE, 0).repeat(SCALE, 1))


@pytest.mark.parametrize(
    "chunks",
    [
        (gama(0),),
        (gama(1e4),),
        (chrm(np.full((3, 2), 0.3)),),
        (chrm(np.zeros((3, 2))),),
        (chrm(SRGB * [[1, 0]]),),
    ],
)
def test_nonsense_is_treated_as_srgb_with_one_notice(chunks, caplog):
    pixels = np.full((4, 5, 3), 77, np.uint8)
    result = upscale_image(Image.open(io.BytesIO(png(pixels, *chunks))), nearest, SCALE)
    assert result.getpixel((0, 0)) == (77, 77, 77)
    assert [record.message for record in caplog.records if "treated as sRGB" in record.message]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("transfer", "full"), [(16, 1), (18, 1), (13, 0)])
def test_pq_hlg_and_narrow_range_keep_values_and_label(transfer, full, caplog):
    pixels = np.full((4, 5, 3), 99, np.uint8)
    data = png(pixels, cicp(9, transfer, full=full), gama(1))
    result = upscale_image(Image.open(io.BytesIO(data)), nearest, SCALE)
    assert result.getpixel((3, 3)) == (99, 99, 99)
    assert result.info == {"cicp": (9, transfer, 0, full)}
    assert "went through the network as they are" in caplog.text
    again = upscale_image(result, nearest, SCALE)
    assert again.info == result.info


def test_the_label_of_a_loaded_image_is_found_by_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.full((4, 5, 3), 99, np.uint8), cicp(9, 16)))
    with Image.open(tmp_path / "a.png") as image:
        image.load()
    assert upscale_image(image, nearest, SCALE).info == {"cicp": (9, 16, 0, 1)}


@pytest.mark.parametrize("label", [*(Label(12, kind) for kind in TRANSFERS), *(Label(kind, 8) for kind in PRIMARIES)])
def test_written_profiles_agree_with_littlecms(label):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    profile = label.profile(gray=False)
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = np.asarray(ImageCms.profileToProfile(pixels, own, ImageCms.createProfile("sRGB"))).astype(int)
    planes = torch.from_numpy(np.asarray(pixels) / 255.0).permute(2, 0, 1)[None]
    found = (icc.parse_profile(profile).to_srgb(planes)[0].permute(1, 2, 0) * 255).round().numpy()
    assert abs(found - expected).max() <= 2


def gain_maps() -> dict[str, bytes]:
    image = Image.new("RGB", (4, 3))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r hdrgm:Version="1.0" hdrgm:HDRCapacityMax="3"/></x:xmpmeta>'
    name = b"urn:iso:std:iso:ts:21496:-1\0\0\0\0"
    return {
        "XMP": bytes_of(image, "JPEG", xmp=xmp),
        "ISO": bytes_of(image, "JPEG", extra=b"\xff\xe2" + struct.pack(">H", len(name) + 2) + name),
    }


@pytest.mark.parametrize("kind", ["XMP", "ISO"])
def test_a_hdr_gain_map_is_named(kind, caplog):
    result = upscale_image(Image.open(io.BytesIO(gain_maps()[kind])), nearest, SCALE)
    assert [record.message for record in caplog.records] == [
        "dropped with the old file: the HDR gain map (the result is the SDR image)"
    ]
    assert b"hdrgm" not in result.info.get("xmp", b"")
