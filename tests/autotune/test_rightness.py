"""A wrong kernel is found out, a right one is not, on the CPU in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.rightness import EachRounded, draw_inputs, truths, verdict
from autotune.work import Item
from tests.kernels import test_layer_norm_kernel as layer_norm_tests
from tests.kernels.kernels import mutated
from tests.ops.cases import CASES
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.launch.plan import Implementation, Plan
from tinysr_kernels.ops import REGISTRY, layer_norm_kernel
from tinysr_kernels.ops.registry import Operator

CPU = torch.device("cpu")
META = torch.device("meta")


def make_item(op: str, *args: Any, **kwargs: Any) -> Item:
    operator = REGISTRY[op]
    assert operator.kernels is not None
    arguments = operator.arguments(*args, **kwargs)
    return Item(op, operator.kernels.bucket(**arguments), arguments, operator.cost(**arguments), 1)


def norm_item(dtype: torch.dtype = torch.float16) -> Item:
    return make_item("layer_norm", torch.empty(3, 40, dtype=dtype, device=META), 1e-6)


def sepconv_item() -> Item:
    x = torch.empty(1, 24, 6, 10, dtype=torch.float16, device=META, memory_format=torch.channels_last)
    weights = [torch.empty(shape, dtype=torch.float16, device=META) for shape in ((24, 3, 3), (24, 24))]
    return make_item("sepconv", x, *weights, torch.empty(24, device=META), x, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_heuristic_is_right(dtype: torch.dtype) -> None:
    item = norm_item(dtype)
    config = item.implementation.heuristic(GPUS[90], **item.arguments)
    assert verdict(item, config, truths(item, CPU, 0)) is None


def test_a_convolution_with_an_input_given_twice() -> None:
    item = sepconv_item()
    known = truths(item, CPU, 1)
    assert len(known) > 1  # a small result: several draws
    assert known[0].inputs["x"] is known[0].inputs["residual"]
    config = item.implementation.heuristic(GPUS[90], **item.arguments)
    assert verdict(item, config, known) is None


@pytest.mark.parametrize("op", [name for name, operator in REGISTRY.items() if operator.kernels])
def test_every_operation_is_right_on_the_inputs_that_are_drawn(op: str) -> None:
    """Whatever inputs an operation needs, those drawn are such: the heuristic's results pass, and nothing is NaN."""
    made = []
    for case in CASES[op]:
        given = case.arguments(torch.float16)
        moved = {name: v.to(META) if isinstance(v, Tensor) else v for name, v in given.items()}
        made.append(make_item(op, **moved))
        truth = truths(made[-1], CPU, 0)[0]
        assert all(bool(t.float().isfinite().all()) for t in (*truth.exact, *truth.eager)), case
    item = min(made, key=lambda item: item.cost.flops)
    config = item.implementation.heuristic(GPUS[90], **item.arguments)
    assert verdict(item, config, truths(item, CPU, 0)[:2]) is None


