"""How work is timed: samples alternate, are divided by calls, marked if disturbed, rejected below the floor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.measure import timing
from benchmarks.measure.nvml import State
from benchmarks.measure.timing import BelowFloor, Stopwatch, Work, captured, record, rotation, sequential

CPU = torch.device("cpu")


class Throttled:
    """A monitor whose GPU is throttled after some queries."""

    def __init__(self, cool: int = 1000) -> None:
        self.queries = 0
        self.cool = cool

    def state(self) -> State:
        self.queries += 1
        return State(1980, "" if self.queries <= self.cool else "thermal slowdown", power=650.5, temperature=61)

    def disturbance(self, before: State, after: State) -> str:
        return before.slowed or after.slowed


def test_samples_alternate_and_are_per_call() -> None:
    order: list[str] = []
    watch = Stopwatch(CPU)
    works = {
        "slow": Work(lambda: (order.append("slow"), time.sleep(0.008)), calls=4),
        "slower": sequential([lambda: (order.append("slower"), time.sleep(0.006))] * 2),
    }
    found = watch.interleaved(works, 3)
    assert order[-9:] == ["slow", "slower", "slower"] * 3
    for name, least in (("slow", 2000), ("slower", 6000)):
        samples, readings = found[name]
        assert [one.us >= least for one in samples] == [True] * 3
        assert [one.when for one in readings] == ["before", "during", "after"]


def test_short_work_is_repeated_until_a_sample_is_long_enough() -> None:
    long, short = Work(lambda: time.sleep(0.0005)), Work(lambda: None)
    for work in (long, short):
        Stopwatch(CPU).warm_up(work)
    assert 1 <= long.repeats <= 1e3 * timing.READING_MS / 500  # the fewer, the longer a busy machine sleeps
    assert short.repeats > 100


def test_one_round_is_run_even_after_the_deadline() -> None:
    found = Stopwatch(CPU).interleaved({"a": Work(lambda: None)}, 50, until=time.monotonic() - 1)
    assert len(found["a"][0]) == 1


def test_a_sample_below_the_floor_is_an_error() -> None:
    work = Work(lambda: time.sleep(0.001), floor_us=1e6)
    with pytest.raises(BelowFloor, match="the least that is possible"):
        Stopwatch(CPU).interleaved({"a": work}, 1)


def test_throttled_samples_are_marked() -> None:
    work = Work(lambda: time.sleep(0.001))
    found = Stopwatch(CPU, Throttled(cool=7)).interleaved({"a": work}, 5)  # one look before all, two a sample
    made = record("a", {}, found["a"], work)
    assert made.disturbed == ["", "", "", "thermal slowdown", "thermal slowdown"]
    assert made.values["disturbed"] == 2
    assert (made.readings[0].clock_mhz, made.readings[0].power_w, made.readings[0].temperature_c) == (1980, 650.5, 61)
    assert made.readings[-1].slowed == "thermal slowdown"


def test_a_record_has_the_ratio_to_the_floor() -> None:
    work = Work(lambda: time.sleep(0.002), floor_us=1.0)
    made = record("a", {"x": "y"}, Stopwatch(CPU).interleaved({"a": work}, 3)["a"], work, flops=5.0)
    assert made.values["of_floor"] == pytest.approx(1 / made.values["p50_us"])
    assert made.values["cpu_p50_us"] < made.values["p50_us"]
    assert made.values["flops"] == 5.0
    assert made.readings == []


def test_rotating_inputs_exceed_twice_the_l2() -> None:
    assert rotation(1 << 20, 50 << 20) == 100
    assert rotation(1 << 30, 50 << 20) == 2
    assert rotation(16, 50 << 20) == timing.COPIES


def test_a_graph_holds_complete_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    inside: list[int] = []

    class Graph:
        def replay(self) -> None:
            ran.append("replay")

    @contextlib.contextmanager
    def graph(_: Graph) -> Iterator[None]:
        before = len(ran)
        yield
        inside.append(len(ran) - before)

    for name, value in (("CUDAGraph", Graph), ("graph", graph), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    _, calls = captured([lambda: ran.append("a"), lambda: ran.append("b"), lambda: ran.append("c")], least=7)
    assert ran[:3] == ["a", "b", "c"]  # once before the capture
    assert calls == 9 == inside[0]
    assert ran[-1] == "replay"
