"""unpatchify_subtract: the projection of tokens to patches, laid out as an image and taken from the latent.

    out[n,c,y*p+i,x*p+j] = z[n,c,y*p+i,x*p+j] - (t @ weight.T + bias)[n, y*w+x, (i*p+j)*C+c]

N x (h*w) tokens become p x p patches of C channels: SD3's proj_out and unpatchify (order nhwpqc -> nchpwq) and TinySR's
z - transformer(z) at once. With row_moments [N,h*w,2,ceil(D/32)] of t and weight_sums [p*p*C], t goes through a
LayerNorm first, as in ops/linear/linear.py. Layouts: t [N,h*w,D], weight [p*p*C,D], bias [p*p*C], z [N,C,h*p,w*p] of
any strides, out channels_last.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.linear import linear
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.norm.kernels import row_moments as row_moments_kernel
from tinysr_kernels.ops.norm.row_moments import PART, check_row_moments
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = (
    "unpatchify_subtract(Tensor t, Tensor weight, Tensor? bias, Tensor z, int patch_size, Tensor? row_moments=None, "
    "Tensor? weight_sums=None, float eps=0.0) -> Tensor"
)


def _check(
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    patch_size: int,
    row_moments: Tensor | None,
    weight_sums: Tensor | None,
) -> None:
    check_rank("z", z, "N,C,H,W")
    check_rank("t", t, "N,T,D")
    check(patch_size >= 1, f"patch_size must be at least 1, found {patch_size}")
    n, c, h, w = z.shape
    check(
        h % patch_size == 0 and w % patch_size == 0,
        f"z must be a multiple of the patch size {patch_size} per side, found {h}x{w}",
    )
    check_shape("t", t, (n, (h // patch_size) * (w // patch_size), t.shape[2]))
    features = patch_size * patch_size * c
    check_shape("weight", weight, (features, t.shape[2]))
    check_shape("bias", bias, (features,))
    check_row_moments(t, features, row_moments, weight_sums)


def reference(
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    patch_size: int,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has z's. Raises ValueError naming argument, expected and found.
    """
    _check(t, weight, bias, z, patch_size, row_moments, weight_sums)
    dtype = compute_dtype(t.dtype)
    v = linear.reference(t.to(dtype), weight.to(dtype), bias, row_moments=row_moments, weight_sums=weight_sums, eps=eps)
    n, c, h, w = z.shape
    p = patch_size
    image = v.view(n, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
    return nhwc((z.to(dtype) - image).to(z.dtype))


def fake(
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    patch_size: int,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check(t, weight, bias, z, patch_size, row_moments, weight_sums)
    return empty_nhwc(z, tuple(z.shape))


def cost(
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    patch_size: int,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Cost:
    """FLOPs of the matrix product; bytes of every tensor once."""
    flops = 2 * t.shape[0] * t.shape[1] * weight.numel()
    return Cost(flops, nbytes(t, weight, bias, z, row_moments, weight_sums) + z.numel() * z.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of unpatchify_subtract: rows and columns of a tile of the product; slice of the reduction, a step."""

    rows: int
    columns: int
    slice: int
    warps: int
    stages: int


def bucket(t: Tensor, weight: Tensor, **_: Any) -> str:
    """Calls that share a configuration: dtype, depth, features, tokens of a sample up to a power of two."""
    return f"{str(t.dtype).removeprefix('torch.')} {t.shape[2]}->{weight.shape[0]} {next_power_of_2(t.shape[1])}"


def heuristic(gpu: Gpu, t: Tensor, weight: Tensor, **_: Any) -> Config:
    """Small tiles: the product is narrow, and there must be enough of them."""
    half = t.element_size() == 2
    return Config(16, next_power_of_2(weight.shape[0], most=32), 64 if half else 16, 4, 3 if half else 2)


def plan(
    config: Config,
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    patch_size: int,
    row_moments: Tensor | None,
    weight_sums: Tensor | None,
    eps: float,
) -> Plan:
    """The launch; raises what the reference raises. Inputs that are not dense in their layout are copied once."""
    _check(t, weight, bias, z, patch_size, row_moments, weight_sums)
    out = empty_nhwc(z, tuple(z.shape))
    dtype = functools.reduce(torch.promote_types, (t.dtype, weight.dtype))
    n, tokens, depth = t.shape
    arguments = {
        "t": contiguous_as(t, t.dtype),
        "weight": contiguous_as(weight, dtype),
        "bias": None if bias is None else contiguous_as(bias, bias.dtype),
        "z": nhwc(z),
        "out": out,
        "row_moments": None if row_moments is None else contiguous_as(row_moments, row_moments.dtype),
        "weight_sums": None if weight_sums is None else contiguous_as(weight_sums, weight_sums.dtype),
        "eps": eps,
        "tokens": n * tokens,
        "across": z.shape[3] // patch_size,
        "depth": depth,
        "CHANNELS": z.shape[1],
        "PATCH": patch_size,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "SLICE": config.slice,
        "WHOLE": depth % config.slice == 0,
        "PART": PART,
        "PARTS": next_power_of_2(cdiv(depth, PART), least=1),
    }
    grid = (cdiv(n * tokens, config.rows), cdiv(weight.shape[0], config.columns))
    return Plan(out, (Launch(linear_kernel.unpatchify, grid, arguments, config.warps, config.stages),))


def space(gpu: Gpu, t: Tensor, weight: Tensor, **_: Any) -> Iterator[Config]:
    """Tiles of few rows, whose buffers fit the shared memory."""
    half = t.element_size() == 2
    for rows, columns, slice_, warps, stages in itertools.product(
        (16, 32, 64), (16, 32, 64), (32, 64, 128) if half else (16, 32), (2, 4), (2, 3, 4)
    ):
        config = Config(rows, next_power_of_2(weight.shape[0], most=columns), slice_, warps, stages)
        if (rows + config.columns) * slice_ * t.element_size() * stages <= gpu.shared_limit:
            yield config


MODULES = (linear_kernel.__name__, row_moments_kernel.__name__, device_functions.__name__)
KERNELS = Implementation(Config, bucket, heuristic, plan, space, MODULES)

unpatchify_subtract = register(SCHEMA, reference, fake, cost, KERNELS)
