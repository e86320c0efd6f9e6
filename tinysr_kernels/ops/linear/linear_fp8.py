"""linear_fp8: a matrix product of e4m3 operands with everything that touches its result.

    v   = (x * x_scale) @ (weight * weight_scale).T + bias
    out = residual + act(v)

x_scale has one value for each row, or one for each of S equal groups of a row's elements; weight_scale one for each
feature, which also takes a gate, as bias does. act: none, or gelu_tanh. Partial sums of at most 128 products leave the
tensor cores, whose fp8 accumulators keep 13 digits (Hopper and Ada: arXiv 2411.10958, section 3; arXiv 2412.19437,
section 3.3.2), and are scaled and added in float32.

`linear_fp8_quantized` gives act(v) in e4m3 in its turn, with a scale for each row and group of features (`out_group`):
what the next linear_fp8 takes, without another pass and without calibration.

Layouts: x [...,K] and weight [O,K] in float8_e4m3fn, K a multiple of 32; x_scale [...,S] with groups that are
multiples of 32; weight_scale and bias [O]; residual and out [...,O], out contiguous.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import KERNEL_DTYPES, Cost
from tinysr_kernels.ops.checks import check, check_choice, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, nbytes
from tinysr_kernels.ops.linear.kernels import linear_fp8 as linear_fp8_kernel
from tinysr_kernels.ops.linear.kernels import quantize as quantize_kernel
from tinysr_kernels.ops.linear.quantize import CAPABILITY, E4M3, SMALLEST, dequantized, quantized
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

FP8_ACTIVATIONS = ("none", "gelu_tanh")
STEP = 32
"""What a group of a row's elements, and so a row, must be a multiple of: the depth of one fp8 instruction."""
GROUPS = (128, 64, 32)

SCHEMA = (
    "linear_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, ScalarType dtype, Tensor? bias=None, "
    'Tensor? residual=None, str activation="none") -> Tensor'
)
QUANTIZED_SCHEMA = (
    "linear_fp8_quantized(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, ScalarType dtype, "
    'Tensor? bias=None, str activation="none") -> (Tensor, Tensor)'
)


def out_group(features: int) -> int:
    """Features that share a scale in the result of linear_fp8_quantized; 0 where their number is no multiple of 32."""
    return next((group for group in GROUPS if features % group == 0), 0)


