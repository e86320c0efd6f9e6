"""Files: read by content with all their bits, refused by name where they are no pictures; damage is harmless."""

from __future__ import annotations

import io
import os
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.runtime.pictures import SCALE, bytes_of, enlarge_file, exif, nearest, noise, picture, put, repeated
from tinysr_kernels.errors import InputError, OutOfMemory
from tinysr_kernels.files import encode
from tinysr_kernels.files.bit16 import encode_png
from tinysr_kernels.files.picture_io import read_picture, upscale_picture, write_picture
from tinysr_kernels.files.tiff import encode_tiff
from tinysr_kernels.runtime.device import host_memory
from tinysr_kernels.runtime.images.metadata import Metadata

# Reading


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "ICO"])
def test_content_decides_not_the_suffix(tmp_path, form):
    path = put(tmp_path, "wrong.txt", bytes_of(picture("RGB", 16, 16), form))
    assert read_picture(path).size == (16, 16)
    assert read_picture(path).format == form


@given(channels=st.sampled_from([1, 2, 3, 4]), width=st.integers(1, 60), height=st.integers(1, 60))
def test_sixteen_bit_png_is_written_as_others_read_it(channels, width, height):
    codecs = pytest.importorskip("imagecodecs")
    pixels = noise(height, width, channels, "uint16")
    pixels[:, :: 2 + channels] //= 300  # rows of different character use different filters
    written = encode_png(pixels, Metadata())
    assert np.array_equal(codecs.png_decode(written).reshape(pixels.shape), pixels)


@given(
    channels=st.sampled_from([1, 2, 3, 4]),
    dtype=st.sampled_from(["uint8", "uint16"]),
    width=st.integers(1, 60),
    height=st.integers(1, 60),
)
def test_tiff_is_written_as_others_read_it(channels, dtype, width, height):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(height, width, channels, dtype)
    read = tifffile.imread(io.BytesIO(encode_tiff(pixels, Metadata())))
    if channels == 2 and dtype == "uint16":
        read = read[..., [0, 3]]
    assert np.array_equal(read.reshape(pixels.shape), pixels)
    Image.open(io.BytesIO(encode_tiff(pixels, Metadata()))).load()


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_png_keeps_its_bits(tmp_path, channels):
    codecs = pytest.importorskip("imagecodecs")
    pixels = noise(11, 13, channels, "uint16")
    source = put(tmp_path, "a.png", codecs.png_encode(pixels))
    read = read_picture(source)
    assert np.array_equal(read.image, pixels)
    assert read.mode == {2: "LA;16", 3: "RGB;16", 4: "RGBA;16"}[channels]
    if channels == 3:
        for name in ("b.png", "b.tif"):
            enlarge_file(source, tmp_path / name)
            assert np.array_equal(read_picture(tmp_path / name).image, repeated(pixels))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_tiff_keeps_its_bits(tmp_path, order, compression, channels):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(11, 13, channels, "uint16")
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        byteorder=order,
        photometric="rgb",
        compression=compression,
        predictor=compression is not None,
        extrasamples=["unassalpha"] if channels == 4 else None,
    )
    assert np.array_equal(read_picture(tmp_path / "a.tif").image, pixels)


