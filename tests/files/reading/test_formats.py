"""Bit depths, channels and inversions of every other format, against readers that share no code with Pillow."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.runtime.sample_images import SCALE, bytes_of, nearest, noise, put, sample_image
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.picture_io import read_image
from tinysr_kernels.runtime.dispatch import upscale_image

codecs = pytest.importorskip("imagecodecs")
HEIGHT, WIDTH = 37, 29
REDUCED = "was read as 8 bits"


def pixels_of(folder, data: bytes) -> np.ndarray:
    return np.asarray(read_image(put(folder, "a.bin", data)).image)


def smooth(channels: int, top: int) -> np.ndarray:
    """A ramp that lossy codecs keep."""
    ramp = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) / (HEIGHT + WIDTH - 2)
    return (ramp[..., None] * np.ones(channels) * top).astype(np.uint16 if top > 255 else np.uint8)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png(tmp_path, channels, dtype):
    pixels = noise(HEIGHT, WIDTH, channels, dtype).squeeze()
    assert np.array_equal(pixels_of(tmp_path, codecs.png_encode(pixels)), pixels)


def interlaced_png(pixels: np.ndarray) -> bytes:
    """An RGB PNG with Adam7 interlacing, unfiltered."""
    plain = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        for row in pixels[y::dy, x::dx]:
            plain += b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes()
    height, width, _ = pixels.shape
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, pixels.itemsize * 8, 2, 0, 0, 1),
        b"IDAT" + zlib.compress(plain),
    )
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (*chunks, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_interlaced_png(tmp_path, dtype):
    pixels = noise(HEIGHT, WIDTH, 3, dtype)
    assert np.array_equal(pixels_of(tmp_path, interlaced_png(pixels)), pixels)


def test_jpeg(tmp_path):
    for channels in (1, 3):
        data = codecs.jpeg8_encode(smooth(channels, 255).squeeze(), level=100)
        assert np.array_equal(pixels_of(tmp_path, data), codecs.jpeg8_decode(data))


def test_cmyk_jpeg_is_inverted_if_adobe_made_it(tmp_path):
    inks = smooth(4, 255)
    plain = codecs.jpeg8_encode(inks, level=100)
    assert b"Adobe" not in plain
    assert np.array_equal(pixels_of(tmp_path, plain), codecs.jpeg8_decode(plain))
    for space in ("CMYK", "YCCK"):
        marked = codecs.jpeg8_encode(inks, level=100, colorspace="CMYK", outcolorspace=space)
        assert b"Adobe" in marked
        assert np.array_equal(pixels_of(tmp_path, marked), 255 - codecs.jpeg8_decode(marked))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: codecs.jpeg_encode(smooth(1, 4095).squeeze(), bitspersample=12), "a JPEG of 12 bits per sample"),
        (lambda: codecs.ljpeg_encode(smooth(1, 4095).squeeze()), "a lossless JPEG"),
        (lambda: codecs.jpegls_encode(smooth(1, 255).squeeze()), "a JPEG-LS image"),
        (lambda: codecs.jpegxl_encode(smooth(3, 255)), "a JPEG XL image"),
        (lambda: codecs.jpegxr_encode(smooth(3, 255)), "a JPEG XR image"),
        (lambda: codecs.jpeg2k_encode(smooth(3, 65535), level=0), "a JPEG 2000 image of 16 bits"),
        (lambda: codecs.jpeg2k_encode(smooth(3, 1023), level=0, bitspersample=10), "a JPEG 2000 image of 10 bits"),
    ],
)
def test_kinds_that_no_decoder_here_reads_are_named(tmp_path, data, words):
    with pytest.raises(InputError, match=words) as caught:
        read_image(put(tmp_path, "a.jpg", data()))
    assert "convert it to" in str(caught.value)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_gray_jpeg2000(tmp_path, bits):
    top = (1 << bits) - 1
    pixels = noise(HEIGHT, WIDTH, 1, "uint16")[..., 0] >> 16 - bits
    pixels = pixels.astype(np.uint8) if bits == 8 else pixels
    found = pixels_of(tmp_path, codecs.jpeg2k_encode(pixels, level=0, bitspersample=bits))
    full = 255 if bits == 8 else 65535
    assert np.array_equal(found, (pixels.astype(np.uint64) * full + top // 2) // top)


def test_an_opened_jpeg2000_that_pillow_misreads_is_refused():
    wide, plain = (io.BytesIO(codecs.jpeg2k_encode(smooth(3, top), level=0)) for top in (65535, 255))
    with Image.open(wide) as image, pytest.raises(InputError, match="JPEG 2000"):
        upscale_image(image, nearest, SCALE)
    with Image.open(plain) as image:
        assert upscale_image(image, nearest, SCALE).size == (WIDTH * SCALE, HEIGHT * SCALE)


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avif_of_more_than_8_bits_is_noticed(tmp_path, bits, caplog):
    data = codecs.avif_encode(smooth(3, (1 << bits) - 1), level=100, bitspersample=bits)
    assert abs(pixels_of(tmp_path, data).astype(int) - smooth(3, 255)).max() <= 9
    assert (REDUCED in caplog.text) == (bits > 8)


def heif(depth: int, channels: int = 3) -> tuple[bytes, np.ndarray]:
    """A lossless HEIC file and its pixels at full range."""
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    if depth == 8:
        pixels = noise(64, 48, channels)
        image = pillow_heif.from_pillow(Image.fromarray(pixels))
    else:
        values = noise(64, 48, channels, "uint16") >> 16 - depth
        mode = "RGB;16" if channels == 3 else "RGBA;16"
        image = pillow_heif.from_bytes(mode=mode, size=(48, 64), data=(values << 16 - depth).tobytes())
        top = (1 << depth) - 1
        pixels = ((values.astype(np.uint64) * 65535 + top // 2) // top).astype(np.uint16)
    image.save(stream, quality=-1, chroma=444, matrix_coefficients=0)
    return stream.getvalue(), pixels


@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("channels", [3, 4])
def test_heic_keeps_all_bits(tmp_path, depth, channels):
    data, pixels = heif(depth, channels)
    read = read_image(put(tmp_path, "a.jpg", data))
    assert read.format == "HEIF"
    assert read.mode == {3: "RGB", 4: "RGBA"}[channels] + (";16" if depth > 8 else "")
    assert np.array_equal(np.asarray(read.image), pixels)


def test_heic_without_its_package_names_the_extra(tmp_path, monkeypatch):
    import sys

    data, _ = heif(8)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"a HEIC image; pip install 'tinysr-kernels\[heif\]', or convert it"):
        read_image(put(tmp_path, "a.heic", data))


@pytest.mark.parametrize("top", [300, 65535])
def test_ppm_keeps_all_bits(tmp_path, top, caplog):
    pixels = noise(HEIGHT, WIDTH, 3, "uint16").clip(0, top)
    data = b"P6 # made by a test\n29 37\n%d\n" % top + pixels.astype(">u2").tobytes()
    expected = (pixels.astype(np.uint64) * 65535 + top // 2) // top
    assert np.array_equal(pixels_of(tmp_path, data), expected)
    assert REDUCED not in caplog.text
    gray = data.replace(b"P6", b"P5", 1)
    plane = pixels.reshape(-1)[: HEIGHT * WIDTH].reshape(HEIGHT, WIDTH)
    assert np.array_equal(pixels_of(tmp_path, gray), np.rint(plane * 65535.0 / top))
    with pytest.raises(InputError, match="truncated PPM file"):
        pixels_of(tmp_path, data[:-1])


def test_sgi_of_16_bits_is_noticed(tmp_path, caplog):
    pixels = noise(HEIGHT, WIDTH, 3, "uint16")
    header = struct.pack(">HBBHHHHll", 474, 0, 2, 3, WIDTH, HEIGHT, 3, 0, 65535).ljust(512, b"\0")
    data = header + pixels[::-1].transpose(2, 0, 1).astype(">u2").tobytes()
    assert np.array_equal(pixels_of(tmp_path, data), pixels >> 8)
    assert f"SGI with more than 8 bits per channel {REDUCED}" in caplog.text


def bitmap(header: bytes, pixels: bytes) -> bytes:
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + pixels


def test_bmp_alpha_masks_and_16_bits_per_pixel(tmp_path, caplog):
    rgba = noise(HEIGHT, WIDTH, 4)
    stored = rgba[::-1][..., [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    v4 = (
        struct.pack("<IiiHHIIiiII", 108, WIDTH, HEIGHT, 1, 32, 3, len(stored), 0, 0, 0, 0) + masks + b"BGRs" + bytes(48)
    )
    assert np.array_equal(pixels_of(tmp_path, bitmap(v4, stored)), rgba)
    plain = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 32, 0, len(stored), 0, 0, 0, 0)
    assert np.array_equal(pixels_of(tmp_path, bitmap(plain, stored)), rgba[..., :3])
    value = noise(HEIGHT, WIDTH, 1, "uint16")[..., 0]
    packed = np.pad(value[::-1], ((0, 0), (0, 1))).tobytes()
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    short = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 3, len(packed), 0, 0, 0, 0) + masks
    found = pixels_of(tmp_path, bitmap(short, packed))
    parts = [(value >> 11) * 255 // 31, (value >> 5 & 63) * 255 // 63, (value & 31) * 255 // 31]
    assert np.array_equal(found, np.stack([part.astype(np.uint8) for part in parts], -1))
    assert not caplog.text  # 5 and 6 bits are not "more than 8"


@pytest.mark.parametrize(
    ("form", "mode"), [("PCX", "RGB"), ("TGA", "RGBA"), ("SGI", "RGBA"), ("ICO", "RGBA"), ("DIB", "RGB")]
)
def test_other_formats_round_trip(tmp_path, form, mode):
    image = sample_image(mode, 16, 16)
    assert np.array_equal(pixels_of(tmp_path, bytes_of(image, form)), np.asarray(image))


def test_qoi_and_webp(tmp_path):
    pixels = noise(HEIGHT, WIDTH, 4)
    assert np.array_equal(pixels_of(tmp_path, codecs.qoi_encode(pixels)), pixels)
    opaque = np.ascontiguousarray(pixels[..., :3])
    assert np.array_equal(pixels_of(tmp_path, codecs.webp_encode(opaque, lossless=True)), opaque)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"8BPS\0\1", "a Photoshop document; flatten it"),
        (b"SIMPLE  =                    T", "a FITS file"),
        (b"DDS |\0\0\0", "a DDS texture"),
        (b"icns\0\0\0\0", "an Apple icon"),
        (b"\0\0\2\0\1\0 \0", "a Windows cursor"),
        (b"\x76\x2f\x31\x01", "floating-point samples; tone map it"),
        (b"Pf\n9 9\n-1.0\n", "a PFM image of floating-point samples"),
        (bytes(128) + b"DICM", "a DICOM file"),
        (b"FUJIFILMCCD-RAW 0201", "a camera raw file; develop it first"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "develop it first"),
        (b"IIRO\x08\0\0\0", "develop it first"),
        (b"IIU\0\x08\0\0\0", "develop it first"),
        (b"II*\0\x10\0\0\0CR\2\0", "develop it first"),
        (b"\x89PNG\r\n\x1a\n\0\0", "corrupt or truncated PNG file: its header"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "corrupt or truncated JPEG file"),
    ],
)
def test_what_is_refused_is_named(tmp_path, head, words):
    with pytest.raises(InputError, match=words):
        read_image(put(tmp_path, "a.png", head + bytes(64)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("form", "mode"), [("XBM", "1"), ("IM", "RGB"), ("MSP", "1"), ("DDS", "RGB")])
def test_formats_outside_the_list_are_not_opened(tmp_path, form, mode):
    path = put(tmp_path, "a.png", bytes_of(sample_image(mode, 16, 16), form))
    with pytest.raises(InputError, match=r"a\.png: .*convert it to"):
        read_image(path)
