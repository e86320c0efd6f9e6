"""linear: a matrix product with everything that touches its result.

    v = x @ weight.T + x2 @ weight2.T + bias
    out = residual + gate * act(v)

act: none, gelu_tanh (tanh approximation), or geglu: v = [a, g] in halves, a * gelu(g) with exact GELU. gate multiplies
where a gate could not be folded into the weight. Layouts: x [...,K], weight [O,K], x2 [...,K2], weight2 [O,K2], bias
[O]; with F = O, or O/2 for geglu: gate [F], residual and out [...,F], out contiguous.

With row_moments [...,2,ceil(K/32)] of x and weight_sums [O], the sums of weight's rows, x is the input of a LayerNorm
without affine part (ops/norm/row_moments.py), and there is no x2:

    v = (x @ weight.T - mean * weight_sums) / sqrt(variance + eps) + bias

`linear_row_moments` leaves such moments of its own result.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu, gpu_of
from tinysr_kernels.launch.plan import Launch, Library, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_choice, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, nbytes
from tinysr_kernels.ops.linear import cublaslt
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.norm import layer_norm
from tinysr_kernels.ops.norm.kernels import row_moments as row_moments_kernel
from tinysr_kernels.ops.norm.row_moments import PART, check_row_moments, merged, register_with_row_moments, scratch
from tinysr_kernels.ops.reference_math import compute_dtype, matmul
from tinysr_kernels.ops.registry import Implementation, register

LINEAR_ACTIVATIONS = ("none", "gelu_tanh", "geglu")
SCHEMA = (
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? gate=None, "
    'str activation="none", Tensor? x2=None, Tensor? weight2=None, Tensor? row_moments=None, '
    "Tensor? weight_sums=None, float eps=0.0) -> Tensor"
)


def _out_shape(x: Tensor, weight: Tensor, activation: str) -> tuple[int, ...]:
    features = weight.shape[0] // (2 if activation == "geglu" else 1)
    return (*x.shape[:-1], features)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    activation: str,
    x2: Tensor | None,
    weight2: Tensor | None,
    row_moments: Tensor | None,
    weight_sums: Tensor | None,
) -> tuple[int, ...]:
    check(x.dim() >= 1, f"x must be [...,K], found {list(x.shape)}")
    check_rank("weight", weight, "O,K")
    o = weight.shape[0]
    check_shape("weight", weight, (o, x.shape[-1]))
    check_shape("bias", bias, (o,))
    check_choice("activation", activation, LINEAR_ACTIVATIONS)
    check(activation != "geglu" or o % 2 == 0, f"weight must have an even number of rows for geglu, found {o}")
    check((x2 is None) == (weight2 is None), "x2 and weight2 must be given together, found only one of them")
    if x2 is not None and weight2 is not None:
        check(x2.dim() >= 1, f"x2 must be [...,K2], found {list(x2.shape)}")
        check_shape("x2", x2, (*x.shape[:-1], x2.shape[-1]))
        check_shape("weight2", weight2, (o, x2.shape[-1]))
        check(row_moments is None, "x2 must not be given with row_moments, found both")
    check_row_moments(x, o, row_moments, weight_sums)
    out = _out_shape(x, weight, activation)
    check_shape("gate", gate, out[-1:])
    check_shape("residual", residual, out)
    return out


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check(x, weight, bias, residual, gate, activation, x2, weight2, row_moments, weight_sums)
    dtype = compute_dtype(x.dtype)
    added = None if bias is None else contiguous_as(bias, dtype)
    if row_moments is None or weight_sums is None:
        v = matmul(contiguous_as(x, dtype), contiguous_as(weight, dtype), added)
    else:
        mean, variance = merged(row_moments.to(dtype), x.shape[-1])
        v = matmul(contiguous_as(x, dtype), contiguous_as(weight, dtype))
        v.addcmul_(mean, weight_sums.to(dtype), value=-1).mul_((variance + eps).rsqrt())
        if added is not None:
            v += added
    if x2 is not None and weight2 is not None:
        v += matmul(contiguous_as(x2, dtype), contiguous_as(weight2, dtype))
    if activation == "gelu_tanh":
        torch.ops.aten.gelu_(v, approximate="tanh")
    elif activation == "geglu":
        a, g = v.chunk(2, -1)
        v = a * torch.ops.aten.gelu_(g)
    if gate is not None:
        v *= gate.to(dtype)
    if residual is not None:
        v += residual.to(dtype)
    return contiguous_as(v, x.dtype)


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return x.new_empty(_check(x, weight, bias, residual, gate, activation, x2, weight2, row_moments, weight_sums))


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Cost:
    """FLOPs of the matrix products; bytes of every tensor once."""
    shape = _out_shape(x, weight, activation)
    rows = x.numel() // x.shape[-1]
    flops = 2 * rows * (weight.numel() + (0 if weight2 is None else weight2.numel()))
    moved = nbytes(x, weight, bias, residual, gate, x2, weight2, row_moments, weight_sums)
    return Cost(flops, moved + rows * shape[-1] * x.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of linear. form: "tile" (linear_kernel's docstring), or "library", which ignores the rest.

    rows, columns and side: of a tile, side the second block of features or 0 (geglu has one as wide as the first);
    slice: of the reduction, a step; band: blocks of rows that run together.
    """

    form: str
    rows: int
    columns: int
    side: int
    slice: int
    band: int
    warps: int
    stages: int


