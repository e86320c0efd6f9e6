"""A CUDA device: streams, CUDA graph capture and replay, and copies between host and device.

All work on a device runs on one side stream under one lock, for all models and threads, so that all graphs can share
one memory pool. A replay overwrites memory that other graphs of the pool wrote, so outputs are copied before the lock
is released, into memory of the caller's stream. Copies from and to host memory go through pinned memory on separate
streams.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tinysr_kernels.errors import DeviceError, InputError
from tinysr_kernels.runtime.device.device_error import FORKED, typed_device_error
from tinysr_kernels.runtime.device.engine import EagerEngine, Engine, GraphHolder, Outputs, Step, Work, into_out
from tinysr_kernels.runtime.device.out_of_memory import is_out_of_memory
from tinysr_kernels.runtime.device.staging import Staging


@dataclass(frozen=True)
class CudaGraph:
    """A captured step with its static inputs and outputs, all allocated in the pool."""

    graph: torch.cuda.CUDAGraph
    inputs: Outputs
    outputs: Outputs


class CudaEngine:
    """`engine.Engine` on torch.cuda. device: a CUDA device with an index."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self.users: weakref.WeakSet[GraphHolder] = weakref.WeakSet()
        self.can_capture = True
        self._process = os.getpid()
        self._stream = _side_stream(device)
        self._computes = False
        self._copy_streams: list[torch.cuda.Stream] = []
        self._staging = Staging(device)
        self._pool: Any = None
        self._pool_keeper: CudaGraph | None = None

    def check(self) -> None:
        if os.getpid() != self._process:
            raise DeviceError(FORKED)
        with typed_device_error():  # after an illegal memory access and the like every call of CUDA fails
            capturing = torch.cuda.is_current_stream_capturing()
            with torch.cuda.device(self.device):
                capturing |= torch.cuda.is_current_stream_capturing()
        if capturing:
            raise InputError(
                "a model cannot be called while a CUDA graph is captured: it captures graphs of its own and waits for "
                "the GPU; call it before or after the capture"
            )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Run the block on the side stream, ordered after the caller's earlier work and before its later work."""
        if self._computes:  # nested in another step
            yield
            return
        caller = torch.cuda.current_stream(self.device)
        if caller == self._stream:
            self._replace_stream()
        stream = self._stream
        with torch.cuda.device(self.device):
            stream.wait_stream(caller)
            self._computes = True
            try:
                # Also restores the caller's stream if a failed capture did not.
                with torch.cuda.stream(stream):
                    yield
            finally:
                self._computes = False
                caller.wait_stream(stream)

    def launch(self, step: Step, inputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        if self._computes:
            return into_out(step(*inputs), out)
        caller = torch.cuda.current_stream(self.device)
        with self._computing():
            outputs = step(*inputs)
            rest = outputs if out is None else outputs[1:]
            # Memory of the side stream must not be reused there while the caller reads it. `record_stream` would see
            # to it, but after a failed capture some versions of PyTorch never free memory with recorded streams.
            with torch.cuda.stream(caller):
                own = [torch.empty_like(t) if self.holds(t) else t for t in rest]
            # The new memory may be in use by what the caller's stream was given before.
            self._stream.wait_stream(caller)
            for result, t in zip(own, rest, strict=True):
                if result is not t:  # parts of large images lie in host memory, which has no streams
                    result.copy_(t, non_blocking=True)
            return tuple(own) if out is None else (out.copy_(outputs[0]), *own)

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> CudaGraph:
        with self._computing():
            # Dense and aligned like the static inputs, because kernels are specialized on strides and alignment. The
            # inputs themselves must live until the caller's stream waits for this one.
            dense = tuple(torch.empty_like(t).copy_(t) for t in inputs)
            # Warm-up: compiles and loads kernels and allocates library workspaces, which is not allowed during capture.
            step(*dense)
            try:
                if self._pool_keeper is None:
                    self._open_pool()
                return self._captured(step, dense)
            except BaseException as error:
                # The failed capture may have left the pool and the stream unusable. Existing graphs keep the old pool.
                self._pool, self._pool_keeper = None, None
                self._replace_stream()
                # Nor is PyTorch's allocator what it was: some versions believe in a capture under way from then on.
                self.can_capture = not isinstance(error, Exception) or is_out_of_memory(error)
                raise

    def _replace_stream(self) -> None:
        """Take another side stream. Graphs replayed on it share memory with those that still run on the old one."""
        old = self._stream
        self._stream = _side_stream(self.device)
        self._stream.wait_stream(old)

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
        if image.device.type != "cpu" or image.is_pinned():
            return image.to(self.device, non_blocking=True)
        uploaded = torch.empty_like(image, device=self.device)
        self._staging.to_device(uploaded, dense_like(uploaded, image))
        return uploaded

    def download(self, outputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        if out is not None and out.is_pinned():
            out.copy_(outputs[0], non_blocking=True)
            rest = self._downloaded(outputs[1:])
            torch.cuda.current_stream(self.device).synchronize()
            return (out, *rest)
        return into_out(self._downloaded(outputs, out), out)

    def _downloaded(self, outputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        """Copies in pageable memory, the first in `out` if its strides allow it: results must not hold pinned memory,
        which is scarce.
        """
        hosts = [torch.empty_like(t, device="cpu") for t in outputs]
        if out is not None and out.stride() == hosts[0].stride():
            hosts[0] = out
        self._staging.to_host([(host, dense_like(host, t)) for host, t in zip(hosts, outputs, strict=True)])
        return tuple(hosts)

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


def dense_like(shape: Tensor, t: Tensor) -> Tensor:
    """t, or a copy of it where it lies, with the strides of `shape`, which are those of a dense tensor."""
    return t if t.stride() == shape.stride() else torch.empty_like(t).copy_(t)


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
