"""Notices: one message per lossy or unusual step, sent to the logger ``tinysr_kernels``, never to ``warnings``.

If logging is not configured, Python prints them to stderr. The command line collects them per file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tinysr_kernels.errors import shorten

logger = logging.getLogger("tinysr_kernels")
_deferred: ContextVar[list[str] | None] = ContextVar("deferred", default=None)
_LONGEST = 2000  # characters


def notice(message: str) -> None:
    """Report a lossy or unusual step of the current image.

    What is not printable is escaped, because names and metadata may hold anything.
    """
    message = shorten(message, _LONGEST)
    deferred = _deferred.get()
    if deferred is None:
        logger.warning(message)
    elif message not in deferred:
        deferred.append(message)


@contextmanager
def defer_notices() -> Iterator[list[str]]:
    """Append the notices of the block to the yielded list, without duplicates, instead of logging them.

    For work in a background thread: the thread that consumes the result reports the notices in order.
    """
    messages: list[str] = []
    token = _deferred.set(messages)
    try:
        yield messages
    finally:
        _deferred.reset(token)


class _Collector(logging.Handler):
    """Keeps the messages of one thread, without duplicates."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            message = record.getMessage()
            if message not in self.messages:
                self.messages.append(message)


@contextmanager
def collect_notices() -> Iterator[list[str]]:
    """Yield a list that receives the notices which this thread logs inside the block; they are logged as well."""
    collector = _Collector()
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)
