"""One CUDA device: where work is launched, captured and replayed, and how images get there and back.

All computing on a device runs on one side stream and under one lock, whichever model and thread it is for: that is what
lets every graph share one memory pool. A replay overwrites what another graph of the pool computed, so its results are
copied out before the lock is let go. Copies from and to host memory go through pinned memory on streams of their own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tinysr_kernels.runtime.device.engine import Direct, Engine, Holder, Outputs, Step, Work


@dataclass(frozen=True)
class CudaGraph:
    """A captured step with the tensors it reads and writes, all in the pool."""

    graph: torch.cuda.CUDAGraph
    inputs: Outputs
    outputs: Outputs


class CudaEngine:
    """`engine.Engine` by torch.cuda. device: with an index."""

    can_capture = True
    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self.users: weakref.WeakSet[Holder] = weakref.WeakSet()
        self._stream = _side_stream(device)
        self._copy_streams: list[torch.cuda.Stream] = []
        self._pool: Any = None
        self._keeper: CudaGraph | None = None

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Inside, work goes to the side stream, after what the caller's stream holds and before what it gets later."""
        caller, stream = torch.cuda.current_stream(self.device), self._stream
        with torch.cuda.device(self.device):
            if caller == stream:  # a step inside another
                yield
                return
            stream.wait_stream(caller)
            try:
                # Also puts the caller's stream back in place where a failed capture has not.
                with torch.cuda.stream(stream):
                    yield
            finally:
                caller.wait_stream(stream)

    def plain(self, step: Step, inputs: Sequence[Tensor]) -> Outputs:
        with self._computing():
            outputs = step(*inputs)
        caller = torch.cuda.current_stream(self.device)
        for t in outputs:  # allocated on the side stream: not to be used again there while the caller's reads it
            t.record_stream(caller)
        return outputs

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> CudaGraph:
        with self._computing():
            # Dense and aligned, as the graph's own: kernels are compiled for their inputs' strides and addresses.
            inputs = tuple(torch.empty_like(t).copy_(t) for t in inputs)
            # Compiles kernels, loads them and allocates the libraries' workspaces, none of which a capture can do.
            step(*inputs)
            try:
                if self._keeper is None:
                    self._open_pool()
                return self._captured(step, inputs)
            except RuntimeError:
                # The failed capture may have left the pool and the stream unusable. Graphs that are held keep theirs.
                self._pool, self._keeper = None, None
                self._stream = _side_stream(self.device)
                raise

    def _open_pool(self) -> None:
        """A pool whose last graph is freed cannot be captured into again: a graph of one launch stays alive in it."""
        torch.zeros(1, device=self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper = self._captured(lambda: (torch.zeros(1, device=self.device),), ())

    def _captured(self, step: Step, inputs: Sequence[Tensor]) -> CudaGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and copy meanwhile; "global" would have that break the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            own = tuple(torch.empty_like(t) for t in inputs)  # inside the pool, which keeps their addresses
            outputs = step(*own)
        return CudaGraph(graph, own, outputs)

    def replay(self, graph: CudaGraph, inputs: Sequence[Tensor], into: Tensor | None) -> Outputs:
        results = [torch.empty_like(t) for t in graph.outputs[0 if into is None else 1 :]]
        results = results if into is None else [into, *results]
        with self._computing():
            for own, given in zip(graph.inputs, inputs, strict=True):
                own.copy_(given, non_blocking=True)
            graph.graph.replay()
            for result, own in zip(results, graph.outputs, strict=True):
                result.copy_(own, non_blocking=True)
        return tuple(results)

    def drop(self, graphs: Iterable[CudaGraph]) -> None:
        self._stream.synchronize()
        for graph in graphs:
            graph.graph.reset()

    def trim(self) -> None:
        self._pool, self._keeper = None, None
        torch.cuda.empty_cache()

    def holds(self, image: Tensor) -> bool:
        return image.device == self.device

    def upload(self, image: Tensor) -> Tensor:
        if image.device.type != "cpu":
            return image.to(self.device, non_blocking=True)
        staged = image if image.is_pinned() else _pinned_like(image).copy_(image)
        # The allocator of pinned memory waits for the copy before it gives the memory to anybody else.
        return staged.to(self.device, non_blocking=True)

    def download(self, outputs: Sequence[Tensor], into: Tensor | None = None) -> Outputs:
        staged = [_pinned_like(t) for t in outputs]
        if into is not None and into.is_pinned():
            staged[0] = into
        for host, t in zip(staged, outputs, strict=True):
            host.copy_(t, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        first, *rest = staged
        if first is not into:  # pinned memory is scarce: results must not hold it
            first = (torch.empty_like(first, pin_memory=False) if into is None else into).copy_(first)
        return (first, *rest)

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        try:
            stream = self._copy_streams.pop()
        except IndexError:
            stream = torch.cuda.Stream(self.device)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._copy_streams.append(stream)

    def bound(self, work: Work) -> Work:
        stream = torch.cuda.current_stream(self.device)

        @functools.wraps(work)
        def bound(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.stream(stream):
                return work(*args, **kwargs)

        return cast(Work, bound)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """PyTorch hands out 32 streams of a priority in turn. With that of copies, work of another thread could land on
    this one after many, and in the middle of a capture.
    """
    return torch.cuda.Stream(device, priority=-1)


def _pinned_like(t: Tensor) -> Tensor:
    """Host memory that the device copies from and to by itself; PyTorch keeps what is freed for the next call."""
    return torch.empty_like(t, device="cpu", pin_memory=True)


_engines: dict[torch.device, Engine] = {}
_engines_lock = threading.Lock()


def engine_for(device: torch.device) -> Engine:
    """The engine of a device: one for all models on a GPU, made at first use."""
    if device.type != "cuda":
        return Direct(device)
    with _engines_lock:
        if device not in _engines:
            _engines[device] = CudaEngine(device)
        return _engines[device]
