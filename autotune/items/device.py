"""The interface of a device under tuning. `gpu.py` implements it for a GPU; the tests implement a simulated one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from autotune.items.candidates import Candidate
from autotune.items.cost_model import Built
from autotune.items.results import Failure, Sample
from autotune.items.work import Item, Target
from benchmarks.hardware import Ceilings
from tinysr_kernels.launch.config_file import Facts

Entries = Mapping[str, Mapping[str, Any]]
"""Configurations by operator and bucket."""


class Device(Protocol):
    """A GPU, real or simulated. A candidate that fails is a return value, not an exception."""

    facts: Facts
    ceilings: Ceilings

    def build(self, item: Item, candidates: Sequence[Candidate]) -> list[Built]:
        """Compile ahead of time, several candidates in parallel."""

    def check(self, item: Item, candidate: Candidate, draw: int) -> Failure | None:
        """Run on random inputs and compare with the reference; None if the outputs are correct."""

    def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
        """Take one timing sample."""

    def sample_model(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
        """Take one timing sample of a whole model, with these configurations as overrides.

        pdl: whether with programmatic dependent launches.
        """

    def clock(self) -> float:
        """Seconds since an arbitrary start."""

    def wait(self, seconds: float) -> None:
        """Sleep."""
