"""A convolution's result and the GroupNorm that follows it: `<operator>_norm` beside an operator.

    out    = operator(...)                                                                          [N,O,H,W]
    normed = group_norm(out, normed_skip, normed_weight, normed_bias, normed_groups, ...)          [N,O+C2,H,W]

`ops/norm/group_norm.py` has the mathematics. Fused is what the image's size allows: where programs share a reduction,
the launch that adds their sums normalises too; where groups are too large for one program, the convolution leaves the
moments of its tiles, group by group, and the launch that normalises puts them together.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_choice, check_rank, check_shape
from tinysr_kernels.ops.conv import conv_tiles
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.kernels import conv_norm as conv_norm_kernel
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.norm import channel_moments, group_norm
from tinysr_kernels.ops.norm.kernels import channel_moments as moments_kernel
from tinysr_kernels.ops.norm.kernels import group_norm as group_norm_kernel
from tinysr_kernels.ops.registry import Implementation, Operator, register

REQUIRED = "Tensor normed_weight, Tensor normed_bias, int normed_groups, float normed_eps"
OPTIONAL = "bool normed_silu=True, Tensor? normed_skip=None"
Arguments = dict[str, Any]
FORMS = ("group", "tiles", "split")
MOST_TILES = 512
"""Tiles whose moments each program of the normalising launch merges itself: more are better read once, by a launch."""


@dataclass(frozen=True)
class Config(conv_tiles.Config):
    """The convolution's, and how its result is normalised.

    norm_form: "group", a program a group; "tiles", by the moments of the convolution's tiles, or of its channels
    where a tile is none of one launch or its channels no whole groups; "split", group_norm's three launches.
    The rest are group_norm's: its tile, its chunks of the image, its warps and stages.
    """

    norm_form: str
    norm_pixels: int
    norm_channels: int
    norm_chunks: int
    norm_warps: int
    norm_stages: int


@dataclass(frozen=True)
class Norm:
    """What follows the convolution."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool
    skip: Tensor | None

    @property
    def arguments(self) -> dict[str, Any]:
        """As group_norm takes them."""
        return {name: getattr(self, name) for name in ("skip", "weight", "bias", "groups", "eps", "silu")}


def _split(arguments: Arguments) -> tuple[Arguments, Norm]:
    """A call's arguments: the convolution's and the norm's."""
    conv = {k: v for k, v in arguments.items() if not k.startswith("normed_")}
    norm = Norm(**{k.removeprefix("normed_"): v for k, v in arguments.items() if k.startswith("normed_")})
    return conv, norm


def _shape(out: Tensor, norm: Norm) -> tuple[int, int, int, int]:
    """Of the normalised result; ValueError unless the norm fits."""
    n, c, h, w = out.shape
    if norm.skip is not None:
        check_rank("normed_skip", norm.skip, "N,C,H,W")
        check_shape("normed_skip", norm.skip, (n, norm.skip.shape[1], h, w))
        c += norm.skip.shape[1]
    check_shape("normed_weight", norm.weight, (c,))
    check_shape("normed_bias", norm.bias, (c,))
    check(norm.groups > 0 and c % norm.groups == 0, f"normed_groups must divide {c} channels, found {norm.groups}")
    return n, c, h, w


