"""Small files that ask for much memory or time are refused before they are decoded, from files and from Python."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.runtime.sample_images import SCALE, bytes_of, nearest, noise, put, sample_image
from tinysr_kernels.errors import InputError, OutOfMemory
from tinysr_kernels.files.picture_io import read_image
from tinysr_kernels.runtime.device import host_memory
from tinysr_kernels.runtime.dispatch import upscale_image
from tinysr_kernels.runtime.images import bounds, structure


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Python's own allocations in the block stay below so many bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def icon(side: int) -> bytes:
    """An icon whose directory says 16x16, and whose image is larger."""
    inner = bytes_of(Image.new("L", (side, side)), "PNG")
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def gif(frames: int, width: int, height: int) -> bytes:
    """A canvas of 9x9 and frames that say they are larger."""
    head = b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\4\0\1\0\0\0," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2\x44\1\0"
    return head + frame * frames + b";"


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = bytes_of(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def webp(width: int, height: int) -> bytes:
    """A header alone, of a canvas of that size."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + sides


def codestream(width: int, height: int) -> bytes:
    """A JP2 file whose boxes say 16x16, and whose codestream says otherwise."""
    data = bytearray(bytes_of(sample_image("RGB", 16, 16), "JPEG2000"))
    size = data.index(b"\xff\x4f\xff\x51") + 8
    data[size : size + 8] = struct.pack(">II", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [icon(3000), gif(2, 60000, 60000), webp(15000, 15000), codestream(60000, 60000)],
    ids=["icon", "gif", "webp", "codestream"],
)
def test_the_size_of_what_is_decoded_counts(tmp_path, data, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded before it was checked"))
    path = put(tmp_path, "a.bin", data)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1 << 30)
    with peak_below(8 << 20):
        with pytest.raises(InputError, match="pixels, the limit is 1000000"):
            read_image(path, max_pixels=1_000_000)
        with pytest.raises(OutOfMemory, match="needs about"):
            read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_an_honest_icon_is_read(tmp_path):
    assert read_image(put(tmp_path, "a.ico", icon(300)), max_pixels=90_000).size == (300, 300)


def test_the_scans_of_a_jpeg_are_bounded(tmp_path):
    path = put(tmp_path, "a.jpg", scans(13_000, 1500))
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"a JPEG file of 130\d\d scans, each a pass over 1500x1500 pixels"):
        read_image(path)
    with Image.open(path) as image, pytest.raises(InputError, match=r"image: a JPEG file of 130\d\d scans"):
        upscale_image(image, nearest, SCALE)
    assert time.perf_counter() - started < 2
    assert read_image(put(tmp_path, "b.jpg", scans(300, 40))).size == (40, 40)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_late_frames_are_bounded(tmp_path, form, monkeypatch):
    """Frame N is drawn over all the frames before it."""
    frames = [sample_image("RGB", 20, 20, seed) for seed in range(4)]
    path = put(tmp_path, "a", bytes_of(frames[0], form, save_all=True, append_images=frames[1:]))
    assert read_image(path, frame=3).size == (20, 20)
    monkeypatch.setattr(bounds, "MAX_WORK", 4 * 400 * 3)
    assert read_image(path, frame=2).size == (20, 20)
    with pytest.raises(InputError, match="frame 3 is drawn over all frames before it"):
        read_image(path, frame=3)
    with Image.open(path) as image, pytest.raises(InputError, match="frame 3 is drawn"):
        upscale_image(image, nearest, SCALE, frame=3)


def test_many_frames_are_counted_fast(tmp_path):
    started = time.perf_counter()
    with pytest.raises(InputError, match="100000 frames"):
        read_image(put(tmp_path, "a.gif", gif(100_000, 9, 9)))
    assert time.perf_counter() - started < 5


