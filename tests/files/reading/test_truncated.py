"""Damaged files in part: what is there equals the whole file's pixels, and the notice says how much is missing."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.files.reading.test_formats import interlaced_png
from tests.runtime.sample_images import bytes_of, exif, noise, put
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.picture_io import read_image
from tinysr_kernels.files.writing.png import encode_png
from tinysr_kernels.files.writing.tiff import encode_tiff
from tinysr_kernels.runtime.images.metadata import Metadata

SIDE = 128


def photo() -> Image.Image:
    return Image.fromarray(noise(SIDE, SIDE))


FILES = {
    "JPEG": lambda: bytes_of(photo(), "JPEG", quality=90, subsampling=0, exif=exif(1)),
    "PNG": lambda: bytes_of(photo(), "PNG"),
    "PNG16": lambda: encode_png(noise(SIDE, SIDE, 3, "uint16"), Metadata()),
    "PPM": lambda: bytes_of(photo(), "PPM"),
    "PPM16": lambda: b"P6 128 128 65535\n" + noise(SIDE, SIDE, 3, "uint16").tobytes(),
    "TGA": lambda: bytes_of(photo().transpose(Image.Transpose.FLIP_TOP_BOTTOM), "TGA"),
    "TIFF": lambda: encode_tiff(noise(SIDE, SIDE, 3, "uint16"), Metadata()),
}


def missing_rows(text: str) -> int:
    found = re.search(r"truncated: (\d+) of 128 rows", text)
    assert found, text
    return int(found[1])


@pytest.mark.parametrize("form", sorted(FILES))
@pytest.mark.parametrize("part", [0.3, 0.8])
def test_what_is_there_is_read(tmp_path, form, part, caplog, monkeypatch):
    from tinysr_kernels.files.writing import tiff

    monkeypatch.setattr(tiff, "_STRIP_BYTES", 4000)
    data = FILES[form]()
    whole = np.asarray(read_image(put(tmp_path, "whole", data)).image)
    path = put(tmp_path, "part", data[: int(len(data) * part)])
    with pytest.raises(InputError, match="truncated") as caught:
        read_image(path)
    assert "--allow-truncated" in str(caught.value)
    caplog.clear()
    found = np.asarray(read_image(path, allow_truncated=True).image)
    assert found.shape == whole.shape
    missing = missing_rows(caplog.text)
    upright = slice(missing, None) if form == "TGA" else slice(None, SIDE - missing)
    assert np.array_equal(found[upright], whole[upright])
    assert abs(missing / SIDE - (1 - part)) < 0.2
    assert len(caplog.records) == 1


def test_metadata_of_a_part_are_kept(tmp_path):
    data = FILES["JPEG"]()
    read = read_image(put(tmp_path, "a.jpg", data[: len(data) // 2]), allow_truncated=True)
    assert read.metadata.exif is not None
    assert b"maker" in read.metadata.exif


def test_progressive_jpeg_and_interlaced_png(tmp_path, caplog):
    progressive = bytes_of(photo(), "JPEG", progressive=True)
    assert read_image(put(tmp_path, "a", progressive[: len(progressive) // 2]), allow_truncated=True).size == (
        SIDE,
        SIDE,
    )
    assert missing_rows(caplog.text) > 0
    caplog.clear()
    pixels = noise(SIDE, SIDE)
    interlaced = interlaced_png(pixels)
    found = np.asarray(
        read_image(put(tmp_path, "b", interlaced[: len(interlaced) * 3 // 4]), allow_truncated=True).image
    )
    missing = missing_rows(caplog.text)
    assert np.array_equal(found[: SIDE - missing], pixels[: SIDE - missing])
    assert 0.4 < missing / SIDE < 0.6  # the last pass holds half of the pixels


def test_a_damaged_png_is_read_up_to_the_damage(tmp_path, caplog):
    pixels = np.repeat(noise(SIDE, 256), 2, 1)  # several chunks
    data = bytearray(bytes_of(Image.fromarray(pixels), "PNG"))
    last = data.rindex(b"IDAT")
    data[last + 1000 : last + 1400] = bytes(400)
    found = np.asarray(read_image(put(tmp_path, "a", bytes(data)), allow_truncated=True).image)
    missing = missing_rows(caplog.text)
    assert 0 < missing < SIDE
    assert np.array_equal(found[: SIDE - missing], pixels[: SIDE - missing])


def test_a_whole_file_gives_no_notice(tmp_path, caplog):
    for form, make in FILES.items():
        read_image(put(tmp_path, form, make()), allow_truncated=True)
    assert not caplog.text


@pytest.mark.parametrize("form", ["WEBP", "GIF", "AVIF"])
def test_formats_without_parts_are_refused_either_way(tmp_path, form):
    data = bytes_of(photo(), form)
    path = put(tmp_path, "a", data[: len(data) // 2])
    for allowed in (False, True):
        with pytest.raises(InputError) as caught:
            read_image(path, allow_truncated=allowed)
        assert "--allow-truncated" not in str(caught.value)


def test_other_threads_go_on_refusing(tmp_path):
    data = FILES["JPEG"]()
    path = put(tmp_path, "a.jpg", data[: len(data) // 2])

    def attempt(index: int) -> bool:
        try:
            read_image(path, allow_truncated=index % 2 == 0)
        except InputError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(attempt, range(40))) == [True, False] * 20
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