def _norm_config(gpu: Gpu, out: Tensor, norm: Norm, parts: int) -> tuple[str, group_norm.Config]:
    """The norm's form and launch: a program a group while it is small, else whatever reads the image once.

    parts: programs at most that share a reduction of the convolution.
    """
    _, c, h, w = _shape(out, norm)
    found = group_norm.heuristic(gpu, x=out, skip=norm.skip, groups=norm.groups, moments=None)
    if found.form == "single" and parts > 1:
        # All parts are loaded at once: with more than 4 numbers of each a thread, or 8 of two, some card would spill.
        lanes = next_power_of_2(h * w, least=1, most=max((4096 if parts == 2 else 2048) // found.block_n, 1))
        found = dataclasses.replace(found, block_m=lanes, num_warps=16 if lanes * found.block_n >= 2048 else 8)
    if found.form == "single":
        return "group", found
    if norm.skip is not None:
        return "split", found
    width = c // norm.groups
    # Rows of 64 bytes in half precision; of wider ones a program would have to merge more groups.
    channels = next_power_of_2(c, most=max(32, next_power_of_2(width)))
    lanes = next_power_of_2(h * w, least=1, most=max(4096 // channels, 1))
    chunks = min(cdiv(2 * gpu.multiprocessors, cdiv(c, channels)), cdiv(h * w, lanes))
    return "tiles", group_norm.Config("split", lanes, channels, chunks, 4, 3)


def _config(conv: conv_tiles.Config, form: str, norm: group_norm.Config) -> Config:
    shared = {f.name: getattr(conv, f.name) for f in dataclasses.fields(conv_tiles.Config)}
    rest: dict[str, Any] = {"pixels": norm.block_m, "channels": norm.block_n, "chunks": norm.chunks}
    rest |= {"warps": norm.num_warps, "stages": norm.num_stages}
    return Config(**shared, norm_form=form, **{f"norm_{name}": value for name, value in rest.items()})


def normalised(config: Config, plan: Plan, norm: Norm) -> Plan:
    """The plan of a convolution, with the GroupNorm of its result as a second result."""
    check_choice("norm_form", config.norm_form, FORMS)
    out: Tensor = plan.result
    shape = _shape(out, norm)
    width = shape[1] // norm.groups
    *first, last = plan.launches
    launches, given = plan.launches, None
    if isinstance(last, Launch):
        shared = last.kernel is conv3x3_kernel.merge and last.arguments["scratch_parts"] is not out
        if config.norm_form == "group" and shared:
            normed = empty_nhwc(out, shape)
            return Plan((out, normed), (*first, _merge(config, last, norm, normed, width)))
        if config.norm_form == "tiles" and last.kernel is conv3x3_kernel.conv and norm.skip is None:
            if width == next_power_of_2(width, least=1) and width <= min(config.outputs, config.norm_channels):
                normed = empty_nhwc(out, shape)
                return Plan((out, normed), (*first, *_tiles(config, last, norm, out, normed, width)))
            launches = (*first, _leaving(config, last, out, out.shape[1]))
    if config.norm_form == "tiles" and norm.skip is None:
        with_moments = channel_moments.merged(Plan(out, launches))
        launches, given = with_moments.launches, with_moments.result[1]
    form = {"group": "single", "tiles": "split", "split": "split"}[config.norm_form]
    channels = max(config.norm_channels, next_power_of_2(width, least=1)) if form == "single" else config.norm_channels
    chosen = group_norm.Config(
        form, config.norm_pixels, channels, config.norm_chunks, config.norm_warps, config.norm_stages
    )
    after = group_norm.plan(chosen, x=out, **norm.arguments, moments=given, skip_moments=None)
    return Plan((out, after.result), (*launches, *after.launches))


def _merge(config: Config, last: Launch, norm: Norm, normed: Tensor, width: int) -> Launch:
    """conv3x3_kernel.merge with the norm in the same launch."""
    names = ("scratch_parts", "bias", "residual", "out", "pixels", "RESULTS", "ACTIVATION", "ACTIVATE_RESIDUAL")
    given = {name: last.arguments[name] for name in (*names, "PARTS")}
    channels = max(config.norm_channels, next_power_of_2(width, least=1))
    given |= {
        **_affine(norm, normed),
        "skip": None if norm.skip is None else nhwc(norm.skip),
        "SECOND": normed.shape[1] - given["RESULTS"],
        "WIDTH": width,
        "SILU": norm.silu,
        "PIXELS": config.norm_pixels,
        "CHANNELS": channels,
        "WHOLE": config.norm_pixels >= given["pixels"],
    }
    grid = (norm.groups, normed.shape[0])
    return Launch(conv_norm_kernel.merge, grid, given, config.norm_warps, 1)


def _affine(norm: Norm, normed: Tensor) -> dict[str, Any]:
    gain, shift = (contiguous_as(t, t.dtype) for t in (norm.weight, norm.bias))
    return {"gain": gain, "shift": shift, "normed": normed, "eps": norm.eps}


def _leaving(config: Config, last: Launch, out: Tensor, groups: int) -> Launch:
    """conv3x3_kernel.conv with the moments of its tiles, for so many groups of its channels."""
    parts = last.grid[0] // cdiv(out.shape[1], config.outputs)
    scratch = out.new_empty((out.shape[0], 3, groups, parts), dtype=torch.float32)
    more = {"scratch_moments": scratch, "WIDTH": out.shape[1] // groups}
    return dataclasses.replace(last, arguments={**last.arguments, **more})


def _tiles(config: Config, last: Launch, norm: Norm, out: Tensor, normed: Tensor, width: int) -> Iterator[Launch]:
    """The convolution, leaving the moments of its tiles for each group; their merging, if many; what normalises."""
    n, c, h, w = out.shape
    leaving = _leaving(config, last, out, norm.groups)
    yield leaving
    scratch = leaving.arguments["scratch_moments"]
    parts = scratch.shape[3]
    merged = parts > MOST_TILES
    if merged:
        whole = scratch.new_empty((n, 2, norm.groups))
        yield channel_moments.merge(scratch, whole[:, 0], whole[:, 1])
        scratch = whole
    chunk = cdiv(h * w, config.norm_chunks)
    given = {
        "x": out,
        "scratch_moments": scratch,
        **_affine(norm, normed),
        "pixels": h * w,
        "parts": parts,
        "chunk": chunk,
        "RESULTS": c,
        "WIDTH": width,
        "MERGED": merged,
        "SILU": norm.silu,
        "PARTS": next_power_of_2(parts, least=1, most=max(2048 * width // config.norm_channels, 1)),
        "PIXELS": config.norm_pixels,
        "CHANNELS": config.norm_channels,
        "STAGES": config.norm_stages,
    }
    grid = (cdiv(h * w, chunk), cdiv(c, config.norm_channels), n)
    yield Launch(conv_norm_kernel.apply, grid, given, config.norm_warps, config.norm_stages)


def _named(signature: inspect.Signature) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the convolution's arguments and the norm, called as the signature says."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*_split(bound.arguments))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _signature(schema: str, operator: Operator) -> tuple[str, inspect.Signature]:
    """Schema and signature of `<name>_norm`: the norm behind the operator's own required and optional arguments."""
    required = [p for p in inspect.signature(operator.reference).parameters.values() if p.default is p.empty]
    optional = [p for p in inspect.signature(operator.reference).parameters.values() if p.default is not p.empty]
    head, tail = schema.split(f"Tensor {required[-1].name}, ")
    head = head.replace(f"{operator.name}(", f"{operator.name}_norm(", 1)
    named = f"{head}Tensor {required[-1].name}, {REQUIRED}, {tail}".replace(
        ") -> Tensor", f", {OPTIONAL}) -> (Tensor, Tensor)"
    )
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    needed = [inspect.Parameter(f"normed_{name}", kind) for name in ("weight", "bias", "groups", "eps")]
    silu = inspect.Parameter("normed_silu", kind, default=True)
    skip = inspect.Parameter("normed_skip", kind, default=None)
    return named, inspect.Signature([*required, *needed, *optional, silu, skip])


def register_with_norm(operator: Operator, schema: str, operator_fake: Callable[..., Tensor]) -> Operator:
    """Register `<name>_norm(...) -> (out, normed)` beside an operator of this schema, with conv3x3_kernel's kernels."""
    named, signature = _signature(schema, operator)

    @_named(signature)
    def reference(conv: Arguments, norm: Norm) -> tuple[Tensor, Tensor]:
        """The operator's reference, and group_norm's on its result."""
        _shape(operator_fake(**_meta(conv)), norm)
        out = operator.reference(**conv)
        return out, group_norm.reference(out, **norm.arguments)

    @_named(signature)
    def fake(conv: Arguments, norm: Norm) -> tuple[Tensor, Tensor]:
        """Uninitialised results of the true shapes, dtype and strides; raises what the reference raises."""
        out = operator_fake(**conv)
        return out, empty_nhwc(out, _shape(out, norm))

    @_named(signature)
    def cost(conv: Arguments, norm: Norm) -> Cost:
        """The operator's and group_norm's, but for the result that passes between them."""
        out = operator_fake(**_meta(conv))
        given = [t for t in conv.values() if isinstance(t, Tensor)]
        more = nbytes(*given, norm.weight, norm.bias, norm.skip) - nbytes(*given)
        elements = math.prod(_shape(out, norm))
        least = operator.cost(**conv)
        flops = elements * (9 if norm.silu else 5)
        return Cost(least.flops + flops, least.bytes + more + elements * out.element_size())

    return register(named, reference, fake, cost, _implementation(operator, operator_fake))


def _meta(arguments: Arguments) -> Arguments:
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _looked_at(*functions: Callable[..., Any]) -> inspect.Signature:
    """A signature of what functions look at of a convolution's arguments, and of the norm's groups and second image."""
    given = [
        name for function in functions for name in inspect.signature(function).parameters if name not in ("gpu", "_")
    ]
    names = dict.fromkeys([*given, "normed_groups", "normed_skip"])
    rest = inspect.Parameter("_", inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names), rest])


def _implementation(operator: Operator, operator_fake: Callable[..., Tensor]) -> Implementation:
    assert operator.kernels is not None
    own = operator.kernels

    def bucket(**arguments: Any) -> str:
        """The operator's, with the groups and the other channels that they reach over."""
        conv, norm = _split(arguments)
        other = "" if norm.skip is None else f"+{norm.skip.shape[1]}"
        return f"{own.bucket(**conv)} in {norm.groups}{other}"

    def heuristic(gpu: Gpu, **arguments: Any) -> Config:
        """Whatever the batch, as the operator's own and group_norm's are."""
        conv, norm = _split(arguments)
        chosen = own.heuristic(gpu, **conv)
        shape: Arguments = {name: conv[name] for name in ("x", "weight", "phases", "stride") if name in conv}
        return _config(chosen, *_norm_config(gpu, operator_fake(**_meta(shape)), norm, chosen.splits))

    def plan(config: Config, **arguments: Any) -> Plan:
        """The convolution's launches and what normalises its result; raises what the reference raises."""
        conv, norm = _split(arguments)
        return normalised(config, own.plan(config, **conv), norm)

    def space(gpu: Gpu, **arguments: Any) -> Iterator[Config]:
        """The operator's own with the norm that suits each, and other tiles of the norm behind the heuristic's."""
        conv, norm = _split(arguments)
        out = operator_fake(**_meta(conv))
        for chosen in own.space(gpu, **conv):
            yield _config(chosen, *_norm_config(gpu, out, norm, chosen.splits))
        usual = own.heuristic(gpu, **conv)
        form, after = _norm_config(gpu, out, norm, usual.splits)
        for factor, warps in itertools.product((1, 2, 4), (4, 8)):
            pixels = max(after.block_m * factor // 2, 1)
            yield _config(usual, form, dataclasses.replace(after, block_m=pixels, num_warps=warps))

    # A look-up goes by what these two look at, not by all that they are given.
    looked_at = _looked_at(own.bucket, own.heuristic)
    bucket.__signature__ = heuristic.__signature__ = looked_at  # type: ignore[attr-defined]
    modules = (own.plan.__module__, group_norm.__name__, channel_moments.__name__)
    kernels = (conv_norm_kernel.__name__, group_norm_kernel.__name__, moments_kernel.__name__)
    return Implementation(Config, bucket, heuristic, plan, space, (*own.modules, *modules, *kernels))
