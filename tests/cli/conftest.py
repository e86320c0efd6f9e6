"""Fixtures of the tests of the command: a model that repeats pixels, and a folder of inputs."""

from __future__ import annotations

import pytest

import tinysr_kernels
from tests.runtime.sample_images import FakeModel, sample_image
from tinysr_kernels.errors import CheckpointError


@pytest.fixture
def compiled(monkeypatch):
    """Replace compile(); yields the arguments of its calls."""
    calls = []

    def fake(checkpoint, **options):
        calls.append((checkpoint, options))
        if checkpoint == "broken":
            raise CheckpointError("broken: no such checkpoint")
        return FakeModel()

    monkeypatch.setattr(tinysr_kernels, "compile", fake)
    monkeypatch.setattr(tinysr_kernels, "describe", lambda path: {"family": "fake", "notices": ["one", "two"]})
    return calls


@pytest.fixture
def folder(tmp_path):
    """in/ with two images, a text, and a text that claims to be an image."""
    (tmp_path / "in").mkdir()
    sample_image("RGB", 3, 2).save(tmp_path / "in" / "a.png")
    sample_image("CMYK", 3, 2).save(tmp_path / "in" / "b.jpg")
    (tmp_path / "in" / "notes.txt").write_text("remember the milk")
    (tmp_path / "in" / "text.png").write_text("remember the milk")
    return tmp_path
