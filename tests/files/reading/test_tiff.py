"""TIFF by its tags: every accepted layout equals an independent reader's pixels, every other one is refused by name."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import ROOT
from tests.runtime.sample_images import noise, put, sample_image
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.picture_io import read_image, write_image
from tinysr_kernels.files.writing import tiff as writing
from tinysr_kernels.runtime.images import structure
from tinysr_kernels.runtime.images.metadata import Metadata

tifffile = pytest.importorskip("tifffile")
HEIGHT, WIDTH = 37, 29


def pixels_of(path: Path, **options) -> np.ndarray:
    return np.asarray(read_image(path, **options).image)


def written(folder: Path, pixels: np.ndarray, **options) -> Path:
    tifffile.imwrite(folder / "a.tif", pixels, **options)
    return folder / "a.tif"


LAYOUTS = list(itertools.product(("uint8", "uint16"), "<>", (None, "zlib", "lzw", "packbits"), (None, (16, 16))))


@pytest.mark.parametrize(("dtype", "order", "compression", "tile"), LAYOUTS)
def test_every_layout_of_gray_and_rgb(tmp_path, dtype, order, compression, tile):
    top = np.iinfo(dtype).max
    rgba = noise(HEIGHT, WIDTH, 4, dtype)
    rgb, gray, gray_alpha = rgba[..., :3], rgba[..., 0], np.ascontiguousarray(rgba[..., :2])
    options = {"byteorder": order, "compression": compression, "tile": tile}
    if compression in ("zlib", "lzw"):
        options["predictor"] = True
    if tile is None:
        options["rowsperstrip"] = 10
    for expected, stored, more in (
        (gray, gray, {"photometric": "minisblack"}),
        (top - gray, gray, {"photometric": "miniswhite"}),
        (rgb, rgb, {"photometric": "rgb"}),
        (rgb, np.moveaxis(rgb, -1, 0), {"photometric": "rgb", "planarconfig": "separate"}),
        (rgba, rgba, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (rgb, rgba, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
        (gray_alpha, gray_alpha, {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": [2]}),
    ):
        path = written(tmp_path, np.ascontiguousarray(stored), **options, **more)
        assert np.array_equal(pixels_of(path), expected), more


@pytest.mark.parametrize("compression", ["zstd", "lzma"])
def test_other_lossless_compressions(tmp_path, compression):
    pixels = noise(HEIGHT, WIDTH, 3, "uint16")
    assert np.array_equal(pixels_of(written(tmp_path, pixels, photometric="rgb", compression=compression)), pixels)


def test_no_optional_package_is_needed(tmp_path):
    pixels = noise(HEIGHT, WIDTH, 3, "uint16")
    written(tmp_path, pixels, photometric="rgb", compression="lzw", predictor=True, byteorder=">")
    np.save(tmp_path / "a.npy", pixels)
    script = f"""
import sys
sys.modules["imagecodecs"] = None
import numpy as np
from pathlib import Path
from tinysr_kernels.files.reading.tiff import read_tiff
with open({str(tmp_path / "a.tif")!r}, "rb") as stream:
    found = read_tiff(Path("a.tif"), stream, None, lambda width, height: None, False).pixels
