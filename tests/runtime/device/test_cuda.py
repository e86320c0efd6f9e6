"""The CUDA engine on a GPU that is not there (fake_cuda): streams, pools, captures, copies, and what ends a call.

The last test runs on a GPU if there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.runtime.device.fake_cuda import Machine, captured, fake_cuda
from tinysr_kernels.errors import DeviceError, InputError
from tinysr_kernels.runtime.device import staging
from tinysr_kernels.runtime.device.choose import choose_device
from tinysr_kernels.runtime.device.cuda import CudaEngine, engine_for
from tinysr_kernels.runtime.device.device_error import device_error
from tinysr_kernels.runtime.device.graphs import Graphs

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with fake_cuda() as machine:
        yield machine


@pytest.fixture
def engine(machine: Machine) -> CudaEngine:
    return engine_for(GPU)


def step(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x * 2)
    return y, y.isfinite().all()


def synchronizing(x: Tensor) -> tuple[Tensor]:
    return (x * float(x.sum()),)


def image(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 4, 5))


@pytest.mark.parametrize("way", ["launch", "replay"])
def test_results_belong_to_the_stream_of_the_caller(machine: Machine, engine: CudaEngine, way: str) -> None:
    """Written, read and freed in the caller's order, and with `out` given in its memory."""
    mine, host = torch.cuda.Stream(GPU), image()
    with torch.cuda.stream(mine):
        x = host.to(GPU)
        graph = engine.capture(step, (x,))
        for out in (None, torch.empty_like(x)):
            given = x * 1
            if way == "launch":
                found, finite = engine.launch(step, (given,), out)
            else:
                found, finite = engine.replay(graph, (given,), out)
            del given  # its memory goes to later work of the caller's stream
            assert out is None or found is out
            assert torch.cuda.current_stream() == mine
            assert found.block.lane is finite.block.lane is mine.lane
            found += 1  # on the caller's stream
            assert torch.equal(found.cpu(), torch.tanh(host * 2) + 1)
    assert not machine.faults


