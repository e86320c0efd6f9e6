"""What the search asks of a device. A GPU answers through `gpu.py`; the tests put a simulated one in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from autotune.items.answers import Failure, Sample
from autotune.items.candidates import Candidate
from autotune.items.cost_model import Built
from autotune.items.work import Item, Target
from benchmarks.hardware import Ceilings
from tinysr_kernels.launch.config_file import Facts

Entries = Mapping[str, Mapping[str, Any]]
"""Configurations by operation and bucket."""


class Device(Protocol):
    """A GPU, real or not. What goes wrong with a candidate is an answer, not an exception."""

    facts: Facts
    ceilings: Ceilings

    def build(self, item: Item, candidates: Sequence[Candidate]) -> list[Built]:
        """Compile ahead of time, many at once."""

    def check(self, item: Item, candidate: Candidate, draw: int) -> Failure | None:
        """Run on random inputs and compare with the reference; None if it is right."""

    def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
        """Time it once."""

    def whole(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
        """Time a whole model once, with these configurations in place of what is looked up.

        pdl: whether by programmatic dependent launches.
        """

    def clock(self) -> float:
        """Seconds since some moment."""

    def wait(self, seconds: float) -> None:
        """Let time pass."""
