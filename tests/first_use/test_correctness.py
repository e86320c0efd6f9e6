"""The correctness check detects wrong kernels and accepts correct ones, on the CPU in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES
from tests.ops.kernel_contract import mutated
from tests.ops.norm import test_layer_norm_kernel as layer_norm_tests
from tinysr_kernels.first_use.correctness import RoundEachOp, check_results, expected_results
from tinysr_kernels.first_use.inputs import random_inputs
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.norm.kernels import layer_norm as layer_norm_kernel

CPU = torch.device("cpu")
META = torch.device("meta")


def make_call(op: str, *args: Any, **kwargs: Any) -> Operator:
    return REGISTRY[op](*args, **kwargs)


def norm_call(dtype: torch.dtype = torch.float16) -> Operator:
    return make_call("layer_norm", torch.empty(3, 40, dtype=dtype, device=META), 1e-6)


def sepconv_call() -> Operator:
    x = torch.empty(1, 24, 6, 10, dtype=torch.float16, device=META, memory_format=torch.channels_last)
    weights = [torch.empty(shape, dtype=torch.float16, device=META) for shape in ((24, 3, 3), (24, 24))]
    return make_call("sepconv", x, *weights, torch.empty(24, device=META), x, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_heuristic_is_correct(dtype: torch.dtype) -> None:
    call = norm_call(dtype)
    config = call.heuristic(GPUS[90])
    assert check_results(config, expected_results(call, CPU, 0)) is None


@pytest.mark.parametrize("op", ["adain_fix", "wavelet_fix", "clamp_image"])
def test_uint8_images_and_flags(op: str) -> None:
    """Correct outputs pass; outputs 10 % too bright fail."""
    x = torch.empty(1, 3, 8, 12, dtype=torch.float16, device=META, memory_format=torch.channels_last)
    style = torch.empty(1, 3, 2, 3, dtype=torch.uint8, device=META)
    options = {"adain_fix": (style, 1e-5, 0.0, True), "wavelet_fix": (style, 4), "clamp_image": ()}[op]
    call = make_call(op, x, *options, dtype=torch.uint8)
    config = call.heuristic(GPUS[90])
    known = expected_results(call, CPU, 0)
    assert check_results(config, known) is None
    darker = [(t.exact[0] * 0.9, t.exact[1]) for t in known]
    moved = [
        dataclasses.replace(t, exact=(image, flags), eager=(image.round(), flags))
        for t, (image, flags) in zip(known, darker, strict=True)
    ]
    assert check_results(config, moved) is not None


def test_a_convolution_with_the_same_tensor_as_two_inputs() -> None:
    call = sepconv_call()
    known = expected_results(call, CPU, 1)
    assert len(known) > 1  # a small output: several sets of inputs
    assert known[0].call.arguments["x"] is known[0].call.arguments["residual"]
    config = call.heuristic(GPUS[90])
    assert check_results(config, known) is None


@pytest.mark.parametrize("op", list(REGISTRY))
def test_every_operator_is_correct_on_random_inputs(op: str) -> None:
    """Random inputs are valid for every operator: the heuristic's outputs pass, and none is NaN."""
    made = []
    for case in CASES[op]:
        arguments = case.arguments(torch.float16)
        moved = {name: v.to(META) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        made.append(make_call(op, **moved))
        expected = expected_results(made[-1], CPU, 0)[0]
        assert all(bool(t.float().isfinite().all()) for t in (*expected.exact, *expected.eager)), case
    call = min(made, key=lambda call: call.cost().flops)
    config = call.heuristic(GPUS[90])
    assert check_results(config, expected_results(call, CPU, 0)[:2]) is None


KERNEL_TESTS = layer_norm_tests.TestLayerNormKernels
# "no eps" does not change the output for rows that vary.
MUTATIONS = sorted(set(KERNEL_TESTS.mutations) - {"no eps"})


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_detected(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = KERNEL_TESTS.mutations[mutation]
    calls = [make_call("layer_norm", torch.empty(n, d, dtype=torch.float16, device=META), 1e-6) for n, d in SHAPES]
    with mutated(layer_norm_kernel, old, new, tmp_path) as wrong:
        for name, value in vars(wrong).items():
            if name in vars(layer_norm_kernel) and type(value).__name__ == "Kernel":
                monkeypatch.setattr(layer_norm_kernel, name, value)
        failures = []
        for call in calls:
            known = expected_results(call, CPU, 0)
            for config in (None, *KERNEL_TESTS.configs.values()):
                config = config or call.heuristic(GPUS[90])
                failures.append(check_results(config, known))
    assert any(failures)


SHAPES = ((3, 40), (2, 129))


class Faulty:
    """A fake launch whose output has a fault."""

    def __init__(self, fault: str, call: Operator, out: Tensor) -> None:
        self.fault, self.out = fault, out
        self.exact = call.reference()
        self.arguments: dict[str, Any] = {}
        self.runs = 0

    def run(self, pdl: bool = False) -> None:
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
    def plan(call: Operator, config: Any) -> Plan:
        out = call.reference()  # what memory may hold by chance
        return Plan(out, (Faulty(fault, call, out),))  # type: ignore[arg-type]

    call = norm_call()
    monkeypatch.setattr(REGISTRY["layer_norm"], "plan", plan)
    found = check_results(None, expected_results(call, CPU, 0))
    if fault == "none":
        assert found is None
    else:
        assert found is not None
        assert ("second run" in found) == (fault == "differs")


def test_random_inputs_keep_shape_and_strides() -> None:
    """Shapes, dtypes, strides, offsets and identities stay; another seed gives other values."""
    whole = torch.empty(4, 3, 50, dtype=torch.bfloat16, device=META)
    arguments = {
        "x": whole[1:, :, 3:].transpose(1, 2),
        "expanded": torch.empty(1, 5, device=META).expand(7, 5),
        "bytes": torch.empty(2, 3, dtype=torch.uint8, device=META),
        "weight": torch.empty(100, 400, device=META),
        "none": None,
        "n": 3,
    }
    made = random_inputs({**arguments, "again": arguments["x"]}, CPU, 0)
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
    assert not torch.equal(random_inputs(arguments, CPU, 1)["x"], made["x"])
    assert torch.equal(random_inputs(arguments, CPU, 0)["x"], made["x"])


E4M3 = torch.float8_e4m3fn


def test_random_inputs_depend_on_name_and_dtype() -> None:
    """So a new operator needs no code for its inputs."""
    arguments = {
        "x": torch.empty(4, 96, 512, dtype=E4M3, device=META),
        "x_scale": torch.empty(4, 96, 2, device=META),
        "weight": torch.empty(64, 512, dtype=E4M3, device=META),
        "weight_scale": torch.empty(64, device=META),
        "moments": torch.empty(3, 2, 40, device=META),
        "row_moments": torch.empty(3, 50, 2, device=META),
        "mask": torch.empty(200, dtype=torch.bool, device=META),
        "image": torch.empty(50, 50, dtype=torch.uint8, device=META),
        "none": None,
        "activation": "silu",
    }
    made = random_inputs(arguments, CPU, 0)
    x, weight = made["x"].double(), made["weight"].double()
    assert x.abs().max() > 200  # of 448: all exponents occur
    assert bool(weight.isfinite().all())
    assert all(float(made[name].min()) > 0 for name in ("x_scale", "weight_scale"))
    rows = (x.unflatten(-1, (2, -1)) * made["x_scale"][..., None]).flatten(-2) @ weight.T * made["weight_scale"]
    assert 0.3 < float(rows.std()) < 2  # of order one, whatever the scales
    for name, axis in (("moments", 1), ("row_moments", -1)):
        means, variances = made[name].unbind(axis)
        assert float(variances.min()) > 0 > float(means.min())
    assert 50 < int(made["mask"].sum()) < 150
    assert int(made["image"].max()) > 250


class Mixed:
    """A fake launch of `MixedOperator` whose outputs have a fault."""

    def __init__(self, fault: str, call: MixedOperator, out: tuple[Tensor, ...]) -> None:
        self.fault, self.call, self.out = fault, call, out
        self.arguments: dict[str, Any] = {}

    def run(self, pdl: bool = False) -> None:
        image, flags, q, scale = self.call.reference()
        v = self.call.x.float()
        if self.fault == "truncated image":
            image = (v.clamp(0, 1) * 255).to(torch.uint8)
        elif self.fault == "one pixel":
            image.view(-1)[5] ^= 128
        elif self.fault == "flag":
            flags = ~flags
        elif self.fault == "truncated e4m3":
            q = toward_zero(v / scale)
        elif self.fault == "scale":
            scale = scale * 1.001
        elif self.fault == "one step off":  # as another summation order may cause
            image.view(-1)[3] += 1 if image.view(-1)[3] < 255 else -1
        for out, value in zip(self.out, (image, flags, q, scale), strict=True):
            if self.fault != "unwritten flags" or out is not self.out[1]:
                out.copy_(value)


def toward_zero(v: Tensor) -> Tensor:
    """v in e4m3, truncated instead of rounded."""
    q = v.to(E4M3)
    lower = (q.view(torch.uint8) - 1).view(E4M3)
    return torch.where(q.float().abs() > v.abs(), lower.float(), q.float()).to(E4M3)


@dataclass(slots=True, eq=False)
class MixedOperator(Operator):
    """x as an image, whether each row has a value above 1, and x in e4m3 with a scale per row."""

    name = "mixed"

    x: Tensor
    dtype: torch.dtype
    fault: str

    def reference(self) -> tuple[Tensor, ...]:
        v = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        top = v.abs().amax(-1, keepdim=True)
        image = v.clamp(0, 1)
        return (
            image.mul(255).round().to(self.dtype) if self.dtype == torch.uint8 else image.to(self.dtype),
            (v > 1).any(-1),
            (v / top * 448).to(E4M3),
            top / 448,
        )

    def cost(self) -> Cost:
        return Cost(0, 0)

    def plan(self, config: Any) -> Plan:
        x = self.x
        dtypes = (torch.uint8, torch.bool, E4M3, torch.float32)
        shapes = (tuple(x.shape), (x.shape[0],), tuple(x.shape), (x.shape[0], 1))
        out = tuple(torch.empty(s, dtype=d, device=x.device) for s, d in zip(shapes, dtypes, strict=True))
        return Plan(out, (Mixed(self.fault, self, out),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fault",
    ["none", "one step off", "truncated image", "one pixel", "flag", "truncated e4m3", "scale", "unwritten flags"],
)
def test_outputs_of_every_dtype(fault: str) -> None:
    """Several outputs of one operator: uint8, bool, fp8. An error of one rounding step passes, more fails."""
    call = MixedOperator(torch.empty(40, 64, dtype=torch.float16, device=META), torch.uint8, fault)
    found = check_results(None, expected_results(call, CPU, 0))
    if fault in ("none", "one step off"):
        assert found is None
    else:
        assert found is not None


def test_half_precision_accumulators_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why no candidate accumulates in half precision: rounding after every 16 terms, as tensor cores do, exceeds the
    error bound at every K that is large enough to benefit."""

    def plan(call: Any, config: Any) -> Plan:
        x, weight = call.x, call.weight
        out = x.new_empty(*x.shape[:-1], weight.shape[0])

        class Halved:
            arguments: ClassVar[dict[str, Any]] = {}

            def run(self, pdl: bool = False) -> None:
                acc = torch.zeros(out.shape, dtype=torch.float16)
                for k in range(0, x.shape[-1], 16):
                    acc = (acc.float() + x[..., k : k + 16].float() @ weight[:, k : k + 16].float().T).half()
                out.copy_(acc)

        return Plan(out, (Halved(),))  # type: ignore[arg-type]

    monkeypatch.setattr(REGISTRY["linear"], "plan", plan)
    for depth in (256, 576, 1536):
        x = torch.empty(32, depth, dtype=torch.float16, device=META)
        call = make_call("linear", x, torch.empty(48, depth, dtype=torch.float16, device=META))
        found = check_results(None, expected_results(call, CPU, 0))
        assert found is not None, depth


def test_rounding_like_eager() -> None:
    """Every output is representable in the dtype; inputs are unchanged."""
    a, b = torch.rand(50), torch.rand(50)
    kept = a.clone()
    with RoundEachOp(torch.float16, [a, b]):
        c = (a + b) * b
        a.view(5, 10).contiguous()
    assert torch.equal(a, kept)
    assert torch.equal(c, c.half().float())
    once = ((a + b).half().float() * b).half().float()
    assert torch.equal(c, once)
