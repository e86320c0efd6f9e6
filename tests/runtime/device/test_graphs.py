"""Which steps are captured, replayed, evicted and launched eagerly, with a recorder in place of CUDA.

The same tests also run on a GPU if there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.device.recorder import Recorder
from tinysr_kernels.runtime.device import graphs as module
from tinysr_kernels.runtime.device.cuda import engine_for
from tinysr_kernels.runtime.device.engine import EagerEngine, Engine, free_graphs
from tinysr_kernels.runtime.device.graphs import Graphs

ENGINES: dict[str, Callable[[], Any]] = {"recorder": Recorder}
if torch.cuda.is_available():
    ENGINES["cuda"] = lambda: engine_for(torch.device("cuda", 0))


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]()


def double(x: Tensor) -> tuple[Tensor, Tensor]:
    """A step with two results."""
    return x * 2, x.sum()


def run(graphs: Graphs, x: Tensor, name: str = "double", **options: Any) -> Tensor:
    first, total = graphs.run(name, double, x, **options)
    assert torch.equal(first, x * 2)
    torch.testing.assert_close(total, x.sum())
    return first


def sized(engine: Engine, *shape: int) -> Tensor:
    return torch.rand(shape).to(engine.device)


def counted(graphs: Graphs) -> tuple[int, int, int, int]:
    s = graphs.statistics
    return s.captures, s.replays, s.dropped, len(graphs)


def test_a_step_is_captured_at_its_second_call(engine: Engine) -> None:
    graphs = Graphs(engine, 4)
    run(graphs, sized(engine, 3))
    assert counted(graphs) == (0, 0, 0, 0)
    first = run(graphs, sized(engine, 3))
    kept = first.clone()
    assert counted(graphs) == (1, 1, 0, 1)
    for _ in range(3):
        run(graphs, sized(engine, 3))
    assert counted(graphs) == (1, 4, 0, 1)
    assert torch.equal(first, kept)  # later replays do not change a returned result


def test_the_key_contains_everything_that_launches_depend_on(engine: Engine) -> None:
    graphs = Graphs(engine, 16)
    x = sized(engine, 2, 3, 4, 5)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    for image in (x, nhwc, x.double(), x[:1], x.transpose(2, 3).contiguous()):
        run(graphs, image, now=True)
    run(graphs, x, name="other", now=True)
    assert counted(graphs)[0] == 6
    for image in (x, nhwc, x.double()):
        run(graphs, image)
    assert counted(graphs)[0] == 6


def test_a_step_for_any_layout_has_one_graph(engine: Engine) -> None:
    graphs = Graphs(engine, 16)
    x = sized(engine, 2, 3, 4, 5)
    for image in (x, x.contiguous(memory_format=torch.channels_last), sized(engine, 2, 3, 4, 9)[..., 2:7]):
        run(graphs, image, now=True, any_layout=True)
    assert counted(graphs)[:2] == (1, 3)


def test_the_least_recently_used_graph_is_evicted(engine: Engine) -> None:
    graphs = Graphs(engine, 2)
    a, b, c = (sized(engine, n) for n in (1, 2, 3))
    for x in (a, b):
        run(graphs, x, now=True)
    run(graphs, a)
    run(graphs, c, now=True)
    assert counted(graphs) == (3, 4, 1, 2)
    run(graphs, a)
    assert counted(graphs)[0] == 3  # still cached
    for _ in range(3):
        run(graphs, b)  # evicted once, so it is captured at its fourth call
    assert counted(graphs)[0] == 3
    run(graphs, b)
    assert counted(graphs)[0] == 4


def test_cycling_through_more_shapes_than_graphs_rarely_captures(engine: Engine) -> None:
    graphs = Graphs(engine, 2)
    shapes = [sized(engine, n) for n in range(1, 5)]
    for _ in range(64):
        for x in shapes:
            run(graphs, x)
    captures = counted(graphs)[0]
    assert captures <= 4 * 6  # each shape at most log2(64) times in 64 rounds
    assert len(graphs) <= 2


def test_a_limit_of_zero_launches_eagerly(engine: Engine) -> None:
    graphs = Graphs(engine, 0)
    for _ in range(3):
        run(graphs, sized(engine, 3), now=True)
    assert counted(graphs) == (0, 0, 0, 0)


@pytest.mark.parametrize("limit", [0, 1])
def test_out_receives_the_first_output(engine: Engine, limit: int) -> None:
    graphs = Graphs(engine, limit)
    out = torch.empty(3, device=engine.device)
    for _ in range(3):
        assert run(graphs, sized(engine, 3), out=out) is out


def test_the_counts_of_steps_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COUNTED_STEPS", 5)
    graphs = Graphs(engine, 2)
    for n in range(1, 20):
        run(graphs, sized(engine, n))
    assert len(graphs._counts) == 5
    run(graphs, sized(engine, 19))
    assert counted(graphs)[0] == 1


@pytest.mark.parametrize("where", ["warm-up", "capture"])
def test_a_failed_capture_falls_back_with_one_notice(
    engine: Engine, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA refuses to capture a synchronization such as `item`."""
    if where == "capture" and not isinstance(engine, Recorder):
        pytest.skip("a failed capture leaves the allocator of some versions unusable (pytorch pull request 180395)")
    graphs = Graphs(engine, 4)
    calls = []

    def reads(x: Tensor) -> tuple[Tensor]:
        calls.append(1)
        if where == "warm-up" and len(calls) == 1:
            raise RuntimeError("no kernel\nand more lines")
        return (x * float(x[0].item() * 0 + 3),)

    for n in (2, 3):
        if isinstance(engine, Recorder) and where == "capture":
            engine.failures = [RuntimeError("operation not permitted when stream is capturing\nand more lines")]
        calls.clear()
        for _ in range(3):
            x = sized(engine, n)
            assert torch.equal(graphs.run("reads", reads, x, now=True)[0], x * 3)
    assert counted(graphs)[0] == 0
    assert graphs.statistics.fallbacks == 2
    assert len(caplog.records) == 1
    assert "launched individually" in caplog.text
    assert "and more lines" not in caplog.text
    run(graphs, sized(engine, 3), now=True)  # other steps are captured
    run(graphs, sized(engine, 3))
    assert counted(graphs)[:2] == (1, 2)