def _check(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[int, ...]:
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
    check_shape("weight_scale", weight_scale, (features,))
    check_shape("bias", bias, (features,))
    check_choice("activation", activation, FP8_ACTIVATIONS)
    out = (*x.shape[:-1], features)
    check_shape("residual", residual, out)
    return out


def _check_quantized(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str,
) -> tuple[tuple[int, ...], int]:
    out = _check(x, x_scale, weight, weight_scale, dtype, bias, None, activation)
    group = out_group(out[-1])
    check(group > 0, f"weight must have a multiple of {STEP} rows for a quantised result, found {out[-1]}")
    return out, group


def _values(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """act(v) in a wide dtype."""
    v = F.linear(contiguous_as(dequantized(x, x_scale, dtype), dtype), contiguous_as(weight, dtype)) * weight_scale.to(
        dtype
    )
    if bias is not None:
        v = v + bias.to(dtype)
    return F.gelu(v, approximate="tanh") if activation == "gelu_tanh" else v


def reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    The result is in `dtype`. Raises ValueError naming argument, expected and found.
    """
    _check(x, x_scale, weight, weight_scale, dtype, bias, residual, activation)
    v = _values(x, x_scale, weight, weight_scale, bias, activation, compute_dtype(dtype))
    if residual is not None:
        v = v + residual.to(v.dtype)
    return contiguous_as(v, dtype)


def quantized_reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (q [...,O] in e4m3, scale [...,O/out_group]), in float32 or, if `dtype` is wider, in that."""
    out, group = _check_quantized(x, x_scale, weight, weight_scale, dtype, bias, activation)
    return quantized(
        _values(x, x_scale, weight, weight_scale, bias, activation, compute_dtype(dtype)), out[-1] // group
    )


def fake(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return x.new_empty(_check(x, x_scale, weight, weight_scale, dtype, bias, residual, activation), dtype=dtype)


def quantized_fake(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """As `fake`."""
    out, group = _check_quantized(x, x_scale, weight, weight_scale, dtype, bias, activation)
    return x.new_empty(out), x.new_empty((*out[:-1], out[-1] // group), dtype=compute_dtype(dtype))


def cost(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Cost:
    """FLOPs of the matrix product; bytes of every tensor once."""
    rows = x.numel() // x.shape[-1]
    moved = nbytes(x, x_scale, weight, weight_scale, bias, residual)
    return Cost(2 * rows * weight.numel(), moved + rows * weight.shape[0] * dtype.itemsize)


def quantized_cost(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Cost:
    """FLOPs of the matrix product; bytes of every tensor once."""
    rows, features = x.numel() // x.shape[-1], weight.shape[0]
    moved = nbytes(x, x_scale, weight, weight_scale, bias)
    written = rows * (features + features // out_group(features) * compute_dtype(dtype).itemsize)
    return Cost(2 * rows * weight.numel(), moved + written)


@dataclass(frozen=True)
class Config:
    """A launch of either: rows and columns of a tile, slice of the reduction a step, blocks of rows run together.

    Groups that slice does not divide shorten it; a quantised result has tiles one group wide.
    """

    rows: int
    columns: int
    slice: int
    band: int
    warps: int
    stages: int


# Tiles, rows x columns, and how much of the arithmetic each can be hoped to reach: larger ones load less for each
# product. The partial sums are a second set of accumulators, so larger ones still would spill. An ordering, not a
# measurement.
TILES = ((128, 128, 1.0), (64, 128, 0.9), (64, 64, 0.7))


def bucket(x: Tensor, x_scale: Tensor, weight: Tensor, dtype: torch.dtype, activation: str, **_: Any) -> str:
    """Calls that share a configuration: result, groups, depth, features, rows of a sample, activation."""
    shape = f"{x.shape[-1]}/{x_scale.shape[-1]}->{weight.shape[0]} {next_power_of_2(_rows(x))}"
    return f"{str(dtype).removeprefix('torch.')} {shape} {activation}"


def _rows(x: Tensor) -> int:
    """Rows of one sample: a configuration must not depend on the batch, or a result would."""
    return x.shape[-2] if x.dim() > 2 else 1024


def heuristic(gpu: Gpu, x: Tensor, weight: Tensor, **_: Any) -> Config:
    """The tile with the least time by waves of programs and what a tile can be hoped to reach."""
    features = weight.shape[0]

    def time(tile: tuple[int, int, float]) -> float:
        rows, columns, reach = tile
        programs = cdiv(_rows(x), rows) * cdiv(features, columns)
        return cdiv(programs, gpu.multiprocessors) * rows * columns / reach

    # Where products read registers instead of shared memory, slices of 128 leave too few of them.
    slice_ = 128 if gpu.arch in (90, 100) else 64
    # Masks and single elements take registers of their own: 64 columns leave room for them.
    ragged = features % 16 != 0 or x.shape[-1] % slice_ != 0
    rows, columns = min(TILES[-1:] if ragged else TILES, key=time)[:2]
    return Config(rows, columns, slice_, 8, 8 if rows * columns > 8192 else 4, 3)


def _launch(
    config: Config,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
    out_scale: Tensor | None,
) -> Launch:
    depth, groups, features = x.shape[-1], x_scale.shape[-1], weight.shape[0]
    rows = x.numel() // depth
    columns = config.columns if out_scale is None else features // out_scale.shape[-1]
    group = depth // groups
    slice_ = config.slice
    while groups > 1 and group % slice_:
        slice_ //= 2
    arguments = {
        "x": contiguous_as(x, x.dtype),
        "x_scale": contiguous_as(x_scale, x_scale.dtype),
        "weight": contiguous_as(weight, weight.dtype),
        "weight_scale": contiguous_as(weight_scale, weight_scale.dtype),
        "bias": None if bias is None else contiguous_as(bias, bias.dtype),
        "residual": None if residual is None else contiguous_as(residual, residual.dtype),
        "out": out,
        "out_scale": out_scale,
        "smallest": SMALLEST,
        "rows": rows,
        "features": features,
        "depth": depth,
        "groups": groups,
        "ACTIVATION": activation,
        "ROWS": config.rows,
        "COLUMNS": columns,
        "SLICE": slice_,
        "GROUP": group if groups > 1 else 0,
        "WHOLE": depth % slice_ == 0,
        "BAND": config.band,
    }
    grid = (cdiv(rows, config.rows) * cdiv(features, columns),)
    return Launch(linear_fp8_kernel.linear, grid, arguments, config.warps, config.stages)


def plan(
    config: Config,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Plan:
    """The launch; raises what the reference raises. Inputs that are not dense are copied once."""
    out = fake(x, x_scale, weight, weight_scale, dtype, bias, residual, activation)
    launch = _launch(config, x, x_scale, weight, weight_scale, bias, residual, activation, out, None)
    return Plan(out, (launch,))


def quantized_plan(
    config: Config,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str,
) -> Plan:
    """As `plan`."""
    out, scale = quantized_fake(x, x_scale, weight, weight_scale, dtype, bias, activation)
    launch = _launch(config, x, x_scale, weight, weight_scale, bias, None, activation, out, scale)
    return Plan((out, scale), (launch,))


def space(gpu: Gpu, **_: Any) -> Iterator[Config]:
    """Tiles of powers of two whose two sets of sums fit the registers of their warps."""
    for rows, columns, slice_, warps, stages, band in itertools.product(
        (32, 64, 128), (32, 64, 128), (64, 128), (4, 8), (2, 3, 4), (4, 8)
    ):
        if rows * columns <= 2048 * warps and (rows + columns) * slice_ * stages <= gpu.shared_limit:
            yield Config(rows, columns, slice_, band, warps, stages)


MODULES = (linear_fp8_kernel.__name__, quantize_kernel.__name__, device_functions.__name__)
KERNELS = Implementation(
    Config, bucket, heuristic, plan, space, MODULES, dtypes=(*KERNEL_DTYPES, E4M3), capability=CAPABILITY
)
QUANTIZED_KERNELS = dataclasses.replace(KERNELS, plan=quantized_plan)

linear_fp8 = register(SCHEMA, reference, fake, cost, KERNELS)
linear_fp8_quantized = register(
    QUANTIZED_SCHEMA, quantized_reference, quantized_fake, quantized_cost, QUANTIZED_KERNELS
)