def test_a_nested_step_is_part_of_the_outer_one(machine: Machine, engine: CudaEngine) -> None:
    lanes = []

    def inner(x: Tensor) -> tuple[Tensor]:
        lanes.append(torch.cuda.current_stream().lane)
        return (x * 2,)

    def outer(x: Tensor) -> tuple[Tensor]:
        return (engine.launch(inner, (x + 1,))[0] * 3,)

    x = image().to(GPU)
    assert torch.equal(engine.launch(outer, (x,))[0], (x + 1) * 2 * 3)
    assert lanes[0] is not torch.cuda.current_stream().lane
    with pytest.raises(ZeroDivisionError):
        engine.launch(lambda: (image(1 // 0),), ())
    assert torch.equal(engine.launch(outer, (x,))[0], (x + 1) * 2 * 3)
    assert lanes[0] is lanes[1]


def test_results_in_host_memory_stay_there(machine: Machine, engine: CudaEngine) -> None:
    host = image()
    found, flag = engine.launch(lambda: (host, torch.ones(2, device=GPU)), ())
    assert found is host
    assert flag.device == GPU


def test_a_pool_lives_as_long_as_its_graphs(machine: Machine, engine: CudaEngine) -> None:
    x = image().to(GPU)
    before = machine.used[GPU]
    graphs = [engine.capture(step, (x,)) for _ in range(2)]
    assert len({id(graph.graph.captured.pool) for graph in graphs}) == 1
    engine.drop(graphs)
    again = engine.capture(step, (x,))  # the pool is kept usable by a graph of the engine's own
    assert torch.equal(engine.replay(again, (x,), None)[0], step(x)[0])
    engine.drop([again])
    del graphs, again
    engine.trim()
    assert machine.used[GPU] == before
    graph = engine.capture(step, (x,))
    assert torch.equal(engine.replay(graph, (x,), None)[0], step(x)[0])


def test_a_failed_capture_ends_captures_but_not_the_graphs_that_are(machine: Machine, engine: CudaEngine) -> None:
    """And leaves nothing to an allocator that believes in a capture under way from then on."""
    machine.gets_stuck = True
    x = image().to(GPU)
    graph = engine.capture(step, (x,))
    engine.replay(graph, (x,), None)
    mine = torch.cuda.Stream(GPU)
    with torch.cuda.stream(mine), pytest.raises(RuntimeError, match="CUDA error: operation"):
        engine.capture(synchronizing, (x,))
    assert torch.cuda.current_stream().lane is machine.default_lane(GPU)
    assert not engine.can_capture
    used = machine.used[GPU]
    for _ in range(20):
        for result in (engine.replay(graph, (x,), None), engine.launch(step, (x,))):
            assert torch.equal(result[0], step(x)[0])
        del result
    assert machine.used[GPU] == used


def test_a_capture_that_runs_out_of_memory_does_not_end_captures() -> None:
    with fake_cuda(memory=4096) as machine:
        engine = engine_for(GPU)
        x = image(100).to(GPU)

        def large(x: Tensor) -> tuple[Tensor]:
            machine.capacity = 4096 if machine.capture() is None else machine.used[GPU]
            return (x * 2,)

        with pytest.raises(torch.OutOfMemoryError):
            engine.capture(large, (x,))
        assert engine.can_capture
        machine.capacity = 4096
        graph = engine.capture(step, (x,))
        assert torch.equal(engine.replay(graph, (x,), None)[0], step(x)[0])


def test_another_stream_is_taken_where_pytorch_gave_ours_to_the_caller(machine: Machine, engine: CudaEngine) -> None:
    """It hands out 32 of a priority in turn, so the caller's 32nd would be the engine's."""
    x = image().to(GPU)
    graph = engine.capture(step, (x,))
    ours = engine._stream
    theirs = next(stream for stream in (torch.cuda.Stream(GPU, priority=-1) for _ in range(32)) if stream == ours)
    torch.cuda.synchronize()
    with torch.cuda.stream(theirs):
        for _ in range(2):
            given = x * 1
            for found in (engine.launch(step, (given,)), engine.replay(graph, (given,), None)):
                assert torch.equal(found[0], step(x)[0])
            assert engine._stream != theirs
        engine.capture(step, (x,))
    torch.cuda.synchronize()


def test_copies_use_separate_streams_that_are_reused(machine: Machine, engine: CudaEngine) -> None:
    lanes = []
    with engine.copies():
        lanes.append(torch.cuda.current_stream().lane)
        with engine.copies():
            lanes.append(torch.cuda.current_stream().lane)
    for _ in range(5):
        with engine.copies():
            lanes.append(torch.cuda.current_stream().lane)
    assert len(set(lanes[:2])) == len(set(lanes)) == 2
    assert torch.cuda.current_stream().lane is machine.default_lane(GPU)


# Copies


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("slice_bytes", [64, 128, 1 << 20])
def test_copies_in_slices(slice_bytes: int, pinned: bool, machine: Machine, engine: CudaEngine, monkeypatch) -> None:
    """Any layout and dtype, with pinned memory or without, in memory that does not grow with the image."""
    monkeypatch.setattr(staging, "SLICE", slice_bytes)
    monkeypatch.setattr(staging, "IN_FLIGHT", 2 * slice_bytes)
    machine.pinned = pinned
    x = image()
    images = [x, x.contiguous(memory_format=torch.channels_last), x[..., 1:4], x.transpose(1, 3), x.double(), x[:0]]
    images += [torch.tensor(True), (x * 255).to(torch.uint8), x[:, :, ::2], x.half()]
    for host in images:
        with engine.copies():
            device = engine.upload(host)
            assert device.device == GPU
            assert torch.equal(device.data_, host)
            sliced = device[..., : max(device.shape[-1] - 1, 0)] if device.dim() else device
            found, again = engine.download((device, sliced))
            assert torch.equal(found, host)
            assert torch.equal(again, sliced.data_)
            assert not found.is_pinned()
            for out in (
                torch.empty_like(host),
                torch.empty_like(host.movedim(0, -1)).movedim(-1, 0) if host.dim() else host,
            ):
                assert engine.download((device,), out)[0] is out
                assert torch.equal(out, host)
    assert machine.memory.most_pinned <= (4 * slice_bytes if pinned else 0)  # rounded up


def test_without_pinned_memory_it_says_so_once(machine: Machine, engine: CudaEngine, caplog) -> None:
    machine.pinned = False
    for _ in range(3):
        engine.download((engine.upload(image()),))
    (record,) = caplog.records
    assert "no pinned host memory (CUDA error: out of memory)" in record.getMessage()
    machine.pinned = True
    engine.upload(image())
    assert machine.memory.most_pinned == 0


def test_pinned_results_are_written_by_the_device_itself(machine: Machine, engine: CudaEngine) -> None:
    host = image()
    pinned = torch.empty_like(host, pin_memory=True).copy_(host)
    most = machine.memory.most_pinned
    device = engine.upload(pinned)
    pinned_out = torch.empty_like(host, pin_memory=True)
    assert engine.download((device,), pinned_out)[0] is pinned_out
    assert torch.equal(pinned_out, host)
    assert machine.memory.most_pinned == 2 * most


def test_images_of_another_gpu(machine: Machine, engine: CudaEngine) -> None:
    """Whatever the current device is."""
    host = image()
    other = torch.device("cuda", 1)
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream(other)):
        x = (host - 1).to(other) + 1
        with engine.copies():
            uploaded = engine.upload(x)
            assert uploaded.device == GPU
            found = engine.launch(step, (uploaded,))[0].to(other) * 2
        assert torch.cuda.current_device() == 1
        torch.testing.assert_close(found.cpu(), torch.tanh(host * 2) * 2)
        graph = engine.capture(step, (host.to(GPU),))
        torch.testing.assert_close(engine.replay(graph, (host.to(GPU),), None)[0].cpu(), torch.tanh(host * 2))
        assert torch.cuda.current_device() == 1


def test_bound_work_is_ordered_with_the_creating_thread(machine: Machine, engine: CudaEngine) -> None:
    mine = torch.cuda.Stream(GPU)
    found = []
    with torch.cuda.stream(mine):
        x = image().to(GPU) * 2
        bound = engine.bound(lambda: found.append((x + 1).cpu()))
        thread = threading.Thread(target=bound)
        thread.start()
        thread.join()
    assert torch.equal(found[0], x.data_ + 1)


# What a call cannot be made in


def test_a_call_within_the_caller_s_capture_is_refused_before_it_harms_it(machine: Machine, engine: CudaEngine) -> None:
    x = image().to(GPU)
    x * 2
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with captured(graph, torch.cuda.Stream(GPU)):
        with pytest.raises(InputError, match=r"while a CUDA graph is captured.*before or after"):
            engine.check()
        y = x * 2
    graph.replay()
    assert torch.equal(y, x * 2)
    engine.check()
    other = torch.cuda.Stream(torch.device("cuda", 1))
    graph = torch.cuda.CUDAGraph()
    with captured(graph, other), pytest.raises(InputError, match="while a CUDA graph is captured"):
        engine.check()


def test_a_forked_process_is_told_to_spawn(machine: Machine, engine: CudaEngine, monkeypatch) -> None:
    engine.lock.acquire()  # by a thread that the fork left behind
    machine.forked = True
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(DeviceError, match="get_context\\('spawn'\\)"):
        engine.check()
    for device in (None, "cuda", "cuda:1", 0):
        with pytest.raises(DeviceError, match="forked after CUDA was initialized"):
            choose_device(device)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RuntimeError) as caught:
        torch.cuda._lazy_init()
    assert "spawn" in str(device_error(caught.value))


if torch.cuda.is_available():

    def test_on_a_gpu_graphs_match_eager_launches_bit_for_bit() -> None:
        engine = engine_for(torch.device("cuda", 0))
        graphs = Graphs(engine, 2)
        weight = torch.randn(64, 64, device="cuda")

        def step(x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(x @ weight)
            return y, y.isfinite().all()

        for n in (8, 8, 16, 8, 16, 24, 24, 24, 8):
            with engine.copies():
                x = engine.upload(torch.randn(n, 64))
                found, finite = engine.download(graphs.run("step", step, x))
                expected, _ = engine.download(engine.launch(step, (x,)))
            assert torch.equal(found, expected)
            assert bool(finite)
        assert graphs.statistics.captures >= 2
        assert graphs.statistics.fallbacks == 0
        graphs.clear()
