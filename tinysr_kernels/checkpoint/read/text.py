"""How names, shapes and lists from a file nobody has vouched for are written into messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from tinysr_kernels.errors import shorten

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 16
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 1000


def quoted(value: Any, limit: int = 120) -> str:
    """`repr` in at most `limit` printable characters: a hostile key may be megabytes long. Never raises."""
    if isinstance(value, str) and len(value) > 2 * limit:
        value = value[:limit] + value[-limit:]
    try:
        return shorten(repr(value) if isinstance(value, str) else _SHORT.repr(value), limit)
    except Exception:  # noqa: BLE001  a __repr__ of the caller's own, an int of more digits than Python writes
        return f"<{shorten(type(value).__name__, limit)}>"


def shape_text(shape: Sequence[int | None]) -> str:
    """`[O, 48, 3, 3]`-like text; None, meaning any size, is written `any`."""
    return shorten("[" + ", ".join("any" if n is None else str(n) for n in shape) + "]")


def listed(values: Iterable[Any], limit: int = 6) -> str:
    """The first few values, quoted, and how many more there are."""
    names = sorted(values, key=str)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(n, 300) for n in names[:limit]) + more
