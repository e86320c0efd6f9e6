"""The compiled model with CUDA graphs: same images as without, counters, warm-up, and output tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import tinysr_kernels
from tests.runtime.device.recorder import Recorder
from tests.runtime.test_runner import photo
from tinysr_kernels.errors import InputError


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    engine = Recorder()
    monkeypatch.setattr("tinysr_kernels.runtime.compiled.engine_for", lambda device: engine)
    return engine


@pytest.fixture(scope="module")
def plain() -> tinysr_kernels.CompiledSR:
    return tinysr_kernels.compile("demo", device="cpu")


def test_the_compiled_model_counts_its_graphs(recorder: Recorder, plain: tinysr_kernels.CompiledSR) -> None:
    model = tinysr_kernels.compile("demo", device="cpu", max_graph_shapes=2)
    pixels = photo(9, 14)[0].permute(1, 2, 0).numpy()
    for image in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1), pixels[None]):
        found, expected = model(image), plain(image)
        assert type(found) is type(expected)
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    info = model.info()
    assert (info["graphs_held"], info["graph_captures"], info["graph_replays"]) == (1, 1, 3)
    assert info["graph_fallbacks"] == 0
    model.warmup([(8, 8), (2, 8, 8), (8, 12)])
    assert model.info()["graphs_held"] == 2
    assert model.info()["graph_captures"] == 3  # without kernels a batch is run image by image
    model.warmup([(8, 12)], torch.float32)
    assert recorder.graphs[-1].inputs[0].dtype == torch.float32


def test_graphs_can_be_disabled_and_failed_captures_fall_back(
    recorder: Recorder, plain: tinysr_kernels.CompiledSR, caplog: pytest.LogCaptureFixture
) -> None:
    lr = torch.rand(3, 8, 8)
    model = tinysr_kernels.compile("demo", device="cpu", cuda_graphs=False)
    for _ in range(3):
        assert torch.equal(model(lr), plain(lr))
    assert recorder.count("warm-up") == 0
    model = tinysr_kernels.compile("demo", device="cpu")
    recorder.failures = [RuntimeError("not when capturing")]
    for _ in range(3):
        assert torch.equal(model(lr), plain(lr))
    assert model.info()["graph_fallbacks"] == 1
    assert caplog.text.count("launched individually") == 1


def test_out_receives_the_result_and_is_returned(plain: tinysr_kernels.CompiledSR) -> None:
    bytes_ = photo(8, 12)[0]
    for lr in (bytes_, bytes_.contiguous()[None], bytes_ / 255, (bytes_ / 255).half(), (bytes_ / 255).double()):
        out = torch.empty((*lr.shape[:-2], 32, 48), dtype=lr.dtype)
        assert plain(lr, out=out) is out
        assert torch.equal(out, plain(lr))
    strided = torch.empty((32, 48, 3), dtype=torch.uint8).permute(2, 0, 1)
    assert torch.equal(plain(bytes_, out=strided), plain(bytes_))
    result = plain(bytes_)
    assert not result.is_inference()
    assert result.is_contiguous()
    for wrong in (out.float(), torch.empty((3, 8, 12), dtype=torch.uint8), torch.empty((3, 32, 48)).to("meta")):
        with pytest.raises(InputError, match=r"out must be torch\.uint8"):
            plain(bytes_, out=wrong)
    with pytest.raises(InputError, match="out requires image and out to be tensors, found ndarray and Tensor"):
        plain(bytes_.permute(1, 2, 0).numpy(), out=out)
    with pytest.raises(InputError, match="require grad"):
        plain(bytes_ / 255, out=torch.empty((3, 32, 48), requires_grad=True))


def test_opaque_alpha_uses_the_uint8_path(plain: tinysr_kernels.CompiledSR) -> None:
    pixels = photo(9, 14)[0].permute(1, 2, 0).numpy()
    rgba = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], -1)
    large = plain(rgba)
    assert np.array_equal(large[..., :3], plain(pixels))
    assert (large[..., 3] == 255).all()


SOAKS = {"recorder": (48, 8)}  # the number of images, and a unit of their sizes
if torch.cuda.is_available():
    SOAKS["cuda"] = (1000, 64)


@pytest.mark.parametrize("where", sorted(SOAKS))
def test_many_images_of_mixed_sizes_by_eight_threads(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal images give identical results in any order, and memory use does not grow after the first half."""
    count, unit = SOAKS[where]
    if where == "recorder":
        engine = Recorder()
        monkeypatch.setattr("tinysr_kernels.runtime.compiled.engine_for", lambda device: engine)
    device = "cpu" if where == "recorder" else "cuda:0"
    model = tinysr_kernels.compile("demo", device=device, max_graph_shapes=4, tile=2 * unit)
    sizes = [(unit * (1 + i % 3) - i % 2, unit * (1 + i % 4) + i % 3) for i in range(8)]
    images = [photo(*size, seed=i)[0].permute(1, 2, 0).numpy() for i, size in enumerate(sizes)]
    first = [model(image) for image in images]

    def work(i: int) -> bool:
        return np.array_equal(model(images[i % 8]), first[i % 8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(count // 2)))
        reserved = torch.cuda.memory_reserved() if where == "cuda" else 0
        assert all(pool.map(work, range(count // 2)))
    assert model.info()["graphs_held"] <= 4
    if where == "cuda":
        assert torch.cuda.memory_reserved() <= 1.05 * reserved
    else:
        assert len(engine.graphs) == model.info()["graphs_held"]