LIBRARY = Config("library", 1, 1, 0, 1, 1, 1, 1)

# Tiles of half-precision products, rows x (columns + side), and how much of the arithmetic each can be hoped to reach:
# larger ones load less for each product. An ordering, not a measurement.
TILES = (
    (128, 128, 64, 1.0),
    (128, 128, 0, 0.95),
    (128, 64, 32, 0.85),
    (64, 128, 0, 0.8),
    (64, 64, 32, 0.7),
    (64, 64, 0, 0.65),
)


def bucket(x: Tensor, weight: Tensor, activation: str, x2: Tensor | None, row_moments: Tensor | None, **_: Any) -> str:
    """Calls that share a configuration: dtype, depths, features, rows of a sample to a power of two, what is fused."""
    depth = f"{x.shape[-1]}{'' if x2 is None else f'+{x2.shape[-1]}'}"
    fused = activation if row_moments is None else f"{activation} normed"
    return f"{str(x.dtype).removeprefix('torch.')} {depth}->{weight.shape[0]} {next_power_of_2(_rows(x))} {fused}"


def _rows(x: Tensor) -> int:
    """Rows of one sample: a configuration must not depend on the batch, or a result would."""
    return x.shape[-2] if x.dim() > 2 else 1024


def heuristic(
    gpu: Gpu, x: Tensor, weight: Tensor, activation: str, x2: Tensor | None, row_moments: Tensor | None, **_: Any
) -> Config:
    """The tile with the least time by waves of programs and what a tile can be hoped to reach."""
    features = _out_shape(x, weight, activation)[-1]
    if x.element_size() == 4:
        # Products of float32 run without tensor cores, from registers.
        side = 32 if activation == "geglu" else 0
        return Config("tile", 32, 32 if side else next_power_of_2(features, most=64), side, 16, 8, 4, 2)

    def time(tile: tuple[int, int, int, float]) -> float:
        rows, columns, side, reach = tile
        width = columns + side
        if activation == "geglu":
            width //= 2
        programs = cdiv(_rows(x), rows) * cdiv(features, width)
        return cdiv(programs, gpu.multiprocessors) * rows * (columns + side) / reach

    device_functions = [t for t in TILES if activation != "geglu" or t[2] == 0]
    rows, columns, side = min(device_functions, key=time)[:3]
    if activation == "geglu":
        columns = side = columns // 2
    # Steps that are not whole take masks, and datacentre Blackwell's products registers of their own: then 64 spill.
    whole = all(t.shape[-1] % 64 == 0 for t in (x, x2) if t is not None)
    slice_ = 64 if whole and gpu.shared_limit > 128 << 10 and gpu.arch < 100 else 32
    # Without warpgroup products the operands of the largest tile are in registers too, and leave none for the norm.
    if row_moments is not None and gpu.arch < 90 and rows * (columns + side) > 128 * 128:
        slice_ = 32
    return Config("tile", rows, columns, side, slice_, 8, 8 if rows * (columns + side) > 8192 else 4, 3)


