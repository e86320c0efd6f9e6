"""What a device answers, kept apart from everything heavy: processes that only hand answers on start faster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One reading: microseconds a call; disturbed: why it should be taken again; clock: of the GPU, in MHz."""

    us: float
    disturbed: str = ""
    clock: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a candidate is out. kind: "wrong", "error", "crash", "timeout" or "impossible" (faster than can be)."""

    kind: str
    detail: str = ""