def test_directories_are_bounded_for_an_opened_image():
    one = struct.pack("<H", 5) + b"".join(struct.pack("<HHII", tag, 4, 1, 1) for tag in (256, 257, 258, 262, 273))
    size = len(one) + 4
    chain = b"".join(one + struct.pack("<I", 8 + size * (i + 1)) for i in range(20_000))
    with Image.open(io.BytesIO(b"II*\0\x08\0\0\0" + chain + bytes(64))) as image:
        started = time.perf_counter()
        with pytest.raises(InputError, match="more than 10000 images"):
            upscale_image(image, nearest, SCALE)
    assert time.perf_counter() - started < 2


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("name", [b"zTXtComment\0\0", b"iCCPprofile\0\0", b"iTXtComment\0\1\0\0\0"])
def test_compressed_chunks_do_not_grow(tmp_path, name):
    data = bytes_of(sample_image("RGB", 9, 9), "PNG")
    bomb = chunk(name[:4], name[4:] + zlib.compress(bytes(40 << 20)))
    path = put(tmp_path, "a.png", data[:33] + bomb + data[33:])
    with peak_below(16 << 20), suppress(InputError):
        assert read_image(path).size == (9, 9)


def test_a_strip_does_not_grow(tmp_path):
    strip = zlib.compress(bytes(40 << 20))
    fields = {256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 273: 110, 277: 1, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries + bytes(4) + strip
    path = put(tmp_path, "a.tif", data)
    with peak_below(8 << 20):
        assert read_image(path).size == (9, 9)


def test_chunks_of_a_png_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "_MAX_CHUNKS", 100)
    data = bytes_of(sample_image("RGB", 9, 9), "PNG")
    with pytest.raises(InputError, match="more than 100 chunks"):
        read_image(put(tmp_path, "a.png", data[:33] + chunk(b"tEXt", b"a\0b") * 200 + data[33:]))


def test_the_check_keeps_the_position_of_an_opened_image():
    pixels = noise(9, 8)
    with Image.open(io.BytesIO(bytes_of(Image.fromarray(pixels), "PNG"))) as image:
        assert np.array_equal(np.asarray(upscale_image(image, nearest, SCALE)), pixels.repeat(4, 0).repeat(4, 1))


def test_pillow_gets_a_limit_that_is_no_narrower(monkeypatch):
    assert bounds.pillow_limit(5) == 5
    monkeypatch.setattr(bounds, "available_memory", lambda: 1 << 40)
    assert bounds.pillow_limit(None) == 1 << 37
    monkeypatch.setattr(bounds, "available_memory", lambda: 0)
    assert bounds.pillow_limit(None) == 1 << 24


def test_a_marker_in_a_thumbnail_is_no_scan():
    data = bytes_of(sample_image("RGB", 16, 16), "JPEG")
    note = b"\xff\xe1" + struct.pack(">H", 2 + 400) + b"\xff\xda\0\2" * 100
    assert structure.jpeg(io.BytesIO(data[:2] + note + data[2:])).scans == 1


def test_strips_that_claim_the_same_bytes_take_linear_time(tmp_path):
    """2,000 strips of a row, each of which claims the whole file."""
    count, width = 2000, 8
    body = zlib.compress(bytes(width)).ljust(4 << 20, b"\0")
    tables = struct.pack(f"<{count}I", *[0x10000] * count) + struct.pack(f"<{count}I", *[len(body)] * count)
    fields = {256: (1, width), 257: (1, count), 258: (1, 8), 259: (1, 8), 262: (1, 1), 273: (count, 200), 277: (1, 1)}
    fields |= {278: (1, 1), 279: (count, 200 + 4 * count)}
    entries = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, (number, value) in fields.items())
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries + bytes(4)
    path = put(tmp_path, "a.tif", (data.ljust(200, b"\0") + tables).ljust(0x10000, b"\0") + body)
    started = time.perf_counter()
    assert read_image(path).size == (width, count)
    assert time.perf_counter() - started < 2
