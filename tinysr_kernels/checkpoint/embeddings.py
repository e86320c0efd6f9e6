"""Pre-computed embeddings: which of the tensors at hand is the pooled prompt, the cached temb, the position table.

Shapes tell them apart: pooled [1,P], temb [1,D], position table [1,T,D]; where P equals D, or a
prompt embedding [1,T,D] lies about, the file's or the tensor's name does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.errors import CheckpointError


@dataclass(frozen=True)
class Candidate:
    """A tensor that may be an embedding; `name` is what the shapes leave open, such as "pool_embeds"."""

    name: str
    tensor: Tensor
    where: str


@dataclass(frozen=True)
class Conditioning:
    """What was recognized: pooled [1,P], temb [1,D] before its SiLU, table [1,T,D]; None where there is none."""

    pooled: Candidate | None = None
    temb: Candidate | None = None
    table: Candidate | None = None


def recognize(candidates: Sequence[Candidate], dim: int, pooled_dim: int | None, strict: bool = False) -> Conditioning:
    """Sort the candidates by shape, then by name; CheckpointError where two different tensors claim one role.

    `pooled_dim` is None when the network has no text embedder to feed (its prompt is cached). `strict` refuses a vector
    that fits no role: one that the caller named is not passed over in silence.
    """
    pooled, temb, table = [], [], []
    for candidate in candidates:
        tensor, name = candidate.tensor, candidate.name.lower()
        size = tensor.shape[-1] if tensor.ndim else 0
        if tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[0] == 1):
            named_temb, named_pooled = "temb" in name or "time" in name, "pool" in name
            if size == dim and not named_pooled and (size != pooled_dim or named_temb):
                temb.append(candidate)
            elif size == pooled_dim and not named_temb and (size != dim or named_pooled):
                pooled.append(candidate)
            elif size == dim and size == pooled_dim:
                raise CheckpointError(
                    f"{candidate.where}: shape {list(tensor.shape)} fits the pooled embedding and temb alike; name it "
                    '"pool_embeds" or "temb"'
                )
            elif strict:
                raise CheckpointError(
                    f"{candidate.where}: expected a pooled embedding [1, {pooled_dim or 'any'}] or temb [1, {dim}], "
                    f"found {list(tensor.shape)}"
                )
        elif tensor.ndim == 3 and tensor.shape[0] == 1 and size == dim and _is_square(tensor.shape[1], name):
            table.append(candidate)
    return Conditioning(_only(pooled, "pooled embedding"), _only(temb, "temb"), _only(table, "position table"))


def _is_square(tokens: int, name: str) -> bool:
    """Whether so many tokens may be a position table: a square number, and not said to be a prompt's."""
    return math.isqrt(tokens) ** 2 == tokens and "prompt" not in name


def _only(found: list[Candidate], role: str) -> Candidate | None:
    for other in found[1:]:
        if not torch.equal(other.tensor.flatten(), found[0].tensor.flatten()):
            raise CheckpointError(
                f"{other.where}: a second {role}, different from {found[0].where}; pass one with embeddings="
            )
    return found[0] if found else None


def prefer(first: Conditioning, second: Conditioning) -> Conditioning:
    """`first` where it has something to say, else `second`; pooled and temb are alternatives and go together."""
    source = first if first.pooled or first.temb else second
    return Conditioning(source.pooled, source.temb, first.table or second.table)


def timestep_features(channels: int, t: float = 1000.0) -> Tensor:
    """e(t), float64 [1,channels]: the cosines, then the sines of t * exp(-ln(10000) i / (channels/2))."""
    half = channels // 2
    angles = t * torch.exp(torch.arange(half, dtype=torch.float64, device="cpu") * (-math.log(10000.0) / half))
    return torch.cat([angles.cos(), angles.sin()])[None]


def position_table(dim: int, side: int, base: int, full_side: int) -> Tensor:
    """The center crop of side `side` of SD3's sin-cos table of side `full_side`; float32 [1, side*side, dim].

    Coordinates are arange(full_side) / (full_side / base); the first half of the channels encodes the column, the
    second the row, each as sines then cosines of coordinate * 10000^(-k / (dim/4)).
    """
    start = (full_side - side) // 2
    coordinates = torch.arange(start, start + side, dtype=torch.float64, device="cpu") / (full_side / base)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles = coordinates[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, dim/2]
    columns = axis[None].expand(side, side, -1)
    rows = axis[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, dim).float()


def checked(candidate: Candidate, shape: Sequence[int | None]) -> Tensor:
    """A recognized embedding with a leading 1, checked to be floating point, finite and of this shape."""
    tensor = candidate.tensor if candidate.tensor.ndim == len(shape) else candidate.tensor[None]
    return Weights({candidate.name: tensor}, lambda _: candidate.where).take(candidate.name, shape)
