"""Colors declared without an ICC profile, from file to file: the result means the same colors in every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tests.runtime.images.raw_files import png
from tests.runtime.images.test_declared_color import LINEAR, PATCHES, means, srgb_curve
from tests.runtime.sample_images import FakeModel, enlarge_file, put
from tinysr_kernels.files.batch import Settings, run
from tinysr_kernels.files.jobs import Job

SUFFIXES = [".jpg", ".webp", ".tif", ".avif", ".bmp"]
# How a profile is written does not depend on where it came from.
CASES = [*((name, ".png") for name in PATCHES), *(("gAMA and cHRM", suffix) for suffix in SUFFIXES)]


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_the_result_means_the_same(tmp_path, name, suffix):
    if "AVIF" in name + suffix.upper() and not features.check("avif"):
        pytest.skip("this Pillow lacks the format")
    enlarge_file(put(tmp_path, "source", PATCHES[name]()), tmp_path / f"result{suffix}")
    with Image.open(tmp_path / f"result{suffix}") as image:
        # 8 bits of a linear encoding, and what lossy formats add.
        assert abs(means(image) - srgb_curve(LINEAR)).max() < 0.016


def test_hdr_values_are_written_as_png_where_the_format_cannot_state_them(tmp_path):
    source = put(tmp_path, "a.avif", png(np.full((4, 5, 3), 99, np.uint8), (b"cICP", bytes([9, 18, 0, 1]))))
    job = Job(source, Path("a.avif"), tmp_path / "b.jpg", tmp_path / "b.png")
    (result,) = run([job], FakeModel(), Settings())
    assert (result.status, result.output) == ("done", str(tmp_path / "b.png"))
    assert "JPEG cannot state that its values are HLG (HDR): written as b.png" in result.notices
    assert b"cICP\x09\x12\x00\x01" in (tmp_path / "b.png").read_bytes()
