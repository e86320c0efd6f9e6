"""A device as the runtime uses it, and the simplest one: everything runs where and when it is called."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Step = Callable[..., Outputs]
"""Launches work on tensors and reads nothing back; always the same work for the same shapes, dtypes and strides."""
Work = TypeVar("Work", bound=Callable[..., Any])


class Holder(Protocol):
    """Who keeps graphs that were captured on a device."""

    def __len__(self) -> int: ...

    def clear(self) -> None:
        """Drop them."""


class Engine(Protocol):
    """A device as the runtime uses it. `plain`, `capture`, `replay`, `drop` and `trim` are called with `lock` held.

    Work is in order with what the calling thread has enqueued so far and will enqueue. can_capture: whether there are
    graphs; overlaps: whether copies for one thread go on beside the work for another.
    """

    device: torch.device
    can_capture: bool
    overlaps: bool
    users: weakref.WeakSet[Holder]

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Reentrant: a step may run steps."""

    def plain(self, step: Step, inputs: Sequence[Tensor]) -> Outputs:
        """Launch the step's work."""

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Any:
        """Run the step once, then capture it on inputs of its own. RuntimeError where that is impossible."""

    def replay(self, graph: Any, inputs: Sequence[Tensor], into: Tensor | None) -> Outputs:
        """Copy the inputs in, replay, and copy out: the first output to `into` if given, else all to new tensors."""

    def drop(self, graphs: Iterable[Any]) -> None:
        """Free captured graphs."""

    def trim(self) -> None:
        """Give back memory that nothing uses; no graph is held."""

    def holds(self, image: Tensor) -> bool:
        """Whether the tensor lies on this device."""

    def upload(self, image: Tensor) -> Tensor:
        """A tensor from elsewhere, on this device."""

    def download(self, outputs: Sequence[Tensor], into: Tensor | None = None) -> Outputs:
        """The outputs in host memory, whole: the first in `into` if given. Waits for them alone."""

    def copies(self) -> AbstractContextManager[Any]:
        """Inside, this thread's copies run beside the work of others and not between it."""

    def bound(self, work: Work) -> Work:
        """The function as other threads are to call it: in order with what this thread has enqueued."""


class Direct:
    """The engine of devices without graphs and streams (the CPU, meta): everything runs at once, where it is called."""

    can_capture = False
    overlaps = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock: AbstractContextManager[Any] = contextlib.nullcontext()
        self.users: weakref.WeakSet[Holder] = weakref.WeakSet()

    def plain(self, step: Step, inputs: Sequence[Tensor]) -> Outputs:
        return step(*inputs)

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Any:
        raise RuntimeError(f"there are no graphs on {self.device}")

    def replay(self, graph: Any, inputs: Sequence[Tensor], into: Tensor | None) -> Outputs:
        raise RuntimeError(f"there are no graphs on {self.device}")

    def drop(self, graphs: Iterable[Any]) -> None:
        """There are none."""

    def trim(self) -> None:
        """Nothing is kept."""

    def holds(self, image: Tensor) -> bool:
        return image.device == self.device

    def upload(self, image: Tensor) -> Tensor:
        return image.to(self.device)

    def download(self, outputs: Sequence[Tensor], into: Tensor | None = None) -> Outputs:
        first, *rest = (t if t.is_meta else t.cpu() for t in outputs)
        return (first if into is None else into.copy_(first), *rest)

    def copies(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def bound(self, work: Work) -> Work:
        return work


def make_room(engine: Engine) -> bool:
    """Drop the graphs of every model on the device and give their memory back; whether there were any."""
    with engine.lock:
        holding = [user for user in engine.users if len(user)]
        for user in holding:
            user.clear()
        engine.trim()
    return bool(holding)
