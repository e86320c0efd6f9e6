"""Say every lossy step once: messages go to the logger ``tinysr_kernels``, never to ``warnings``.

Without any logging set up Python prints them on stderr; the command line collects them for each file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

logger = logging.getLogger("tinysr_kernels")


_held: ContextVar[list[str] | None] = ContextVar("held", default=None)


def notice(message: str) -> None:
    """Report one lossy or unusual step of the image at hand."""
    held = _held.get()
    if held is None:
        logger.warning(message)
    elif message not in held:
        held.append(message)


@contextmanager
def held() -> Iterator[list[str]]:
    """Notices of the block are kept in the list and not given: for work in the background of another thread.

    Whoever takes the work's result gives them, where they belong.
    """
    messages: list[str] = []
    token = _held.set(messages)
    try:
        yield messages
    finally:
        _held.reset(token)


class _Collector(logging.Handler):
    """Keeps the messages of one thread, each different one once."""

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
def collected() -> Iterator[list[str]]:
    """The notices that this thread gives inside the block, as a list that grows while it runs."""
    collector = _Collector()
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)
