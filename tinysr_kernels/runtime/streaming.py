"""Work in the background, in order: frames through a model while others are read and written, packets to an encoder.

Results come in the order of what went in, errors and notices at the turn of the item they belong to, and never more
than a fixed number of items is under way.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, TypeVar

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.notices import held, notice

Item = TypeVar("Item")
Result = TypeVar("Result")
OnError = Literal["raise", "yield"]

Outcome = tuple[Any, Exception | None, list[str]]
"""What an item's work gave: a result or an error, and its notices."""


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    ahead: int,
    on_error: OnError = "raise",
    stop: Callable[[], None] | None = None,
) -> Generator[Result | Exception, None, None]:
    """work(item) for every item, in order, by `workers` threads, `ahead` items under way at once.

    on_error: "raise" ends the iteration with an item's error at its turn; "yield" gives the error in its place and goes
    on. The items are taken by the calling thread; if taking them fails, that error comes after the results of those
    before it, whatever on_error says. Closing the generator drops what has not begun and waits for the rest, which
    `stop` may make shorter: it is called before. Raises InputError at once for arguments that make no sense.
    """
    if on_error not in ("raise", "yield"):
        raise InputError(f"on_error must be 'raise' or 'yield', found {on_error!r}")
    for name, value in (("workers", workers), ("buffers", ahead)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, found {value!r}")
    return _in_order(work, items, workers, ahead, on_error, stop)


def _in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    on_error: OnError,
    stop: Callable[[], None] | None,
) -> Generator[Result | Exception, None, None]:
    waiting: deque[Future[Outcome]] = deque()
    broken: Exception | None = None
    source = iter(items)
    more = True
    pool = ThreadPoolExecutor(min(workers, ahead), thread_name_prefix="tinysr")
    try:
        while more or waiting:
            while more and len(waiting) < ahead:
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                except Exception as error:  # noqa: BLE001  it is raised below, after the results that precede it
                    more, broken = False, error
                else:
                    waiting.append(pool.submit(contextvars.copy_context().run, _outcome, work, item))
            if waiting:
                result, failure, notices = waiting.popleft().result()
                for message in notices:
                    notice(message)
                if failure is not None and on_error == "raise":
                    raise failure
                yield result if failure is None else failure
        if broken is not None:
            raise broken
    finally:
        if stop is not None:
            stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(work: Callable[[Item], Result], item: Item) -> Outcome:
    with held() as notices:
        try:
            return work(item), None, notices
        except Exception as error:  # noqa: BLE001  it belongs to the item and is raised where its result is taken
            return None, error, notices


class Background:
    """Calls functions one after another in a thread of its own, at most `depth` of them waiting.

    An error comes out of a later `call` or of the end of the `with` block, which waits for all calls; leaving the block
    by an error drops the calls that have not begun.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._waiting: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tinysr")

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call the function later. Waits while too many wait already."""
        while len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(contextvars.copy_context().run, function, *args))

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
