"""The CUDA graphs of one model: what is captured, kept, replayed and dropped. Written against `Engine`, not CUDA.

A step is a function of tensors whose shapes stay the same from call to call: the whole way of an image of one size, or
the network on a tile. It launches work and reads nothing back. The first call of a step launches plainly, the second
captures it, so that sizes which occur once cost no capture; later calls replay. At most `limit` graphs are kept, the
least recently used goes first, and a step whose graph was dropped must occur twice as often before it is captured
again: more sizes in turn than graphs cost little more than plain launches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.runtime.device.engine import Engine, Outputs, Step
from tinysr_kernels.runtime.notices import notice

REMEMBERED = 256
"""Steps whose calls are counted; of more, the longest unused are forgotten."""
FIRST_CAPTURE = 2
"""The call of a step that captures it."""


@dataclass
class _Count:
    """Calls of a step since it was last captured or dropped, and the call that is to capture it."""

    calls: int = 0
    wanted: float = FIRST_CAPTURE


@dataclass
class Statistics:
    """fallbacks: captures that failed, whose steps are launched plainly from then on."""

    captures: int = 0
    replays: int = 0
    dropped: int = 0
    fallbacks: int = 0


Key = tuple[Hashable, ...]


@dataclass(eq=False)
class Graphs:
    """The graphs of one model on one device. `run` may be called by several threads; one at a time is served.

    limit: how many are kept at most; 0 launches everything plainly.
    """

    engine: Engine
    limit: int
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self._held: OrderedDict[Key, Any] = OrderedDict()
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
        into: Tensor | None = None,
        now: bool = False,
        any_layout: bool = False,
    ) -> Outputs:
        """step(*inputs), by its graph where there is one. A step may run others.

        name: what the step computes besides its inputs (the part, the dtype). into: where its first output goes.
        now: capture at the first call already. any_layout: the step gives the same for inputs of any strides, so that
        one graph serves all. Raises what the step raises.
        """
        with self.engine.lock:
            if self._capturing:  # a step inside the one that is being captured: part of its graph
                return step(*inputs)
            key = _key(name, inputs, any_layout)
            graph = self._graph(key, step, inputs, now)
            if graph is not None:
                self.statistics.replays += 1
                return self.engine.replay(graph, inputs, into)
            try:
                first, *rest = self.engine.plain(step, inputs)
            except torch.OutOfMemoryError:  # the next attempt is no second call
                self._counts.pop(key, None)
                raise
            return (first if into is None else into.copy_(first), *rest)

    def clear(self) -> None:
        """Drop every graph. They are captured again when their steps have occurred often enough."""
        with self.engine.lock:
            for key in list(self._held):
                self._drop(key)

    def _graph(self, key: Key, step: Step, inputs: Sequence[Tensor], now: bool) -> Any:
        """The graph of the step, captured if it is time, or None."""
        if not self.limit or not self.engine.can_capture:
            return None
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        count = self._counts.setdefault(key, _Count())
        self._counts.move_to_end(key)
        while len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)
        count.calls += 1
        if count.calls < count.wanted and not (now and count.wanted < math.inf):
            return None
        return self._capture(key, count, step, inputs)

    def _capture(self, key: Key, count: _Count, step: Step, inputs: Sequence[Tensor]) -> Any:
        while len(self._held) >= self.limit:
            self._drop(next(iter(self._held)))
        self._capturing = True
        try:
            self._held[key] = self.engine.capture(step, inputs)
        except torch.OutOfMemoryError:
            # Plain launches may still fit, in the memory that the graphs held; later it may be otherwise.
            self.clear()
            count.calls = 0
            return None
        except RuntimeError as error:
            count.wanted = math.inf
            self.statistics.fallbacks += 1
            if self.statistics.fallbacks == 1:
                reason = str(error).strip().partition("\n")[0]
                notice(f"a CUDA graph could not be captured ({reason}); kernels are launched one by one instead")
            return None
        finally:
            self._capturing = False
        self.statistics.captures += 1
        return self._held[key]

    def _drop(self, key: Key) -> None:
        self.engine.drop([self._held.pop(key)])
        self.statistics.dropped += 1
        count = self._counts.setdefault(key, _Count())
        count.calls, count.wanted = 0, 2 * count.wanted


def _key(name: Hashable, inputs: Sequence[Tensor], any_layout: bool) -> Key:
    return (name, *((t.device, t.dtype, t.shape, None if any_layout else t.stride()) for t in inputs))
