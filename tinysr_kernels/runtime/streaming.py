"""Ordered background work: frames through a model while others are read and written, packets to an encoder.

Results, errors and notices come in the order of the items. The number of items in flight is bounded.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, TypeVar

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.notices import defer_notices, notice

Item = TypeVar("Item")
Result = TypeVar("Result")
OnError = Literal["raise", "yield"]

Outcome = tuple[Any, Exception | None, list[str]]
"""Of one item: its result or error, and its notices."""


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    ahead: int,
    on_error: OnError = "raise",
    stop: Callable[[], None] | None = None,
) -> Generator[Result | Exception, None, None]:
    """Yield work(item) for all items in order, by `workers` threads with at most `ahead` items in flight.

    The calling thread iterates over the items. on_error: "raise" raises the error of an item in its turn and ends the
    iteration; "yield" yields the error in place of the result and continues. An error of the iterator itself is always
    raised, after the results of the items before it. Closing the generator cancels items that have not started and
    waits for the others; `stop` is called first and may shorten that. Raises InputError at once for invalid arguments.
    """
    if on_error not in ("raise", "yield"):
        raise InputError(f"on_error must be 'raise' or 'yield', found {on_error!r}")
    for name, value in (("workers", workers), ("buffers", ahead)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1, found {value!r}")
    return _in_order(work, items, workers, ahead, on_error, stop)


def _in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    on_error: OnError,
    stop: Callable[[], None] | None,
) -> Generator[Result | Exception, None, None]:
    pending: deque[Future[Outcome]] = deque()
    source_error: Exception | None = None
    source = iter(items)
    more = True
    pool = ThreadPoolExecutor(min(workers, ahead), thread_name_prefix="tinysr")
    try:
        while more or pending:
            while more and len(pending) < ahead:
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                except Exception as error:  # noqa: BLE001  raised below, after the results that precede it
                    more, source_error = False, error
                else:
                    pending.append(pool.submit(contextvars.copy_context().run, _outcome, work, item))
            if pending:
                result, failure, notices = pending.popleft().result()
                for message in notices:
                    notice(message)
                if failure is not None and on_error == "raise":
                    raise failure
                yield result if failure is None else failure
        if source_error is not None:
            raise source_error
    finally:
        if stop is not None:
            stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(work: Callable[[Item], Result], item: Item) -> Outcome:
    with defer_notices() as notices:
        try:
            return work(item), None, notices
        except Exception as error:  # noqa: BLE001  reported in the item's turn
            return None, error, notices


class Stopped(Exception):
    """Work was stopped by whoever asked for it; it has no result."""


class Background:
    """Runs calls one after another in a dedicated thread, with a queue of at most `depth` calls.

    An error of a call is raised by a later `call`, or at the end of the `with` block, which waits for all calls. If the
    block raises, calls that have not started are canceled.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pending: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tinysr")

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Enqueue a call. Blocks while the queue is full. Raises the error of an earlier call."""
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(contextvars.copy_context().run, function, *args))

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
