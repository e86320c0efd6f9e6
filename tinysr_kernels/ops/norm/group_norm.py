"""group_norm: GroupNorm of one tensor or of the concatenation of two, with SiLU on request.

    v = concat(x, skip) over channels; per sample and group of C/groups channels: mean and biased variance
    out = act((v - mean) / sqrt(variance + eps) * weight + bias)          act = SiLU or nothing

Layouts: x [N,C1,H,W], skip [N,C2,H,W] or None, weight and bias [C1+C2], out [N,C1+C2,H,W] channels_last.
Groups may span the seam between x and skip and have any size. Where the producers of x and skip have left their
moments, [N,2,C1] and [N,2,C2], mean and biased variance of every channel (`ops/norm/channel_moments.py`), those are taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2, programs_wanted
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.norm.channel_moments import CACHED, of
from tinysr_kernels.ops.norm.kernels import group_norm as group_norm_kernel
from tinysr_kernels.ops.reference_math import activate, compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = (
    "group_norm(Tensor x, Tensor? skip, Tensor weight, Tensor bias, int groups, float eps, bool silu=True, "
    "Tensor? moments=None, Tensor? skip_moments=None) -> Tensor"
)


def _out_shape(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    moments: Tensor | None,
    skip_moments: Tensor | None,
) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    n, c, h, w = x.shape
    if skip is not None:
        check_rank("skip", skip, "N,C,H,W")
        check_shape("skip", skip, (n, skip.shape[1], h, w))
        c += skip.shape[1]
    check_shape("weight", weight, (c,))
    check_shape("bias", bias, (c,))
    check(groups > 0 and c % groups == 0, f"groups must divide {c} channels, found {groups}")
    check_shape("moments", moments, (n, 2, x.shape[1]))
    check_shape("skip_moments", skip_moments, (n, 2, c - x.shape[1]))
    together = (moments is None) == (skip_moments is None) if skip is not None else skip_moments is None
    check(together, "moments must be given for each of x and skip or for none of them")
    return n, c, h, w


def reference(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    moments: Tensor | None = None,
    skip_moments: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    n, c, _, _ = _out_shape(x, skip, weight, bias, groups, moments, skip_moments)
    dtype = compute_dtype(x.dtype)
    images = [x] if skip is None else [x, skip]
    if moments is None and c * x.shape[2] * x.shape[3] <= CACHED:
        # Contiguous planes, because torch takes the variance of channels_last ones as E[v^2] - mean^2: at a mean of 50
        # standard deviations that errs by 4.5e-4 in float32, against 2.6e-6 this way. torch.group_norm, unlike
        # torch.nn.functional's, accepts a group of a single element (a 1x1 image).
        y = torch.group_norm(contiguous_as(torch.cat(images, 1), dtype), groups, weight.to(dtype), bias.to(dtype), eps)
        return nhwc(activate(y, "silu" if silu else "none").to(x.dtype))
    if moments is None:  # of a large image, which is not copied twice for that
        parts = torch.cat([of(image) for image in images], 2)
    else:
        parts = moments if skip_moments is None else torch.cat([moments, skip_moments], 2)
    means, variances = contiguous_as(parts, dtype).view(n, 2, groups, c // groups).unbind(1)
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    each = [t.expand(means.shape).reshape(n, c, 1, 1) for t in (mean, (variance + eps).rsqrt())]
    mean, gain, shift = each[0], each[1] * weight.to(dtype).view(-1, 1, 1), bias.to(dtype).view(-1, 1, 1)
    y = empty_nhwc(x, (n, c, *x.shape[2:]), dtype)
    begin = 0
    for image in images:
        own = slice(begin, begin + image.shape[1])
        torch.sub(image, mean[:, own], out=y[:, own])
        begin = own.stop
    torch.addcmul(shift, y, gain, out=y)
    return nhwc(activate(y, "silu" if silu else "none").to(x.dtype))


def fake(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    moments: Tensor | None = None,
    skip_moments: Tensor | None = None,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return empty_nhwc(x, _out_shape(x, skip, weight, bias, groups, moments, skip_moments))


def cost(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    moments: Tensor | None = None,
    skip_moments: Tensor | None = None,
) -> Cost:
    """FLOPs: 3 per element for statistics that are not given, 2 for the map, 4 for SiLU; bytes of each tensor once."""
    n, c, h, w = _out_shape(x, skip, weight, bias, groups, moments, skip_moments)
    elements = n * c * h * w
    flops = elements * ((3 if moments is None else 0) + 2 + (4 if silu else 0))
    return Cost(flops, nbytes(x, skip, weight, bias, moments, skip_moments) + elements * x.element_size())


@dataclass(frozen=True)
class Config:
    """Launches of group_norm. form: "single", or "split" into chunks (group_norm_kernel's docstring).

    pixels and channels: a program's tile, which is all that counts where moments are given; chunks: of the image, for
    the statistics (split alone).
    """

    form: str
    pixels: int
    channels: int
    chunks: int
    warps: int
    stages: int


SINGLE_ELEMENTS = 1 << 16
"""Largest group that one program normalises (`splits`), 128 KB in half precision."""


def bucket(x: Tensor, skip: Tensor | None, groups: int, moments: Tensor | None, **_: Any) -> str:
    """Calls that share a configuration: dtype, channels, groups, pixels up to a power of two, given moments."""
    c, h, w = x.shape[1:]
    other = "" if skip is None else f"+{skip.shape[1]}"
    variant = "" if moments is None else " given"
    return f"{str(x.dtype).removeprefix('torch.')} {c}{other} in {groups} {next_power_of_2(h * w)}{variant}"


def splits(pixels: int, width: int) -> bool:
    """Whether groups of `width` channels are too large for one program, so that moments from their producer help."""
    return pixels * width > SINGLE_ELEMENTS


def heuristic(gpu: Gpu, x: Tensor, skip: Tensor | None, groups: int, moments: Tensor | None, **_: Any) -> Config:
    """Whatever the batch, so that a sample's sums have the same order in any."""
    c = x.shape[1] + (0 if skip is None else skip.shape[1])
    pixels = x.shape[2] * x.shape[3]
    width = c // groups
    if moments is not None:
        channels = next_power_of_2(c, most=64)
        return Config("split", next_power_of_2(pixels, least=1, most=4096 // channels), channels, 1, 8, 1)
    if not splits(pixels, width):
        inner = next_power_of_2(width, least=1)
        lanes = next_power_of_2(pixels, least=1, most=max(4096 // inner, 1))
        return Config("single", lanes, inner, 1, 8 if lanes * inner >= 2048 else 4, 1)
    channels = next_power_of_2(c, most=64)
    # Twice as many would take 80 registers, and spill some of them in Triton 3.6.
    lanes = 2048 // channels
    chunks = min(cdiv(programs_wanted(gpu), cdiv(c, channels)), cdiv(pixels, lanes))
    return Config("split", lanes, channels, chunks, 8, 3)


def plan(
    config: Config,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    moments: Tensor | None,
    skip_moments: Tensor | None,
) -> Plan:
    """One launch or three; raises what the reference raises. Inputs not dense in their layout are copied once."""
    n, c, h, w = _out_shape(x, skip, weight, bias, groups, moments, skip_moments)
    out = empty_nhwc(x, (n, c, h, w))
    inputs = {"x": nhwc(x), "skip": None if skip is None else nhwc(skip)}
    affine = {"weight": contiguous_as(weight, weight.dtype), "bias": contiguous_as(bias, bias.dtype)}
    sizes = {"pixels": h * w, "channels": c}
    depths = {"first_depth": x.shape[1], "second_depth": c - x.shape[1]}
    width = c // groups
    tile = {"PIXELS": config.pixels, "CHANNELS": config.channels}
    tiles_of_out = (cdiv(h * w, config.pixels), cdiv(c, config.channels), n)
    if moments is not None:
        both = {
            "moments": contiguous_as(moments, moments.dtype),
            "skip_moments": None if skip_moments is None else contiguous_as(skip_moments, skip_moments.dtype),
        }
        given = {**inputs, **affine, **both, "out": out, "eps": eps, **sizes, **depths, "width": width, "SILU": silu}
        given |= {"WIDTH": next_power_of_2(width, least=1), **tile}
        return Plan(out, (Launch(group_norm_kernel.given, tiles_of_out, given, config.warps, config.stages),))
    if config.form == "single":
        check(config.channels >= width, f"single needs at least {width} channels, found {config.channels}")
        given = {**inputs, **affine, "out": out, "eps": eps, **sizes, **depths, "width": width, "SILU": silu, **tile}
        return Plan(out, (Launch(group_norm_kernel.single, (groups, n), given, config.warps, config.stages),))
    chunk = cdiv(h * w, config.chunks)
    chunks = cdiv(h * w, chunk)
    across = cdiv(c, config.channels)
    parts = {name: x.new_empty((n, chunks, c), dtype=torch.float32) for name in ("scratch_mean", "scratch_squares")}
    whole = {name: x.new_empty((n, groups), dtype=torch.float32) for name in ("scratch_center", "scratch_rstd")}
    split: dict[str, Any] = {"chunk": chunk, "chunks": chunks}
    inner = next_power_of_2(width, least=1)
    return Plan(
        out,
        (
            Launch(
                group_norm_kernel.moments,
                (chunks, across, n),
                {**inputs, **parts, **sizes, **depths, **split, **tile, "STAGES": config.stages},
                config.warps,
                config.stages,
            ),
            Launch(
                group_norm_kernel.merge,
                (groups, n),
                {
                    **parts,
                    **whole,
                    "eps": eps,
                    **sizes,
                    "width": width,
                    **split,
                    "CHUNKS": next_power_of_2(chunks, least=1, most=max(1024 // inner, 1)),
                    "CHANNELS": inner,
                },
                4,
                1,
            ),
            Launch(
                group_norm_kernel.apply,
                tiles_of_out,
                {**inputs, **affine, **whole, "out": out, **sizes, **depths, "width": width, "SILU": silu, **tile},
                config.warps,
                config.stages,
            ),
        ),
    )


def space(gpu: Gpu, x: Tensor, skip: Tensor | None, groups: int, moments: Tensor | None, **_: Any) -> Iterator[Config]:
    """One launch where the group is small enough for one program; three with more or fewer chunks."""
    c = x.shape[1] + (0 if skip is None else skip.shape[1])
    pixels = x.shape[2] * x.shape[3]
    if moments is not None:
        for channels, elements, warps in itertools.product((32, 64, 128), (1024, 2048, 4096, 8192), (4, 8)):
            channels = next_power_of_2(c, most=channels)
            yield Config("split", next_power_of_2(pixels, least=1, most=elements // channels), channels, 1, warps, 1)
        return
    inner = next_power_of_2(c // groups, least=1)
    if pixels * inner <= 4 * SINGLE_ELEMENTS:
        for elements, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8)):
            lanes = next_power_of_2(pixels, least=1, most=max(elements // inner, 1))
            yield Config("single", lanes, inner, 1, warps, 1)
    for channels, elements, programs in itertools.product((32, 64, 128), (2048, 4096), (1, 2, 4)):
        channels, lanes = next_power_of_2(c, most=channels), elements // channels
        chunks = min(cdiv(programs * gpu.multiprocessors, cdiv(c, channels)), cdiv(pixels, lanes))
        for warps, stages in itertools.product((4, 8), (1, 3)):
            yield Config("split", lanes, channels, chunks, warps, stages)


KERNELS = Implementation(
    Config, bucket, heuristic, plan, space, (group_norm_kernel.__name__, device_functions.__name__)
)

group_norm = register(SCHEMA, reference, fake, cost, KERNELS)
