"""Timing on GPUs and CPUs.

On a GPU: CUDA events around replays of a CUDA graph of many calls, on rotating inputs that together exceed twice the
L2. Where no graph is possible (eager PyTorch, whole images from the host): events or the host's clock around the work
itself. On a CPU: time.perf_counter. Samples of what is compared are interleaved, and every sample says what disturbed
it. A sample below the physical floor raises `BelowFloor`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.measure.nvml import Monitor, State
from benchmarks.measure.results import Reading, Record, percentiles

UNROLLED = 24
"""Minimum number of calls per graph."""
COPIES = 256
"""Maximum number of input sets."""
READING_MS = 4.0
"""Minimum length of a sample in ms: launching a graph takes the host about 10 us."""
WARM_UP_US = 1e6
"""Work that takes longer (in us) needs one warm-up run only."""


class BelowFloor(RuntimeError):
    """A sample below the physical floor of the hardware: the measurement is wrong."""


@dataclass
class Work:
    """What is timed: run() makes `calls` calls.

    host: by the host's clock, from start to the end of everything that was launched; otherwise the device's own time.
    floor_us: what a call takes at least, 0 where that is not known. keep: stays alive as long as the work.
    """

    run: Callable[[], Any]
    calls: int = 1
    host: bool = False
    floor_us: float = 0.0
    keep: Any = None
    repeats: int = field(default=1, init=False)


@dataclass(frozen=True)
class Sample:
    """Microseconds per call, the disturbance if any, the device's state afterwards. cpu_us: CPU time of the process."""

    us: float
    disturbed: str = ""
    state: State = field(default_factory=State)
    cpu_us: float = 0.0


class Watch(Protocol):
    """Reads a device's state: `nvml.Monitor`, or nothing."""

    def state(self) -> State:
        """The current state."""

    def disturbance(self, before: State, after: State) -> str:
        """The disturbance of a measurement between two states, or an empty string."""


class Unwatched:
    """A CPU."""

    def state(self) -> State:
        return State()

    def disturbance(self, before: State, after: State) -> str:
        return ""


def _monitor(device: torch.device) -> Monitor:
    """NVML's monitor of a GPU on which this process has a context by then."""
    torch.zeros(1, dtype=torch.float32, device=device)
    torch.cuda.synchronize(device)
    return Monitor(str(torch.cuda.get_device_properties(device).uuid))


class Stopwatch:
    """Times work on one device."""

    def __init__(self, device: torch.device, watch: Watch | None = None) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if watch is None:
            watch = _monitor(device) if self.cuda else Unwatched()
        self.watch = watch

    def sample(self, work: Work) -> Sample:
        """One sample. BelowFloor if it is under the work's floor."""
        before = self.watch.state()
        processor = time.process_time()
        us = self._elapsed_us(work) / (work.calls * work.repeats)
        processor = 1e6 * (time.process_time() - processor) / (work.calls * work.repeats)
        after = self.watch.state()
        if us < work.floor_us:
            raise BelowFloor(f"{us:.4g} us a call, where {work.floor_us:.4g} us is the least that is possible")
        return Sample(us, self.watch.disturbance(before, after), after, processor)

    def _elapsed_us(self, work: Work) -> float:
        if not self.cuda or work.host:
            self.synchronize()
            started = time.perf_counter()
            for _ in range(work.repeats):
                work.run()
            self.synchronize()
            return 1e6 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(work.repeats):
            work.run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def warm_up(self, work: Work) -> None:
        """Run a few times, and set the number of repeats per sample."""
        work.repeats = 1
        us = self._elapsed_us(work)  # compiles, and takes memory
        if us < WARM_UP_US:
            us = min(self._elapsed_us(work) for _ in range(2))
        work.repeats = max(math.ceil(1e3 * READING_MS / max(us, 1e-3)), 1)

    def interleaved(
        self, works: Mapping[str, Work], samples: int, until: float = math.inf
    ) -> dict[str, tuple[list[Sample], list[Reading]]]:
        """Interleaved samples of each work, so that drifts of clock and temperature affect all alike.

        until: time.monotonic after which no further round starts; there is at least one round.
        """
        start = _reading("before", self.watch.state())
        for work in works.values():
            self.warm_up(work)
        found: dict[str, list[Sample]] = {name: [] for name in works}
        for i in range(samples):
            if i and time.monotonic() >= until:
                break
            for name, work in works.items():
                found[name].append(self.sample(work))
        end = _reading("after", self.watch.state())
        return {
            name: (several, [start, _reading("during", several[len(several) // 2].state), end])
            for name, several in found.items()
        }


def _reading(when: str, state: State) -> Reading:
    return Reading(when, state.clock, state.memory_clock, round(state.power, 1), state.temperature, state.slowed)


def record(
    key: str,
    labels: Mapping[str, str],
    measured: tuple[list[Sample], list[Reading]],
    work: Work | None = None,
    **values: float,
) -> Record:
    """A record of samples. values: further ones; floor_us and of_floor come from the work."""
    samples, readings = measured
    reasons = [one.disturbed for one in samples]
    found = percentiles([one.us for one in samples], reasons) | values
    if work is not None and work.floor_us:
        found |= {"floor_us": work.floor_us, "of_floor": work.floor_us / found["p50_us"]}
    if samples and samples[0].state == State():  # a CPU: what others take of it shows in the difference
        found["cpu_p50_us"] = percentiles([one.cpu_us for one in samples])["p50_us"]
        readings = []
    return Record(key, dict(labels), [round(one.us, 4) for one in samples], reasons, found, readings)


def captured(runs: Sequence[Callable[[], Any]], least: int = UNROLLED) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of these runs in turn, `least` of them or more, and how many there are in it."""
    for run in runs:  # compiles and loads, which a capture must not
        run()
    torch.cuda.synchronize()
    rounds = math.ceil(least / len(runs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()  # the first replay uploads the graph
    return graph, rounds * len(runs)


def rotation(bytes_each: int, l2_bytes: int) -> int:
    """Number of input sets that together exceed twice the L2, so that each call finds a cold L2."""
    return min(max(math.ceil(2 * l2_bytes / max(bytes_each, 1)), 2), COPIES)


def graphed(runs: Sequence[Callable[[], Any]], least: int = UNROLLED, floor_us: float = 0.0, keep: Any = None) -> Work:
    """The runs as replays of one graph."""
    graph, calls = captured(runs, least)
    return Work(graph.replay, calls, floor_us=floor_us, keep=(graph, runs, keep))


def sequential(runs: Sequence[Callable[[], Any]], floor_us: float = 0.0, keep: Any = None) -> Work:
    """The runs one after another, launched by the host."""

    def run() -> None:
        for one in runs:
            one()

    return Work(run, len(runs), floor_us=floor_us, keep=keep)
