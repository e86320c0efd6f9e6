"""How a GPU is timed, with CUDA's part played by counters: what is captured, replayed, divided and refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.device import cuda
from autotune.device.cuda import Bench
from autotune.device.gpu import RealDevice
from autotune.device.worker import Broken, Worker
from autotune.items.answers import Failure, Sample
from autotune.items.candidates import candidates
from autotune.items.work import Item, Target
from benchmarks.measure import timing
from benchmarks.measure.nvml import State
from tests.autotune.simulated import ITEMS, TARGET, candidates_of
from tests.autotune.test_correctness import norm_item
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import GPUS

CALL_US = 3.0


class Clock:
    """A GPU on which every replay takes CALL_US a captured call."""

    def __init__(self) -> None:
        self.us = 0.0
        self.capturing: list[int] | None = None
        self.launched = 0
        self.broken = False


CLOCK = Clock()


class Graph:
    def __init__(self) -> None:
        self.calls = 0

    def replay(self) -> None:
        CLOCK.us += CALL_US * self.calls


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = CLOCK.us

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e3


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    before = CLOCK.launched
    yield
    graph.calls = CLOCK.launched - before


class Watch:
    """A monitor that says what it is told."""

    said = ""

    def state(self) -> State:
        return State(1980)

    def disturbance(self, before: State, after: State) -> str:
        return self.said


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    CLOCK.__init__()  # type: ignore[misc]
    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capture,
        "empty_cache": lambda: None,
        "synchronize": _synchronize,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    made = Bench.__new__(Bench)
    made.device = torch.device("cpu")
    made.properties = SimpleNamespace(L2_cache_size=4096, name="NVIDIA H200", major=9, minor=0)
    made.monitor = Watch()  # type: ignore[assignment]
    made.item, made.inputs, made.truths = "", [], {}
    made.prepared, made.models = cuda.OrderedDict(), cuda.OrderedDict()
    real = cuda.Plan.run

    def counted(plan: Any) -> Any:
        CLOCK.launched += 1
        return real(plan)

    monkeypatch.setattr(cuda.Plan, "run", counted)
    return made


def _synchronize(device: Any = None) -> None:
    if CLOCK.broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def config_of(item: Item) -> Any:
    return item.call.heuristic(GPUS[90])


def test_a_reading_is_the_time_of_one_call(bench: Bench) -> None:
    item = norm_item()
    found = bench.sample(item, config_of(item), 0.1)
    assert found == Sample(pytest.approx(CALL_US), "", 1980)
    (prepared,) = bench.prepared.values()
    # Inputs that together exceed the L2 twice, as many results, and enough calls and replays for a reading.
    assert len(bench.inputs) * item.cost.bytes >= 2 * 4096
    assert len(prepared.plans) == len(bench.inputs) > 2
    assert len({plan.result.data_ptr() for plan in prepared.plans}) == len(prepared.plans)
    assert prepared.calls >= timing.UNROLLED
    assert prepared.calls % len(prepared.plans) == 0
    assert prepared.calls * prepared.replays * CALL_US >= 1e3 * timing.READING_MS


def test_captured_once_and_kept_while_there_is_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    item = norm_item()
    some = [c.config for c in candidates(item, GPUS[90], config_of(item)).all[:3]]
    monkeypatch.setattr(cuda, "GRAPHS", 2)
    bench.sample(item, some[0], 0.0)
    launched = CLOCK.launched
    bench.sample(item, some[0], 0.0)
    assert CLOCK.launched == launched
    for config in some:
        bench.sample(item, config, 0.0)
    assert list(bench.prepared) == some[1:]
    other = norm_item(torch.float32)
    bench.sample(other, config_of(other), 0.0)
    assert list(bench.prepared) == [config_of(other)]


def test_nothing_reads_under_the_floor(bench: Bench) -> None:
    item = norm_item()
    found = bench.sample(item, config_of(item), CALL_US * 1.01)
    assert found == Failure("impossible", "3 us where 3.03 us is the least")
    # With inputs that stay in the L2 the floor of the memory says nothing.
    bench.properties.L2_cache_size = 1 << 40
    assert isinstance(bench.sample(item, config_of(item), CALL_US * 1.01), Sample)


def test_disturbances_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "said", "thermal slowdown")
    item = norm_item()
    found = bench.sample(item, config_of(item), 0.0)
    assert isinstance(found, Sample)
    assert found.disturbed == "thermal slowdown"


def test_a_failed_launch_is_an_answer_and_a_lost_context_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    item = norm_item()

    def fail(plan: Any) -> None:
        raise RuntimeError("too many resources requested for launch")

    monkeypatch.setattr(cuda.Plan, "run", fail)
    found = bench.sample(item, config_of(item), 0.0)
    assert found == Failure("error", "RuntimeError: too many resources requested for launch")
    assert not bench.prepared
    CLOCK.broken = True
    with pytest.raises(Broken, match="too many resources"):
        bench.sample(item, config_of(item), 0.0)


def test_a_refusing_compiler_is_an_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")

    def fail(plan: Any) -> None:
        raise triton.TritonError("out of resource: shared memory")

    monkeypatch.setattr(cuda.Plan, "run", fail)
    item = norm_item()
    found = bench.check(item, config_of(item), 0)
    assert isinstance(found, Failure)
    assert found.kind == "error"
    assert "shared memory" in found.detail


def test_checks_keep_what_they_compare_with(bench: Bench) -> None:
    item = norm_item()
    assert bench.check(item, config_of(item), 0) is None
    known = bench.truths[0]
    assert bench.check(item, config_of(item), 0) is None
    assert bench.truths[0] is known
    assert bench.check(item, config_of(item), 1) is None
    assert set(bench.truths) == {0, 1}


class Model:
    """Stands for a compiled model: a call takes a millisecond."""

    def __init__(self) -> None:
        self.fallbacks = self.retries = 0
        self.warm: list[Any] = []

    def warmup(self, shapes: list[Any]) -> None:
        self.warm += shapes
        self.pdl = configs.pdl(GPUS[90])

    def enlarge(self, image: torch.Tensor) -> None:
        assert image.dtype == torch.uint8
        CLOCK.us += 1000

    def info(self) -> dict[str, int]:
        return {"non_finite_retries": self.retries, "graph_fallbacks": self.fallbacks}


def test_whole_models(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model a set of configurations, warmed up with it, timed for long enough."""
    made: list[Model] = []

    def build(target: Any) -> Model:
        made.append(Model())
        return made[-1]

    monkeypatch.setattr(bench, "_compile", build)
    entries = {"simulated": {ITEMS[0].bucket: candidates_of(ITEMS[0].key).incumbent.config}}
    for given in ({}, entries, {}, entries):
        assert bench.whole(TARGET, given, False) == Sample(pytest.approx(1000), "", 1980)
    assert [model.pdl for model in made] == [False, False]
    assert isinstance(bench.whole(TARGET, entries, True), Sample)
    assert made.pop().pdl
    assert isinstance(bench.whole(TARGET, entries, False), Sample)
    assert len(made) == 2
    assert made[0].warm == [(1, 128, 128)]
    assert {calls for _, _, calls in bench.models.values()} == {int(cuda.WHOLE_MS)}
    made[1].retries = 1
    found = bench.whole(TARGET, entries, False)
    assert isinstance(found, Failure)
    assert "overflowed" in found.detail


