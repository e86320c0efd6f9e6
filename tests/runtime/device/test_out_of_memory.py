"""Out-of-memory: recognized in every form, tried again unchanged, then smaller for this call, then a typed error."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests import ROOT
from tests.runtime.device.recorder import Recorder
from tests.runtime.test_runner import photo, running
from tinysr_kernels.errors import OutOfMemory
from tinysr_kernels.nets import LatentNetwork, Network
from tinysr_kernels.nets.unet_sr import UNetSR
from tinysr_kernels.runtime.device import host_memory, out_of_memory
from tinysr_kernels.runtime.device.out_of_memory import is_out_of_memory, shortage
from tinysr_kernels.runtime.tiles import limits
from tinysr_kernels.runtime.tiles.limits import Limits

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "750000000 bytes. Error code 12 (Cannot allocate memory)"
)


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, pixels: int, error: Exception | None = None, times: float = float("inf")
) -> list[int]:
    """Make the network fail above `pixels` per call, so many times; the pixels of its calls, failed ones negative."""
    forward, sizes = UNetSR.forward, list[int]()

    def limited(self: UNetSR, x: Tensor) -> Tensor:
        size = x.shape[0] * x.shape[2] * x.shape[3]
        failed = size > pixels and sum(each < 0 for each in sizes) < times
        sizes.append(-size if failed else size)
        if failed:
            raise error or torch.OutOfMemoryError("no room")
        return forward(self, x)

    monkeypatch.setattr(UNetSR, "forward", limited)
    monkeypatch.setattr(limits, "SMALLEST_TILE", 16)
    return sizes


def test_a_transient_shortage_changes_nothing(small: Network, monkeypatch, caplog) -> None:
    lr = photo(40, 40)
    expected = running(small)(lr)
    sizes = limit_memory(monkeypatch, 0, times=1)
    assert torch.equal(running(small)(lr), expected)
    assert sizes == [-1600, 1600]  # the same again
    assert caplog.text == ""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError(), RuntimeError(ALLOCATOR)], ids=type)
def test_smaller_tiles_are_for_one_call_and_said(small: Network, monkeypatch, caplog, error: Exception) -> None:
    lr = photo(40, 40)
    whole, tiled = running(small)(lr), running(small, limits=Limits(tile=24))(lr)
    assert not torch.equal(whole, tiled)
    model = running(small)
    before = model.limits
    with monkeypatch.context() as patch:
        limit_memory(patch, 24 * 24, error)
        assert torch.equal(model(lr), tiled)
    # 40 * 40 / 2 pixels are 28 a side, and tiles are 2^k or 3 * 2^k
    (record,) = caplog.records
    assert "this call continues with tiles of 24x24 pixels, so it may differ slightly; tile=24" in record.getMessage()
    assert model.limits is before
    assert torch.equal(model(lr), whole)  # memory is back: so is the result


def test_another_thread_keeps_its_limits(small: Network, monkeypatch) -> None:
    """While one call goes on in small tiles, calls of other threads give what they always give."""
    lr, other = photo(40, 40), photo(20, 20, seed=1)
    model = running(small)
    expected = model(other)
    limit_memory(monkeypatch, 24 * 24)
    found: list[Tensor] = []
    seen = threading.Event()

    def beside(done: int, total: int) -> None:
        if not seen.is_set():
            seen.set()
            thread = threading.Thread(target=lambda: found.append(model(other)))
            thread.start()
            thread.join()

    model(lr, progress=beside)
    assert torch.equal(found[0], expected)


def test_an_explicit_tile_is_tried_again_and_then_final(small: Network, monkeypatch) -> None:
    lr = photo(40, 40)
    expected = running(small, limits=Limits(tile=32))(lr)
    sizes = limit_memory(monkeypatch, 0, times=1)
    assert torch.equal(running(small, limits=Limits(tile=32))(lr), expected)
    assert sizes[:2] == [-1024, 1024]
    limit_memory(monkeypatch, 24 * 24)
    with pytest.raises(OutOfMemory, match=r"tile of 32x32 pixels, the size asked for, .*use a tile below 32"):
        running(small, limits=Limits(tile=32))(lr)


def test_a_batch_of_images_is_halved_first(small: Network, monkeypatch, caplog) -> None:
    lr = photo(8, 8, batch=7)
    expected = torch.cat([running(small)(one[None]) for one in lr])
    sizes = limit_memory(monkeypatch, 3 * 8 * 8)
    found = running(small)(lr)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=1)
    assert sizes == [-448, -448, 192, 192, 64]
    assert "batches of 3 images" in caplog.text


def test_graphs_are_dropped_first(small: Network, monkeypatch, caplog) -> None:
    engine = Recorder()
    model = running(small, engine)
    model(photo(8, 8), now=True)
    forward = UNetSR.forward

    def while_graphs_are_held(self: UNetSR, x: Tensor) -> Tensor:
        if engine.graphs and x.shape[2] > 8:
            raise torch.OutOfMemoryError("no room")
        return forward(self, x)

    monkeypatch.setattr(UNetSR, "forward", while_graphs_are_held)
    model(photo(16, 16))
    assert engine.events[-4:] == ["launch", "drop", "trim", "launch"]
    assert caplog.text == ""


def test_a_graph_of_smaller_limits_is_not_replayed_for_others(latent: Network, monkeypatch) -> None:
    """The graph of a whole image holds its windows' batches."""
    model = running(latent, Recorder())
    encoder = type(latent.get_submodule("encoder"))
    forward = encoder.forward
    failures = [1] * 4  # capture and launch, and both again

    def failing(self: torch.nn.Module, x: Tensor) -> Tensor:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("no room")
        return forward(self, x)

    def images() -> int:
        return sum(key[0][0] == "image" for key in model.graphs._held)

    model.graphs.clear()
    monkeypatch.setattr(encoder, "forward", failing)
    model(photo(16, 40), now=True)
    assert not failures
    assert images() == 1
    model(photo(16, 40), now=True)
    assert images() == 2


