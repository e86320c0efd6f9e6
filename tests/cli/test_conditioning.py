"""`tinysr upscale` and `convert` with a prompt, embeddings and weights of LoRA: used, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tinysr_kernels
from tests.layouts.osediff import FEATURES, write_osediff
from tests.layouts.osediff_kin import write_relative
from tests.layouts.weights import write_pickle
from tinysr_kernels.cli.main import main
from tinysr_kernels.families import FAMILIES


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("osediff", "pisa-sr"):
        monkeypatch.setattr(type(FAMILIES[name]), "least", 4)


def upscaled(image: Path, model: Path | str, *options: str) -> tuple[int, np.ndarray | None]:
    out = image.with_name("out.png")
    out.unlink(missing_ok=True)
    code = main(["upscale", str(image), "-o", str(out), "--model", str(model), "-q", *options])
    return code, np.asarray(Image.open(out)) if out.exists() else None


def test_embeddings(image: Path, tmp_path: Path) -> None:
    layout = write_osediff(tmp_path / "model")
    other = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(5))
    write_pickle(tmp_path / "other.pt", other)
    code, found = upscaled(image, layout.folder, "--embeddings", str(tmp_path / "other.pt"))
    assert code == 0
    expected = tinysr_kernels.compile(layout.folder, embeddings=other)(Image.open(image))
    assert np.array_equal(found, np.asarray(expected))
    assert not np.array_equal(found, upscaled(image, layout.folder)[1])


def test_refused_with_what_to_do(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layout = write_osediff(tmp_path / "model")
    write_pickle(tmp_path / "narrow.pt", torch.ones(4, FEATURES - 1))
    tinysr_kernels.compile(layout.folder).save(tmp_path / "folded.safetensors")
    cases = (
        ("demo", ["--prompt", "sharp"], "tinysr-unet takes no prompt"),
        (layout.folder, ["--prompt", "sharp"], "nor a text encoder to evaluate the prompt 'sharp'; put text_encoder/"),
        (layout.folder, ["--embeddings", str(tmp_path / "narrow.pt")], f"[1,T,{FEATURES}]"),
        (layout.folder, ["--embeddings", str(tmp_path / "none.pt")], "none.pt"),
        (tmp_path / "folded.safetensors", ["--prompt", "sharp"], "fold the checkpoint again"),
        (tmp_path / "folded.safetensors", ["--embeddings", str(tmp_path / "narrow.pt")], "fold the checkpoint again"),
    )
    for model, options, words in cases:
        assert upscaled(image, model, *options) == (2, None)
        assert words in capsys.readouterr().err


def test_convert_with_weights_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_relative(tmp_path / "model", "pisa-sr").folder
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(folder), str(out), "--lora-weights", "0.5", "1.5"]) == 0
    expected = tinysr_kernels.compile(folder, lora_weights=(0.5, 1.5))._folded
    found = tinysr_kernels.compile(out)._folded
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert main(["convert", str(folder), str(out), "--force", "--lora-alpha", "0"]) == 2
    assert "lora_alpha must be a positive number" in capsys.readouterr().err
    assert main(["convert", "demo", str(tmp_path / "b.safetensors"), "--lora-weights", "1", "1"]) == 2
    assert "pisa-sr (pixel, semantic)" in capsys.readouterr().err
