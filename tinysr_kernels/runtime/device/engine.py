"""The interface through which the runtime uses a device, and the eager implementation for the CPU."""

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
"""Launches work on tensors without synchronizing; the work depends only on shapes, dtypes and strides."""
Work = TypeVar("Work", bound=Callable[..., Any])


class GraphHolder(Protocol):
    """An owner of graphs captured on a device."""

    def __len__(self) -> int: ...

    def clear(self) -> None:
        """Drop all graphs."""


class Engine(Protocol):
    """A device as the runtime uses it. Hold `lock` to call `launch`, `capture`, `replay`, `drop` and `trim`.

    Work is stream-ordered with what the calling thread enqueued before and enqueues afterwards. can_capture: whether
    steps can be captured, which a failed capture ends for the device. overlaps: whether copies of one thread overlap
    the work of another. users: the graph holders.
    """

    device: torch.device
    can_capture: bool
    overlaps: bool
    users: weakref.WeakSet[GraphHolder]

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the device. Reentrant, because a step may run other steps."""

    def check(self) -> None:
        """Refuse a call before it touches the device: InputError while the caller captures a CUDA graph, DeviceError
        in a process forked after the device was used. Takes no lock, which a fork may have left held.
        """

    def launch(self, step: Step, inputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        """Launch the work of the step eagerly. out: receives the first output."""

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Any:
        """Run the step once as warm-up, then capture it on static inputs. Raises RuntimeError if capture fails."""

    def replay(self, graph: Any, inputs: Sequence[Tensor], out: Tensor | None) -> Outputs:
        """Copy to the static inputs, replay, and copy the outputs: the first to `out` if given, else to new tensors."""

    def drop(self, graphs: Iterable[Any]) -> None:
        """Free captured graphs."""

    def trim(self) -> None:
        """Return unused memory to the device. Call it only when no graph is held."""

    def holds(self, image: Tensor) -> bool:
        """Whether the tensor is on this device."""

    def upload(self, image: Tensor) -> Tensor:
        """Copy a tensor to this device."""

    def download(self, outputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        """Copy the outputs to host memory, the first to `out` if given. Synchronizes with the current stream only."""

    def copies(self) -> AbstractContextManager[Any]:
        """Inside the block, copies of this thread overlap the work of other threads."""

    def bound(self, work: Work) -> Work:
        """Wrap a function for other threads, so that its work is stream-ordered with what this thread enqueued."""


def into_out(outputs: Outputs, out: Tensor | None) -> Outputs:
    """The outputs, the first copied to `out` if given."""
    first, *rest = outputs
    return outputs if out is None or first is out else (out.copy_(first), *rest)


class EagerEngine:
    """The engine of devices without streams and graphs (CPU, meta): work runs synchronously."""

    can_capture = False
    overlaps = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock: AbstractContextManager[Any] = contextlib.nullcontext()
        self.users: weakref.WeakSet[GraphHolder] = weakref.WeakSet()

    def check(self) -> None:
        """No-op: nothing is captured, and a forked process may go on."""

    def launch(self, step: Step, inputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        return into_out(step(*inputs), out)

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Any:
        raise RuntimeError(f"{self.device} does not support CUDA graphs")

    def replay(self, graph: Any, inputs: Sequence[Tensor], out: Tensor | None) -> Outputs:
        raise RuntimeError(f"{self.device} does not support CUDA graphs")

    def drop(self, graphs: Iterable[Any]) -> None:
        """No-op: there are no graphs."""

    def trim(self) -> None:
        """No-op: no memory is cached."""

    def holds(self, image: Tensor) -> bool:
        return image.device == self.device

    def upload(self, image: Tensor) -> Tensor:
        return image.to(self.device)

    def download(self, outputs: Sequence[Tensor], out: Tensor | None = None) -> Outputs:
        first, *rest = (t if t.is_meta else t.cpu() for t in outputs)
        return (first if out is None else out.copy_(first), *rest)

    def copies(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def bound(self, work: Work) -> Work:
        return work


def free_graphs(engine: Engine) -> bool:
    """Drop the graphs of all models on the device and free their memory. Returns whether there were any."""
    with engine.lock:
        holders = [user for user in engine.users if len(user)]
        for user in holders:
            user.clear()
        engine.trim()
    return bool(holders)
