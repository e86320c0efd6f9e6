"""Whole models on a GPU that is not there (fake_cuda): every way through the runtime, ordered, bounded and the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tinysr_kernels
from tests.layouts.adcsr import write_adcsr
from tests.layouts.tinysr import write_tinysr
from tests.runtime.device.fake_cuda import Machine, captured, fake_cuda
from tinysr_kernels.errors import DeviceError, InputError, OutOfMemory
from tinysr_kernels.runtime import runner
from tinysr_kernels.runtime.images import arrays

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tinysr")
    write_tinysr(folder)
    return folder


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Path) -> tinysr_kernels.CompiledSR:
    return compiled(checkpoint, device="cpu")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with fake_cuda() as machine:
        yield machine


def compiled(source: Path | str, **options: Any) -> tinysr_kernels.CompiledSR:
    return tinysr_kernels.compile(source, **{"dtype": "float32", "backend": "reference", **options})


def photo(height: int = 10, width: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def close(found: Any, expected: np.ndarray) -> None:
    """Within one step of 8 bits: tiles and windows run in larger batches on a GPU."""
    assert np.abs(np.asarray(found).astype(float) - expected).max() < 1.01


@pytest.mark.parametrize(
    "family", ["tinysr", pytest.param("adcsr", marks=pytest.mark.long), pytest.param("demo", marks=pytest.mark.long)]
)
def test_every_family_eagerly_captured_and_replayed(family: str, tmp_path: Path) -> None:
    if family != "demo":
        (write_adcsr if family == "adcsr" else write_tinysr)(tmp_path)
    source = "demo" if family == "demo" else tmp_path
    expected = compiled(source, device="cpu")(photo())
    with fake_cuda() as machine:
        model = compiled(source)
        assert model.device == GPU
        first = model(photo())
        close(first, expected)
        for image in (photo(), Image.fromarray(photo()), tensor(photo()), tensor(photo()).to(GPU)):
            found = model(image)
            found = found.cpu().permute(1, 2, 0).numpy() if isinstance(found, Tensor) else np.asarray(found)
            assert np.array_equal(found, first)
        assert (model.info()["graph_captures"], model.info()["graph_replays"]) == (1, 4)
        assert model.info()["graph_fallbacks"] == 0
        del model
        assert not machine.faults


@pytest.mark.long
def test_every_kind_of_image(machine: Machine, checkpoint: Path, on_cpu: tinysr_kernels.CompiledSR) -> None:
    model = compiled(checkpoint)
    pixels = photo()
    alpha = np.concatenate([pixels, pixels[..., :1]], -1)
    images = [pixels[..., 0], alpha, pixels.astype(np.uint16) * 257, pixels / 255, tensor(pixels) / 255]
    images += [(tensor(pixels) / 255).half(), Image.fromarray(alpha), Image.fromarray(pixels).convert("P")]
    for image in images:
        found, expected = np.asarray(model(image)), np.asarray(on_cpu(image))
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=1.01 * (found.max() > 1) + 0.004)
    out = torch.empty((3, 40, 36), dtype=torch.uint8, pin_memory=True)
    assert model(tensor(pixels), out=out) is out
    close(out.permute(1, 2, 0), on_cpu(pixels))
    on_gpu = torch.empty((3, 40, 36), dtype=torch.uint8, device=GPU)
    assert model(tensor(pixels).to(GPU), out=on_gpu) is on_gpu
    close(on_gpu.cpu().permute(1, 2, 0), on_cpu(pixels))
    close(model(pixels, scale=2.5), on_cpu(pixels, scale=2.5))


@pytest.mark.parametrize("where", ["host", pytest.param("device", marks=pytest.mark.long)])
def test_large_images_in_tiles(
    where: str, machine: Machine, checkpoint: Path, on_cpu: tinysr_kernels.CompiledSR, monkeypatch
) -> None:
    monkeypatch.setattr(runner, "DEVICE_PIXELS", 100)
    monkeypatch.setattr(arrays, "DEVICE_PIXELS", 100)
    model = compiled(checkpoint)
    pixels = photo(40, 30)
    for _ in range(2):
        found = model(pixels) if where == "host" else model(tensor(pixels).to(GPU)).cpu().permute(1, 2, 0)
        close(found, on_cpu(pixels))
    close(np.asarray(model(tensor(pixels) / 255)) * 255, np.asarray(on_cpu(tensor(pixels) / 255)) * 255)


@pytest.mark.parametrize("large", [pytest.param(False, marks=pytest.mark.long), True])
def test_an_overflow_is_recomputed(large: bool, machine: Machine, checkpoint: Path, monkeypatch, caplog) -> None:
    if large:
        monkeypatch.setattr(runner, "DEVICE_PIXELS", 50)
    model = compiled(checkpoint, dtype="float16")
    decoder = type(model.network.get_submodule("decoder"))
    forward = decoder.forward

    def overflowing(self: Any, x: Tensor) -> Tensor:
        y = forward(self, x)
        return y * float("inf") if x.dtype == torch.float16 else y

    monkeypatch.setattr(decoder, "forward", overflowing)
    expected = compiled(checkpoint, device="cpu", dtype="float16")(photo())
    for _ in range(2):
        assert np.abs(model(photo()).astype(float) - expected).mean() < 4  # rounded to 16 bits on another way
    assert model.info()["non_finite_retries"] == 2
    assert "recomputed in torch.bfloat16" in caplog.text


@pytest.mark.long
def test_out_of_memory_leads_to_smaller_pieces(checkpoint: Path, on_cpu: tinysr_kernels.CompiledSR, caplog) -> None:
    pixels = photo(60, 50)
    with fake_cuda() as machine:
        model = compiled(checkpoint)
        weights = machine.used[GPU]
        close(model(pixels), on_cpu(pixels))
        most = machine.most_used[GPU]
    with fake_cuda(memory=weights + int(0.7 * (most - weights))) as machine:
        model = compiled(checkpoint)
        for _ in range(2):
            close(model(pixels), on_cpu(pixels))
        assert "out of memory: this call continues with" in caplog.text
        machine.capacity = machine.used[GPU] + 1000
        with pytest.raises(OutOfMemory, match=r"GB|MB"):
            model(pixels)
        machine.capacity = 1 << 40
        close(model(pixels), on_cpu(pixels))


@pytest.mark.long
def test_a_stream_of_frames(machine: Machine, checkpoint: Path, on_cpu: tinysr_kernels.CompiledSR) -> None:
    model = compiled(checkpoint)
    frames = [photo(seed=i) for i in range(5)]
    with torch.cuda.stream(torch.cuda.Stream(GPU)):
        for found, frame in zip(model.stream(frames), frames, strict=True):
            close(found, on_cpu(frame))
        on_gpu = (tensor(frame).to(GPU) ^ 1 for frame in frames)
        for found, frame in zip(model.stream(on_gpu), frames, strict=True):
            close(found.cpu().permute(1, 2, 0), on_cpu(frame ^ 1))
    results = list(model.stream([photo(), "no image", photo(seed=1)], on_error="yield"))
    assert isinstance(results[1], InputError)
    close(results[2], on_cpu(photo(seed=1)))


@pytest.mark.long
def test_threads_with_streams_of_their_own(
    machine: Machine, checkpoint: Path, on_cpu: tinysr_kernels.CompiledSR
) -> None:
    model = compiled(checkpoint, max_graph_shapes=2)
    pictures = [photo(8 + i % 3, 9, seed=i) for i in range(4)]
    expected = [on_cpu(picture) for picture in pictures]

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            for _ in range(2):
                given = pictures[i] if i % 2 else tensor(pictures[i]).to(GPU)
                found = model(given)
                close(found if i % 2 else found.cpu().permute(1, 2, 0), expected[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_weights_placed_on_another_stream(machine: Machine, checkpoint: Path, on_cpu) -> None:
    """Compiled on a stream of one thread, or in a wider dtype during a call, and used from others."""
    with torch.cuda.stream(torch.cuda.Stream(GPU)):
        model = compiled(checkpoint)
    model._network(torch.float64)
    with torch.cuda.stream(torch.cuda.Stream(GPU)):
        close(model(tensor(photo()).to(GPU)).cpu().permute(1, 2, 0), on_cpu(photo()))
        encoder = model._network(torch.float64).get_submodule("encoder")
        encoder(torch.zeros((1, 3, 64, 64), dtype=torch.float64, device=GPU))
        torch.cuda.current_stream().synchronize()


@pytest.mark.long
def test_a_model_on_another_gpu_than_the_current_one(machine: Machine, checkpoint: Path, on_cpu) -> None:
    model = compiled(checkpoint, device="cuda:1")
    for image in (photo(), photo(), tensor(photo()).to(OTHER), tensor(photo()).to(GPU)):
        found = model(image)
        if isinstance(found, Tensor):
            assert found.device == image.device
            found = found.cpu().permute(1, 2, 0)
        close(found, on_cpu(photo()))
    assert torch.cuda.current_device() == 0
    assert machine.most_used[GPU] < 100_000
    assert model.info()["graph_replays"] == 3


@pytest.mark.long
def test_the_caller_s_default_device_is_the_caller_s(machine: Machine, checkpoint: Path, on_cpu) -> None:
    with OTHER:
        model = compiled(checkpoint, device="cuda:0")
        model.warmup([(8, 8)])
        for image in (photo(), photo(), photo() / 255, Image.fromarray(photo())):
            model(image)
        close(model(photo()), on_cpu(photo()))
        model(photo(40, 30))
    assert machine.most_used[OTHER] == 0


@pytest.mark.long
def test_a_failed_capture_leaves_everything_else_as_it_was(
    machine: Machine, checkpoint: Path, on_cpu: tinysr_kernels.CompiledSR, monkeypatch, caplog
) -> None:
    machine.gets_stuck = True
    model = compiled(checkpoint)
    decoder = type(model.network.get_submodule("decoder"))
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda self, x: forward(self, x) + 0 * float(x.flatten()[0]))
    used = []
    for i in range(4):
        close(model(tensor(photo(seed=i)).to(GPU)).cpu().permute(1, 2, 0), on_cpu(photo(seed=i)))
        used.append(machine.used[GPU])
    assert len(set(used[1:])) == 1
    assert model.info()["graph_fallbacks"] == 1
    assert caplog.text.count("launched individually") == 1


CALLS: dict[str, Callable[[tinysr_kernels.CompiledSR], Any]] = {
    "bytes": lambda model: model(photo()),
    "floats": lambda model: model(photo() / 255),
    "PIL": lambda model: model(Image.fromarray(photo())),
    "enlarge": lambda model: model.enlarge(tensor(photo())[None]),
    "warmup": lambda model: model.warmup([(8, 8)]),
    "stream": lambda model: next(model.stream([photo()])),
}


@pytest.mark.parametrize(
    "call", [name if name == "floats" else pytest.param(name, marks=pytest.mark.long) for name in CALLS]
)
def test_inside_a_capture_of_the_caller(call: str, machine: Machine, checkpoint: Path) -> None:
    """It is refused before it touches the device, and the capture goes on."""
    model = compiled(checkpoint)
    x = torch.ones(3, device=GPU)
    x * 2
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with captured(graph, torch.cuda.Stream(GPU)):
        with pytest.raises(InputError, match="while a CUDA graph is captured"):
            CALLS[call](model)
        y = x * 2
    graph.replay()
    assert y.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "call", [name if name == "floats" else pytest.param(name, marks=pytest.mark.long) for name in CALLS]
)
def test_in_a_forked_process(call: str, machine: Machine, checkpoint: Path, monkeypatch) -> None:
    """An error, also where another thread held the lock when the process was forked."""
    model = compiled(checkpoint)
    engine = model._runner.graphs.engine
    thread = threading.Thread(target=engine.lock.acquire)
    thread.start()
    thread.join()
    machine.forked = True
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(DeviceError, match=r"forked.*spawn"):
        CALLS[call](model)
