"""TEMPORARY: operators registered as functions, presented as classes until all are written as such."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import MINIMUM_CAPABILITY
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import call
from tinysr_kernels.ops.call import KERNEL_DTYPES, Cost


@dataclass(frozen=True)
class Implementation:
    config: type
    bucket: Callable[..., str]
    heuristic: Callable[..., Any]
    plan: Callable[..., Plan]
    space: Callable[..., Iterable[Any]]
    modules: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    capability: tuple[int, int] = MINIMUM_CAPABILITY


@dataclass(frozen=True)
class Operator:
    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    kernels: Implementation | None = None


PYTHON = {v: k for k, v in call.SCHEMA_TYPES.items()}


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    kernels: Implementation | None = None,
) -> Operator:
    name = schema[: schema.index("(")]
    old = Operator(name, reference, cost, kernels)
    assert kernels is not None
    parsed = torch._C.parse_schema(f"tinysr::{schema}")
    words = dict(
        zip(
            [a.name for a in parsed.arguments],
            schema[schema.index("(") + 1 : schema.index(") ->")].split(", "),
            strict=True,
        )
    )
    fields: list[Any] = []
    for a in parsed.arguments:
        kind = PYTHON[words[a.name].split(" ")[0]]
        if a.has_default_value():
            fields.append((a.name, kind, dataclasses.field(default=a.default_value)))
        else:
            fields.append((a.name, kind))
    many = len(parsed.returns) > 1

    def empty(self: Any) -> Any:
        return fake(**self.arguments)

    namespace = {
        "name": name,
        "config": kernels.config,
        "dtypes": kernels.dtypes,
        "capability": kernels.capability,
        "returns": "(Tensor, Tensor)" if many else "Tensor",
        "tuned_by": tuple(f[0] for f in fields),
        "check": lambda self: (
            None
            if fake(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in self.arguments.items()}) is None
            else None
        ),
        "reference": lambda self: reference(**self.arguments),
        "empty": empty,
        "cost": lambda self: cost(**self.arguments),
        "bucket": lambda self: kernels.bucket(**self.arguments),
        "heuristic": lambda self, gpu: kernels.heuristic(gpu, **self.arguments),
        "plan": lambda self, config: kernels.plan(config, **self.arguments),
        "space": lambda self, gpu: kernels.space(gpu, **self.arguments),
    }
    cls = dataclasses.make_dataclass(name, fields, bases=(call.Operator,), namespace=namespace, eq=False)
    module = inspect.getmodule(kernels.plan)
    assert module is not None
    cls.__module__ = module.__name__
    call.register(cls)
    return old
