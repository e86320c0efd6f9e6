"""The CUDA engine: streams, pools and captures in the right order, against a mock of torch.cuda that records calls.

The last tests run on a GPU if there is one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tinysr_kernels.runtime.device import cuda as module
from tinysr_kernels.runtime.device.cuda import CudaEngine, engine_for
from tinysr_kernels.runtime.device.graphs import Graphs


class Stream:
    made = 0

    def __init__(self, notes: list[str], name: str = "", high: bool = False) -> None:
        Stream.made += not name
        self.notes = notes
        self.name = name or f"s{Stream.made}"
        self.high = high

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.notes.append(f"sync {self.name}")


class FakeCuda:
    """The part of torch.cuda that CudaEngine uses. notes: the recorded calls, with the current stream if relevant."""

    def __init__(self) -> None:
        Stream.made = 0
        self.notes: list[str] = []
        self.caller = Stream(self.notes, "caller")
        self.local = threading.local()
        self.pools = 0
        self.failing = False

    @property
    def current(self) -> Stream:
        return getattr(self.local, "stream", self.caller)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.local.stream = self.current, stream
        try:
            yield
        finally:
            self.local.stream = before

    def graph_pool_handle(self) -> str:
        self.pools += 1
        return f"pool{self.pools}"

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream is self.current
        assert stream.high
        assert capture_error_mode == "thread_local"
        self.notes.append(f"begin {pool} on {stream.name}")
        yield
        if self.failing:
            self.local.stream = Stream(self.notes, "leaked")  # as torch leaves the current stream
            raise RuntimeError("capture failed")
        self.notes.append("end")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    class Graph:
        def replay(self) -> None:
            fake.notes.append(f"replay on {fake.current.name}")

        def reset(self) -> None:
            fake.notes.append("reset")

    for name, stand_in in {
        "Stream": lambda device, priority=0: Stream(fake.notes, high=priority < 0),
        "current_stream": lambda device: fake.current,
        "stream": fake.stream,
        "device": lambda device: contextlib.nullcontext(),
        "graph": fake.graph,
        "graph_pool_handle": fake.graph_pool_handle,
        "CUDAGraph": Graph,
        "empty_cache": lambda: fake.notes.append("empty"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(module, "_pinned_like", torch.empty_like)
    record = lambda t, stream: fake.notes.append(f"recorded for {stream.name}")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    return fake


@pytest.fixture
def engine(fake: FakeCuda) -> CudaEngine:
    return CudaEngine(torch.device("cpu"))


def test_work_runs_on_the_side_stream_in_order_with_the_caller(fake: FakeCuda, engine: CudaEngine) -> None:
    def step(x: Tensor) -> tuple[Tensor]:
        fake.notes.append(f"step on {fake.current.name}")
        return (x,)

    def outer(x: Tensor) -> tuple[Tensor]:
        return engine.launch(step, (x,))

    order = ["s1 waits for caller", "step on s1", "caller waits for s1", "recorded for caller"]
    engine.launch(step, (torch.rand(2),))
    assert fake.notes == order
    fake.notes.clear()
    engine.launch(outer, (torch.rand(2),))
    assert fake.notes == [*order[:2], "recorded for s1", *order[2:]]
    fake.notes.clear()
    with pytest.raises(ZeroDivisionError):
        engine.launch(lambda: (torch.rand(1 // 0),), ())
    assert fake.notes == ["s1 waits for caller", "caller waits for s1"]
    assert fake.current is fake.caller


def test_results_in_other_memory_have_no_stream(fake: FakeCuda, engine: CudaEngine) -> None:
    engine.launch(lambda: (torch.rand(2), torch.empty(2, device="meta")), ())
    assert fake.notes.count("recorded for caller") == 1


def test_captures_share_a_pool_kept_alive_by_a_graph(fake: FakeCuda, engine: CudaEngine) -> None:
    seen: list[Tensor] = []

    def step(x: Tensor) -> tuple[Tensor]:
        fake.notes.append("step")
        seen.append(x)
        return (torch.ones_like(x),)  # not of x, which the capture leaves uninitialized

    image = torch.rand(2, 3)
    graph = engine.capture(step, (image,))
    begin = "begin pool1 on s1"
    enter, leave = "s1 waits for caller", "caller waits for s1"
    assert fake.notes == [enter, "step", begin, "end", begin, "step", "end", leave]
    assert seen[0] is not image  # the warm-up runs on a dense copy of the input
    assert torch.equal(seen[0], image)
    assert seen[1] is graph.inputs[0] is not image
    fake.notes.clear()
    engine.capture(step, (image,))
    assert fake.notes == [enter, "step", begin, "step", "end", leave]
    fake.notes.clear()

    (result,) = engine.replay(graph, (image,), None)
    assert fake.notes == [enter, "replay on s1", leave]
    assert torch.equal(graph.inputs[0], image)
    assert torch.equal(result, graph.outputs[0])
    assert result.data_ptr() != graph.outputs[0].data_ptr()
    out = torch.empty(2, 3)
    assert engine.replay(graph, (image,), out)[0] is out
    assert torch.equal(out, graph.outputs[0])

    fake.notes.clear()
    engine.drop([graph])
    engine.trim()
    assert fake.notes == ["sync s1", "reset", "empty"]
    engine.capture(step, (image,))
    assert fake.notes.count("begin pool2 on s1") == 2  # including the graph that keeps the new pool alive


def test_a_failed_capture_resets_stream_and_pool(fake: FakeCuda, engine: CudaEngine) -> None:
    step, x = (lambda t: (t * 2,)), torch.rand(3)
    graph = engine.capture(step, (x,))
    fake.failing = True
    with pytest.raises(RuntimeError, match="capture failed"):
        engine.capture(step, (x,))
    assert fake.current is fake.caller
    fake.failing = False
    fake.notes.clear()
    engine.capture(step, (x,))
    assert fake.notes.count("begin pool2 on s2") == 2
    engine.replay(graph, (x,), None)  # graphs of the old pool still work
    assert "replay on s2" in fake.notes

    def broken(t: Tensor) -> tuple[Tensor]:
        raise RuntimeError("no such kernel")

    fake.notes.clear()
    with pytest.raises(RuntimeError, match="no such kernel"):
        engine.capture(broken, (x,))
    assert not any(
        note.startswith("begin") for note in fake.notes
    )  # it failed before the capture, so the pool is still usable
    engine.capture(step, (x,))
    assert "begin pool2 on s2" in fake.notes


def test_copies_use_separate_streams_that_are_reused(fake: FakeCuda, engine: CudaEngine) -> None:
    names = []
    with engine.copies():
        names.append(fake.current.name)
        with engine.copies():
            names.append(fake.current.name)
    for _ in range(5):
        with engine.copies():
            names.append(fake.current.name)
    assert len(set(names[:2])) == 2
    assert len(set(names)) == 2
    assert fake.current is fake.caller


def test_images_are_copied_through_pinned_memory(fake: FakeCuda, engine: CudaEngine, monkeypatch) -> None:
    image = torch.rand(2, 3)
    device = engine.upload(image)
    assert torch.equal(device, image)
    assert device.data_ptr() != image.data_ptr()
    flags = torch.tensor([True])
    for out in (None, torch.empty(2, 3)):
        fake.notes.clear()
        first, second = engine.download((device, flags), out)
        assert fake.notes == ["sync caller"]
        assert torch.equal(first, image)
        assert torch.equal(second, flags)
        assert out is None or first is out
    staged: list[Tensor] = []
    monkeypatch.setattr(module, "_pinned_like", lambda t: staged.append(torch.empty_like(t)) or staged[-1])
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: True)
    copied = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, *a, **k: copied.append(t.data_ptr()) or copy(t, *a, **k))
    out = torch.empty(2, 3)
    assert engine.download((device, flags), out)[0] is out
    assert copied == [out.data_ptr(), staged[1].data_ptr()]  # directly, without another copy
    copied.clear()
    engine.upload(out)
    assert copied == []


def test_bound_work_is_ordered_with_the_creating_thread(fake: FakeCuda, engine: CudaEngine) -> None:
    with fake.stream(Stream(fake.notes, "mine")):
        bound = engine.bound(lambda: fake.current.name)
    found = []
    thread = threading.Thread(target=lambda: found.append(bound()))
    thread.start()
    thread.join()
    assert found == ["mine"]
    assert fake.current is fake.caller


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
