"""patch_embed: non-overlapping patches of a latent, projected to tokens, plus the position table.

    out[n, y*w+x, d] = table[y*w+x, d] + sum_{c,i,j} weight[d,c,i,j] * z[n,c,y*p+i,x*p+j]

Layouts: z [N,C,H,W], weight [D,C,p,p], table [h*w,D] with h = H/p, w = W/p (the convolution's bias is folded
into it), out [N,h*w,D] contiguous. SD3's PatchEmbed with a fixed table. `patch_embed_row_moments` leaves the moments of
its rows (ops/norm/row_moments.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, nbytes, nhwc
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.norm.kernels import row_moments as row_moments_kernel
from tinysr_kernels.ops.norm.row_moments import PART, register_with_row_moments, scratch
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = "patch_embed(Tensor z, Tensor weight, Tensor table) -> Tensor"


def _out_shape(z: Tensor, weight: Tensor, table: Tensor) -> tuple[int, int, int]:
    check_rank("z", z, "N,C,H,W")
    check_rank("weight", weight, "D,C,p,p")
    n, c, h, w = z.shape
    d, p = weight.shape[0], weight.shape[2]
    check_shape("weight", weight, (d, c, p, p))
    check(h % p == 0 and w % p == 0, f"z must be a multiple of the patch size {p} per side, found {h}x{w}")
    tokens = (h // p) * (w // p)
    check_shape("table", table, (tokens, d))
    return n, tokens, d


def reference(z: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has z's. Raises ValueError naming argument, expected and found.
    """
    _out_shape(z, weight, table)
    dtype = compute_dtype(z.dtype)
    patches = F.conv2d(contiguous_as(z, dtype), contiguous_as(weight, dtype), stride=weight.shape[2])
    return contiguous_as(patches.flatten(2).transpose(1, 2) + table.to(dtype), z.dtype)


def fake(z: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return z.new_empty(_out_shape(z, weight, table))


def cost(z: Tensor, weight: Tensor, table: Tensor) -> Cost:
    """FLOPs of the projection; bytes of every tensor once."""
    n, tokens, d = _out_shape(z, weight, table)
    flops = 2 * n * tokens * weight.numel()
    return Cost(flops, nbytes(z, weight, table) + n * tokens * d * z.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of patch_embed: rows and columns of a tile of the product; slice of the reduction, a step."""

    rows: int
    columns: int
    slice: int
    warps: int


def bucket(z: Tensor, weight: Tensor, table: Tensor, **_: Any) -> str:
    """Calls that share a configuration: dtype, shape of the weight, tokens of a sample up to a power of two."""
    d, c, p = weight.shape[:3]
    return f"{str(z.dtype).removeprefix('torch.')} {c}x{p}x{p}->{d} {next_power_of_2(table.shape[0])}"


def heuristic(gpu: Gpu, z: Tensor, weight: Tensor, **_: Any) -> Config:
    """All of a patch at once where it fits: the product is shallow, what counts is the store."""
    depth = weight[0].numel()
    columns = next_power_of_2(weight.shape[0], most=128)
    if z.element_size() == 4:
        return Config(32, next_power_of_2(columns, most=64), 16, 4)
    return Config(64, columns, next_power_of_2(depth, most=64), 4)


def plan(config: Config, z: Tensor, weight: Tensor, table: Tensor, moments: bool = False) -> Plan:
    """The launch; raises what the reference raises. Inputs that are not dense in their layout are copied once.

    moments: whether the launch leaves those of the result's rows.
    """
    n, tokens, d = _out_shape(z, weight, table)
    check(not moments or config.columns % PART == 0, f"row moments need blocks of whole {PART} features")
    out = z.new_empty((n, tokens, d))
    patch = weight.shape[2]
    arguments = {
        "z": nhwc(z),
        "weight": nhwc(weight.to(torch.promote_types(z.dtype, weight.dtype))),
        "table": contiguous_as(table, table.dtype),
        "out": out,
        "out_moments": scratch(out) if moments else None,
        "tokens": n * tokens,
        "sample_tokens": tokens,
        "across": z.shape[3] // patch,
        "features": d,
        "CHANNELS": z.shape[1],
        "PATCH": patch,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "SLICE": config.slice,
        "PART": PART,
    }
    grid = (cdiv(n * tokens, config.rows), cdiv(d, config.columns))
    return Plan(out, (Launch(linear_kernel.embed, grid, arguments, config.warps, 1),))


def space(gpu: Gpu, z: Tensor, weight: Tensor, **_: Any) -> Iterator[Config]:
    """Tiles around the heuristic's."""
    half = z.element_size() == 2
    depth = next_power_of_2(weight[0].numel(), most=64 if half else 16)
    for rows, columns, warps in itertools.product((16, 32, 64, 128), (32, 64, 128), (2, 4, 8)):
        if rows * columns <= 2048 * warps:
            yield Config(rows, next_power_of_2(weight.shape[0], most=columns), depth, warps)


def _whole_parts(config: Config) -> Config:
    return replace(config, columns=max(config.columns, PART))


MODULES = (linear_kernel.__name__, row_moments_kernel.__name__, device_functions.__name__)
KERNELS = Implementation(Config, bucket, heuristic, plan, space, MODULES)

patch_embed = register(SCHEMA, reference, fake, cost, KERNELS)
patch_embed_row_moments = register_with_row_moments(patch_embed, SCHEMA, fake, _whole_parts)
