"""How a GPU is timed, with a fake CUDA: what is captured, replayed, divided by calls, and rejected."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.device import cuda
from autotune.device.cuda import GpuRunner
from autotune.device.gpu import CudaDevice
from autotune.device.worker import StickyError, Worker
from autotune.items.candidates import candidates
from autotune.items.results import Failure, Sample
from autotune.items.work import Item, Target
from benchmarks.measure import timing
from benchmarks.measure.nvml import State
from tests.autotune.simulated import ITEMS, TARGET, candidates_of, norm_item
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import GPUS

CALL_US = 3.0


class Clock:
    """The clock of a fake GPU: a replay takes CALL_US per captured call."""

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
        """Nothing to wait for."""

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e3


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    before = CLOCK.launched
    yield
    graph.calls = CLOCK.launched - before


class FakeMonitor:
    """A monitor that returns `disturbed`."""

    disturbed = ""

    def state(self) -> State:
        return State(1980)

    def disturbance(self, before: State, after: State) -> str:
        return self.disturbed


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> GpuRunner:
    CLOCK.__init__()  # type: ignore[misc]
    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capture,
        "empty_cache": lambda: None,
        "synchronize": _synchronize,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    made = GpuRunner.__new__(GpuRunner)
    made.device = torch.device("cpu")
    made.properties = SimpleNamespace(L2_cache_size=4096, name="NVIDIA H200", major=9, minor=0)
    made.monitor = FakeMonitor()  # type: ignore[assignment]
    made.item, made.inputs, made.expected = "", [], {}
    made.captured, made.models = cuda.OrderedDict(), cuda.OrderedDict()
    real = cuda.Plan.run

    def counted(plan: Any, pdl: bool = False) -> Any:
        CLOCK.launched += 1
        return real(plan, pdl)

    monkeypatch.setattr(cuda.Plan, "run", counted)
    return made


def _synchronize(device: Any = None) -> None:
    if CLOCK.broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def config_of(item: Item) -> Any:
    return item.call.heuristic(GPUS[90])


def test_a_sample_is_the_time_per_call(runner: GpuRunner) -> None:
    item = norm_item()
    found = runner.sample(item, config_of(item), 0.1)
    assert found == Sample(pytest.approx(CALL_US), "", 1980)
    (entry,) = runner.captured.values()
    # Inputs exceed twice the L2, there are as many outputs, and calls times replays are long enough for a sample.
    assert len(runner.inputs) * item.cost.bytes >= 2 * 4096
    assert len(entry.plans) == len(runner.inputs) > 2
    assert len({plan.result.data_ptr() for plan in entry.plans}) == len(entry.plans)
    assert entry.calls >= timing.UNROLLED
    assert entry.calls % len(entry.plans) == 0
    assert entry.calls * entry.replays * CALL_US >= 1e3 * timing.READING_MS


def test_graphs_are_cached(runner: GpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    item = norm_item()
    some = [c.config for c in candidates(item, GPUS[90], config_of(item)).all[:3]]
    monkeypatch.setattr(cuda, "GRAPHS", 2)
    runner.sample(item, some[0], 0.0)
    launched = CLOCK.launched
    runner.sample(item, some[0], 0.0)
    assert CLOCK.launched == launched
    for config in some:
        runner.sample(item, config, 0.0)
    assert list(runner.captured) == some[1:]
    other = norm_item(torch.float32)
    runner.sample(other, config_of(other), 0.0)
    assert list(runner.captured) == [config_of(other)]


def test_a_sample_below_the_floor_is_a_failure(runner: GpuRunner) -> None:
    item = norm_item()
    found = runner.sample(item, config_of(item), CALL_US * 1.01)
    assert found == Failure("impossible", "3 us is below the floor of 3.03 us")
    # The DRAM floor does not apply to inputs that stay in the L2.
    runner.properties.L2_cache_size = 1 << 40
    assert isinstance(runner.sample(item, config_of(item), CALL_US * 1.01), Sample)


def test_disturbances_are_reported(runner: GpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeMonitor, "disturbed", "thermal slowdown")
    item = norm_item()
    found = runner.sample(item, config_of(item), 0.0)
    assert isinstance(found, Sample)
    assert found.disturbed == "thermal slowdown"


def test_a_failed_launch_is_a_failure_and_a_lost_context_a_sticky_error(
    runner: GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = norm_item()

    def fail(plan: Any) -> None:
        raise RuntimeError("too many resources requested for launch")

    monkeypatch.setattr(cuda.Plan, "run", fail)
    found = runner.sample(item, config_of(item), 0.0)
    assert found == Failure("error", "RuntimeError: too many resources requested for launch")
    assert not runner.captured
    CLOCK.broken = True
    with pytest.raises(StickyError, match="too many resources"):
        runner.sample(item, config_of(item), 0.0)


def test_a_compiler_error_is_a_failure(runner: GpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")

    def fail(plan: Any, pdl: bool = False) -> None:
        raise triton.TritonError("out of resource: shared memory")

    monkeypatch.setattr(cuda.Plan, "run", fail)
    item = norm_item()
    found = runner.check(item, config_of(item), 0)
    assert isinstance(found, Failure)
    assert found.kind == "error"
    assert "shared memory" in found.detail


def test_references_are_cached(runner: GpuRunner) -> None:
    item = norm_item()
    assert runner.check(item, config_of(item), 0) is None
    known = runner.expected[0]
    assert runner.check(item, config_of(item), 0) is None
    assert runner.expected[0] is known
    assert runner.check(item, config_of(item), 1) is None
    assert set(runner.expected) == {0, 1}


class Model:
    """A fake compiled model: a call takes 1 ms."""

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


def test_samples_of_models(runner: GpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model per set of configurations, warmed up with it, timed for long enough."""
    made: list[Model] = []

    def build(target: Any) -> Model:
        made.append(Model())
        return made[-1]

    monkeypatch.setattr(runner, "_compile", build)
    entries = {"simulated": {ITEMS[0].bucket: candidates_of(ITEMS[0].key).incumbent.config}}
    for overrides in ({}, entries, {}, entries):
        assert runner.sample_model(TARGET, overrides, False) == Sample(pytest.approx(1000), "", 1980)
    assert [model.pdl for model in made] == [False, False]
    assert isinstance(runner.sample_model(TARGET, entries, True), Sample)
    assert made.pop().pdl
    assert isinstance(runner.sample_model(TARGET, entries, False), Sample)
    assert len(made) == 2
    assert made[0].warm == [(1, 128, 128)]
    assert {calls for _, _, calls in runner.models.values()} == {int(cuda.MODEL_MS)}
    made[1].retries = 1
    found = runner.sample_model(TARGET, entries, False)
    assert isinstance(found, Failure)
    assert "overflowed" in found.detail


