"""Reading image files: detected by content, all bits kept, non-images refused with a reason, corrupt files harmless."""

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

from tests.runtime.sample_images import SCALE, bytes_of, enlarge_file, exif, nearest, noise, put, repeated, sample_image
from tinysr_kernels.errors import InputError, OutOfMemory
from tinysr_kernels.files import encode
from tinysr_kernels.files.picture_io import read_image, upscale_image_file, write_image
from tinysr_kernels.files.writing.png import encode_png
from tinysr_kernels.files.writing.tiff import encode_tiff
from tinysr_kernels.runtime.device import host_memory
from tinysr_kernels.runtime.images.metadata import Metadata

# Reading


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "ICO"])
def test_content_decides_not_the_suffix(tmp_path, form):
    path = put(tmp_path, "wrong.txt", bytes_of(sample_image("RGB", 16, 16), form))
    assert read_image(path).size == (16, 16)
    assert read_image(path).format == form


@given(channels=st.sampled_from([1, 2, 3, 4]), width=st.integers(1, 60), height=st.integers(1, 60))
def test_16bit_png_round_trips_through_imagecodecs(channels, width, height):
    codecs = pytest.importorskip("imagecodecs")
    pixels = noise(height, width, channels, "uint16")
    pixels[:, :: 2 + channels] //= 300  # different rows use different filters
    written = encode_png(pixels, Metadata())
    assert np.array_equal(codecs.png_decode(written).reshape(pixels.shape), pixels)


@given(
    channels=st.sampled_from([1, 2, 3, 4]),
    dtype=st.sampled_from(["uint8", "uint16"]),
    width=st.integers(1, 60),
    height=st.integers(1, 60),
)
def test_tiff_round_trips_through_tifffile(channels, dtype, width, height):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(height, width, channels, dtype)
    read = tifffile.imread(io.BytesIO(encode_tiff(pixels, Metadata())))
    assert np.array_equal(read.reshape(pixels.shape), pixels)
    if channels != 2 or dtype == "uint8":  # Pillow has no mode for 16-bit gray + alpha
        Image.open(io.BytesIO(encode_tiff(pixels, Metadata()))).load()


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16bit_png_keeps_all_bits(tmp_path, channels):
    codecs = pytest.importorskip("imagecodecs")
    pixels = noise(11, 13, channels, "uint16")
    source = put(tmp_path, "a.png", codecs.png_encode(pixels))
    read = read_image(source)
    assert np.array_equal(read.image, pixels)
    assert read.mode == {2: "LA;16", 3: "RGB;16", 4: "RGBA;16"}[channels]
    if channels == 3:
        for name in ("b.png", "b.tif"):
            enlarge_file(source, tmp_path / name)
            assert np.array_equal(read_image(tmp_path / name).image, repeated(pixels))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16bit_tiff_keeps_all_bits(tmp_path, order, compression, channels):
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
    assert np.array_equal(read_image(tmp_path / "a.tif").image, pixels)


