"""The GPUs as a whole, in place of torch.cuda."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.device.fake_cuda import graphs
from tests.runtime.device.fake_cuda.graphs import Capture, CUDAGraph
from tests.runtime.device.fake_cuda.memory import Accesses, HostMemory, Pool
from tests.runtime.device.fake_cuda.streams import NOT_IN_CAPTURE, Event, Fault, Lane, Point, Stream, merge
from tests.runtime.device.fake_cuda.tensors import Watch
from tinysr_kernels.launch import backend
from tinysr_kernels.launch import device as launch_device
from tinysr_kernels.runtime.device import cuda
from tinysr_kernels.runtime.tiles import tiled_inference

STREAMS = 32
"""Streams per device and priority, handed out in turn."""


class Machine:
    """GPUs of `memory` bytes each.

    gets_stuck: as some versions of PyTorch, believe for ever in a capture under way after one failed. pinned: whether
    there is pinned memory. forked: whether this is a process forked after CUDA was initialized. used: bytes taken per
    device, graph pools included, cached memory not.
    """

    def __init__(self, memory: int = 1 << 40) -> None:
        self.capacity = memory
        self.gets_stuck = self.stuck = self.forked = False
        self.pinned = True
        self.faults: list[str] = []
        self.devices = [torch.device("cuda", index) for index in range(2)]
        self.host: dict[Lane, int] = {}
        self.memory = HostMemory()
        self.used = dict.fromkeys(self.devices, 0)
        self.most_used = dict.fromkeys(self.devices, 0)
        self.captures = self.replays = 0
        self.graphs: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()
        self.loaded: set[tuple[str, torch.dtype]] = set()
        self.local = threading.local()
        self.captures_under_way: list[Capture] = []
        self._default = {device: Lane(device, "the default stream") for device in self.devices}
        self._lanes: dict[tuple[torch.device, bool], list[Lane]] = {}
        self._turns: dict[tuple[torch.device, bool], int] = {}
        self.watch = Watch(self)

    # Faults and refusals

    def note(self, text: str) -> None:
        self.faults.append(text)

    def fault(self, text: str) -> Fault:
        self.note(text)
        return Fault(text)

    def capture(self) -> Capture | None:
        """This thread's capture."""
        return getattr(self.local, "capture", None)

    def refuse(self, text: str, capture: Capture | None) -> None:
        """Fail as CUDA does for what a capture forbids, which also breaks the capture."""
        if capture is not None:
            capture.broken = True
        raise torch.AcceleratorError(text)

    def refuse_in_capture(self) -> None:
        if self.capture() is not None:
            self.refuse(NOT_IN_CAPTURE, self.capture())

    # Order

    def begin(self, lane: Lane) -> Point:
        """The point of new work, launched by this thread."""
        if lane.broken:
            raise self.fault(f"{lane} is used after a capture on it failed")
        if lane.capture is not None and lane.capture is not self.capture():
            raise self.fault(f"another thread's work on {lane} becomes part of a capture")
        if self.capture() is not None and lane.capture is None:
            self.refuse(NOT_IN_CAPTURE, self.capture())
        merge(lane.clock, self.host)
        return lane.tick()

    def access(self, lane: Lane, point: Point, memory: Accesses, what: str, writes: bool) -> None:
        overtaken = memory.conflict(lane.clock, writes)
        if overtaken:
            raise self.fault(f"{what} on {lane} may overtake {overtaken}")
        memory.note(point, writes)

    def wait_on_host(self, lane: Lane) -> None:
        self.refuse_in_capture()
        if lane.capture is not None:
            self.refuse(NOT_IN_CAPTURE, lane.capture)
        merge(self.host, lane.clock)

    def synchronize(self, device: Any = None) -> None:
        self.refuse_in_capture()
        at = self.devices[self.index(device)]
        lanes = [lane for (where, _), some in self._lanes.items() if where == at for lane in some]
        for lane in (self._default[at], *lanes):
            self.wait_on_host(lane)

    def load(self, name: str, dtype: torch.dtype, capture: Capture | None) -> None:
        """Load a kernel, which a capture forbids."""
        if capture is not None and (name, dtype) not in self.loaded:
            self.refuse(NOT_IN_CAPTURE, capture)
        self.loaded.add((name, dtype))

    # Memory

    def take(self, device: torch.device, nbytes: int) -> None:
        if self.used[device] + nbytes > self.capacity:
            mebibytes = f"{nbytes / 2**20:.2f} MiB"
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {mebibytes}. GPU {device.index}")
        self.used[device] += nbytes
        self.most_used[device] = max(self.most_used[device], self.used[device])

    def allocate_pinned(self) -> None:
        self.refuse_in_capture()
        if not self.pinned:
            raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    # Devices and streams

    def thread(self) -> int:
        return threading.get_ident()

    def index(self, device: Any) -> int:
        if device is None:
            return getattr(self.local, "device", 0)
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return getattr(self.local, "device", 0) if index is None else index

    def default_lane(self, device: torch.device) -> Lane:
        return self._default[device]

    def next_lane(self, index: int, priority: int) -> Lane:
        key = self.devices[index], priority < 0
        lanes = self._lanes.setdefault(key, [])
        turn = self._turns[key] = self._turns.get(key, -1) + 1
        if turn < STREAMS:
            lanes.append(Lane(key[0], f"{'high-priority ' if key[1] else ''}stream {turn}"))
        return lanes[turn % STREAMS]

    def _streams(self) -> dict[torch.device, Stream]:
        if not hasattr(self.local, "streams"):
            self.local.streams = {}
        return self.local.streams

    def current_stream(self, device: Any = None) -> Stream:
        at = self.devices[self.index(device)]
        return self._streams().get(at) or Stream(lane=self._default[at])

    def set_stream(self, stream: Stream) -> None:
        self._streams()[stream.device] = stream
        self.local.device = stream.device.index

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self.index(None)
        self.local.device = self.index(device)
        try:
            yield
        finally:
            self.local.device = before

    @contextlib.contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        index, before = self.index(None), self.current_stream(stream.device)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)
            self.local.device = index

    def is_current_stream_capturing(self) -> bool:
        return self.current_stream().lane.capture is not None

    def record_stream(self, t: Tensor, stream: Stream) -> None:
        if t.device.type != "cuda":
            raise NotImplementedError("Could not run 'aten::record_stream' with arguments from the 'CPU' backend")
        t.block.recorded.add(stream.lane)  # type: ignore[attr-defined]

    def properties(self, device: Any = None) -> Any:
        return SimpleNamespace(
            name="Fake GPU", major=9, minor=0, multi_processor_count=132, total_memory=self.capacity,
            uuid="fake", index=self.index(device),
        )  # fmt: skip

    def lazy_init(self) -> None:
        if self.forked:
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
                "'spawn' start method"
            )

    def replacements(self) -> dict[str, Any]:
        """What stands in torch.cuda while the machine runs."""
        bound = {kind.__name__: type(kind.__name__, (kind,), {"machine": self}) for kind in (Event, CUDAGraph)}
        Stream.machine = self
        Event.machine = self
        return bound | {
            "Stream": Stream,
            "is_available": lambda: not self.forked,
            "is_initialized": lambda: True,
            "_is_in_bad_fork": lambda: self.forked,
            "_lazy_init": self.lazy_init,
            "device_count": lambda: len(self.devices),
            "current_device": lambda: self.index(None),
            "get_device_properties": self.properties,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "Fake GPU",
            "device": self.device,
            "stream": self.stream,
            "set_stream": self.set_stream,
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: Stream(lane=self._default[self.devices[self.index(device)]]),
            "synchronize": self.synchronize,
            "graph": graphs.graph,
            "graph_pool_handle": lambda: Pool(self, self.devices[self.index(None)]),
            "empty_cache": lambda: None,
            "memory_reserved": lambda device=None: self.used[self.devices[self.index(device)]],
            "memory_allocated": lambda device=None: self.used[self.devices[self.index(device)]],
            "mem_get_info": lambda device=None: (
                self.capacity - self.used[self.devices[self.index(device)]], self.capacity,
            ),
            "is_current_stream_capturing": self.is_current_stream_capturing,
        }  # fmt: skip


def captured(graph: CUDAGraph, stream: Stream) -> contextlib.AbstractContextManager[None]:
    """A capture of the caller's own, in a pool of its own."""
    return graphs.graph(graph, pool=torch.cuda.graph_pool_handle(), stream=stream)


@contextlib.contextmanager
def fake_cuda(memory: int = 1 << 40, *, faults: bool = False) -> Iterator[Machine]:
    """Two GPUs while the block runs. faults: whether some are expected; else the block's end fails with the first."""
    torch._C._ensureCUDADeviceGuardSet()
    machine = Machine(memory)
    run = threading.Thread.run

    def watched(thread: threading.Thread) -> None:
        with machine.watch:
            run(thread)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in machine.replacements().items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.Tensor, "record_stream", lambda t, stream: machine.record_stream(t, stream))
        patch.setattr(threading.Thread, "run", watched)
        patch.setattr(cuda, "_engines", {})
        caches = [launch_device._properties, backend._capability, tiled_inference.window_weights]
        caches.append(tiled_inference._ramp_window)
        try:
            with machine.watch:
                yield machine
        finally:
            for cache in caches:
                cache.cache_clear()
    assert faults or not machine.faults, machine.faults[0]
