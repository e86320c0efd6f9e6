"""What several threads ask of one network at once, put together: images of one shape become one batch.

While one batch is being computed, requests gather for the next; with nobody else asking, a request runs alone and at
once. The kernels give every image of a batch the bits that they give it alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinysr_kernels.runtime.notices import held, notice


class Stopped(Exception):
    """The run has been broken off; nothing more is computed."""


@dataclass(eq=False)
class _Request:
    images: Tensor
    result: Tensor | None = None
    error: BaseException | None = None
    notices: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def fits(self, other: _Request) -> bool:
        """Whether both can be in one batch."""
        a, b = self.images, other.images
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


class Gatherer:
    """Stands for `enlarge` where several threads call it.

    pixels: of the images that are put together, at most. turns: batches under way at once; with two, the copies of one
    go on while the other is computed.
    """

    def __init__(self, enlarge: Callable[..., Tensor], pixels: int, turns: int = 2) -> None:
        self.takes_bytes = getattr(enlarge, "takes_bytes", False)
        self._enlarge = enlarge
        self._pixels = pixels
        self._turns = threading.Semaphore(turns)
        self._lock = threading.Lock()
        self._waiting: list[_Request] = []
        self._stopped = False

    def __call__(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """As `enlarge`: [N,3,H,W] -> [N,3,s*H,s*W]. Raises what it raises for these very images; Stopped."""
        own = _Request(images)
        with self._lock:
            self._waiting.append(own)
        with self._turns:
            group = self._take(own)
            if group:
                self._run(group)
        own.done.wait()
        for message in own.notices:
            notice(message)
        if own.error is not None:
            raise own.error
        assert own.result is not None
        return own.result if out is None else out.copy_(own.result)

    def stop(self) -> None:
        """Let every request that has not begun fail with Stopped."""
        self._stopped = True

    def _take(self, own: _Request) -> list[_Request]:
        """The batch to run now: the thread's own request and what fits to it; nothing if it has been taken already."""
        with self._lock:
            if own not in self._waiting:
                return []
            fitting = [own, *(other for other in self._waiting if other is not own and other.fits(own))]
            most = min(len(fitting), max(self._pixels // _pixels(own), 1))
            group = fitting[: 1 << (most.bit_length() - 1)]  # powers of two: batches come in few shapes
            self._waiting = [request for request in self._waiting if request not in group]
        return group

    def _run(self, group: list[_Request]) -> None:
        images = [request.images for request in group]
        try:
            with held() as notices:
                if self._stopped:
                    raise Stopped("the run was broken off")
                results = self._enlarge(images[0] if len(images) == 1 else torch.cat(images))
        except BaseException as error:  # noqa: BLE001  it is raised in the threads that asked
            if len(group) > 1:  # it belongs to one of them; the others have their results
                for request in group:
                    self._run([request])
            else:
                group[0].error = error
                group[0].done.set()
            return
        for request, result in zip(group, results.split([len(r.images) for r in group]), strict=True):
            request.result, request.notices = result, notices
            request.done.set()


def _pixels(request: _Request) -> int:
    """Low-resolution pixels, at least 1."""
    count, _, height, width = request.images.shape
    return max(count * height * width, 1)


class Room:
    """An amount that threads share: each waits until what it needs is left, or until it is alone."""

    def __init__(self, amount: int) -> None:
        self._amount = amount
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Inside, the amount is in use."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + amount <= self._amount)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()
