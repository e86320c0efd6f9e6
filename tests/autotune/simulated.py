"""A simulated device and the operator that is tuned on it.

The device is a seeded cost model with noise, outliers, throttling, wrong results, crashes and hangs, with a simulated
clock.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from autotune.items.candidates import Candidate, Candidates, candidates
from autotune.items.cost_model import Built, predict
from autotune.items.device import Entries
from autotune.items.results import Failure, Sample
from autotune.items.work import Item, Target
from benchmarks.hardware import Ceilings, ceilings
from tests.first_use.test_correctness import norm_call
from tinysr_kernels.launch.config_file import Facts, installed
from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.launch.kernel import jit
from tinysr_kernels.launch.plan import Launch, Library, Plan, cdiv
from tinysr_kernels.ops.call import Cost, Operator

OP = "simulated"
TARGET = Target(family="tinysr-unet")
FACTS = Facts(GPUS[90], installed("triton"), installed("torch"), "570.10", 143771, 700)


def norm_item(dtype: torch.dtype = torch.float16) -> Item:
    """An item of a real operator, small enough for the interpreter."""
    return Item(norm_call(dtype), 1)


@dataclass(frozen=True)
class Config:
    """A launch configuration of the simulated operator."""

    form: str
    block: int
    depth: int
    warps: int
    stages: int


@jit
def kernel(x, out, BLOCK, DEPTH):
    """Never runs."""


def library(x: Tensor, out: Tensor) -> None:
    """Never runs."""


@dataclass(slots=True, eq=False)
class Simulated(Operator):
    """An operator of one tensor; not registered with PyTorch."""

    name = OP
    config = Config
    tuned_by = ("x",)

    x: Tensor

    def check(self) -> None:
        """Every call is valid."""

    def reference(self) -> Tensor:
        return self.x

    def empty(self) -> Tensor:
        return torch.empty_like(self.x)

    def cost(self) -> Cost:
        return Cost(2 * self.x.numel() * 1024, 2 * self.x.nbytes)

    def bucket(self) -> str:
        return f"{self.x.shape[0]} x {self.x.shape[1]}"

    def heuristic(self, gpu: Gpu) -> Config:
        return Config("tile", 32, 32, 4, 2)

    def plan(self, config: Config) -> Plan:
        x = self.x
        if config.form == "tile" and config.depth > x.shape[1]:
            raise ValueError(f"depth must be at most {x.shape[1]}, found {config.depth}")
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if config.form == "library":
            return Plan(out, (Library(library, {"x": x, "out": out}),))
        grid = (cdiv(x.shape[0], config.block),)
        arguments = {"x": x, "out": out, "BLOCK": config.block, "DEPTH": config.depth}
        return Plan(out, (Launch(kernel, grid, arguments, config.warps, config.stages),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        yield Config("library", 0, 0, 4, 1)
        for block, depth, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64), (2, 4, 8), (1, 2)):
            yield Config("tile", block, depth, warps, stages)


def make_items(count: int = 3) -> list[Item]:
    """Items of the simulated operator, the first with the largest share of the time."""
    shapes = [(4096 >> i, 1024) for i in range(count)]
    return [
        Item(Simulated(torch.empty(shape, dtype=torch.float16, device="meta")), 3 + i) for i, shape in enumerate(shapes)
    ]


@dataclass
class Odds:
    """How often the device misbehaves, as fractions of all candidates or samples; throttle_every: seconds."""

    spill: float = 0.1
    wrong: float = 0.08
    wrong_sometimes: float = 0.02
    crash: float = 0.02
    hang: float = 0.01
    breaks_later: float = 0.01
    noise: float = 0.01
    outlier: float = 0.02
    throttle_every: float = 60.0


CALM = Odds(0, 0, 0, 0, 0, 0, 0.01, 0, math.inf)


@dataclass
class SimulatedDevice:
    """A deterministic device: every result depends on the seed and the number of calls so far only."""

    seed: int
    odds: Odds = field(default_factory=Odds)
    facts: Facts = FACTS
    pdl_factor: float = 1.0
    now: float = 0.0
    calls: Counter[Any] = field(default_factory=Counter)
    _true: dict[Any, float] = field(default_factory=dict)
    _fates: dict[Any, str] = field(default_factory=dict)
    _effects: dict[Any, float] = field(default_factory=dict)

    @property
    def ceilings(self) -> Ceilings:
        return CEILINGS

    def chance(self, *what: Any) -> float:
        """A uniform number in (0, 1), determined by the seed and the arguments."""
        digest = hashlib.blake2b(f"{self.seed} {what}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") + 0.5) / 2**64

    def effect(self, *what: Any) -> float:
        """As `chance`, cached."""
        if what not in self._effects:
            self._effects[what] = self.chance(*what)
        return self._effects[what]

    def true_us(self, item: Item, candidate: Candidate) -> float:
        """Microseconds per call: the cost model's prediction times effects that the cost model does not know."""
        key = item.key, candidate.key
        if key not in self._true:
            log = 0.0
            pairs = itertools.combinations(sorted(candidate.fields.items()), 2)
            for names in [*candidate.fields.items(), *pairs]:
                log += 0.3 * self.effect(item.key, names)
            log += 0.05 * self.chance(item.key, candidate.key)
            if self.is_wrong(item, candidate):
                log -= 0.7  # wrong candidates look fast
            self._true[key] = 1e6 * _predicted(item, candidate) * math.exp(log)
        return self._true[key]

    def fate(self, item: Item, candidate: Candidate) -> str:
        """How a candidate fails, "" if it does not; the incumbent never fails."""
        key = item.key, candidate.key
        if key not in self._fates:
            self._fates[key] = self._fate(item, candidate)
        return self._fates[key]

    def _fate(self, item: Item, candidate: Candidate) -> str:
        if candidate.config == item.call.heuristic(self.facts.gpu):
            return ""
        point = self.chance("fate", item.key, candidate.key)
        for name in ("spill", "wrong", "wrong_sometimes", "crash", "hang", "breaks_later"):
            point -= getattr(self.odds, name)
            if point < 0:
                return name
        return ""

    def is_wrong(self, item: Item, candidate: Candidate) -> bool:
        return self.fate(item, candidate).startswith("wrong")

    def best_us(self, item: Item) -> float:
        """Microseconds per call of the fastest candidate that does not fail."""
        found = candidates_of(item.key)
        return min(self.true_us(item, c) for c in found.all if not self.fate(item, c))

    def build(self, item: Item, candidates: Sequence[Candidate]) -> list[Built]:
        self.now += 0.1 * len(candidates)
        self.calls["builds"] += len(candidates)
        return [
            Built((), ("spills registers",))
            if self.fate(item, c) == "spill"
            else Built(((128, 16384),) * (not c.library))
            for c in candidates
        ]

    def check(self, item: Item, candidate: Candidate, draw: int) -> Failure | None:
        self.calls["checks"] += 1
        self.calls["check", item.key, candidate.key] += 1
        fate = self.fate(item, candidate)
        if fate == "crash":
            self.now += 3
            return Failure("crash", "signal 11")
        if fate == "hang":
            self.now += 20
            return Failure("timeout", "20 s")
        self.now += 0.2
        return Failure("wrong", "0.3 off") if fate == "wrong" or (fate == "wrong_sometimes" and draw == 1) else None

    def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
        self.calls["samples"] += 1
        self.now += 0.02
        if self.fate(item, candidate) == "breaks_later":
            self.now += 3
            return Failure("error", "illegal memory access")
        return self._sample(self.true_us(item, candidate), item.key, candidate.key)

    def sample_model(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
        self.calls["models"] += 1
        self.now += 0.05
        total = 0.0
        for item in ITEMS:
            config = entries.get(OP, {}).get(item.bucket, item.call.heuristic(self.facts.gpu))
            total += item.calls * self.true_us(item, Candidate(config, item.call.plan(config)))
        return self._sample(total * (self.pdl_factor if pdl else 1), "model", f"{entries} {pdl}")

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def _sample(self, true: float, *key: str) -> Sample:
        self.calls[key] += 1
        us = true * math.exp(self.odds.noise * NORMAL.inv_cdf(self.chance(key, self.calls[key])))
        outlier = self.chance("outlier", key, self.calls[key]) / (self.odds.outlier or math.nan)
        if outlier < 1:
            us *= 1.1 + 2 * outlier
        since = self._throttled_since()
        if since is None:
            return Sample(us)
        return Sample(1.3 * us, "" if since < 0.3 else "thermal slowdown")

    def _throttled_since(self) -> float | None:
        """Seconds since throttling began, or None."""
        if math.isinf(self.odds.throttle_every):
            return None
        period, place = divmod(self.now, self.odds.throttle_every)
        begin = self.odds.throttle_every / 2 * self.effect("throttled at", period)
        length = 1 + 11 * self.effect("throttled for", period)
        return place - begin if begin <= place < begin + length else None


CEILINGS = ceilings(GPUS[90])
NORMAL = NormalDist()
CODE = ((128, 16384),)
ITEMS = make_items()


@functools.cache
def candidates_of(key: str) -> Candidates:
    """The candidates of one of ITEMS."""
    item = next(item for item in ITEMS if item.key == key)
    return candidates(item, GPUS[90], item.call.heuristic(GPUS[90]))


_predictions: dict[Any, float] = {}


def _predicted(item: Item, candidate: Candidate) -> float:
    key = item.key, candidate.key
    if key not in _predictions:
        _predictions[key] = predict(item, candidate, GPUS[90], CEILINGS)
    return _predictions[key]
