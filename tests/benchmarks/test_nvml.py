"""What is made of the driver's answers, and of none."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.measure import nvml
from benchmarks.measure.nvml import Monitor, State


class Refusal(Exception):
    """What the driver raises."""


class Driver:
    """Stands for the module pynvml on a machine with one GPU."""

    NVMLError = Refusal

    def __init__(self, **answers: Any) -> None:
        self.answers = {
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetComputeRunningProcesses": [],
            "nvmlDeviceGetCurrentClocksEventReasons": 0,
            "nvmlDeviceGetMaxClockInfo": {1: 1980, 2: 3201},
            "nvmlDeviceGetMemoryBusWidth": 6016,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=143771 << 20),
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            **answers,
        }
        self.uuid = ""

    def nvmlInit(self) -> None:
        if self.answers.get("nvmlInit") is Refusal:
            raise Refusal

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        self.uuid = uuid
        return object()

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.10"

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            raise AttributeError(name)

        def ask(handle: object, *arguments: int) -> Any:
            answer = self.answers[name]
            if answer is Refusal:
                raise Refusal
            return answer[arguments[0]] if isinstance(answer, dict) else answer

        return ask


def monitor(patch: pytest.MonkeyPatch, **answers: Any) -> Monitor:
    patch.setattr(nvml, "pynvml", Driver(**answers))
    return Monitor("1234")


def processes(*pids: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid) for pid in pids]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(monkeypatch)
    assert nvml.pynvml.uuid == "GPU-1234"
    limits = made.limits()
    assert limits.pop("memory") == pytest.approx(4.8e12, rel=0.01)  # the H200's, from its clock and bus
    assert limits == {"driver": "570.10", "memory_mib": 143771, "power_limit_w": 700, "clock": 1.98e9}


def test_without_nvml_nothing_is_known_and_nothing_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in (None, Driver(nvmlInit=Refusal)):
        monkeypatch.setattr(nvml, "pynvml", absent)
        made = Monitor("1234")
        assert set(made.limits().values()) == {None}
        assert made.state() == State()
        assert made.disturbance(made.state(), made.state()) == ""


def test_a_driver_that_refuses_single_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(monkeypatch, nvmlDeviceGetEnforcedPowerLimit=Refusal, nvmlDeviceGetMemoryBusWidth=Refusal)
    limits = made.limits()
    assert limits["power_limit_w"] is None
    assert limits["memory"] is None
    assert limits["driver"] == "570.10"


@pytest.mark.parametrize(
    ("bits", "reason"),
    [
        (0x0, ""),
        (0x1, ""),  # idle
        (0x4, ""),  # the power cap is how the card runs
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


def test_the_older_name_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(nvmlDeviceGetCurrentClocksThrottleReasons=0x40)
    del driver.answers["nvmlDeviceGetCurrentClocksEventReasons"]
    monkeypatch.setattr(nvml, "pynvml", driver)
    assert Monitor("1234").state().slowed == "thermal slowdown"


def test_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, its parent and whoever was there before disturb nothing; a newcomer does."""
    made = monitor(monkeypatch, nvmlDeviceGetComputeRunningProcesses=processes(os.getpid(), os.getppid(), 77))
    assert made.known_processes == {77}
    before = made.state()
    assert made.disturbance(before, made.state()) == ""
    nvml.pynvml.answers["nvmlDeviceGetComputeRunningProcesses"] = processes(77, 78)
    assert made.disturbance(before, made.state()) == "another process on the GPU"


def test_how_busy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert monitor(monkeypatch, nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=37, memory=2)).busy() == 37
    assert monitor(monkeypatch, nvmlDeviceGetUtilizationRates=Refusal).busy() == 0


def test_a_falling_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    made = monitor(monkeypatch)
    assert made.disturbance(State(1980), State(1900)) == ""
    assert made.disturbance(State(1980), State(1410)) == "the clock fell from 1980 to 1410 MHz"
    assert made.disturbance(State(345), State(1980)) == ""  # idle before
