"""Predictions of whole networks: every launch with its floor, and totals by part and by kind of launch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.predict.cycles.machines import Machine
from benchmarks.predict.launches import Planned
from benchmarks.predict.model import Prediction
from benchmarks.predict.store import Job

LIBRARY_SHARE = 0.75
"""The part of the floor's rate that a library's kernel is expected to reach. cuBLASLt: 590 to 613 TFLOP/s, measured by
others on an H100 for a GEMM of TinySR's feed-forward size, of 790 for the largest."""
LEAST_FOREIGN_US = 2.0
"""A library's or ATen's kernel takes this long at least."""
SLOW_RATIO, SLOW_US, FEW_SMS, MANY_CONFLICTS, MOST_NARROW = 10, 5.0, 0.5, 4.0, 0.5


@dataclass(frozen=True)
class PredictedLaunch:
    """One launch: its plan, its floor, and its prediction; None for kernels of libraries and ATen, estimated by floor.

    floor_us: as in docs/plan.md.
    """

    planned: Planned
    floor_us: float
    prediction: Prediction | None

    @property
    def us(self) -> float:
        """Predicted, or estimated."""
        return self.prediction.us if self.prediction else max(LEAST_FOREIGN_US, self.floor_us / LIBRARY_SHARE)

    @property
    def limit(self) -> str:
        """What binds; "estimate" where nothing is predicted."""
        return self.prediction.limit if self.prediction else "estimate"

    @property
    def kind(self) -> str:
        """Operator and kernel."""
        return f"{self.planned.op}: {self.planned.kernel}"

    def faults(self, multiprocessors: int) -> list[str]:
        """The rules for fast code that the launch breaks."""
        one, program = self.prediction, self.planned.program
        if one is None or program is None:
            return []
        long = one.us > SLOW_US
        rules = (
            (f"above {SLOW_RATIO}x its floor", long and one.us > SLOW_RATIO * self.floor_us),
            ("grid below half the SMs", long and program.programs < FEW_SMS * multiprocessors),
            (f"bank conflicts above {MANY_CONFLICTS:.0f}-way", long and one.conflicts > MANY_CONFLICTS),
            ("most bytes in units of 1 or 2", long and one.narrow_share > MOST_NARROW),
            ("spills", one.spilled > 0),
        )
        return [name for name, broken in rules if broken]

    def to_json(self) -> dict[str, Any]:
        """The launch as `--json` writes it."""
        one, program = self.prediction, self.planned.program
        return {
            "op": self.planned.op,
            "kernel": self.planned.kernel,
            "part": self.planned.part,
            "output": self.planned.output,
            "grid": program.grid if program else None,
            "config": dict(self.planned.config),
            "floor_us": round(self.floor_us, 3),
            "predicted_us": round(self.us, 3),
            "limit": self.limit,
            "bounds_us": {name: round(us, 3) for name, us in one.bounds_us.items()} if one else {},
            "registers": one.registers if one else None,
            "programs_per_sm": one.programs_per_sm if one else None,
            "instructions_per_warp": round(one.instructions_per_warp, 1) if one else None,
            "ipc": round(one.ipc, 3) if one else None,
        }


@dataclass(frozen=True)
class NetworkPrediction:
    """A network on a GPU, one 128x128 image, from the uint8 image to the uint8 image."""

    family: str
    variant: str
    machine: Machine
    launches: Sequence[PredictedLaunch]

    @property
    def name(self) -> str:
        """Network and GPU."""
        return f"{self.family} {self.variant}, {self.machine.name}"

    @property
    def gap_us(self) -> float:
        """Between dependent launches of a CUDA graph."""
        return 1e6 * self.machine.gap

    def totals(self, launches: Iterable[PredictedLaunch]) -> dict[str, Any]:
        """Launches, floor, predicted time without and with gaps, of some launches; the limits by predicted time."""
        chosen = list(launches)
        us, limits = sum(one.us for one in chosen), defaultdict[str, float](float)
        for one in chosen:
            limits[one.limit] += one.us
        longest = sorted(limits.items(), key=lambda pair: -pair[1])[:3]
        own = [one.prediction for one in chosen if one.prediction]
        return {
            "launches": len(chosen),
            "floor_us": round(sum(one.floor_us for one in chosen), 1),
            "predicted_us": round(us, 1),
            "with_gaps_us": round(us + self.gap_us * len(chosen), 1),
            "limits": {name: round(time / us, 2) for name, time in longest},
            "registers": _range(one.registers for one in own),
            "programs_per_sm": _range(one.programs_per_sm for one in own),
            "ipc": _range(round(one.ipc, 2) for one in own),
        }

    def grouped(self, key: Callable[[PredictedLaunch], str]) -> dict[str, dict[str, Any]]:
        """Totals of the launches with the same key, in order of first occurrence."""
        groups: dict[str, list[PredictedLaunch]] = {}
        for one in self.launches:
            groups.setdefault(key(one), []).append(one)
        return {name: self.totals(launches) for name, launches in groups.items()}

    def faults(self) -> dict[str, int]:
        """How many launches break each rule."""
        found = Counter[str]()
        for one in self.launches:
            found.update(one.faults(self.machine.card.multiprocessors))
        return dict(sorted(found.items()))

    def summary(self) -> dict[str, Any]:
        """What benchmarks/results/predicted-networks.json holds of it."""
        return {
            **self._head(),
            "totals": self.totals(self.launches),
            "parts": self.grouped(lambda one: one.planned.part),
            "kinds": self.grouped(lambda one: one.kind),
            "faults": self.faults(),
        }

    def to_json(self) -> dict[str, Any]:
        """The content of the `--json` file."""
        totals = self.totals(self.launches)
        times = {name: totals[name] for name in ("floor_us", "predicted_us", "with_gaps_us")}
        return {**self._head(), **times, "launches": [one.to_json() for one in self.launches]}

    def _head(self) -> dict[str, Any]:
        gpu, clock = self.machine.name, round(self.machine.clock / 1e9, 3)
        return {"family": self.family, "variant": self.variant, "gpu": gpu, "clock_ghz": clock}


def _range(values: Iterable[float]) -> list[float]:
    """The least and the largest; nothing for none."""
    found = list(values)
    return [min(found), max(found)] if found else []


def assemble(
    family: str, variant: str, machine: Machine, planned: Sequence[Planned], found: Mapping[str, Prediction | str]
) -> NetworkPrediction:
    """The network's launches with their predictions. ValueError if one of them could not be predicted."""
    predictions: list[Prediction | None] = []
    for one in planned:
        made = found[Job(one.program, machine).key] if one.program else None
        if isinstance(made, str):
            raise ValueError(f"{family} {variant}, {machine.name}: {one.op}, {one.kernel} is not predicted: {made}")
        predictions.append(made)
    launches = [
        PredictedLaunch(one, one.floor_us(machine.card), made) for one, made in zip(planned, predictions, strict=True)
    ]
    return NetworkPrediction(family, variant, machine, launches)
