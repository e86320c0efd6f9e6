"""A prompt for each image: embeddings from a callable or with a call, against the network with a fixed prompt."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.layouts.osediff import FEATURES, OSEDiffLayout, write_osediff
from tests.layouts.osediff_kin import write_relative
from tests.layouts.weights import random_image
from tests.runtime.device.fake_cuda import fake_cuda
from tinysr_kernels.errors import CheckpointError, InputError
from tinysr_kernels.families import FAMILIES, load
from tinysr_kernels.runtime.device.graphs import Graphs
from tinysr_kernels.runtime.prompts import Prompts

pytestmark = pytest.mark.numeric
SIZE = (16, 18)
LARGE = (40, 26)
"""Whose latents go through the UNet in windows of 10."""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> OSEDiffLayout:
    return write_osediff(tmp_path_factory.mktemp("osediff"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("window", 10), ("overlap", 4), ("least", 8)):
        monkeypatch.setattr(type(FAMILIES["osediff"]), name, value)


def embedding(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(seed))


def by_brightness(image: Tensor) -> Tensor:
    """What a captioner does: another prompt, of another length, for another image."""
    assert image.ndim == 3
    assert image.shape[0] == 3
    level = float(image.double().mean()) / (255 if image.dtype == torch.uint8 else 1)
    return embedding(5, 1) if level < 0.5 else embedding(9, 2)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected.double()).norm() / expected.double().norm()) < 1e-5


@pytest.fixture(scope="module")
def models(layout: OSEDiffLayout) -> tuple[Any, Any, Any]:
    """With a prompt for each image, and with each of the two prompts fixed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("window", 10), ("overlap", 4), ("least", 8)):
            patch.setattr(type(FAMILIES["osediff"]), name, value)
        options: dict[str, Any] = {"color_fix": "none"}
        return tuple(
            tinysr_kernels.compile(layout.folder, embeddings=one, **options)
            for one in (by_brightness, embedding(5, 1), embedding(9, 2))
        )


def test_a_callable_in_a_batch_and_in_windows(models: tuple[Any, Any, Any]) -> None:
    """Each image of a batch has its own prompt; windows of one image share theirs."""
    each, dark, bright = models
    for size in (SIZE, LARGE):
        image = random_image(*size)[0]
        both = torch.stack([image * 0.5, 1 - image * 0.3])
        found = each(both)
        assert close(found[0], dark(both[0]))
        assert close(found[1], bright(both[1]))
        assert not close(found[0], bright(both[0]))


def test_other_kinds_of_images(models: tuple[Any, Any, Any]) -> None:
    """What is called sees RGB, whatever was passed."""
    each, dark, _ = models
    image = (random_image(*SIZE)[0] * 120).to(torch.uint8)
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    assert torch.equal(each(image), dark(image))
    assert torch.equal(torch.from_numpy(each(pixels)), torch.from_numpy(dark(pixels)))
    gray = pixels[..., 0]
    assert torch.equal(torch.from_numpy(each(gray)), torch.from_numpy(dark(gray)))


