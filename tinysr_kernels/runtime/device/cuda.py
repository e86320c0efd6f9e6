"""A CUDA device: streams, CUDA graph capture and replay, and copies between host and device.

All work on a device runs on one side stream under one lock, for all models and threads, so that all graphs can share
one memory pool. A replay overwrites memory that other graphs of the pool wrote, so outputs are copied before the lock
is released. Copies from and to host memory go through pinned memory on separate streams.
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

from tinysr_kernels.runtime.device.engine import EagerEngine, Engine, GraphHolder, Outputs, Step, Work


@dataclass(frozen=True)
class CudaGraph:
    """A captured step with its static inputs and outputs, all allocated in the pool."""

    graph: torch.cuda.CUDAGraph
    inputs: Outputs
    outputs: Outputs


class CudaEngine:
    """`engine.Engine` on torch.cuda. device: a CUDA device with an index."""

    can_capture = True
    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self.users: weakref.WeakSet[GraphHolder] = weakref.WeakSet()
        self._stream = _side_stream(device)
        self._copy_streams: list[torch.cuda.Stream] = []
        self._pool: Any = None
        self._pool_keeper: CudaGraph | None = None

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Run the block on the side stream, ordered after the caller's earlier work and before its later work."""
        caller, stream = torch.cuda.current_stream(self.device), self._stream
        with torch.cuda.device(self.device):
            if caller == stream:  # nested in another step
                yield
                return
            stream.wait_stream(caller)
            try:
                # Also restores the caller's stream if a failed capture did not.
                with torch.cuda.stream(stream):
                    yield
            finally:
                caller.wait_stream(stream)

    def launch(self, step: Step, inputs: Sequence[Tensor]) -> Outputs:
        with self._computing():
            outputs = step(*inputs)
        caller = torch.cuda.current_stream(self.device)
        for t in outputs:  # allocated on the side stream: must not be reused there while the caller reads it
            if self.holds(t):  # parts of large images lie in host memory, which has no streams
                t.record_stream(caller)
        return outputs

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> CudaGraph:
        with self._computing():
            # Dense and aligned like the static inputs, because kernels are specialized on strides and alignment.
            inputs = tuple(torch.empty_like(t).copy_(t) for t in inputs)
            # Warm-up: compiles and loads kernels and allocates library workspaces, which is not allowed during capture.
            step(*inputs)
            try:
                if self._pool_keeper is None:
                    self._open_pool()
                return self._captured(step, inputs)
            except RuntimeError:
                # The failed capture may have left the pool and the stream unusable. Existing graphs keep the old pool.
                self._pool, self._pool_keeper = None, None
                self._stream = _side_stream(self.device)
                raise

    def _open_pool(self) -> None:
        """Create the pool and a one-launch graph in it: a pool is unusable once its last graph is freed."""
        torch.zeros(1, dtype=torch.float32, device=self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_keeper = self._captured(lambda: (torch.zeros(1, dtype=torch.float32, device=self.device),), ())

    def _captured(self, step: Step, inputs: Sequence[Tensor]) -> CudaGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and copy meanwhile, which would fail the capture in "global" mode.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            static = tuple(
                torch.empty_like(t) for t in inputs
            )  # allocated in the pool, so that their addresses stay valid
            outputs = step(*static)
        return CudaGraph(graph, static, outputs)

    def replay(self, graph: CudaGraph, inputs: Sequence[Tensor], out: Tensor | None) -> Outputs:
        results = [torch.empty_like(t) for t in graph.outputs[0 if out is None else 1 :]]
        results = results if out is None else [out, *results]
        with self._computing():
            for static, t in zip(graph.inputs, inputs, strict=True):
                static.copy_(t, non_blocking=True)
            graph.graph.replay()
            for result, static in zip(results, graph.outputs, strict=True):
                result.copy_(static, non_blocking=True)
        return tuple(results)

    def drop(self, graphs: Iterable[CudaGraph]) -> None:
        self._stream.synchronize()
        for graph in graphs:
            graph.graph.reset()

    def trim(self) -> None:
        self._pool, self._pool_keeper = None, None
        torch.cuda.empty_cache()

    def holds(self, image: Tensor) -> bool:
        return image.device == self.device

    def upload(self, image: Tensor) -> Tensor:
        if image.device.type != "cpu":
            return image.to(self.device, non_blocking=True)
        staged = image if image.is_pinned() else _pinned_like(image).copy_(image)
        # PyTorch's pinned-memory allocator does not reuse the buffer before the copy has finished.
        return staged.to(self.device, non_blocking=True)

    def download(self, outputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        staged = [_pinned_like(t) for t in outputs]
        if out is not None and out.is_pinned():
            staged[0] = out
        for host, t in zip(staged, outputs, strict=True):
            host.copy_(t, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        first, *rest = staged
        if first is not out:  # pinned memory is scarce: results must not hold it
            first = (torch.empty_like(first, pin_memory=False) if out is None else out).copy_(first)
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
    """A high-priority stream. PyTorch assigns streams of a priority round-robin from a pool of 32; at the priority of
    the copy streams, the copies of another thread could end up on this stream in the middle of a capture.
    """
    return torch.cuda.Stream(device, priority=-1)


def _pinned_like(t: Tensor) -> Tensor:
    """An uninitialized tensor in pinned host memory, which PyTorch caches after it is freed."""
    return torch.empty_like(t, device="cpu", pin_memory=True)


_engines: dict[torch.device, Engine] = {}
_engines_lock = threading.Lock()


def engine_for(device: torch.device) -> Engine:
    """The engine of a device. All models on a GPU share one, created on first use."""
    if device.type != "cuda":
        return EagerEngine(device)
    with _engines_lock:
        if device not in _engines:
            _engines[device] = CudaEngine(device)
        return _engines[device]