def plan(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    activation: str,
    x2: Tensor | None,
    weight2: Tensor | None,
    row_moments: Tensor | None,
    weight_sums: Tensor | None,
    eps: float,
    moments: bool = False,
) -> Plan:
    """The launch; raises what the reference raises. Inputs that are not dense are copied once.

    moments: whether the launch leaves those of the result's rows.
    """
    shape = _check(x, weight, bias, residual, gate, activation, x2, weight2, row_moments, weight_sums)
    out = x.new_empty(shape)
    # The product runs in the widest dtype of its operands; networks give them all the same.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, weight, x2, weight2) if t is not None))
    given = {
        "x": contiguous_as(x, x.dtype),
        "weight": contiguous_as(weight, dtype),
        "x2": None if x2 is None else contiguous_as(x2, x2.dtype),
        "weight2": None if weight2 is None else contiguous_as(weight2, dtype),
        "bias": None if bias is None else contiguous_as(bias, bias.dtype),
        "residual": None if residual is None else contiguous_as(residual, residual.dtype),
        "gate": None if gate is None else contiguous_as(gate, gate.dtype),
        "out": out,
    }
    if config.form == "library":
        return Plan(out, _by_library(given, activation, row_moments is not None, eps))
    depth, second = x.shape[-1], 0 if x2 is None else x2.shape[-1]
    rows, features = x.numel() // depth, shape[-1]
    width = config.columns if activation == "geglu" else config.columns + config.side
    check(activation != "geglu" or config.side == config.columns, "geglu needs a second block as wide as the first")
    narrow = min(config.columns, config.side or config.columns)
    check(not moments or narrow % PART == 0, f"row moments need blocks of whole {PART} features")
    arguments = {
        **given,
        "row_moments": None if row_moments is None else contiguous_as(row_moments, row_moments.dtype),
        "weight_sums": None if weight_sums is None else contiguous_as(weight_sums, weight_sums.dtype),
        "out_moments": scratch(out) if moments else None,
        "eps": eps,
        "rows": rows,
        "features": features,
        "depth": depth,
        "second_depth": second,
        "ACTIVATION": activation,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "SIDE": config.side,
        "SLICE": config.slice,
        "WHOLE": depth % config.slice == 0 and second % config.slice == 0,
        "BAND": config.band,
        "PART": PART,
        "PARTS": next_power_of_2(cdiv(depth, PART), least=1),
    }
    grid = (cdiv(rows, config.rows) * cdiv(features, width),)
    return Plan(out, (Launch(linear_kernel.linear, grid, arguments, config.warps, config.stages),))


def _by_library(given: dict[str, Any], activation: str, normed: bool, eps: float) -> tuple[Launch | Library, ...]:
    """The library's product, behind a LayerNorm of ours where x is the input of one."""
    launches: tuple[Launch | Library, ...] = ()
    if normed:
        x = given["x"]
        norm = layer_norm.plan(layer_norm.heuristic(gpu_of(x), x), x, eps)
        launches, given = norm.launches, {**given, "x": norm.result}
    kernels = cublaslt.kernels(given, activation)
    return (*launches, Library(cublaslt.linear, {**given, "activation": activation}, kernels))


def space(gpu: Gpu, x: Tensor, weight: Tensor, activation: str, **_: Any) -> Iterator[Config]:
    """The library; tiles of powers of two and of one and a half, whose sums fit the registers of their warps."""
    yield LIBRARY
    half = x.element_size() == 2
    blocks_of_features = (
        [(c, c) for c in (32, 64, 128)] if activation == "geglu" else [(c, 0) for c in (32, 64, 128, 256)]
    )
    if activation != "geglu":
        blocks_of_features += [(64, 32), (128, 64)]
    for rows, (columns, side), slice_, warps, stages, band in itertools.product(
        (32, 64, 128), blocks_of_features, (32, 64, 128) if half else (16, 32), (4, 8), (2, 3, 4), (4, 8)
    ):
        buffers = (rows + columns + side) * slice_ * x.element_size() * stages
        if rows * (columns + side) <= 4096 * warps and buffers <= gpu.shared_limit:
            yield Config("tile", rows, columns, side, slice_, band, warps, stages)


def _whole_parts(config: Config) -> Config:
    return replace(config, columns=max(config.columns, PART), side=max(config.side, PART) if config.side else 0)


MODULES = (linear_kernel, cublaslt, row_moments_kernel, device_functions)
KERNELS = Implementation(Config, bucket, heuristic, plan, space, tuple(m.__name__ for m in MODULES))

linear = register(SCHEMA, reference, fake, cost, KERNELS)
linear_row_moments = register_with_row_moments(linear, SCHEMA, fake, _whole_parts)