def test_embeddings_with_a_call(models: tuple[Any, Any, Any]) -> None:
    """They go before what the model was compiled with: one for all, one for each, a callable."""
    each, dark, bright = models
    images = torch.cat([random_image(*SIZE), random_image(*SIZE, seed=1)])
    first, second = embedding(5, 1), embedding(9, 2)
    found = each(images, embeddings=[first[None], second])
    assert close(found[0], dark(images[0]))
    assert close(found[1], bright(images[1]))
    for given in (second, second[None], torch.stack([second, second]), lambda _: second.double()):
        assert close(each(images, embeddings=given), bright(images))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(5, FEATURES + 1), rf"\[T,{FEATURES}\].*found \[5, {FEATURES + 1}\]"),
        (torch.ones(FEATURES), rf"found \[{FEATURES}\]"),
        (torch.ones(0, FEATURES), r"found \[0, "),
        (torch.ones(5, FEATURES, dtype=torch.int64), "int64"),
        (torch.full((5, FEATURES), float("nan")), "NaN"),
        (lambda image: None, "called with an image: .*found NoneType"),
        (lambda image: torch.ones(5), r"called with an image: .*found \[5\]"),
        ([torch.ones(5, FEATURES)] * 3, "1 too many"),
        ([torch.ones(5, FEATURES)], "found 1 for 2 more"),
        (torch.ones(3, 5, FEATURES), "1 too many"),
        ([torch.ones(5, FEATURES), "a text"], r"embeddings\[1\].*found str"),
        ("a text", "found str"),
    ],
)
def test_what_are_no_embeddings(models: tuple[Any, Any, Any], given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        models[0](random_image(*SIZE, count=2), embeddings=given)


def test_what_a_callable_raises_comes_out(models: tuple[Any, Any, Any]) -> None:
    def fails(_: Tensor) -> Tensor:
        raise ZeroDivisionError("of the captioner")

    with pytest.raises(ZeroDivisionError, match="of the captioner"):
        models[0](random_image(*SIZE), embeddings=fails)


def test_networks_that_take_none(models: tuple[Any, Any, Any], layout: OSEDiffLayout) -> None:
    with pytest.raises(InputError, match="folded into the weights"):
        models[1](random_image(*SIZE), embeddings=embedding(5, 1))
    with pytest.raises(CheckpointError, match="tinysr-unet takes no embeddings of each image"):
        tinysr_kernels.compile("demo", embeddings=by_brightness)
    with pytest.raises(CheckpointError, match="tinysr-unet takes no prompt"):
        tinysr_kernels.compile("demo", prompt="sharp")
    given = load(layout.folder, embeddings=by_brightness, prompt="sharp")
    assert any("prompt given is ignored" in notice for notice in given.notices)


def test_the_prompt_is_an_input_of_the_graph(models: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves every prompt of a length; another length is another graph."""
    seen = []
    run = Graphs.run

    def record(self: Graphs, name: Any, step: Any, *inputs: Tensor, **options: Any) -> Any:
        seen.append(tuple(tuple(t.shape) for t in inputs))
        return run(self, name, step, *inputs, **options)

    monkeypatch.setattr(Graphs, "run", record)
    monkeypatch.setattr(type(models[0]._runner.graphs.engine), "holds", lambda self, tensor: True)
    images = random_image(*SIZE, count=2)
    models[0](images, embeddings=[embedding(5, 1), embedding(9, 2)])
    assert seen == [((1, 3, *SIZE), (5, FEATURES)), ((1, 3, *SIZE), (9, FEATURES))]


@pytest.mark.parametrize("tile", [None, pytest.param(16, marks=pytest.mark.long)], ids=["whole", "tiles"])
def test_captured_and_replayed(tile: int | None, layout: OSEDiffLayout) -> None:
    """On a GPU that is not there: a graph captured with one prompt computes with each later one."""
    size = (16, 16) if tile is None else (32, 48)  # with even latents
    image = random_image(*size)[0]
    given = [embedding(5, seed) for seed in (1, 1, 2, 3, 1)]
    options: dict[str, Any] = {"color_fix": "none", "dtype": "float32", "backend": "reference", "tile": tile}
    plain = tinysr_kernels.compile(layout.folder, device="cpu", embeddings=by_brightness, **options)
    expected = [plain(image, embeddings=one) for one in given]
    with fake_cuda() as machine:
        model = tinysr_kernels.compile(layout.folder, embeddings=by_brightness, **options)
        for one, wanted in zip(given, expected, strict=True):
            assert close(model(image, embeddings=one).cpu(), wanted)
        info = model.info()
        assert info["graph_captures"] == 1 or tile is not None
        assert info["graph_replays"] >= 3
        assert info["graph_fallbacks"] == 0
        del model
        assert not machine.faults


def test_saved_files(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """A folded file of such a network takes embeddings from either side, and one with a fixed prompt none."""
    each, fixed, _ = models
    image = random_image(*SIZE)[0] * 0.5
    each.save(tmp_path / "each.safetensors")
    alone = tinysr_kernels.compile(tmp_path / "each.safetensors", color_fix="none")
    with pytest.raises(InputError, match="needs an embedding"):
        alone(image)
    assert torch.equal(alone(image, embeddings=by_brightness), each(image))
    assert any("each image's prompt" in line for line in alone.info()["folded"])
    fixed.save(tmp_path / "fixed.safetensors")
    for options in ({"embeddings": embedding(5, 1)}, {"prompt": "sharp"}):
        with pytest.raises(CheckpointError, match="the file is folded"):
            tinysr_kernels.compile(tmp_path / "fixed.safetensors", **options)


@pytest.mark.long
def test_pickled_and_compiled_again(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    each, fixed, _ = models
    image = random_image(*SIZE)[0] * 0.5
    each.save(tmp_path / "each.safetensors")
    fixed.save(tmp_path / "fixed.safetensors")
    again = tinysr_kernels.compile(tmp_path / "each.safetensors", embeddings=by_brightness, color_fix="none")
    assert torch.equal(again(image), each(image))
    assert torch.equal(pickle.loads(pickle.dumps(each))(image), each(image))
    with pytest.raises(InputError, match="folded in"):
        tinysr_kernels.compile(tmp_path / "fixed.safetensors", embeddings=by_brightness)


@pytest.mark.long
def test_launches_are_counted(models: tuple[Any, Any, Any]) -> None:
    """One matmul more for each cross-attention, however many windows its image has."""
    each, fixed, _ = models
    crosses = sum(name.endswith(".cross.prompt") for name in each._folded)
    assert crosses > 0
    added = sum(call.op.endswith("bmm") for call in each.launches) - sum(c.op.endswith("bmm") for c in fixed.launches)
    assert added == crosses


@pytest.mark.long
@pytest.mark.parametrize("name", ["pisa-sr", "hypir", "omgsr-s"])
def test_relatives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(FAMILIES[name]), "least", 8)
    folder = write_relative(tmp_path, name).folder
    each = tinysr_kernels.compile(folder, embeddings=by_brightness)
    image = random_image(*SIZE)[0] * 0.5
    assert close(each(image), tinysr_kernels.compile(folder, embeddings=embedding(5, 1))(image))


def test_prompts_in_turn() -> None:
    """A batch that is taken in parts gives each part its own."""
    prompts = Prompts([embedding(3, i) for i in range(3)], FEATURES)
    images = torch.zeros(2, 3, 4, 4)
    assert torch.equal(prompts.take(images)[1], embedding(3, 1))
    assert torch.equal(prompts.take(images[:1])[0], embedding(3, 2))
    prompts.finish()