def test_models_have_random_weights_that_do_not_overflow(runner: GpuRunner) -> None:
    """Shapes come from the checkpoint; the random values stay finite in half precision."""
    model = runner._compile(Target(ckpt="demo"))
    assert model.dtype == torch.float16
    assert all(
        bool(t.isfinite().all()) and float(t.double().std()) > 0 for t in model.network.buffers() if t.numel() > 1
    )
    with using("reference"), torch.inference_mode():
        out = model.network(torch.rand(1, 3, 32, 32, dtype=torch.float16))
    assert bool(out.isfinite().all())


class FakeRunner:
    """Runs in a worker process in place of the one with a GPU."""

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

    def sample_model(self, target: Any, entries: Any, pdl: bool) -> Sample:
        return Sample(float(len(entries)) + 2 * pdl)


def test_the_device_calls_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autotune.device.gpu.Worker", lambda factory, index: Worker("tests.autotune.test_cuda:FakeRunner", index)
    )
    device = CudaDevice(0, 0)
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
        assert device.sample_model(TARGET, {"layer_norm": {item.bucket: candidate.config}}, True) == Sample(3.0)
        assert device.clock() <= device.clock()
        device.wait(0)
    finally:
        device.stop()
    with pytest.raises(InputError, match="CUDA device 9 cannot be used: RuntimeError: invalid device ordinal"):
        CudaDevice(9, 0)
