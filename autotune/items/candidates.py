"""The candidate configurations of one work item."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from autotune.items.work import Item
from tinysr_kernels.launch.device import Gpu, assume
from tinysr_kernels.launch.plan import Launch, Library, Plan

REJECTED = "rejected by the operator"
DUPLICATE = "same launches as another candidate"


@dataclass(frozen=True)
class Candidate:
    """A configuration and the plan that it results in, on meta tensors."""

    config: Any
    plan: Plan = field(compare=False, repr=False)

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The configuration as a JSON object."""
        return dataclasses.asdict(self.config)

    @functools.cached_property
    def key(self) -> str:
        """Identifies the configuration."""
        return json.dumps(self.fields, sort_keys=True)

    @property
    def library(self) -> bool:
        """Whether the candidate calls a library (cuBLASLt, cuDNN, SDPA) in place of a Triton kernel."""
        return any(isinstance(launch, Library) for launch in self.plan.launches)


@dataclass(frozen=True)
class Candidates:
    """The distinct valid candidates, the incumbent first; and how many others of the space were removed, by reason."""

    all: tuple[Candidate, ...]
    removed: Counter[str]

    @property
    def incumbent(self) -> Candidate:
        """The configuration in use before tuning."""
        return self.all[0]


def candidates(item: Item, gpu: Gpu, incumbent: Any) -> Candidates:
    """The incumbent, the heuristic's choice and the search space; one candidate per distinct set of launches.

    ValueError if the operator rejects the incumbent.
    """
    found: dict[Any, Candidate] = {}
    removed: Counter[str] = Counter()
    with assume(gpu):
        first = Candidate(incumbent, item.call.plan(incumbent))
        found[_launches(first.plan)] = first
        for config in (item.call.heuristic(gpu), *item.call.space(gpu)):
            try:
                plan = item.call.plan(config)
            except ValueError:
                removed[REJECTED] += 1
                continue
            launches = _launches(plan)
            if launches in found:
                removed[DUPLICATE] += 1
            else:
                found[launches] = Candidate(config, plan)
    return Candidates(tuple(found.values()), removed)


def _launches(plan: Plan) -> tuple[Any, ...]:
    """Equal for two plans with the same kernels, grids and arguments."""
    return tuple(_launch(launch) for launch in plan.launches)


def _launch(launch: Launch | Library) -> tuple[Any, ...]:
    arguments = tuple((name, _value(v)) for name, v in launch.arguments.items())
    if isinstance(launch, Library):
        return (launch.function, arguments)
    return (launch.kernel.function, launch.grid, launch.num_warps, launch.num_stages, arguments)


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    return repr(value)