assert np.array_equal(found, np.load({str(tmp_path / "a.npy")!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_premultiplied_color_is_divided(tmp_path, dtype):
    top = np.iinfo(dtype).max
    pixels = noise(HEIGHT, WIDTH, 4, dtype)
    pixels[..., 3] = np.maximum(pixels[..., 3], top // 2)
    pixels[0, 0, 3] = 0
    stored = pixels.copy()
    stored[..., :3] = (pixels[..., :3].astype(np.uint64) * pixels[..., 3:] + top // 2) // top
    found = pixels_of(written(tmp_path, stored, photometric="rgb", extrasamples=["assocalpha"]))
    assert abs(found[1:].astype(int) - pixels[1:]).max() <= 1
    assert found[0, 0].tolist() == [0, 0, 0, 0]


def test_colors_and_bits_that_pillow_reads(tmp_path):
    gray, cmyk = noise(HEIGHT, WIDTH, 1)[..., 0], noise(HEIGHT, WIDTH, 4)
    bits = gray > 99
    assert np.array_equal(pixels_of(written(tmp_path, bits, photometric="minisblack")), bits)
    assert np.array_equal(pixels_of(written(tmp_path, bits, photometric="miniswhite")), ~bits)
    assert np.array_equal(pixels_of(written(tmp_path, cmyk, photometric="separated", compression="lzw")), cmyk)
    flat = np.repeat(np.repeat(noise(5, 4), 8, 0), 8, 1)
    for photometric in ("rgb", "ycbcr"):
        path = written(tmp_path, flat, photometric=photometric, compression="jpeg")
        assert np.array_equal(pixels_of(path), tifffile.imread(path))


@pytest.mark.parametrize("scale", [257, 1])
def test_palettes_of_16_and_of_8_bits(tmp_path, scale):
    index, colors = noise(HEIGHT, WIDTH, 1)[..., 0], noise(3, 256, 1)[..., 0]
    path = written(tmp_path, index, photometric="palette", colormap=colors.astype(np.uint16) * scale)
    assert np.array_equal(np.asarray(read_image(path).image.convert("RGB")), colors.T[index])


def tiff_of(bits: int, photometric: int) -> tuple[bytes, np.ndarray]:
    """A gray TIFF of packed samples, and its values at full range of 8 bits."""
    values = noise(HEIGHT, WIDTH, 1, "uint16")[..., 0] >> 16 - bits
    planes = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(planes.astype(np.uint8).reshape(HEIGHT, -1), axis=1).tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 273: 122, 277: 1, 278: HEIGHT, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    full = values * 255 // ((1 << bits) - 1)
    return data + rows, full if photometric else 255 - full


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 10, 12, 14])
def test_packed_gray(tmp_path, bits, photometric):
    data, expected = tiff_of(bits, photometric)
    path = put(tmp_path, "a.tif", data)
    if bits < 8:
        assert np.array_equal(pixels_of(path), expected)
    else:
        with pytest.raises(InputError, match=f"a TIFF image of {bits}-bit integers, gray, .*: convert it to .*16 bits"):
            read_image(path)


@pytest.mark.parametrize(
    ("pixels", "options", "words"),
    [
        (noise(9, 8, 3, "float32"), {"photometric": "rgb"}, "32-bit floating-point numbers, RGB"),
        (noise(9, 8, 1, "uint16").astype("int16")[..., 0], {}, "16-bit signed integers, gray"),
        (noise(9, 8, 1, "uint16").astype("uint32")[..., 0], {}, "32-bit integers"),
        (noise(4, 9, 8), {"photometric": "separated", "planarconfig": "separate"}, "CMYK, 4 channels in planes"),
        (noise(9, 8, 3, "uint16"), {"photometric": "cielab"}, "16-bit integers, Lab"),
        (noise(9, 8), {"photometric": "rgb", "compression": "jpegxl"}, "JPEGXL compression"),
    ],
)
def test_other_combinations_are_refused_by_name(tmp_path, pixels, options, words):
    with pytest.raises(InputError, match=words) as caught:
        read_image(written(tmp_path, pixels, **options))
    assert "convert it" in str(caught.value)


# Several images


def test_reduced_copies_are_no_frames(tmp_path, caplog):
    pixels = noise(16, 16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(pixels, photometric="rgb", subifds=1)
        writer.write(pixels[::2, ::2], photometric="rgb", subfiletype=1)
        writer.write(pixels[::4, ::4], photometric="rgb", subfiletype=1)
    assert np.array_equal(pixels_of(tmp_path / "a.tif"), pixels)
    assert "1 secondary images" in caplog.text


def test_pages_of_any_kind_are_frames(tmp_path):
    pages = [noise(9, 8, 3, "uint16"), noise(7, 6, 1)[..., 0], noise(5, 4, 4)]
    with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=True) as writer:
        writer.write(pages[0], photometric="rgb")
        writer.write(pages[1], photometric="minisblack")
        writer.write(pages[2], photometric="separated")
    with pytest.raises(InputError, match=r"3 frames \(TIFF\); select one with frame=N"):
        read_image(tmp_path / "a.tif")
    for index, page in enumerate(pages):
        assert np.array_equal(pixels_of(tmp_path / "a.tif", frame=index), page)
    with pytest.raises(InputError, match="the frames are 0 to 2"):
        read_image(tmp_path / "a.tif", frame=3)


def directories(count: int, circle: bool) -> bytes:
    one = struct.pack("<H", 2) + struct.pack("<HHIIHHII", 256, 4, 1, 9, 257, 4, 1, 9)
    size = len(one) + 4
    nexts = [8 + size * (i + 1) for i in range(count)]
    nexts[-1] = 8 if circle else 0
    return b"II*\0\x08\0\0\0" + b"".join(one + struct.pack("<I", offset) for offset in nexts)


@pytest.mark.parametrize(
    ("count", "circle", "words"), [(60_000, False, "more than 10000"), (3, True, "circle, after 3")]
)
def test_chains_of_directories_are_bounded(tmp_path, count, circle, words):
    path = put(tmp_path, "a.tif", directories(count, circle))
    with pytest.raises(InputError, match=words):
        read_image(path)


def test_overlapping_directories_take_linear_time(monkeypatch):
    """Each directory may claim thousands of tags that others claim too: their number is bounded."""
    monkeypatch.setattr(structure, "_MAX_TAGS", 2)
    data = directories(3, False).replace(struct.pack("<H", 2), struct.pack("<H", 3), 1)
    assert len(structure.tiff_directories(io.BytesIO(data), [256])) == 1


@pytest.mark.parametrize(("width", "height"), [(0, 9), (9, 0)])
def test_an_image_without_pixels_is_refused(tmp_path, width, height):
    data, _ = tiff_of(8, 1)
    sizes = struct.pack("<HHIIHHII", 256, 4, 1, WIDTH, 257, 4, 1, HEIGHT)
    empty = struct.pack("<HHIIHHII", 256, 4, 1, width, 257, 4, 1, height)
    with pytest.raises(InputError, match=f"an image of {width}x{height} pixels"):
        read_image(put(tmp_path, "a.tif", data.replace(sizes, empty)))


# Camera raw


@pytest.mark.parametrize("photometric", [32803, 34892])
@pytest.mark.parametrize("inside", [False, True])
def test_camera_raw_is_refused(tmp_path, photometric, inside):
    """The thumbnail comes first, the sensor's pixels in a directory of their own or in a sub-directory."""
    sensor = noise(16, 16, 3 if photometric == 34892 else 1, "uint16").squeeze()
    with tifffile.TiffWriter(tmp_path / "a.NEF") as writer:
        if inside:
            writer.write(noise(8, 8), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(sensor, photometric=photometric)
    with pytest.raises(InputError, match="a camera raw file; develop it first"):
        read_image(tmp_path / "a.NEF")


def test_a_dng_version_makes_a_raw_file(tmp_path):
    extra = [(50706, 1, 4, (1, 4, 0, 0), True)]
    with pytest.raises(InputError, match="develop it first"):
        read_image(written(tmp_path, noise(8, 8), photometric="rgb", extratags=extra))


# Writing


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_bigtiff_is_written_beyond_the_limit(tmp_path, monkeypatch, channels):
    monkeypatch.setattr(writing, "_CLASSIC_LIMIT", 100)
    pixels = noise(300, 40, channels, "uint16")
    monkeypatch.setattr(writing, "_STRIP_BYTES", 5000)
    write_image(tmp_path / "a.tif", pixels)
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II+\0"
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif").reshape(pixels.shape), pixels)
    assert np.array_equal(pixels_of(tmp_path / "a.tif").reshape(pixels.shape), pixels)


def test_offsets_beyond_4_gb():
    """Only their number matters to the directory: two strips of 3 GB that hold nothing."""
    strips = [range(3 << 30), range(3 << 30), b"end"]
    head = writing._directory(noise(3, 5, 3), strips, 1, Metadata(), exif=False)
    with tifffile.TiffFile(io.BytesIO(head)) as file:
        offsets = file.pages[0].dataoffsets
    assert offsets == tuple(len(head) + start for start in (0, 3 << 30, 6 << 30))


def test_16bit_gray_and_alpha_stay_gray(tmp_path):
    pixels = noise(9, 8, 2, "uint16")
    write_image(tmp_path / "a.tif", pixels)
    assert tifffile.imread(tmp_path / "a.tif").shape == (9, 8, 2)
    assert read_image(tmp_path / "a.tif").mode == "LA;16"


# The image that Pillow opened


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        (noise(3, 9, 8, "uint16"), {"photometric": "rgb", "planarconfig": "separate"}),
        (noise(9, 8, 1, "uint16")[..., 0], {"photometric": "miniswhite"}),
    ],
)
def test_an_opened_image_that_pillow_misreads_is_refused(tmp_path, stored, options):
    from tests.runtime.sample_images import SCALE, nearest
    from tinysr_kernels.runtime.dispatch import upscale_image

    with Image.open(written(tmp_path, stored, **options)) as image, pytest.raises(InputError, match="tifffile"):
        upscale_image(image, nearest, SCALE)
    sample_image("RGB", 9, 8).save(tmp_path / "b.tif")
    with Image.open(tmp_path / "b.tif") as image:
        assert upscale_image(image, nearest, SCALE).size == (36, 32)
