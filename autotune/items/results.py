"""What a device returns: a timing sample or a failure. Imports nothing heavy, so that worker processes start fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One timing sample.

    us: microseconds per call. disturbed: why the sample should be taken again, "" if it is clean. clock: of the GPU's
    multiprocessors, in MHz.
    """

    us: float
    disturbed: str = ""
    clock: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a candidate was eliminated.

    kind: "wrong", "error", "crash", "timeout" or "impossible" (faster than the roofline allows).
    """

    kind: str
    detail: str = ""
