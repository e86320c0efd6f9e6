"""Globs match what Python's do, except that `**` does not follow links."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest

from tinysr_kernels.files.plan.globs import expand, fixed_part


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.jpg", "x/c.png", "x/y/d.png", "x/y/.hidden.png", ".dot/e.png", "odd[1].png", "A.PNG"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


PATTERNS = [
    *("*", "*.png", "?.*", "[ab].*", "[!a]*", "x/*", "x/*/*", "**/*.png", "**", "x/**", "**/**/*.png", "**/y/*"),
    *("*/../*.png", "./*.png", "x/../*.png", ".*", ".*/*", "odd[[]1].png", "none*", "a.png/*", "no/*", "x*/**/*.png"),
]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_as_pythons(here, pattern, absolute):
    text = f"{here}/{pattern}" if absolute else pattern
    expected = {os.path.normpath(each) for each in glob.glob(text, recursive=True)}
    found = {os.path.normpath(each) for each in expand(text)}
    assert found - {os.path.normpath(fixed_part(text))} == expected - {os.path.normpath(fixed_part(text))}


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_cycles_of_links_take_no_time(here):
    for name in ("one", "two", "three"):
        Path("x", name).symlink_to(here)
    found = sorted(str(path) for path in expand("**/*.png"))
    assert found == ["a.png", "odd[1].png", "x/c.png", "x/y/d.png"]
    assert "x/one/a.png" in {str(path) for path in expand("x/*/a.png")}  # what a part of its own matches is followed
