"""An engine without CUDA that records its calls and overwrites graph memory as a shared pool does."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.runtime.device.engine import Outputs, Step, into_out
from tinysr_kernels.runtime.device.graphs import Graphs
from tinysr_kernels.runtime.device.out_of_memory import is_out_of_memory


@dataclass(eq=False)
class Recorded:
    """A captured step. Replay runs it again on its static inputs."""

    step: Step
    inputs: Outputs
    outputs: Outputs
    alive: bool = True

    def overwrite(self) -> None:
        """Fill the memory of this graph with garbage, as the replay of another graph in the pool may do."""
        for t in (*self.inputs, *self.outputs):
            t.fill_(float("nan") if t.is_floating_point() else 93 % 2 if t.dtype == torch.bool else 93)


class Recorder:
    """`engine.Engine` on the CPU. events: the calls in order. failures: errors to raise in the next captures.

    separate: images in host memory are not on the device and have to be copied.
    """

    overlaps = True

    def __init__(self, separate: bool = False) -> None:
        self.separate = separate
        self.uploaded: list[Tensor] = []
        self.device = torch.device("cpu")
        self.can_capture = True
        self.lock = threading.RLock()
        self.users: weakref.WeakSet[Graphs] = weakref.WeakSet()
        self.events: list[str] = []
        self.failures: list[Exception] = []
        self.graphs: list[Recorded] = []
        self.copying = 0
        self.most_copying = 0
        self._count = threading.Lock()

    def count(self, event: str) -> int:
        return self.events.count(event)

    def check(self) -> None:
        """Every call is served."""

    def launch(self, step: Step, inputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        self.events.append("launch")
        return into_out(step(*inputs), out)

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Recorded:
        self.events.append("warm-up")
        step(*inputs)
        if self.failures:
            self.events.append("failed")
            error = self.failures.pop(0)
            self.can_capture = is_out_of_memory(error)
            raise error
        self.events.append("capture")
        own = tuple(torch.zeros_like(t) for t in inputs)
        graph = Recorded(step, own, tuple(t.clone() for t in step(*own)))
        self.graphs.append(graph)
        return graph

    def replay(self, graph: Recorded, inputs: Sequence[Tensor], out: Tensor | None) -> Outputs:
        assert graph.alive, "a graph was replayed after it was dropped"
        self.events.append("replay")
        for other in self.graphs:
            if other is not graph:
                other.overwrite()
        for static, t in zip(graph.inputs, inputs, strict=True):
            assert (static.shape, static.dtype) == (t.shape, t.dtype)
            static.copy_(t)
        with self._as_captured():
            results = graph.step(*graph.inputs)
        for static, result in zip(graph.outputs, results, strict=True):
            static.copy_(result)
        first, *rest = (t.clone() for t in graph.outputs)
        return (first if out is None else out.copy_(first), *rest)

    @contextlib.contextmanager
    def _as_captured(self) -> Iterator[None]:
        """Nested steps belong to the captured graph and are not steps of their own."""
        users = list(self.users)
        for user in users:
            user._capturing = True
        try:
            yield
        finally:
            for user in users:
                user._capturing = False

    def drop(self, graphs: Iterable[Recorded]) -> None:
        for graph in graphs:
            self.events.append("drop")
            graph.alive = False
            self.graphs.remove(graph)

    def trim(self) -> None:
        self.events.append("trim")
        assert not self.graphs

    def holds(self, image: Tensor) -> bool:
        return not self.separate or any(image is t for t in self.uploaded)

    def upload(self, image: Tensor) -> Tensor:
        self.uploaded.append(image.clone())
        return self.uploaded[-1]

    def download(self, outputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        first, *rest = (t.clone() for t in outputs)
        return (first if out is None else out.copy_(first), *rest)

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        with self._count:
            self.copying += 1
            self.most_copying = max(self.most_copying, self.copying)
        try:
            yield
        finally:
            with self._count:
                self.copying -= 1

    def bound(self, work: Any) -> Any:
        self.events.append("bound")
        return work
