"""Streams and events with vector clocks: what has surely happened before what.

A lane is a CUDA stream proper; several `Stream` objects may stand for one, because PyTorch hands out 32 per priority
round-robin. Work number n of a lane is the point (lane, n). A lane's clock says up to which point of every lane the
work enqueued next on it waits; the host's clock says what the host has waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.runtime.device.fake_cuda.graphs import Capture
    from tests.runtime.device.fake_cuda.machine import Machine

NOT_IN_CAPTURE = "CUDA error: operation not permitted when stream is capturing"
ISOLATION = "CUDA error: dependency created on uncaptured work in another stream"


class Fault(BaseException):
    """What a GPU would do wrong without a word. Not an Exception: nothing in the package may handle it."""


class Lane:
    """A CUDA stream of one device. broken: a capture on it failed, after which PyTorch may allocate on it wrongly."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.name = f"{name} of {device}"
        self.clock: dict[Lane, int] = {}
        self.capture: Capture | None = None
        self.broken = False

    def __repr__(self) -> str:
        return self.name

    def tick(self) -> Point:
        """The point of new work on this lane."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self, self.clock[self]

    def now(self) -> Point:
        """The point of the last work on this lane."""
        return self, self.clock.get(self, 0)


Point = tuple[Lane, int]


def covers(clock: dict[Lane, int], point: Point | None) -> bool:
    """Whether work that waits for the clock comes after the point."""
    return point is None or clock.get(point[0], 0) >= point[1]


def merge(clock: dict[Lane, int], other: dict[Lane, int]) -> None:
    """Wait for another clock too."""
    for lane, number in other.items():
        clock[lane] = max(clock.get(lane, 0), number)


class Stream:
    """In place of torch.cuda.Stream."""

    machine: Machine

    def __init__(self, device: Any = None, priority: int = 0, *, lane: Lane | None = None) -> None:
        self.lane = lane or self.machine.next_lane(self.machine.index(device), priority)
        self.device = self.lane.device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.lane is self.lane

    def __hash__(self) -> int:
        return hash(self.lane)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        if event.capture is not self.lane.capture:
            # CUDA also refuses to wait for captured work outside, or for other work inside, a capture.
            self.machine.refuse(ISOLATION, self.lane.capture or event.capture)
        merge(self.lane.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.machine.wait_on_host(self.lane)

    def query(self) -> bool:
        self.machine.refuse_in_capture()
        return covers(self.machine.host, self.lane.now())


class Event:
    """In place of torch.cuda.Event."""

    machine: Machine

    def __init__(self, **_: Any) -> None:
        self.clock: dict[Lane, int] = {}
        self.capture: Capture | None = None

    def record(self, stream: Stream | None = None) -> None:
        lane = (stream or self.machine.current_stream()).lane
        self.clock, self.capture = dict(lane.clock), lane.capture

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.machine.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.machine.refuse_in_capture()
        if self.capture is not None:
            self.machine.refuse(NOT_IN_CAPTURE, self.capture)
        merge(self.machine.host, self.clock)

    def query(self) -> bool:
        self.machine.refuse_in_capture()
        return all(covers(self.machine.host, point) for point in self.clock.items())
