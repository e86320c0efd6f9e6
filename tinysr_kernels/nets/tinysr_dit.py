"""TinySR's transformer with every constant folded: the pruned SD3 blocks, image stream only.

One block is five operators: qkv, attention, output projection with residual, feed-forward with GELU, feed-forward with
residual. The LayerNorms are in the linears around them (ops/norm/row_moments.py), modulation (1+scale, shift) sits in
the linears that follow, gates in those that precede, the patch convolution's bias in the position table (arXiv
2508.17434, section 3.3, caches the same constants; the folds go further).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tinysr_kernels.launch.backend import statistics_pay
from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Folded, Layer, Linear, Rows, count, ops

EPS = 1e-6


def fold(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Fold the tensors `transformer.*` of a normalized checkpoint; names as `Transformer` reads them."""
    f = Folder(tensors, dtype)
    source = "transformer"
    f.matrix("transformer.patch.weight", f.get(f"{source}.pos_embed.proj.weight"))
    table = f.get(f"{source}.pos_embed.pos_embed")[0] + f.get(f"{source}.pos_embed.proj.bias")
    f.vector("transformer.patch.table", table)
    for i in range(count(tensors, f"{source}.transformer_blocks")):
        _fold_block(f, f"{source}.transformer_blocks.{i}", f"transformer.blocks.{i}")
    scale, shift = f.get(f"{source}.norm_out.modulation")
    modulated(f, "transformer.proj_out", *weight_bias(f, f"{source}.proj_out"), scale, shift)
    return f.folded


def _fold_block(f: Folder, source: str, name: str) -> None:
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = f.get(f"{source}.modulation")
    qkv = [weight_bias(f, f"{source}.attn.to_{which}") for which in "qkv"]
    weight, bias = (torch.cat([part[k] for part in qkv]) for k in (0, 1))
    modulated(f, f"{name}.qkv", weight, bias, scale_msa, shift_msa)
    f.gated_linear(f"{name}.out", *weight_bias(f, f"{source}.attn.to_out.0"), gate_msa)
    modulated(f, f"{name}.ff1", *weight_bias(f, f"{source}.ff.net.0.proj"), scale_mlp, shift_mlp)
    f.gated_linear(f"{name}.ff2", *weight_bias(f, f"{source}.ff.net.2"), gate_mlp)


def weight_bias(f: Folder, source: str) -> tuple[Tensor, Tensor]:
    """A linear layer's weight [O,I] and bias [O] in float64."""
    weight = f.get(f"{source}.weight")
    return weight, f.bias(source, weight)


def modulated(f: Folder, name: str, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> None:
    """W (x * (1+scale) + shift) + b  =  (W diag(1+scale)) x + (b + W shift)."""
    f.linear(name, weight * (1 + scale), bias + weight @ shift)


class Update(nn.Module):
    """What follows an attention: its output projection and a feed-forward, each added to the tokens [N,T,D]."""

    def __init__(self, folded: Folded, prefix: str) -> None:
        super().__init__()
        self.out = Linear(folded, f"{prefix}.out")
        self.ff1 = Linear(folded, f"{prefix}.ff1", "gelu_tanh", norm_eps=EPS)
        self.ff2 = Linear(folded, f"{prefix}.ff2")

    def updated(self, x: Tensor, mixed: Tensor) -> Rows:
        """x + attention, then + feed-forward; mixed: the attention's heads side by side."""
        x, moments = self.out.with_row_moments(mixed, residual=x)
        return self.ff2.with_row_moments(self.ff1(x, row_moments=moments), residual=x)


class Block(Update):
    """One transformer block on tokens [N,T,D]."""

    def __init__(self, folded: Folded, prefix: str, head_dim: int) -> None:
        super().__init__(folded, prefix)
        self.qkv = Linear(folded, f"{prefix}.qkv", norm_eps=EPS)
        self.heads = self.out.weight.shape[1] // head_dim
        self.scale = head_dim**-0.5

    def forward(self, rows: Rows) -> Rows:
        """x + attention, then + feed-forward."""
        x, moments = rows
        return self.updated(x, ops.attention(self.qkv(x, row_moments=moments), self.heads, self.scale))


class Transformer(nn.Module):
    """z [N,16,S,S] -> z - transformer(z), S the side of its window (64 in the release)."""

    block: ClassVar[type[Block]] = Block
    """The class of its blocks."""

    def __init__(self, folded: Folded, head_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch = Layer(folded, "transformer.patch", ("weight", "table"))
        blocks = count(folded, "transformer.blocks")
        self.blocks = nn.ModuleList(self.block(folded, f"transformer.blocks.{i}", head_dim) for i in range(blocks))
        self.proj_out = Linear(folded, "transformer.proj_out", norm_eps=EPS)
        self.patch_size = patch_size
        tokens = self.patch.get_buffer("table").shape[0]
        self.window = round(tokens**0.5) * patch_size

    def forward(self, z: Tensor) -> Tensor:
        """[N,C,window,window] -> the same shape, channels_last."""
        x, moments = self._through_blocks(self._embedded(z))
        last = self.proj_out
        if moments is None:
            x = ops.layer_norm(x, last.norm_eps)
        norm = (moments, None if moments is None else last.weight_sums, last.norm_eps)
        return ops.unpatchify_subtract(x, last.weight, last.bias, z, self.patch_size, *norm)

    def _through_blocks(self, rows: Rows) -> Rows:
        for block in self.blocks:
            rows = block(rows)
        return rows

    def _embedded(self, z: Tensor) -> Rows:
        """The patches of a latent as tokens, in the network's dtype."""
        z = z.to(self.patch.get_buffer("weight").dtype)
        if not statistics_pay():
            return ops.patch_embed(z, self.patch.weight, self.patch.table), None
        x, moments = ops.patch_embed_row_moments(z, self.patch.weight, self.patch.table)
        return x, moments
