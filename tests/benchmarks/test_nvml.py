"""The NVML monitor, with a fake driver and without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.measure import nvml
from benchmarks.measure.nvml import Monitor, State
from benchmarks.measure.timing import Stopwatch
from tests.runtime.device.fake_cuda import fake_cuda


class FakeNVMLError(Exception):
    """The exception of the fake driver."""


class Driver:
    """A fake module pynvml on a machine with one GPU."""

    NVMLError = FakeNVMLError

    def __init__(self, **values: Any) -> None:
        self.values = {
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetComputeRunningProcesses": [],
            "nvmlDeviceGetCurrentClocksEventReasons": 0,
            "nvmlDeviceGetMaxClockInfo": {1: 1980, 2: 3201},
            "nvmlDeviceGetMemoryBusWidth": 6016,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=143771 << 20),
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            **values,
        }
        self.uuid = ""

    def nvmlInit(self) -> None:
        if self.values.get("nvmlInit") is FakeNVMLError:
            raise FakeNVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        self.uuid = uuid
        return object()

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.10"

    def __getattr__(self, name: str) -> Any:
        if name not in self.values:
            raise AttributeError(name)

        def query(handle: object, *arguments: int) -> Any:
            value = self.values[name]
            if value is FakeNVMLError:
                raise FakeNVMLError
            return value[arguments[0]] if isinstance(value, dict) else value

        return query


def monitor(patch: pytest.MonkeyPatch, **values: Any) -> Monitor:
    patch.setattr(nvml, "pynvml", Driver(**values))
    return Monitor("1234")


def processes(*pids: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid) for pid in pids]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(monkeypatch)
    assert nvml.pynvml.uuid == "GPU-1234"
    limits = made.limits()
    assert limits.pop("memory") == pytest.approx(4.8e12, rel=0.01)  # the H200's, from its clock and bus
    assert limits == {"driver": "570.10", "memory_mib": 143771, "power_limit_w": 700, "clock": 1.98e9}


def test_without_nvml_values_are_unknown_and_nothing_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in (None, Driver(nvmlInit=FakeNVMLError)):
        monkeypatch.setattr(nvml, "pynvml", absent)
        made = Monitor("1234")
        assert set(made.limits().values()) == {None}
        assert made.state() == State()
        assert made.disturbance(made.state(), made.state()) == ""


def test_a_driver_that_does_not_support_some_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(
        monkeypatch, nvmlDeviceGetEnforcedPowerLimit=FakeNVMLError, nvmlDeviceGetMemoryBusWidth=FakeNVMLError
    )
    limits = made.limits()
    assert limits["power_limit_w"] is None
    assert limits["memory"] is None
    assert limits["driver"] == "570.10"


@pytest.mark.parametrize(
    ("bits", "reason"),
    [
        (0x0, ""),
        (0x1, ""),  # idle
        (0x4, ""),  # the power cap is normal operation
        (0x8, "hardware slowdown"),
        (0x20, "thermal slowdown"),
        (0x44, "thermal slowdown"),
        (0x80, "power brake"),
    ],
)
def test_slowdowns(bits: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calm, found = State(1980), monitor(monkeypatch, nvmlDeviceGetCurrentClocksEventReasons=bits).state()
    made = monitor(monkeypatch)
    assert made.disturbance(calm, found) == reason
    assert made.disturbance(found, calm) == reason


def test_the_older_name_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(nvmlDeviceGetCurrentClocksThrottleReasons=0x40)
    del driver.values["nvmlDeviceGetCurrentClocksEventReasons"]
    monkeypatch.setattr(nvml, "pynvml", driver)
    assert Monitor("1234").state().slowed == "thermal slowdown"


def test_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, its parent and processes that were there before are no disturbance; a new process is."""
    made = monitor(monkeypatch, nvmlDeviceGetComputeRunningProcesses=processes(os.getpid(), os.getppid(), 77))
    assert made.known_processes == {77}
    before = made.state()
    assert made.disturbance(before, made.state()) == ""
    nvml.pynvml.values["nvmlDeviceGetComputeRunningProcesses"] = processes(77, 78)
    assert made.disturbance(before, made.state()) == "another process on the GPU"


def test_in_a_container_a_process_does_not_take_itself_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver lists it by the host's number, once it has a context; the stopwatch makes one first."""
    with fake_cuda() as machine:
        driver = Driver()
        monkeypatch.setattr(nvml, "pynvml", driver)

        def listed() -> list[SimpleNamespace]:
            return processes(*([4_000_001] if machine.loaded or any(machine.most_used.values()) else []))

        driver.values["nvmlDeviceGetComputeRunningProcesses"] = []
        monkeypatch.setattr(Monitor, "_ask", with_processes(Monitor._ask, listed))
        watch = Stopwatch(torch.device("cuda", 0)).watch
        before = watch.state()
        torch.ones(3, device="cuda:0") * 2
        assert before.others == {4_000_001}
        assert watch.disturbance(before, watch.state()) == ""


def with_processes(ask: Callable[..., Any], listed: Callable[[], Any]) -> Callable[..., Any]:
    """`_ask` of a driver whose list of processes changes."""
    return lambda self, question, *rest: listed() if "Processes" in question else ask(self, question, *rest)


def test_how_busy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert monitor(monkeypatch, nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=37, memory=2)).busy() == 37
    assert monitor(monkeypatch, nvmlDeviceGetUtilizationRates=FakeNVMLError).busy() == 0


def test_a_falling_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(monkeypatch)
    assert made.disturbance(State(1980), State(1900)) == ""
    assert made.disturbance(State(1980), State(1410)) == "the clock fell from 1980 to 1410 MHz"
    assert made.disturbance(State(345), State(1980)) == ""  # idle before
