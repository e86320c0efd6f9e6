"""A wrong kernel is found out, a right one is not, on the CPU in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from autotune.device.correctness import EachRounded, truths, verdict
from autotune.items.work import Item
from benchmarks.subjects.inputs import draw_inputs
from tests.ops.cases import CASES
from tests.ops.kernel_contract import mutated
from tests.ops.norm import test_layer_norm_kernel as layer_norm_tests
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.norm.kernels import layer_norm as layer_norm_kernel

CPU = torch.device("cpu")
META = torch.device("meta")


def make_item(op: str, *args: Any, **kwargs: Any) -> Item:
    return Item(REGISTRY[op](*args, **kwargs), 1)


def norm_item(dtype: torch.dtype = torch.float16) -> Item:
    return make_item("layer_norm", torch.empty(3, 40, dtype=dtype, device=META), 1e-6)


def sepconv_item() -> Item:
    x = torch.empty(1, 24, 6, 10, dtype=torch.float16, device=META, memory_format=torch.channels_last)
    weights = [torch.empty(shape, dtype=torch.float16, device=META) for shape in ((24, 3, 3), (24, 24))]
    return make_item("sepconv", x, *weights, torch.empty(24, device=META), x, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_heuristic_is_right(dtype: torch.dtype) -> None:
    item = norm_item(dtype)
    config = item.call.heuristic(GPUS[90])
    assert verdict(item, config, truths(item, CPU, 0)) is None


@pytest.mark.parametrize("op", ["adain_fix", "wavelet_fix", "clamp_image"])
def test_images_in_bytes_and_flags(op: str) -> None:
    """Right as they are; a tenth too bright is found out."""
    x = torch.empty(1, 3, 8, 12, dtype=torch.float16, device=META, memory_format=torch.channels_last)
    style = torch.empty(1, 3, 2, 3, dtype=torch.uint8, device=META)
    options = {"adain_fix": (style, 1e-5, 0.0, True), "wavelet_fix": (style, 4), "clamp_image": ()}[op]
    item = make_item(op, x, *options, dtype=torch.uint8)
    config = item.call.heuristic(GPUS[90])
    known = truths(item, CPU, 0)
    assert verdict(item, config, known) is None
    darker = [(t.exact[0] * 0.9, t.exact[1]) for t in known]
    moved = [
        dataclasses.replace(t, exact=(image, flags), eager=(image.round(), flags))
        for t, (image, flags) in zip(known, darker, strict=True)
    ]
    assert verdict(item, config, moved) is not None


def test_a_convolution_with_an_input_given_twice() -> None:
    item = sepconv_item()
    known = truths(item, CPU, 1)
    assert len(known) > 1  # a small result: several draws
    assert known[0].inputs["x"] is known[0].inputs["residual"]
    config = item.call.heuristic(GPUS[90])
    assert verdict(item, config, known) is None


@pytest.mark.parametrize("op", list(REGISTRY))
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
    config = item.call.heuristic(GPUS[90])
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
                config = config or item.call.heuristic(GPUS[90])
                failures.append(verdict(item, config, known))
    assert {f.kind for f in failures if f} == {"wrong"}


SHAPES = ((3, 40), (2, 129))


class Faulty:
    """Stands for the launches of a plan: writes a result that has something wrong with it."""

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
        out = torch.empty_like(call.first)
        return Plan(out, (Faulty(fault, call, out),))  # type: ignore[arg-type]

    item = norm_item()
    monkeypatch.setattr(REGISTRY["layer_norm"], "plan", plan)
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


E4M3 = torch.float8_e4m3fn


def test_inputs_are_what_their_names_and_dtypes_say() -> None:
    """So that an operation of tomorrow is drawn for without a word about it here."""
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
    made = draw_inputs(arguments, CPU, 0)
    x, weight = made["x"].double(), made["weight"].double()
    assert x.abs().max() > 200  # of 448: all of the exponents are in use
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
    """Stands for the launch of an operation that gives an image, flags, and a result in e4m3 with its scale."""

    def __init__(self, fault: str, call: MixedOperator, out: tuple[Tensor, ...]) -> None:
        self.fault, self.call, self.out = fault, call, out
        self.arguments: dict[str, Any] = {}

    def run(self, pdl: bool = False) -> None:
        image, flags, q, scale = self.call.reference()
        v = self.call.x.float()
        if self.fault == "cut image":
            image = (v.clamp(0, 1) * 255).to(torch.uint8)
        elif self.fault == "one pixel":
            image.view(-1)[5] ^= 128
        elif self.fault == "flag":
            flags = ~flags
        elif self.fault == "cut e4m3":
            q = toward_zero(v / scale)
        elif self.fault == "scale":
            scale = scale * 1.001
        elif self.fault == "one step off":  # as another order of the sums does here and there
            image.view(-1)[3] += 1 if image.view(-1)[3] < 255 else -1
        for out, value in zip(self.out, (image, flags, q, scale), strict=True):
            if self.fault != "unwritten flags" or out is not self.out[1]:
                out.copy_(value)


def toward_zero(v: Tensor) -> Tensor:
    """v in e4m3, cut off instead of rounded."""
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
    "fault", ["none", "one step off", "cut image", "one pixel", "flag", "cut e4m3", "scale", "unwritten flags"]
)
def test_results_of_every_kind(fault: str) -> None:
    """Several results of one operation: bytes, flags, floats of 8 bits. A step of rounding is right, more is not."""
    item = Item(MixedOperator(torch.empty(40, 64, dtype=torch.float16, device=META), torch.uint8, fault), 1)
    found = verdict(item, None, truths(item, CPU, 0))
    if fault in ("none", "one step off"):
        assert found is None
    else:
        assert found is not None
        assert found.kind == "wrong"


def test_sums_in_half_precision_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why no candidate accumulates in half precision: as tensor cores would, a rounding every 16 terms errs too much
    from a depth on at which there is anything to gain."""

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
        item = make_item("linear", x, torch.empty(48, depth, dtype=torch.float16, device=META))
        found = verdict(item, None, truths(item, CPU, 0))
        assert found is not None, depth
        assert found.kind == "wrong"


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
    assert arrived.call.arguments["x"] is arrived.call.arguments["residual"]
    for name, value in item.call.arguments.items():
        if isinstance(value, Tensor):
            found = arrived.call.arguments[name]
            assert (found.shape, found.stride(), found.dtype, found.device) == (
                value.shape,
                value.stride(),
                value.dtype,
                value.device,
            )