KERNEL_TESTS = layer_norm_tests.TestLayerNormKernels
# Without eps, rows that vary give the same: no candidate differs from another in that.
MUTATIONS = sorted(set(KERNEL_TESTS.mutations) - {"no eps"})


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_found_out(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = KERNEL_TESTS.mutations[mutation]
    items = [make_item("layer_norm", torch.empty(n, d, dtype=torch.float16, device=META), 1e-6) for n, d in SHAPES]
    with mutated(layer_norm_kernel, old, new, tmp_path) as wrong:
        for name, value in vars(wrong).items():
            if name in vars(layer_norm_kernel) and type(value).__name__ == "Kernel":
                monkeypatch.setattr(layer_norm_kernel, name, value)
        failures = []
        for item in items:
            known = truths(item, CPU, 0)
            for config in (None, *KERNEL_TESTS.configs.values()):
                config = config or item.implementation.heuristic(GPUS[90], **item.arguments)
                failures.append(verdict(item, config, known))
    assert {f.kind for f in failures if f} == {"wrong"}


SHAPES = ((3, 40), (2, 129))


class Faulty:
    """Stands for the launches of a plan: writes a result that has something wrong with it."""

    def __init__(self, fault: str, inputs: dict[str, Any], out: Tensor) -> None:
        self.fault, self.out = fault, out
        self.exact = REGISTRY["layer_norm"].reference(**inputs)
        self.arguments: dict[str, Any] = {}
        self.runs = 0

    def run(self) -> None:
        if self.fault == "unwritten":
            self.out[:-1].copy_(self.exact[:-1])
            return
        self.out.copy_(self.exact)
        if self.fault == "coarse":
            self.out.mul_(1.01)
        elif self.fault == "one element":
            self.out.view(-1)[7] += 0.5
        elif self.fault == "differs":
            self.out.view(-1)[7] += 1e-4 * next(COUNT)


COUNT = iter(range(1, 10**6))


@pytest.mark.parametrize("fault", ["none", "unwritten", "coarse", "one element", "differs"])
def test_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(config: Any, x: Tensor, eps: float) -> Plan:
        out = torch.empty_like(x)
        return Plan(out, (Faulty(fault, {"x": x, "eps": eps}, out),))  # type: ignore[arg-type]

    item = norm_item()
    real = REGISTRY["layer_norm"]
    faulty: Implementation = dataclasses.replace(item.implementation, plan=plan)
    monkeypatch.setitem(REGISTRY, "layer_norm", Operator("layer_norm", real.reference, real.cost, faulty))
    found = verdict(item, None, truths(item, CPU, 0))
    if fault == "none":
        assert found is None
    else:
        assert found is not None
        assert found.kind == "wrong"
        assert ("second run" in found.detail) == (fault == "differs")


def test_inputs_keep_their_form() -> None:
    """Shapes, dtypes, strides, offsets and identities; other draws are other numbers."""
    whole = torch.empty(4, 3, 50, dtype=torch.bfloat16, device=META)
    arguments = {
        "x": whole[1:, :, 3:].transpose(1, 2),
        "expanded": torch.empty(1, 5, device=META).expand(7, 5),
        "bytes": torch.empty(2, 3, dtype=torch.uint8, device=META),
        "weight": torch.empty(100, 400, device=META),
        "none": None,
        "n": 3,
    }
    made = draw_inputs({**arguments, "again": arguments["x"]}, CPU, 0)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            assert made[name].shape == value.shape
            assert made[name].stride() == value.stride()
            assert made[name].dtype == value.dtype
            assert made[name].double().std() > 0
        else:
            assert made[name] is value
    assert made["again"] is made["x"]
    assert 0.04 < float(made["weight"].std()) < 0.06
    assert not torch.equal(draw_inputs(arguments, CPU, 1)["x"], made["x"])
    assert torch.equal(draw_inputs(arguments, CPU, 0)["x"], made["x"])


def test_rounding_as_eager_does() -> None:
    """Each result is one of the dtype; what was given stays as it was."""
    a, b = torch.rand(50), torch.rand(50)
    kept = a.clone()
    with EachRounded(torch.float16, [a, b]):
        c = (a + b) * b
        a.view(5, 10).contiguous()
    assert torch.equal(a, kept)
    assert torch.equal(c, c.half().float())
    once = ((a + b).half().float() * b).half().float()
    assert torch.equal(c, once)


def test_items_travel_to_workers() -> None:
    """Meta tensors keep their form on the way to another process, and what is given twice arrives as one."""
    item = sepconv_item()
    arrived = pickle.loads(bytes(ForkingPickler.dumps(item)))
    assert arrived.key == item.key
    assert arrived.arguments["x"] is arrived.arguments["residual"]
    for name, value in item.arguments.items():
        if isinstance(value, Tensor):
            found = arrived.arguments[name]
            assert (found.shape, found.stride(), found.dtype, found.device) == (
                value.shape,
                value.stride(),
                value.dtype,
                value.device,
            )
