"""The CUDA graphs of one model: an LRU cache of captured steps. Written against `Engine`, not CUDA.

A step is a function of tensors whose shapes repeat from call to call: an image of one size from input to output, or the
network on a tile. It launches work without synchronizing. The first call of a step launches eagerly and the second one
captures it, so that sizes that occur once cost no capture; later calls replay. The cache holds at most `limit` graphs.

Where it is full, a graph makes room only for a step that has been called twice since that graph was last used, and only
while graphs pay: a capture costs about three eager launches. So more sizes than graphs, in turn or at random, keep the
graphs that there are; a change from some sizes to others replaces them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tinysr_kernels.runtime.device.engine import Engine, Outputs, Step
from tinysr_kernels.runtime.device.out_of_memory import is_out_of_memory
from tinysr_kernels.runtime.notices import notice

MAX_COUNTED_STEPS = 256
"""Steps whose calls are counted; beyond that, the least recently used are forgotten."""
FIRST_CAPTURE = 2
"""A new step is captured at this call."""
PAYS = 8
"""Replays for each graph that was evicted, below which no graph is evicted that may be used again."""
STALE = 200
"""A graph that was not used in so many calls of any step is not expected to be used again."""


@dataclass
class _Count:
    """calls: of a step since it was last captured or dropped. capture_at: the number of calls that triggers capture.

    last: when it was last called, in calls of all steps.
    """

    calls: int = 0
    capture_at: float = FIRST_CAPTURE
    last: int = 0


@dataclass
class Statistics:
    """Counters. fallbacks: failed captures, whose steps are launched eagerly from then on."""

    captures: int = 0
    replays: int = 0
    dropped: int = 0
    fallbacks: int = 0


Key = tuple[Hashable, ...]


@dataclass(eq=False)
class Graphs:
    """The graphs of one model on one device. Thread-safe: `run` is serialized by the engine's lock.

    limit: maximum number of graphs; 0 launches everything eagerly.
    """

    engine: Engine
    limit: int
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self._held: OrderedDict[Key, Any] = OrderedDict()
        self._calls = 0
        self._counts: OrderedDict[Key, _Count] = OrderedDict()
        self._capturing = False
        with self.engine.lock:
            self.engine.users.add(self)

    def __len__(self) -> int:
        return len(self._held)

    def run(
        self,
        name: Hashable,
        step: Step,
        *inputs: Tensor,
        out: Tensor | None = None,
        now: bool = False,
        any_layout: bool = False,
    ) -> Outputs:
        """step(*inputs), replayed from its graph if there is one. A step may run others.

        name: identifies the step besides its inputs (the part of the network, the dtype). out: receives the first
        output. now: capture at the first call. any_layout: leave strides out of the cache key, for steps that accept
        any. Raises what the step raises.
        """
        with self.engine.lock:
            if self._capturing:  # nested in a step that is being captured: part of its graph
                return step(*inputs)
            key = _key(name, inputs, any_layout)
            graph = self._graph(key, step, inputs, now)
            if graph is not None:
                self.statistics.replays += 1
                return self.engine.replay(graph, inputs, out)
            try:
                return self.engine.launch(step, inputs, out)
            except Exception as error:
                if is_out_of_memory(error) and key in self._counts:  # do not count a failed call
                    self._counts[key].calls -= 1
                raise

    def clear(self) -> None:
        """Drop all graphs, because memory is short. Their steps must occur twice as often to be captured again."""
        with self.engine.lock:
            for key in list(self._held):
                self._drop(key).capture_at *= 2

    def _graph(self, key: Key, step: Step, inputs: Sequence[Tensor], now: bool) -> Any:
        """The graph of the step, captured now if it is due, or None."""
        if not self.limit:
            return None
        self._calls += 1
        count = self._count(key)
        before, count.last = count.last, self._calls
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if not self.engine.can_capture or count.capture_at == math.inf:
            return None
        count.calls += 1
        if not now and (count.calls < count.capture_at or not self._has_room(before)):
            return None
        return self._capture(key, count, step, inputs)

    def _count(self, key: Key) -> _Count:
        count = self._counts.setdefault(key, _Count())
        self._counts.move_to_end(key)
        while len(self._counts) > MAX_COUNTED_STEPS:
            self._counts.popitem(last=False)
        return count

    def _has_room(self, before: int) -> bool:
        """Whether a step may be captured whose previous call was that one."""
        if len(self._held) < self.limit:
            return True
        oldest = self._counts.get(next(iter(self._held)), _Count()).last
        pays = self.statistics.replays >= PAYS * self.statistics.dropped
        return before > oldest and (pays or self._calls - oldest > STALE)

    def _capture(self, key: Key, count: _Count, step: Step, inputs: Sequence[Tensor]) -> Any:
        while len(self._held) >= self.limit:
            self._drop(next(iter(self._held)))
        self._capturing = True
        try:
            self._held[key] = self.engine.capture(step, inputs)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                # An eager launch may fit into the memory that the graphs held. Retry the capture later.
                self.clear()
                count.calls, count.capture_at = 0, 2 * count.capture_at
                return None
            count.capture_at = math.inf
            self.statistics.fallbacks += 1
            if self.statistics.fallbacks == 1:
                reason = str(error).strip().partition("\n")[0]
                notice(f"CUDA graph capture failed ({reason}); kernels are launched individually instead")
            return None
        finally:
            self._capturing = False
        self.statistics.captures += 1
        return self._held[key]

    def _drop(self, key: Key) -> _Count:
        self.engine.drop([self._held.pop(key)])
        self.statistics.dropped += 1
        count = self._counts.setdefault(key, _Count())
        count.calls = 0
        return count


def _key(name: Hashable, inputs: Sequence[Tensor], any_layout: bool) -> Key:
    return (name, *((t.device, t.dtype, t.shape, None if any_layout else t.stride()) for t in inputs))
