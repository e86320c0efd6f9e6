"""linear_fp8: a matmul of e4m3 operands with its epilogue.

    v   = (x * x_scale) @ (weight * weight_scale).T + bias
    out = residual + act(v)

x_scale has one value per row, or one for each of S equal groups of a row's elements; weight_scale one per feature,
into which a gate can be folded, as into bias. act: none, or gelu_tanh. Partial sums of at most 128 multiply-adds leave
the tensor cores, whose fp8 accumulators keep 13 fraction bits (Hopper and Ada: arXiv 2411.10958, section 3; arXiv
2412.19437, section 3.3.2), and are scaled and added in float32.

`linear_fp8_quantized` returns act(v) in e4m3 itself, with a scale for each row and group of features (`out_group`):
what the next linear_fp8 consumes, without another pass and without calibration.

Layouts: x [...,K] and weight [O,K] in float8_e4m3fn, K a multiple of 32; x_scale [...,S] with groups that are
multiples of 32; weight_scale and bias [O]; residual and out [...,O], out contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import KERNEL_DTYPES, Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_choice, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, nbytes
from tinysr_kernels.ops.linear.kernels import linear_fp8 as linear_fp8_kernel
from tinysr_kernels.ops.linear.linear import sample_rows
from tinysr_kernels.ops.linear.quantize import CAPABILITY, E4M3, SMALLEST, dequantized, quantized
from tinysr_kernels.ops.reference_math import compute_dtype

FP8_ACTIVATIONS = ("none", "gelu_tanh")
STEP = 32
"""What a group of a row's elements, and so a row, must be a multiple of: the depth of one fp8 instruction."""
GROUPS = (128, 64, 32)

# Tiles, block_m x block_n, and the share of the arithmetic that each can hope to reach: larger ones load less per
# multiply-add. The partial sums are a second set of accumulators, so still larger ones would spill. An ordering, not a
# measurement.
TILES = ((128, 128, 1.0), (64, 128, 0.9), (64, 64, 0.7))


def out_group(features: int) -> int:
    """Features per scale in the result of linear_fp8_quantized; 0 if their number is not a multiple of 32."""
    return next((group for group in GROUPS if features % group == 0), 0)


@dataclass(frozen=True)
class Config:
    """A launch of either operator: rows and features of a tile, elements of the reduction per step, L2 swizzle.

    Groups that block_k does not divide shorten it; a quantized result has tiles one group wide. group_m: blocks of
    rows that run together.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(slots=True, eq=False)
class Fp8Matmul(Operator):
    """What both operators have in common: the operands, their scales, and the choice of a launch configuration."""

    config = Config
    tuned_by = ("x", "x_scale", "weight", "dtype", "activation")
    dtypes = (*KERNEL_DTYPES, E4M3)
    capability = CAPABILITY

    x: Tensor
    x_scale: Tensor
    weight: Tensor
    weight_scale: Tensor
    dtype: torch.dtype
    bias: Tensor | None = None

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[...,O] of the result."""
        return (*self.x.shape[:-1], self.weight.shape[0])

    def cost(self) -> Cost:
        """FLOPs of the matmul; bytes of every tensor once."""
        results = self.empty()
        written = nbytes(results) if isinstance(results, Tensor) else nbytes(*results)
        rows = self.x.numel() // self.x.shape[-1]
        return Cost(2 * rows * self.weight.numel(), nbytes(*self.tensors) + written)

    def heuristic(self, gpu: Gpu) -> Config:
        """The tile with the least time, by waves of programs and the share of the arithmetic that it can reach."""
        features, depth = self.weight.shape

        def time(tile: tuple[int, int, float]) -> float:
            block_m, block_n, reach = tile
            programs = cdiv(sample_rows(self.x), block_m) * cdiv(features, block_n)
            return cdiv(programs, gpu.multiprocessors) * block_m * block_n / reach

        # Where matmuls read registers instead of shared memory, steps of 128 leave too few of them.
        block_k = 128 if gpu.arch in (90, 100) else 64
        # Masks and single elements take registers of their own: 64 features leave room for them.
        ragged = features % 16 != 0 or depth % block_k != 0
        block_m, block_n, _ = min(TILES[-1:] if ragged else TILES, key=time)
        return Config(block_m, block_n, block_k, 8, 8 if block_m * block_n > 8192 else 4, 3)

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """Tiles of powers of two whose two sets of accumulators fit the registers of their warps."""
        for block_m, block_n, block_k, num_warps, num_stages, group_m in itertools.product(
            (32, 64, 128), (32, 64, 128), (64, 128), (4, 8), (2, 3, 4), (4, 8)
        ):
            fits = (block_m + block_n) * block_k * num_stages <= gpu.shared_limit
            if block_m * block_n <= 2048 * num_warps and fits:
                yield Config(block_m, block_n, block_k, group_m, num_warps, num_stages)


@register
@dataclass(slots=True, eq=False)
class LinearFp8(Fp8Matmul):
    """One matmul with a result in `dtype`; fields and mathematics as in the module's docstring."""

    name = "linear_fp8"

    residual: Tensor | None = None
    activation: str = "none"

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        _check(self)
        check_shape("residual", self.residual, self.out_shape)

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider; the result is in `dtype`."""
        v = _values(self)
        if self.residual is not None:
            v = v + self.residual.to(v.dtype)
        return contiguous_as(v, self.dtype)

    def library(self) -> Tensor:
        """The matmul of the dequantized operands in `dtype`. Sums of e4m3's own 448 would overflow float16."""
        dtype = self.dtype
        x = dequantized(contiguous_as(self.x), self.x_scale, dtype)
        weight = dequantized(contiguous_as(self.weight), self.weight_scale[:, None], dtype)
        v = F.linear(x, weight, contiguous_as(self.bias, dtype))
        if self.activation == "gelu_tanh":
            torch.ops.aten.gelu_(v, approximate="tanh")
        return v if self.residual is None else v.add_(self.residual.to(dtype))

    def empty(self) -> Tensor:
        """[...,O], contiguous, in `dtype`."""
        return self.x.new_empty(self.out_shape, dtype=self.dtype)

    def bucket(self) -> str:
        """dtype, K, groups, features, rows of a sample up to a power of two, activation."""
        return _bucket(self)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out = self.empty()
        return Plan(out, (_launch(config, self, out, self.residual),))