def test_premultiplied_16bit_tiff_is_unpremultiplied(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(5, 6, 4, "uint16")
    pixels[..., 3] = np.maximum(pixels[..., 3], 20000)
    stored = pixels.copy()
    stored[..., :3] = (pixels[..., :3].astype(np.uint64) * pixels[..., 3:] + 32767) // 65535
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    found = read_image(tmp_path / "a.tif").image
    assert abs(found.astype(int) - pixels).max() <= 2  # one rounding to 16 bits at alpha of a third


def test_one_page_of_a_16bit_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pages = [noise(4, 5, 3, "uint16", seed) for seed in range(3)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in pages:
            writer.write(page, photometric="rgb", contiguous=False)
    with pytest.raises(InputError, match="3 frames"):
        read_image(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif", frame=1).image, pages[1])


def test_reduction_to_8_bits_is_noticed(tmp_path, caplog):
    pixels = noise(8, 9, 3, "uint16")
    put(tmp_path, "a.ppm", b"P3 9 8 65535 " + b" ".join(b"%d" % value for value in pixels.ravel()))
    assert read_image(tmp_path / "a.ppm").size == (9, 8)
    assert caplog.text.count("was read as 8 bits") == 1
    caplog.clear()
    write_image(tmp_path / "a.jpg", pixels)
    assert "JPEG stores 8 bits per channel" in caplog.text


def transparent_chunk(data: bytes, values: bytes) -> bytes:
    """Insert a tRNS chunk before the pixels of a PNG."""
    chunk = b"tRNS" + values
    at = data.index(b"IDAT") - 4
    return data[:at] + struct.pack(">I", len(values)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_16bit_color_becomes_alpha(tmp_path, channels):
    pixels = noise(6, 7, channels, "uint16")
    key = pixels[2, 3].astype(">u2").tobytes()
    path = put(tmp_path, "a.png", transparent_chunk(encode_png(pixels, Metadata()), key))
    found = read_image(path).image
    assert found.dtype == np.uint16
    assert np.array_equal(found[..., :-1], pixels)
    assert (found[..., -1] == 0).sum() == 1
    assert found[2, 3, -1] == 0


@pytest.mark.parametrize("is_16bit", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_orientation_of_files(tmp_path, suffix, is_16bit, orientation):
    upright = noise(7, 9, 3, "uint16" if is_16bit else "uint8")
    stored = {
        1: upright,
        3: upright[::-1, ::-1],
        6: upright.swapaxes(0, 1)[::-1],
        7: upright[::-1, ::-1].swapaxes(0, 1),
    }
    marked = Metadata(exif=exif(orientation).tobytes())
    path = tmp_path / f"a{suffix}"
    write_image(path, np.ascontiguousarray(stored[orientation]), marked)
    read = read_image(path)
    assert read.size == (9, 7)
    assert np.array_equal(np.asarray(read.image), upright)
    enlarge_file(path, tmp_path / f"b{suffix}")
    again = read_image(tmp_path / f"b{suffix}")
    assert np.array_equal(np.asarray(again.image), repeated(upright))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"just a few words, not an image\n" * 9, "text"),
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
def test_other_files_are_refused_with_a_reason(tmp_path, data, message):
    path = put(tmp_path, "a.x", data)
    with pytest.raises(InputError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_missing_and_special_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"missing\.png: cannot be read: No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(InputError, match="not a regular file"):
        read_image(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match="not a regular file"):
            read_image(tmp_path / "pipe")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "AVIF"]),
    is_16bit=st.booleans(),
    data=st.data(),
)
def test_corrupt_files_are_read_or_refused(tmp_path_factory, form, is_16bit, data):
    if is_16bit and form in ("PNG", "TIFF"):
        whole = (encode_png if form == "PNG" else encode_tiff)(
            noise(20, 20, 3, "uint16"), Metadata(exif=exif().tobytes())
        )
    elif not encode.writable(f".{form.lower()}") and form == "AVIF":
        return
    else:
        options = {"exif": exif()} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        whole = bytes_of(sample_image("RGB", 20, 20), form, **options)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = put(tmp_path_factory.mktemp("corrupt"), "a.bin", bytes(damaged))
    with suppress(InputError):  # anything else fails the test
        result, metadata = upscale_image_file(read_image(path, max_pixels=1 << 10), nearest, SCALE)
        write_image(path.with_suffix(".png"), result, metadata)
        write_image(path.with_suffix(".tif"), result, metadata)


def test_a_truncated_file_is_named(tmp_path):
    whole = bytes_of(Image.fromarray(noise(64, 64)), "JPEG")
    path = put(tmp_path, "a.jpg", whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.jpg: corrupt or truncated JPEG file: .*truncated"):
        read_image(path)


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
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match="60000x60000 are 3600000000 pixels, the limit is 1000000"):
        read_image(path, max_pixels=1_000_000)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1 << 34)
    with pytest.raises(OutOfMemory, match="60000x60000 upscaled by 4"):
        read_image(path)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    path = put(tmp_path, "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="PostScript"):
        read_image(path)