def test_premultiplied_sixteen_bit_tiff_is_divided_by_its_alpha(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(5, 6, 4, "uint16")
    pixels[..., 3] = np.maximum(pixels[..., 3], 20000)
    stored = pixels.copy()
    stored[..., :3] = (pixels[..., :3].astype(np.uint64) * pixels[..., 3:] + 32767) // 65535
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    found = read_picture(tmp_path / "a.tif").image
    assert abs(found.astype(int) - pixels).max() <= 2  # one rounding to 16 bits at alpha of a third


def test_a_page_of_a_sixteen_bit_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pages = [noise(4, 5, 3, "uint16", seed) for seed in range(3)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in pages:
            writer.write(page, photometric="rgb", contiguous=False)
    with pytest.raises(InputError, match="3 frames"):
        read_picture(tmp_path / "a.tif")
    assert np.array_equal(read_picture(tmp_path / "a.tif", frame=1).image, pages[1])


def test_bits_that_cannot_be_kept_are_said(tmp_path, caplog):
    codecs = pytest.importorskip("imagecodecs")
    pixels = noise(8, 9, 3, "uint16")
    put(tmp_path, "a.ppm", b"P6 9 8 65535\n" + pixels.astype(">u2").tobytes())
    put(tmp_path, "a.jp2", codecs.jpeg2k_encode(pixels, level=0))
    for name in ("a.ppm", "a.jp2"):
        assert read_picture(tmp_path / name).size == (9, 8)
    assert caplog.text.count("was read as 8 bits") == 2
    caplog.clear()
    write_picture(tmp_path / "a.jpg", pixels)
    assert "JPEG holds 8 bits" in caplog.text


def transparent_chunk(data: bytes, values: bytes) -> bytes:
    """A PNG with a tRNS chunk before its pixels."""
    chunk = b"tRNS" + values
    at = data.index(b"IDAT") - 4
    return data[:at] + struct.pack(">I", len(values)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_sixteen_bit_colour_becomes_alpha(tmp_path, channels):
    pixels = noise(6, 7, channels, "uint16")
    key = pixels[2, 3].astype(">u2").tobytes()
    path = put(tmp_path, "a.png", transparent_chunk(encode_png(pixels, Metadata()), key))
    found = read_picture(path).image
    assert found.dtype == np.uint16
    assert np.array_equal(found[..., :-1], pixels)
    assert (found[..., -1] == 0).sum() == 1
    assert found[2, 3, -1] == 0


@pytest.mark.parametrize("sixteen", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_orientation_of_files(tmp_path, suffix, sixteen, orientation):
    upright = noise(7, 9, 3, "uint16" if sixteen else "uint8")
    stored = {
        1: upright,
        3: upright[::-1, ::-1],
        6: upright.swapaxes(0, 1)[::-1],
        7: upright[::-1, ::-1].swapaxes(0, 1),
    }
    marked = Metadata(exif=exif(orientation).tobytes())
    path = tmp_path / f"a{suffix}"
    write_picture(path, np.ascontiguousarray(stored[orientation]), marked)
    read = read_picture(path)
    assert read.size == (9, 7)
    assert np.array_equal(np.asarray(read.image), upright)
    enlarge_file(path, tmp_path / f"b{suffix}")
    again = read_picture(tmp_path / f"b{suffix}")
    assert np.array_equal(np.asarray(again.image), repeated(upright))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"just a few words, no picture\n" * 9, "text"),
        (b"%PDF-1.7 ....", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b'<?xml version="1.0"?><svg xmlns="x"/>', "SVG"),
        (b"PK\x03\x04\0\0\0\0", "ZIP"),
        (b"\xff\x0a\0\0\0\0", "JPEG XL"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (bytes(range(128, 228)), "80 81 82"),
        (b"\x89PNG\r\n\x1a\n", "a.x"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, data, message):
    path = put(tmp_path, "a.x", data)
    with pytest.raises(InputError, match=message) as caught:
        read_picture(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"missing\.png: cannot be read: No such file"):
        read_picture(tmp_path / "missing.png")
    with pytest.raises(InputError, match="not a regular file"):
        read_picture(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match="not a regular file"):
            read_picture(tmp_path / "pipe")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "AVIF"]),
    sixteen=st.booleans(),
    data=st.data(),
)
def test_damaged_files_are_read_or_refused_never_worse(tmp_path_factory, form, sixteen, data):
    if sixteen and form in ("PNG", "TIFF"):
        whole = (encode_png if form == "PNG" else encode_tiff)(
            noise(20, 20, 3, "uint16"), Metadata(exif=exif().tobytes())
        )
    elif not encode.writable(f".{form.lower()}") and form == "AVIF":
        return
    else:
        options = {"exif": exif()} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        whole = bytes_of(picture("RGB", 20, 20), form, **options)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = put(tmp_path_factory.mktemp("damaged"), "a.bin", bytes(damaged))
    with suppress(InputError):  # anything else fails the test
        result, metadata = upscale_picture(read_picture(path, max_pixels=1 << 10), nearest, SCALE)
        write_picture(path.with_suffix(".png"), result, metadata)
        write_picture(path.with_suffix(".tif"), result, metadata)


def test_a_truncated_photograph_is_named(tmp_path):
    whole = bytes_of(Image.fromarray(noise(64, 64)), "JPEG")
    path = put(tmp_path, "a.jpg", whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.jpg: broken or truncated JPEG file: .*truncated"):
        read_picture(path)


def bomb(side: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, pixels, b"IEND")
    )


def test_the_header_is_checked_before_decoding(tmp_path, monkeypatch):
    path = put(tmp_path, "bomb.png", bomb(60000))
    with pytest.raises(InputError, match="MAX_IMAGE_PIXELS"):
        read_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match="60000x60000 are 3600000000 pixels, the limit is 1000000"):
        read_picture(path, max_pixels=1_000_000)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1 << 34)
    with pytest.raises(OutOfMemory, match="60000x60000 enlarged 4 times"):
        read_picture(path)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    path = put(tmp_path, "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="PostScript"):
        read_picture(path)
