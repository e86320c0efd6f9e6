"""trace: the calls of a function and the launches of each, on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.plan import Launch, Library, Plan
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernels
from tinysr_kernels.ops.linear.kernels import linear as linear_kernels
from tinysr_kernels.ops.norm.kernels import layer_norm as layer_norm_kernel
from tinysr_kernels.ops.trace import Call, Moved, ReadingOnes, Step, _assigned, trace

HALF: dict[str, Any] = {"dtype": torch.float16, "device": "meta"}
ops = torch.ops.tinysr


def names(calls: list[Call]) -> list[str]:
    return [call.op for call in calls]


def test_calls_in_order_with_their_costs() -> None:
    x, weight = torch.empty(1, 48, 4, 6, **HALF), torch.empty(60, 48, 3, 3, **HALF)

    def network(image: Tensor) -> Tensor:
        y = ops.conv3x3(image, weight, activation="relu")
        tokens = y.permute(0, 2, 3, 1).reshape(1, 24, 60)  # a view: no launch
        return ops.layer_norm(tokens, 1e-6)

    calls = trace(network, x)
    assert names(calls) == ["conv3x3", "layer_norm"]
    assert calls[0].inputs == ((1, 48, 4, 6), (60, 48, 3, 3))
    assert calls[0].output == (1, 60, 4, 6)
    assert calls[0].cost == REGISTRY["conv3x3"](x, weight, activation="relu").cost()
    assert calls[0].operator.arguments["activation"] == "relu"
    assert calls[1].cost.bytes == 2 * 2 * 24 * 60
    assert all(len(call.steps) == 1 and call.steps[0].flops == call.cost.flops for call in calls)


def test_foreign_kernels_are_counted_too() -> None:
    x = torch.empty(3, 5, device="meta")
    (call,) = trace(lambda t: t + t, x)
    assert call.op == "aten::add"
    assert call.cost.bytes == 4 * 15 * 2
    assert call.steps[0].bytes == 4 * 15 * 2


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.contiguous(memory_format=torch.channels_last), ["aten::clone"]),
        (lambda x: x.permute(0, 2, 3, 1).reshape(-1), ["aten::clone"]),
        (lambda x: x.to(torch.float16), ["aten::_to_copy"]),
        (lambda x: x.to(torch.float32).contiguous().reshape(-1)[3:].unflatten(0, (1, -1)), []),
        (lambda x: torch.isfinite(x).all(), ["aten::abs", "aten::ne", "aten::eq", "aten::mul", "aten::all"]),
        (lambda x: x.new_empty(3), []),
    ],
)
def test_what_aten_composes_launches_its_parts(function: Any, expected: list[str]) -> None:
    """A reshape of a transposed tensor copies it, one of a dense tensor does not."""
    assert names(trace(function, torch.empty(2, 3, 4, 5, device="meta"))) == expected


def test_in_place_operations_move_what_they_read_and_write() -> None:
    x, y = torch.empty(10, device="meta"), torch.empty(10, device="meta")
    add, copy = trace(lambda: (x.add_(y), x.copy_(y)))
    assert add.steps[0].bytes == 3 * 40
    assert copy.steps[0].bytes == 2 * 40


def test_conditions_on_values_hold() -> None:
    def careful(x: Tensor) -> Tensor:
        if not bool((x > 0).all()):
            raise AssertionError
        return x + int(x.sum())

    x = torch.empty(3, device="meta")
    assert names(trace(careful, x))[1:3] == ["aten::all", "aten::_local_scalar_dense"]
    with ReadingOnes():
        assert careful(x).is_meta
    with pytest.raises(RuntimeError, match="meta"):
        careful(x)


def test_parts_and_weights() -> None:
    first, second = nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, bias=False, device="meta")
    for linear in (first, second):
        for name, parameter in list(linear.named_parameters()):
            delattr(linear, name)
            linear.register_buffer(name, parameter.data)
    second.bias = None
    x = torch.empty(2, 4, device="meta")
    calls = trace(
        lambda t: second(first(t + 1) * 2) - 1, x, parts={"one": first, "two": second}, ends=("before", "after")
    )
    assert [call.part for call in calls] == ["before", "one", "one", "two", "after"]
    weights = [sum(m.bytes for step in call.steps for m in step.moved if m.weight) for call in calls]
    assert weights == [0, 4 * 20, 0, 4 * 16, 0]
    assert not first._forward_hooks
    assert not first._forward_pre_hooks


def test_one_step_for_every_launch() -> None:
    """GroupNorm of a large image: its launches, the FLOPs once, sums written before they are read."""
    x, weight = torch.empty(1, 64, 512, 512, **HALF), torch.empty(64, device="meta")
    x = x.to(memory_format=torch.channels_last)
    with assume(GPUS[90]):
        (call,) = trace(lambda: ops.group_norm(x, None, weight, weight, 32, 1e-5, False), kernels=True)
        plan = REGISTRY["group_norm"](x, None, weight, weight, 32, 1e-5, False).planned()[0]
    assert len(call.steps) == plan.kernels > 1
    assert sum(step.flops for step in call.steps) == call.cost.flops
    assert call.steps[0].reads[0].shape == (1, 64, 512, 512)
    assert call.steps[-1].writes[0].bytes == x.nbytes
    sums = call.steps[0].writes
    assert any(moved in call.steps[1].reads for moved in sums)


def step(written: int, read: int = 0) -> Step:
    return Step("kernel", (Moved((1,), read),), (Moved((1,), written),))


def test_flops_belong_to_the_launches_that_multiply_matrices() -> None:
    """By bytes written, all of them; else to the launch that moves most."""
    steps = [step(10), step(20, 500), step(900)]
    assert [s.flops for s in _assigned(steps, [True, True, False], 100)] == [34, 66, 0]
    assert [s.flops for s in _assigned(steps, [False, True, False], 100)] == [0, 100, 0]
    assert [s.flops for s in _assigned(steps, [False, False, False], 100)] == [0, 0, 100]
    assert [s.flops for s in _assigned([step(0), step(0)], [True, False], 100)] == [100, 0]


def test_kernels_that_multiply_matrices() -> None:
    """In their own code, or in that of a function they call."""
    assert conv3x3_kernels.conv.multiplies
    assert linear_kernels.linear.multiplies
    assert "dot" not in conv3x3_kernels.conv.function.__code__.co_names
    assert not layer_norm_kernel.normalize.multiplies


def test_what_a_later_launch_reads_is_written_by_an_earlier_one() -> None:
    """A block of three convolutions: each writes an image, and a third of the FLOPs."""
    x = torch.empty(1, 64, 64, 64, **HALF).to(memory_format=torch.channels_last)
    arguments = 3 * [torch.empty(3, 3, 64, **HALF).movedim(-1, 0), torch.empty(64, 64, **HALF), None]
    with assume(GPUS[90]):
        (call,) = trace(lambda: ops.sepconv_block(x, *arguments), kernels=True)
    assert [[m.bytes for m in one.writes] for one in call.steps] == [[x.nbytes]] * 3
    assert [one.flops for one in call.steps] == [call.cost.flops // 3] * 3


def test_copies_that_a_launcher_makes_are_steps() -> None:
    x = torch.empty(1, 48, 24, device="meta").transpose(1, 2)
    with assume(GPUS[90]):
        (call,) = trace(lambda: ops.layer_norm(x, 1e-6), kernels=True)
    assert len(call.steps) == 2
    assert call.steps[0].kernel in ("aten::clone", "aten::copy_")
    assert call.steps[0].flops == 0
    assert call.steps[1].flops == call.cost.flops


def test_a_library_counts_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors stand with the first of them, a tensor given twice once."""
    x = torch.empty(7, 24, **HALF)

    def norm(**arguments: Any) -> None:
        raise AssertionError("planned, not run")

    def plan(call: Operator, config: Any) -> Plan:
        x = call.first
        out = torch.empty_like(x)
        scratch = x.new_empty(3)
        tile = dict.fromkeys(layer_norm_kernel.normalize.names, 1)
        return Plan(
            out,
            (
                Library(norm, {"x": x, "again": x, "scratch": scratch}, kernels=3),
                Launch(layer_norm_kernel.normalize, (1,), {**tile, "x": scratch, "out": out}, 4, 1),
            ),
        )

    monkeypatch.setattr(REGISTRY["layer_norm"], "plan", plan)
    (call,) = trace(lambda: ops.layer_norm(x, 1e-6), kernels=True)
    assert [step.kernel for step in call.steps] == ["norm", "norm (2 of 3)", "norm (3 of 3)", "normalize"]
    assert [step.bytes for step in call.steps] == [x.nbytes + 6, 0, 0, 6 + x.nbytes]
    assert [step.flops > 0 for step in call.steps] == [True, False, False, False]


def test_compiling_a_model_does_not_import_pytorch_s_compiler() -> None:
    """A dispatch mode that PyTorch wraps for its compiler imports that at its first call, which takes seconds."""
    assert not hasattr(ReadingOnes.__torch_dispatch__, "__wrapped__")
