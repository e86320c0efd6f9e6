"""Convolutions that normalize their result, against the oracles of the convolution and of GroupNorm in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES, Arguments
from tests.ops.contract import BATCHED, OperatorContract, reference_of
from tests.ops.conv import test_conv3x3, test_upsample_conv
from tests.ops.norm import test_group_norm
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops.conv.conv3x3 import Conv3x3Norm

Both = tuple[Tensor, Tensor]


def apart(arguments: Arguments) -> tuple[Arguments, Arguments]:
    """A call's arguments: the convolution's, and group_norm's but for its image."""
    conv = {k: v for k, v in arguments.items() if not k.startswith("normed_")}
    return conv, {k.removeprefix("normed_"): v for k, v in arguments.items() if k.startswith("normed_")}


def in_turn(conv: Callable[..., Tensor], norm: Callable[..., Tensor]) -> Callable[..., Both]:
    """The one function after the other."""

    def both(**arguments: Any) -> Both:
        given, rest = apart(arguments)
        out = conv(**given)
        return out, norm(out, **rest)

    return both


def mutants(reference: Callable[..., Both]) -> dict[str, Callable[..., Both]]:
    """A wrong norm after a right result, and a wrong result."""

    def wrong(name: str, change: Callable[[Any], Any]) -> Callable[..., Both]:
        return lambda **a: reference(
            **{**a, f"normed_{name}": change(a[f"normed_{name}"])} if a.get(f"normed_{name}") is not None else a
        )

    return {
        "no bias": wrong("bias", torch.zeros_like),
        "shifted weight": wrong("weight", lambda t: t.roll(1)),
        "one group": wrong("groups", lambda _: 1),
        "no eps": wrong("eps", lambda _: 0.0),
        "silu always": wrong("silu", lambda _: True),
        "silu never": wrong("silu", lambda _: False),
        "no skip": wrong("skip", torch.zeros_like),
        "skip channels swapped": wrong("skip", lambda t: t.flip(1)),
        "the next sample": lambda **a: tuple(t.roll(1, 0) for t in reference(**a)),
        "the next channel": lambda **a: (reference(**a)[0].roll(1, 1), reference(**a)[1]),
    }


def mistakes(outputs: int) -> list[tuple[Arguments, str]]:
    """For a first case of 2 images without a skip."""
    return [
        ({"bias": torch.ones(7)}, rf"bias must be \[{outputs}\], found \[7\]"),
        ({"normed_weight": torch.ones(7)}, rf"normed_weight must be \[{outputs}\], found \[7\]"),
        ({"normed_bias": torch.ones(7)}, rf"normed_bias must be \[{outputs}\], found \[7\]"),
        ({"normed_groups": 7}, f"normed_groups must divide {outputs} channels, found 7"),
        ({"normed_skip": torch.ones(2, 3, 1)}, r"normed_skip must be \[N,C,H,W\], found \[2, 3, 1\]"),
        ({"normed_skip": torch.ones(2, 3, 1, 1)}, r"normed_skip must be \[2, 3, \d+, \d+\], found \[2, 3, 1, 1\]"),
    ]


class NormContract(OperatorContract):
    same_bits_in_any_batch = False

    def counted_flops(self, arguments: Arguments) -> int:
        """The convolution's, and for each normalized element 3 for the statistics, 2 for the map, 4 for SiLU."""
        normed = type(self).eager(**arguments)[1]
        return self.counted_products(arguments) + normed.numel() * (9 if arguments.get("normed_silu", True) else 5)

    def counted_products(self, arguments: Arguments) -> int:
        return super().counted_flops(arguments)


class TestConv3x3Norm(NormContract):
    op = "conv3x3_norm"
    oracle = staticmethod(in_turn(test_conv3x3.oracle, test_group_norm.oracle))
    eager = staticmethod(in_turn(test_conv3x3.eager, test_group_norm.eager))
    mutants = mutants(reference_of("conv3x3_norm"))
    mistakes = mistakes(60)

    def counted_products(self, arguments: Arguments) -> int:
        return super().counted_products(arguments) + test_conv3x3.norm_flops(arguments)


class TestUpsampleConvNorm(NormContract):
    op = "upsample_conv_norm"
    oracle = staticmethod(in_turn(test_upsample_conv.oracle, test_group_norm.oracle))
    eager = staticmethod(in_turn(test_upsample_conv.eager, test_group_norm.eager))
    mutants = mutants(reference_of("upsample_conv_norm"))
    mistakes = mistakes(30)

    def counted_products(self, arguments: Arguments) -> int:
        return test_upsample_conv.counted_flops(arguments)


def launches(c: int, o: int, side: int, groups: int, second: int = 0, arch: int = 90) -> list[str]:
    """The kernels of conv3x3_norm on an image of this side, by name."""
    half = {"dtype": torch.bfloat16, "device": "meta"}
    skip = torch.empty(1, second, side, side, **half) if second else None
    call = Conv3x3Norm(
        torch.empty(1, c, side, side, **half),
        torch.empty(o, c, 3, 3, **half),
        normed_weight=torch.empty(o + second, device="meta"),
        normed_bias=torch.empty(o + second, device="meta"),
        normed_groups=groups,
        normed_eps=1e-5,
        normed_skip=skip,
    )
    with assume(GPUS[arch]):
        plan, _ = call.planned()
    return [step.kernel.function.__name__ for step in plan.launches if isinstance(step, Launch)]


def test_launches_by_size() -> None:
    """Two, except with channel statistics, thousands of tiles, or a norm over two images without split-K."""
    assert launches(960, 960, 8, 24) == ["conv", "merge_splits_norm"]
    assert launches(960, 960, 16, 24, second=960) == ["conv", "merge_splits_norm"]
    assert launches(480, 480, 16, 32) == ["conv", "merge_splits_norm"]
    assert launches(480, 480, 32, 32) == ["conv", "merge", "from_moments"]
    assert launches(480, 480, 32, 24) == ["conv", "merge", "from_moments"]
    assert launches(256, 256, 128, 32) == ["conv", "apply"]
    assert launches(64, 64, 512, 32) == ["conv", "merge", "apply"]
    assert launches(240, 240, 128, 24) == ["conv", "merge", "from_moments"]
    assert launches(240, 240, 128, 24, second=240) == ["conv", "chunk_moments", "merge_chunks", "apply"]


def test_the_batch_changes_no_configuration() -> None:
    for case in CASES["conv3x3_norm"]:
        arguments = case.arguments(torch.float16)
        call = Conv3x3Norm(**arguments)
        one = Conv3x3Norm(**{k: v[:1] if k in BATCHED else v for k, v in arguments.items()})
        assert call.bucket() == one.bucket()
        for gpu in GPUS.values():
            assert call.heuristic(gpu) == one.heuristic(gpu)


def test_the_norm_is_given_by_keyword() -> None:
    """Positional arguments are the convolution's; the norm's are found by name alone."""
    x, weight, vector = torch.ones(1, 3, 2, 2), torch.ones(3, 3, 3, 3), torch.ones(3)
    with pytest.raises(TypeError, match="positional argument"):
        Conv3x3Norm(x, weight, *[None] * 13, vector, vector, 1, 1e-5)  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="normed_weight"):
        torch.ops.tinysr.conv3x3_norm(x, weight)
