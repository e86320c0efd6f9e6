"""CUDA graphs: capture records operations and computes nothing; replay computes them on the same memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.runtime.device.fake_cuda.memory import Block, Pool
from tests.runtime.device.fake_cuda.streams import NOT_IN_CAPTURE, Lane, Stream

if TYPE_CHECKING:
    from tests.runtime.device.fake_cuda.machine import Machine


@dataclass
class Operation:
    """A recorded operation on plain tensors: the memory that it reads and writes, and its results."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    reads: list[weakref.ref[Block]]
    writes: list[weakref.ref[Block]]
    results: Any

    def run(self) -> None:
        """Compute again, into the same memory."""
        again = self.function(*self.arguments, **self.keywords)
        for old, new in zip(tensors_in(self.results), tensors_in(again), strict=True):
            if old is not new:
                old.copy_(new)


class Capture:
    """A capture under way on a lane. broken: an operation was refused, so that its end fails too."""

    def __init__(self, lane: Lane, pool: Pool, mode: str, thread: int) -> None:
        self.lane, self.pool, self.mode, self.thread = lane, pool, mode, thread
        self.broken = False
        self.operations: list[Operation] = []
        self.blocks: set[weakref.ref[Block]] = set()
        self.tensors: list[Tensor] = []


class CUDAGraph:
    """In place of torch.cuda.CUDAGraph."""

    machine: Machine

    def __init__(self) -> None:
        self.captured: Capture | None = None

    def replay(self) -> None:
        machine, captured = self.machine, self.captured
        if captured is None:
            raise machine.fault("a graph was replayed that is not captured, or was reset")
        machine.refuse_in_capture()
        lane = machine.current_stream(captured.lane.device).lane
        point = machine.begin(lane)
        machine.access(lane, point, captured.pool.replayed, "replay", writes=True)
        machine.replays += 1
        for other in machine.graphs:
            if other.captured is not None and other is not self and other.captured.pool is captured.pool:
                _spoil(other.captured.tensors)
        for operation in captured.operations:
            for refs, writes in ((operation.reads, False), (operation.writes, True)):
                for ref in refs:
                    block = ref()
                    if block is not None:
                        machine.access(lane, point, block, f"replay of {operation.function}", writes=writes)
                    elif ref not in captured.blocks:
                        raise machine.fault(f"a graph uses memory that was freed ({operation.function})")
            operation.run()

    def reset(self) -> None:
        machine, captured = self.machine, self.captured
        if captured is None:
            return
        machine.refuse_in_capture()
        if captured.pool.replayed.conflict(machine.host, writes=True):
            raise machine.fault("a graph was freed while it may still run")
        self.captured = None
        machine.graphs.discard(self)
        captured.pool.release()

    def __del__(self) -> None:
        if self.captured is not None:
            self.captured.pool.release()


@contextlib.contextmanager
def graph(graph: CUDAGraph, *, pool: Pool, stream: Stream, capture_error_mode: str = "global") -> Iterator[None]:
    """In place of torch.cuda.graph. Where the capture was broken, the current stream stays what it was inside."""
    machine = graph.machine
    lane = stream.lane
    if not pool.usable:
        raise machine.fault("a graph pool is used whose graphs are all freed")
    if lane is machine.default_lane(lane.device):
        raise torch.AcceleratorError("CUDA error: operation not permitted on the legacy default stream")
    before = machine.current_stream(lane.device)
    machine.set_stream(stream)
    capture = lane.capture = machine.local.capture = Capture(lane, pool, capture_error_mode, machine.thread())
    machine.captures_under_way.append(capture)
    pool.opened = True
    pool.graphs += 1
    try:
        yield
    finally:
        lane.capture = machine.local.capture = None
        machine.captures_under_way.remove(capture)
        if capture.broken:
            lane.broken = True
            pool.release()
            machine.stuck = machine.gets_stuck
            raise torch.AcceleratorError(NOT_IN_CAPTURE.replace("not permitted when stream is capturing", "failed"))
        machine.set_stream(before)
    graph.captured = capture
    machine.graphs.add(graph)
    machine.captures += 1
    _spoil(capture.tensors)  # nothing ran: what is there is what was there


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [t for each in tree for t in tensors_in(each)] if isinstance(tree, (list, tuple)) else []


def _spoil(tensors: list[Tensor]) -> None:
    """Overwrite memory as somebody else's results would."""
    for t in tensors:
        t.fill_(float("nan") if t.is_floating_point() else 1 if t.dtype == torch.bool else 93)
