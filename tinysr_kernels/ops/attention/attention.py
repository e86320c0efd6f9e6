"""attention: non-causal multi-head self-attention over an interleaved qkv tensor.

    [q, k, v] = qkv in thirds of the last dimension; per head: out = softmax(scale * q k^T) v

Layouts: qkv [N,T,3*heads*d], out [N,T,heads*d] contiguous, heads side by side in the last dimension. Any d.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Library, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.attention.kernels import attention as attention_kernel
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_choice, check_rank
from tinysr_kernels.ops.layout import contiguous_as, nbytes
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = "attention(Tensor qkv, int heads, float scale) -> Tensor"


def _out_shape(qkv: Tensor, heads: int) -> tuple[int, int, int]:
    check(heads > 0, f"heads must be at least 1, found {heads}")
    check_rank("qkv", qkv, "N,T,3*heads*d")
    check(qkv.shape[2] % (3 * heads) == 0, f"qkv must be [N,T,3*{heads}*d], found {list(qkv.shape)}")
    return qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3


def reference(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """PyTorch's scaled dot product attention in float32 or wider; shapes as in the module's docstring.

    Any floating dtype; the result has qkv's. Raises ValueError when qkv does not divide into 3 * heads.
    """
    n, tokens, features = _out_shape(qkv, heads)
    wide_qkv = contiguous_as(qkv, compute_dtype(qkv.dtype)).view(n, tokens, 3, heads, features // heads)
    q, k, v = wide_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return contiguous_as(out.transpose(1, 2).reshape(n, tokens, features), qkv.dtype)


def fake(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return qkv.new_empty(_out_shape(qkv, heads))


def cost(qkv: Tensor, heads: int, scale: float) -> Cost:
    """FLOPs of the two products and 5 per score for the softmax; bytes of qkv and the result once."""
    n, tokens, features = _out_shape(qkv, heads)
    flops = n * tokens * tokens * (4 * features + 5 * heads)
    return Cost(flops, nbytes(qkv) + n * tokens * features * qkv.element_size())


@dataclass(frozen=True)
class Config:
    """Launches of attention. form: "flash" or "wide" (attention_kernel's docstring), or "library": PyTorch's own.

    rows and keys: queries and keys of a tile. apart: whether the keys behind the last whole tile have a loop of their
    own, which leaves the hot loop without a mask. For wide alone, depth: of a slice of the head, in the scores;
    columns: of the result, a program; parts: into which the keys are split.
    """

    form: str
    rows: int = 0
    keys: int = 0
    warps: int = 0
    stages: int = 0
    apart: bool = True
    depth: int = 0
    columns: int = 0
    parts: int = 1


FORMS = ("flash", "wide", "library")
WHOLE = 64
"""Tokens by which networks' images divide: with fewer left over, kernels are others."""
MOST_PARTS = 8
STORING = 4
"""What storing and merging the sums of a part costs, in tiles of keys: by its bytes, which are as many as theirs."""


def bucket(qkv: Tensor, heads: int, **_: Any) -> str:
    """Calls that share a configuration, whatever their batch: dtype, heads, tokens up to a power of two."""
    tokens, features = _out_shape(qkv, heads)[1:]
    rest = "" if tokens % WHOLE == 0 else " ragged"
    return f"{str(qkv.dtype).removeprefix('torch.')} {heads}x{features // heads} {next_power_of_2(tokens)}{rest}"


def slices(width: int) -> tuple[int, int]:
    """Powers of two, of 16 or more, whose sum covers a head: the second is 0 where one is as narrow as two."""
    whole = next_power_of_2(width)
    first = whole // 2
    second = next_power_of_2(width - first)
    return (first, second) if first >= 16 and second < first else (whole, 0)


def heuristic(gpu: Gpu, qkv: Tensor, heads: int, **_: Any) -> Config:
    """Whatever the batch, so that a sample's sums have the same order in any."""
    tokens, features = _out_shape(qkv, heads)[1:]
    width = features // heads
    if qkv.element_size() > 2:
        # Without tensor cores both operands of a product lie in registers: thin slices.
        config = Config("wide", 64, 32, 8, 1, apart=False, depth=16, columns=next_power_of_2(width, most=256))
    elif width <= 64:
        # A tile of 128 queries reads keys and values half as often as one of 64; the small one fills a larger card.
        large = cdiv(tokens, 128) * heads >= gpu.multiprocessors
        return Config("flash", *((128, WHOLE, 8) if large else (64, WHOLE, 4)), 3)
    elif width <= 128:
        # Two loops, or 64 keys, would spill on some architecture.
        return Config("flash", 64, 32, 8, 2, apart=False)
    elif width > 256:
        config = Config("wide", 64, 32, 8, 2, depth=64, columns=256)
    elif tokens % WHOLE or gpu.shared_limit < 160 * 1024:
        # 64 keys need 106 KB, or with their second loop all the registers there are.
        config = Config("wide", 64, 32, 8, 2, depth=256, columns=256)
    else:
        # 128 queries need 193 KB: keys and values pass half as often, which the second-level cache must deliver.
        rows = 128 if gpu.shared_limit >= 200 * 1024 and tokens >= 128 else 64
        config = Config("wide", rows, WHOLE, 8, 2, depth=256, columns=256)
    return replace(config, parts=_parts(gpu, tokens, width, heads, config))


def _parts(gpu: Gpu, tokens: int, width: int, heads: int, config: Config) -> int:
    """Into how many parts to split the keys: what fills the card in the fewest steps, a multiprocessor a program."""
    programs = cdiv(tokens, config.rows) * cdiv(width, config.columns) * heads
    steps = cdiv(tokens, config.keys)

    def time(parts: int) -> int:
        waves = cdiv(programs * parts, gpu.multiprocessors)
        return waves * (cdiv(steps, parts) + (STORING if parts > 1 else 0))

    best = min(range(1, min(MOST_PARTS, steps) + 1), key=time)
    # The sums of the parts take memory: not for a small gain.
    return best if time(best) < 0.8 * time(1) else 1


def plan(config: Config, qkv: Tensor, heads: int, scale: float) -> Plan:
    """One launch, or two where the keys are split; raises what the reference raises.

    qkv that is not dense is copied once.
    """
    n, tokens, features = _out_shape(qkv, heads)
    check_choice("form", config.form, FORMS)
    width = features // heads
    out = qkv.new_empty((n, tokens, features))
    given: dict[str, Any] = {"qkv": contiguous_as(qkv, qkv.dtype), "out": out}
    if config.form == "library":
        # The attention and the copy; heads that are no multiple of 8 it pads first: q, k and v are filled and copied.
        given |= {"heads": heads, "scale": scale}
        return Plan(out, (Library(library, given, 2 if width % 8 == 0 else 8),))
    given |= {
        "scale": abs(scale) * math.log2(math.e),
        "tokens": tokens,
        "heads": heads,
        "NEGATIVE": scale < 0,
        "RAGGED": tokens % config.keys > 0,
        "APART": config.apart,
        "WIDTH": width,
        "ROWS": config.rows,
        "KEYS": config.keys,
        "STAGES": config.stages,
    }
    rows = cdiv(tokens, config.rows)
    if config.form == "flash":
        first, second = slices(width)
        given |= {"FIRST": first, "SECOND": second}
        return Plan(out, (Launch(attention_kernel.flash, (rows, heads, n), given, config.warps, config.stages),))
    part = cdiv(cdiv(tokens, config.keys), config.parts) * config.keys
    parts = cdiv(tokens, part)
    given |= {"part": part, "parts": parts, "DEPTH": config.depth, "COLUMNS": config.columns}
    split = parts > 1
    shapes = {
        "scratch_out": (n, heads, parts, tokens, width),
        "scratch_highest": (n, heads, parts, tokens),
        "scratch_total": (n, heads, parts, tokens),
    }
    scratch = {name: qkv.new_empty(s, dtype=torch.float32) if split else None for name, s in shapes.items()}
    given |= {**scratch, "out": None if split else out}
    grid = (rows * parts * cdiv(width, config.columns), heads, n)
    launch = Launch(attention_kernel.wide, grid, given, config.warps, config.stages)
    if not split:
        return Plan(out, (launch,))
    columns = next_power_of_2(width)
    lanes = max(2048 // columns, 1)
    sizes = {"tokens": tokens, "heads": heads, "parts": parts, "WIDTH": width, "COLUMNS": columns, "ROWS": lanes}
    merge = Launch(attention_kernel.merge, (cdiv(tokens, lanes), heads, n), {**scratch, "out": out, **sizes}, 4, 1)
    return Plan(out, (launch, merge))


def library(qkv: Tensor, out: Tensor, heads: int, scale: float) -> None:
    """PyTorch's scaled dot product attention in qkv's dtype, whichever kernel it takes, copied into out."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out.unflatten(2, (heads, -1)).copy_(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))


def space(gpu: Gpu, qkv: Tensor, heads: int, **_: Any) -> Iterator[Config]:
    """The library; flash for heads that it holds in half precision; else wide, whole and in parts."""
    width = _out_shape(qkv, heads)[2] // heads
    half = qkv.element_size() == 2
    yield Config("library")
    yield heuristic(gpu, qkv, heads)
    if half and width <= 128:
        for rows, keys, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            yield Config("flash", rows, keys, warps, stages)
            yield Config("flash", rows, keys, warps, stages, apart=False)
        return
    columns = next_power_of_2(width, most=256)
    depths = (64, columns) if half else (16, 32)
    for rows, keys, warps, stages in itertools.product((32, 64, 128), (32, 64), (4, 8), (1, 2)):
        for depth, parts in itertools.product(depths, (1, 2, 4, 8)):
            yield Config("wide", rows, keys, warps, stages, half, depth, columns, parts)


KERNELS = Implementation(Config, bucket, heuristic, plan, space, (attention_kernel.__name__, device_functions.__name__))

attention = register(SCHEMA, reference, fake, cost, KERNELS)