@pytest.mark.long
def test_the_minimum_is_a_typed_error(small: Network, latent: Network, monkeypatch) -> None:
    limit_memory(monkeypatch, 1)
    with pytest.raises(OutOfMemory, match=r"tile of 16x16 pixels, the smallest, needs more than the .*B free on cpu"):
        running(small)(photo(40, 12))

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(LatentNetwork, "forward", full)
    monkeypatch.setattr(type(latent.get_submodule("encoder")), "forward", full)
    with pytest.raises(OutOfMemory, match="enlarged pixels, the smallest, needs more than"):
        running(latent)(photo(16, 16))


def test_a_result_that_does_not_fit_is_not_tried_in_ever_smaller_tiles(small: Network, monkeypatch) -> None:
    """Where the enlarged image itself is too large, smaller tiles would only take longer to the same end."""
    model = running(small, limits=Limits(tile=16))
    calls: list[int] = []

    def full(*_: object) -> None:
        calls.append(1)
        raise RuntimeError(ALLOCATOR)

    monkeypatch.setattr(model, "_fix", full)
    with pytest.raises(OutOfMemory, match="an image of 40x30 pixels, enlarged 4 times in tiles, needs more than"):
        model(photo(30, 40))
    assert len(calls) == 2


def test_what_is_needed_and_free_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free memory is that before the attempt, the failed allocation the allocator's own figure."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(out_of_memory, "available_memory", lambda: 1_310_000_000)
    assert shortage(cpu, ALLOCATOR) == "more than the 1.31 GB free on cpu (an allocation of 0.75 GB failed)"
    assert shortage(cpu, "") == "more than the 1.31 GB free on cpu"
    texts = {
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB": "2.68 GB",
        "Unable to allocate 20.0 MiB for an array with shape (1,)": "21.0 MB",
    }
    for text, size in texts.items():
        assert f"an allocation of {size} failed" in shortage(cpu, text)
    monkeypatch.setattr(out_of_memory, "available_memory", lambda: None)
    assert shortage(cpu, "") == "more than is free on cpu"


def test_what_counts_as_out_of_memory() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError(ALLOCATOR),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error), error
    for error in (
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("shape mismatch"),
        ValueError(ALLOCATOR),
        OutOfMemory("ours"),
    ):
        assert not is_out_of_memory(error), error


def test_real_allocation_failures_are_recognized() -> None:
    for allocate in (lambda: torch.empty(1 << 60, device="cpu"), lambda: np.empty(1 << 58), lambda: bytearray(1 << 62)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


def test_what_surrounds_the_network_is_typed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tinysr_kernels.compile("demo", device="cpu")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError(ALLOCATOR)

    monkeypatch.setattr("tinysr_kernels.runtime.images.arrays._rounded", full)
    with pytest.raises(OutOfMemory, match=r"does not fit into host memory .*tried to allocate.*; split it"):
        model(np.zeros((4, 4, 4), np.uint8))
    monkeypatch.setattr("tinysr_kernels.runtime.compiled.place", full)
    with pytest.raises(OutOfMemory, match="weights do not fit on cpu"):
        tinysr_kernels.compile("demo", device="cpu")


LIMITED = """
    import resource
    import numpy as np
    import tinysr_kernels
    from tinysr_kernels.runtime.tiles import limits

    limits.HOST_SHARE = 1.0  # the whole image, whatever it takes
    model = tinysr_kernels.compile("demo", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (140, 140, 3), np.uint8)
    expected = model(image[:64, :64])
    for megabytes in (6, 90):
        used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + (megabytes << 20), resource.RLIM_INFINITY))
        try:
            print(model(image).shape)
        except tinysr_kernels.OutOfMemory as error:
            print("OutOfMemory", error)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert np.array_equal(model(image[:64, :64]), expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are Linux's")
def test_a_process_whose_memory_is_limited() -> None:
    """A real shortage ends with a typed error, or goes on in tiles where these fit, and leaves nothing behind."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    second, first = done.stdout.splitlines()
    assert first == "(560, 560, 3)"
    assert "this call continues with tiles of" in done.stderr
    assert second.startswith("OutOfMemory")
    assert "needs more than the" in second


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are Linux's")
def test_the_limits_of_a_process_count_as_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    unlimited = host_memory.available_memory()
    pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
    for kind, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit = pages[field] * resource.getpagesize() + (64 << 20)
        monkeypatch.setattr(
            resource, "getrlimit", lambda of, kind=kind, limit=limit: (limit if of == kind else -1, -1)
        )  # fmt: skip
        assert 0 <= host_memory.available_memory() <= 64 << 20 < unlimited
