"""The exception types of the package. Every message names what was found and states the remedy."""

from __future__ import annotations

from collections.abc import Iterable

MESSAGE_LIMIT = 2000


class TinySRError(Exception):
    """Base class of all errors that the package raises deliberately.

    A message is printable and at most 2,000 characters long, whatever names it quotes: see `shorten`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shorten(message, MESSAGE_LIMIT))


class CheckpointError(TinySRError):
    """A checkpoint cannot be used. The message names the file, the key, what was expected and what was found."""


class InputError(TinySRError, ValueError):
    """An image or argument is not accepted."""


class OutOfMemory(TinySRError, MemoryError):
    """The smallest unit of work does not fit into memory. The message states the needed and the free amount."""


class DeviceError(TinySRError, RuntimeError):
    """A GPU or its driver failed. The message states the driver's words and the remedy."""


class NonFiniteOutput(TinySRError, ArithmeticError):
    """The network's output contains NaN or infinity, also in the widest dtype tried."""


def shorten(text: object, limit: int = 200) -> str:
    """`str(text)` for a message or a terminal, in at most `limit` characters (5 or more).

    What is not printable (control characters, line breaks, changes of the writing direction, unpaired surrogates) is
    escaped as in a Python string. Of a longer text the middle is left out. Never raises.
    """
    try:
        written = str(text)
    except Exception:  # noqa: BLE001  the caller's own __str__, or an int of more digits than Python writes
        written = f"<{type(text).__name__}>"
    if len(written) > 2 * limit:  # it may be megabytes long: escape no more of it than can be shown
        written = written[:limit] + written[-limit:]
    pieces = [c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in written]
    if sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    tail = (limit - 3) // 2
    return _fitting(pieces, limit - 3 - tail) + "..." + _fitting(pieces[::-1], tail, reverse=True)


def _fitting(pieces: Iterable[str], room: int, reverse: bool = False) -> str:
    """As many of the pieces, from the first on, as take at most `room` characters."""
    taken: list[str] = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        taken.append(piece)
    return "".join(reversed(taken) if reverse else taken)
