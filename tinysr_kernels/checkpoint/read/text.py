"""How names, shapes and lists from a file nobody has vouched for are written into messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def quoted(value: Any, limit: int = 120) -> str:
    """`repr`, shortened: a hostile key may be megabytes long or hold control characters."""
    written = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return written if len(written) <= limit else written[: limit - 3] + "..."


def shape_text(shape: Sequence[int | None]) -> str:
    """`[O, 48, 3, 3]`-like text; None, meaning any size, is written `any`."""
    return "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"


def listed(values: Iterable[Any], limit: int = 6) -> str:
    """The first few values, quoted, and how many more there are."""
    names = sorted(values, key=str)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(n, 1000) for n in names[:limit]) + more
