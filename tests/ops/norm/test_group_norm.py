"""group_norm against means and variances summed group by group, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments, Case, Draw
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered, sigmoid_times
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.ops.norm.group_norm import GroupNorm

reference = reference_of("group_norm")


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None = None,
    silu: bool = True,
    moments: Tensor | None = None,
    skip_moments: Tensor | None = None,
) -> Tensor:
    channels = [*x.unbind(1), *(() if skip is None else skip.unbind(1))]
    width = len(channels) // groups
    out = []
    for c, channel in enumerate(channels):
        first = c // width * width
        group = torch.stack(channels[first : first + width])  # [width,N,H,W]
        if moments is None:
            count = group.numel() / group.shape[1]
            mean = group.sum((0, 2, 3)) / count
            variance = ((group - mean[:, None, None]) ** 2).sum((0, 2, 3)) / count
        else:  # E[v^2] - mean^2 of the mixture of the channels; in float64 nothing is lost
            given = [m for part in (moments, skip_moments) if part is not None for m in part.unbind(2)]  # of [N,2]
            mean = sum(m[:, 0] for m in given[first : first + width]) / width
            square = sum(m[:, 1] + m[:, 0] ** 2 for m in given[first : first + width]) / width
            variance = square - mean**2
        scaled = (channel - mean[:, None, None]) / (variance + eps).sqrt()[:, None, None]
        out.append(scaled * weight[c] + bias[c])
    v = torch.stack(out, 1)
    return sigmoid_times(v) if silu else v


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None = None,
    silu: bool = True,
    moments: Tensor | None = None,
    skip_moments: Tensor | None = None,
) -> Tensor:
    # On contiguous planes: on channels_last ones torch's own variance cancels, and would be too easy a bar.
    v = (x if skip is None else torch.cat([x, skip], 1)).contiguous()
    if moments is None:
        y = torch.group_norm(v, groups, weight, bias, eps)
    else:
        # The statistics in float32, as torch.group_norm holds them; the map in the tensors' dtype.
        parts = (moments if skip_moments is None else torch.cat([moments, skip_moments], 2)).float()
        means, variances = parts.view(v.shape[0], 2, groups, -1).unbind(1)
        mean = means.mean(2, keepdim=True)
        rstd = (variances.mean(2, keepdim=True) + means.var(2, correction=0, keepdim=True) + eps).rsqrt()
        y = ((v.view(v.shape[0], groups, -1) - mean) * rstd).view_as(v) * weight[:, None, None] + bias[:, None, None]
        y = y.to(x.dtype)
    return F.silu(y) if silu else y


def sums_of_squares(**a: object) -> Tensor:
    """The variance as E[v^2] - mean^2, which cancels."""
    x, skip, groups = a["x"], a.get("skip"), a["groups"]
    v = (x if skip is None else torch.cat([x, skip], 1)).float()
    grouped = v.reshape(v.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped.square().mean(2, keepdim=True) - mean.square()).clamp(min=0)
    y = ((grouped - mean) / (variance + a["eps"]).sqrt()).view_as(v)
    y = y * a["weight"].float()[:, None, None] + a["bias"].float()[:, None, None]
    return (F.silu(y) if a.get("silu", True) else y).to(x.dtype)


def swapped(a: dict[str, Any]) -> dict[str, Any]:
    """The two images, each with its moments, in the other order."""
    names = {"x": "skip", "skip": "x", "moments": "skip_moments", "skip_moments": "moments"}
    return {name: a.get(other) for name, other in names.items()}


MUTANTS = {
    "no bias": altered(reference, "bias", torch.zeros_like),
    "no weight": altered(reference, "weight", torch.ones_like),
    "shifted weight": altered(reference, "weight", lambda t: t.roll(1)),
    "one group": altered(reference, "groups", lambda _: 1),
    "no eps": altered(reference, "eps", lambda _: 0.0),
    "silu always": lambda **a: reference(**{**a, "silu": True}),
    "silu never": lambda **a: reference(**{**a, "silu": False}),
    "skip first": lambda **a: reference(**({**a, **swapped(a)} if a["skip"] is not None else a)),
    "skip channels swapped": altered(reference, "skip", lambda t: t.flip(1)),
    "moments ignored": lambda **a: reference(**{**a, "moments": None, "skip_moments": None}),
    "moments of other channels": altered(reference, "moments", lambda t: t.roll(1, 2)),
    "moments swapped": altered(reference, "moments", lambda t: t.flip(1).abs()),
    "skip's moments swapped": altered(reference, "skip_moments", lambda t: t.flip(1).abs()),
    "the next sample": lambda **a: reference(**a).roll(1, 0),
}

MISTAKES = [
    ({"x": torch.ones(60, 5)}, r"x must be \[N,C,H,W\], found \[60, 5\]"),
    ({"weight": torch.ones(59)}, r"weight must be \[60\], found \[59\]"),
    ({"bias": torch.ones(1)}, r"bias must be \[60\], found \[1\]"),
    ({"skip": torch.ones(2, 3, 5, 6)}, r"skip must be \[2, 3, 5, 7\], found \[2, 3, 5, 6\]"),
    ({"skip": torch.ones(2, 3, 5, 7)}, r"weight must be \[63\], found \[60\]"),
    ({"groups": 7}, "groups must divide 60 channels, found 7"),
    ({"groups": 0}, "groups must divide 60 channels, found 0"),
    ({"moments": torch.ones(2, 60)}, r"moments must be \[2, 2, 60\], found \[2, 60\]"),
    ({"skip_moments": torch.ones(2, 2, 0)}, "for each of x and skip or for none"),
]


class TestGroupNorm(OperatorContract):
    op = "group_norm"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    # SiLU's exponential has other bits in the last few elements of a tensor than in a full vector register.
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """Per element 3 for the statistics unless they are arguments, 2 for the affine map, 4 for SiLU."""
        elements = sum(arguments[name].numel() for name in ("x", "skip") if arguments[name] is not None)
        statistics = 3 if arguments.get("moments") is None else 0
        return elements * (statistics + 2 + (4 if arguments.get("silu", True) else 0))


def far_mean(d: Draw, channels: int = 60, groups: int = 4) -> Arguments:
    """An image whose mean is 50 deviations from zero."""
    weight, bias = d.normal(channels), d.normal(channels)
    x = d.normal(1, channels, 33, 17) + 50
    return {"x": x, "skip": None, "weight": weight, "bias": bias, "groups": groups, "eps": 1e-6, "silu": False}


def test_channels_last_keeps_the_variance() -> None:
    """Means of 50 deviations, in the layout that networks use: a variance by cancellation errs 100 times more."""
    case = Case("group_norm", "far mean", far_mean)
    contract, single = TestGroupNorm(), torch.float32
    arguments = case.arguments(single)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    careful = contract.judge([reference(**arguments)], case, single)
    careless = contract.judge([sums_of_squares(**arguments)], case, single)
    assert careful.holds, careful
    assert not careless.holds
    assert careless.found[0] > 10 * careful.found[0]


def test_cost_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    vector = torch.empty(90, device="meta")  # float32 parameters beside half activations
    x, skip = torch.empty(1, 48, 3, 5, **half), torch.empty(1, 42, 3, 5, **half)
    found = GroupNorm(x, skip, vector, vector.clone(), 2, 1e-5).cost()
    assert found.flops == 9 * 1350
    assert found.bytes == 2 * (720 + 630 + 1350) + 4 * 180


@pytest.mark.parametrize(
    ("channels", "side", "groups", "form"),
    [
        (960, 8, 32, "single"),
        (256, 16, 32, "single"),
        (128, 32, 8, "single"),  # groups of 16, whole 16-byte accesses
        (96, 32, 8, "split"),  # of 12: 8-byte accesses
        (240, 64, 24, "split"),
        (4096, 64, 512, "single"),  # as many groups as programs that fill the GPU
    ],
)
def test_one_program_normalizes_a_small_group(channels: int, side: int, groups: int, form: str) -> None:
    """Larger groups would leave most multiprocessors idle."""
    x = torch.empty(1, channels, side, side, dtype=torch.float16, device="meta")
    vector = torch.empty(channels, device="meta")
    assert GroupNorm(x, None, vector, vector, groups, 1e-5).heuristic(GPUS[90]).form == form