@register
@dataclass(slots=True, eq=False)
class LinearFp8Quantized(Fp8Matmul):
    """One matmul with a result in e4m3; fields and mathematics as in the module's docstring."""

    name = "linear_fp8_quantized"
    returns = "(Tensor, Tensor)"

    activation: str = "none"

    @property
    def out_groups(self) -> int:
        """Scales per row of the result."""
        features = self.weight.shape[0]
        return features // out_group(features)

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        _check(self)
        features = self.weight.shape[0]
        found = f"found {features}"
        check(out_group(features) > 0, f"weight must have a multiple of {STEP} rows for a quantized result, {found}")

    def reference(self) -> tuple[Tensor, Tensor]:
        """Plain PyTorch, in float32 or, if `dtype` is wider, in that: (q, scale)."""
        return quantized(_values(self), self.out_groups)

    def empty(self) -> tuple[Tensor, Tensor]:
        """(q [...,O] in e4m3, scale [...,O/out_group] in float32 or wider), contiguous."""
        scale_shape = (*self.out_shape[:-1], self.out_groups)
        return self.x.new_empty(self.out_shape), self.x.new_empty(scale_shape, dtype=compute_dtype(self.dtype))

    def bucket(self) -> str:
        """dtype, K, groups, features, rows of a sample up to a power of two, activation."""
        return _bucket(self)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out, scale = self.empty()
        return Plan((out, scale), (_launch(config, self, out, out_scale=scale),))


Call: TypeAlias = LinearFp8 | LinearFp8Quantized


def _check(call: Call) -> None:
    """The checks of the fields that both operators have."""
    x, x_scale, weight, dtype = call.x, call.x_scale, call.weight, call.dtype
    check(x.dim() >= 1, f"x must be [...,K], found {list(x.shape)}")
    check_rank("weight", weight, "O,K")
    features, depth = weight.shape
    for name, t in (("x", x), ("weight", weight)):
        check(t.dtype == E4M3, f"{name} must be of {E4M3}, found {t.dtype}")
    check(dtype.is_floating_point and dtype.itemsize > 1, f"dtype must be floating, of 16 bits or more, found {dtype}")
    check_shape("weight", weight, (features, x.shape[-1]))
    check(depth % STEP == 0, f"x and weight must be a multiple of {STEP} deep, found {depth}")
    check(x_scale.dim() >= 1, f"x_scale must be [...,S], found {list(x_scale.shape)}")
    check_shape("x_scale", x_scale, (*x.shape[:-1], x_scale.shape[-1]))
    groups = x_scale.shape[-1]
    check(
        groups == 1 or depth % (groups * STEP) == 0,
        f"x_scale must have groups of a multiple of {STEP} of {depth} elements, found {groups} groups",
    )
    check_shape("weight_scale", call.weight_scale, (features,))
    check_shape("bias", call.bias, (features,))
    check_choice("activation", call.activation, FP8_ACTIVATIONS)


def _values(call: Call) -> Tensor:
    """act(v) in float32 or wider."""
    dtype = compute_dtype(call.dtype)
    x = contiguous_as(dequantized(call.x, call.x_scale, dtype), dtype)
    v = F.linear(x, contiguous_as(call.weight, dtype)) * call.weight_scale.to(dtype)
    if call.bias is not None:
        v = v + call.bias.to(dtype)
    return F.gelu(v, approximate="tanh") if call.activation == "gelu_tanh" else v


def _bucket(call: Call) -> str:
    name = str(call.dtype).removeprefix("torch.")
    shape = f"{call.x.shape[-1]}/{call.x_scale.shape[-1]}->{call.weight.shape[0]}"
    return f"{name} {shape} {next_power_of_2(sample_rows(call.x))} {call.activation}"


def _launch(
    config: Config, call: Call, out: Tensor, residual: Tensor | None = None, out_scale: Tensor | None = None
) -> Launch:
    """The launch of a call into `out`, which is e4m3 if there is an out_scale."""
    depth, groups, features = call.x.shape[-1], call.x_scale.shape[-1], call.weight.shape[0]
    rows = call.x.numel() // depth
    group = depth // groups
    block_n = config.block_n if out_scale is None else features // out_scale.shape[-1]
    block_k = config.block_k
    while groups > 1 and group % block_k:
        block_k //= 2
    arguments = {
        "x": contiguous_as(call.x),
        "x_scale": contiguous_as(call.x_scale),
        "weight": contiguous_as(call.weight),
        "weight_scale": contiguous_as(call.weight_scale),
        "bias": contiguous_as(call.bias),
        "residual": contiguous_as(residual),
        "out": out,
        "out_scale": out_scale,
        "smallest": SMALLEST,
        "M": rows,
        "N": features,
        "K": depth,
        "groups": groups,
        "ACTIVATION": call.activation,
        "BLOCK_M": config.block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_K": group if groups > 1 else 0,
        "EVEN_K": depth % block_k == 0,
        "GROUP_M": config.group_m,
    }
    grid = (cdiv(rows, config.block_m) * cdiv(features, block_n),)
    return Launch(linear_fp8_kernel.linear_fp8, grid, arguments, config.num_warps, config.num_stages)
