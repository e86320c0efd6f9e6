"""Dynamic batching: requests of several threads for images of equal shape are combined into one batch.

While a batch runs, further requests queue for the next one; a request without company runs alone and at once. The
kernels compute bit-identical results for an image, alone or in a batch.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinysr_kernels.runtime.notices import defer_notices, notice
from tinysr_kernels.runtime.runner import Report
from tinysr_kernels.runtime.streaming import Stopped


@dataclass(eq=False)
class _Request:
    images: Tensor
    progress: Report | None = None
    result: Tensor | None = None
    error: BaseException | None = None
    notices: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def fits(self, other: _Request) -> bool:
        """Whether both can run in one batch: equal shape, dtype and device."""
        a, b = self.images, other.images
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


class MicroBatcher:
    """Replaces `enlarge` when several threads call it.

    enlarge: the network; one with a parameter `progress` can be stopped, and is reported on, between its tiles.
    max_pixels: low-resolution pixels per batch. max_in_flight: batches that run concurrently; with two, the copies of
    one overlap the computation of the other.
    """

    def __init__(self, enlarge: Callable[..., Tensor], max_pixels: int, max_in_flight: int = 2) -> None:
        self.takes_bytes = getattr(enlarge, "takes_bytes", False)
        self._reports = "progress" in inspect.signature(enlarge).parameters
        self._enlarge = enlarge
        self._max_pixels = max_pixels
        self._slots = threading.Semaphore(max_in_flight)
        self._lock = threading.Lock()
        self._waiting: list[_Request] = []
        self._stopped = False

    def __call__(self, images: Tensor, out: Tensor | None = None, *, progress: Report | None = None) -> Tensor:
        """Like `enlarge`: [N,3,H,W] -> [N,3,s*H,s*W]. Raises what it raises, and Stopped after `stop`.

        progress: called with (done, total) of the batch that the images are in, maybe by the thread of another request.
        """
        own = _Request(images, progress)
        with self._lock:
            self._waiting.append(own)
        with self._slots:
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
        """Make all requests fail with Stopped: those that have not started at once, the others after their tile."""
        self._stopped = True

    def _take(self, own: _Request) -> list[_Request]:
        """Dequeue the batch to run now: the thread's own request and compatible ones; empty if it was taken already."""
        with self._lock:
            if own not in self._waiting:
                return []
            fitting = [own, *(other for other in self._waiting if other is not own and other.fits(own))]
            most = min(len(fitting), max(self._max_pixels // _pixels(own), 1))
            group = fitting[: 1 << (most.bit_length() - 1)]  # powers of two limit the number of batch shapes
            self._waiting = [request for request in self._waiting if request not in group]
        return group

    def _run(self, group: list[_Request]) -> None:
        images = [request.images for request in group]
        try:
            with defer_notices() as notices:

                def report(done: int, total: int) -> None:
                    if self._stopped:
                        raise Stopped("the run was stopped")
                    for request in group:
                        if request.progress is not None:
                            request.progress(done, total)

                if self._stopped:
                    raise Stopped("the run was stopped")
                batch = images[0] if len(images) == 1 else torch.cat(images)
                results = self._enlarge(batch, progress=report) if self._reports else self._enlarge(batch)
        except BaseException as error:  # noqa: BLE001  re-raised in the requesting threads
            if len(group) > 1:  # one image may cause the error: retry each alone
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
    """Low-resolution pixels of a request, at least 1."""
    count, _, height, width = request.images.shape
    return max(count * height * width, 1)


class Budget:
    """A resource shared by threads: each waits until its amount is available, or until it is the only user."""

    def __init__(self, amount: int) -> None:
        self._amount = amount
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Hold the amount inside the block. Waits until it is available; more than the total is granted alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + amount <= self._amount)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()