def test_out_of_memory_in_a_capture_drops_the_graphs_and_retries_later(caplog) -> None:
    engine = Recorder()
    graphs = Graphs(engine, 4)
    run(graphs, torch.rand(2), now=True)
    engine.failures = [torch.OutOfMemoryError("no room")]
    run(graphs, torch.rand(3), now=True)
    assert counted(graphs) == (1, 1, 1, 0)
    assert graphs.statistics.fallbacks == 0
    assert caplog.text == ""
    run(graphs, torch.rand(3))
    assert len(graphs) == 0
    run(graphs, torch.rand(3))
    assert len(graphs) == 1


def test_out_of_memory_of_the_step_is_raised() -> None:
    def full(x: Tensor) -> tuple[Tensor]:
        raise torch.OutOfMemoryError("no room")

    for limit in (0, 3):
        with pytest.raises(torch.OutOfMemoryError):
            Graphs(Recorder(), limit).run("full", full, torch.rand(2), now=True)


def test_nested_steps_belong_to_the_outer_graph(engine: Engine) -> None:
    graphs = Graphs(engine, 4)

    def outer(x: Tensor) -> tuple[Tensor]:
        return (graphs.run("inner", double, x)[0] + 1,)

    for expected in ((0, 0), (2, 2), (2, 3)):
        # eager with an eager inner step; then both are due, as the inner step has also run once on its own
        x = sized(engine, 4)
        assert torch.equal(graphs.run("outer", outer, x)[0], x * 2 + 1)
        if expected == (0, 0):
            run(graphs, x, name="inner")  # captured here, replayed inside eager outer steps
            assert counted(graphs)[:2] == (1, 1)
        else:
            assert counted(graphs)[:2] == expected
    if isinstance(engine, Recorder):
        # during warm-up and capture of the outer step, the inner one ran as part of it
        start = len(engine.events) - 1 - engine.events[::-1].index("warm-up")
        assert engine.events[start : start + 3] == ["warm-up", "capture", "replay"]


def test_an_eager_step_replays_the_graphs_of_nested_steps(engine: Engine) -> None:
    graphs = Graphs(engine, 1)
    run(graphs, sized(engine, 4), name="inner", now=True)

    def outer(x: Tensor) -> tuple[Tensor]:
        return (torch.cat([graphs.run("inner", double, x[i : i + 4])[0] for i in (0, 4)]),)

    x = sized(engine, 8)
    assert torch.equal(graphs.run("outer", outer, x)[0], x * 2)
    assert counted(graphs) == (1, 3, 0, 1)


def test_free_graphs_drops_the_graphs_of_all_models_on_the_device(engine: Engine) -> None:
    models = [Graphs(engine, 2), Graphs(engine, 2)]
    for graphs in models:
        run(graphs, sized(engine, 5), now=True)
    assert free_graphs(engine)
    assert [len(graphs) for graphs in models] == [0, 0]
    assert not free_graphs(engine)
    for graphs in models:
        run(graphs, sized(engine, 5), now=True)
        assert len(graphs) == 1
        graphs.clear()


def test_threads_get_their_own_results(engine: Engine) -> None:
    """Eight threads, two graphs, six shapes; each replay overwrites the memory of other graphs."""
    graphs = Graphs(engine, 2)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(30):
            x = torch.full((1 + (seed + i) % 6,), float(100 * seed + i), device=engine.device)
            found = graphs.run("double", double, x)[0]
            if not torch.equal(found, x * 2):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(graphs) <= 2


def test_the_cpu_does_not_support_graphs() -> None:
    cpu = torch.device("cpu")
    engine = engine_for(cpu)
    assert isinstance(engine, EagerEngine)
    for call in (lambda: engine.capture(double, ()), lambda: engine.replay(None, (), None)):
        with pytest.raises(RuntimeError, match="cpu does not support CUDA graphs"):
            call()
    assert not free_graphs(engine)
    x, out = torch.rand(2), torch.empty(2)
    assert engine.download((x, x), out)[0] is out
    assert engine.upload(x) is x