def test_models_are_made_of_random_weights_that_do_not_overflow(bench: Bench) -> None:
    """What is timed is the network itself: shapes from the checkpoint, values that stay finite in half precision."""
    model = bench._compile(Target(ckpt="demo"))
    assert model.dtype == torch.float16
    assert all(
        bool(t.isfinite().all()) and float(t.double().std()) > 0 for t in model.network.buffers() if t.numel() > 1
    )
    with using("reference"), torch.inference_mode():
        out = model.network(torch.rand(1, 3, 32, 32, dtype=torch.float16))
    assert bool(out.isfinite().all())


class FakeBench:
    """Answers in a worker's process as the one on a GPU does."""

    def __init__(self, index: int) -> None:
        self.index = index

    def facts(self) -> dict[str, Any]:
        if self.index == 9:
            raise RuntimeError("invalid device ordinal")
        known = {"name": "NVIDIA H200", "capability": (9, 0), "multiprocessors": 132, "driver": "570.10"}
        return {**known, "memory_mib": 143771, "power_limit_w": 700, "clock": 1.98e9, "memory": None, "busy": 0}

    def check(self, item: Item, config: Any, draw: int) -> Failure | None:
        return Failure("wrong", f"{item.key} {draw}") if draw else None

    def sample(self, item: Item, config: Any, floor_us: float) -> Sample:
        return Sample(floor_us)

    def whole(self, target: Any, entries: Any, pdl: bool) -> Sample:
        return Sample(float(len(entries)) + 2 * pdl)


def test_the_device_speaks_through_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autotune.device.gpu.Worker", lambda factory, index: Worker("tests.autotune.test_cuda:FakeBench", index)
    )
    device = RealDevice(0, 0)
    try:
        assert device.facts.gpu == GPUS[90]
        assert (device.facts.driver, device.facts.power_limit_w) == ("570.10", 700)
        item = norm_item()
        candidate = candidates(item, GPUS[90], config_of(item)).incumbent
        assert device.check(item, candidate, 0) is None
        assert device.check(item, candidate, 1) == Failure("wrong", f"{item.key} 1")
        found = device.sample(item, candidate)
        assert isinstance(found, Sample)
        assert found.us == pytest.approx(1e6 * device.ceilings.floor(item.cost, 16))
        assert device.whole(TARGET, {"layer_norm": {item.bucket: candidate.config}}, True) == Sample(3.0)
        assert device.clock() <= device.clock()
        device.wait(0)
    finally:
        device.stop()
    with pytest.raises(InputError, match="CUDA device 9 cannot be used: RuntimeError: invalid device ordinal"):
        RealDevice(9, 0)
