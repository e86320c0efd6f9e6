"""TinySR's transformer with the linears of its blocks in fp8: e4m3 weights, quantized once, and e4m3 activations.

One block is eight operators: LayerNorm to e4m3, qkv, attention, its result to e4m3, output projection with residual,
LayerNorm to e4m3, feed-forward with GELU and a result in e4m3, feed-forward with residual. The residual stream, the
attention and everything outside the blocks stay in the network's dtype. Every scale is taken from the values
themselves: a weight's row by row at load, an activation's while it is computed, row by row, and after GELU for every
128 elements of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinysr_kernels.errors import InputError
from tinysr_kernels.nets.layers import Folded, Layer, count, ops
from tinysr_kernels.nets.tinysr_dit import EPS
from tinysr_kernels.ops.linear.linear_fp8 import STEP
from tinysr_kernels.ops.linear.quantize import E4M3, quantized

BLOCKS = "transformer.blocks"
LINEARS = ("qkv", "out", "ff1", "ff2")


def is_fp8(folded: Mapping[str, Tensor]) -> bool:
    """Whether any of the folded tensors, of whatever family, is in e4m3."""
    return any(tensor.dtype == E4M3 for tensor in folded.values())


def to_fp8(folded: Folded) -> dict[str, Tensor]:
    """Folded tensors of TinySR, best in float64, with the blocks' weights as e4m3 and a scale per output channel.

    A gate that was kept apart goes into scale and bias, which hold it without loss. Tensors that are quantized already
    stay. InputError where a width is not a multiple of 32.
    """
    made = dict(folded)
    if is_fp8(folded):
        return made
    for i in range(count(folded, BLOCKS)):
        for linear in LINEARS:
            _quantize_linear(made, f"{BLOCKS}.{i}.{linear}")
    return made


def _quantize_linear(folded: dict[str, Tensor], name: str) -> None:
    weight = folded[f"{name}.weight"].double()
    if weight.shape[1] % STEP:
        raise InputError(
            f"quantize='fp8' needs widths that are multiples of {STEP}, {name} takes {weight.shape[1]}; "
            "use quantize=None"
        )
    gate = folded.pop(f"{name}.gate", None)
    if gate is not None:
        weight = weight * gate.double()[:, None]
        bias = folded[f"{name}.bias"]
        folded[f"{name}.bias"] = (bias.double() * gate.double()).to(bias.dtype)
    q, scale = quantized(weight)
    folded[f"{name}.weight"] = q
    folded[f"{name}.weight_scale"] = scale[:, 0].float()


class Linear(Layer):
    """residual + act(x W^T + bias) on an activation that comes as (q, scale)."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, folded: Folded, prefix: str) -> None:
        super().__init__(folded, prefix, ("weight", "weight_scale", "bias"))

    def forward(self, x: tuple[Tensor, Tensor], dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """[...,K] -> [...,O] in `dtype`."""
        return ops.linear_fp8(*x, self.weight, self.weight_scale, dtype, self.bias, residual)

    def hidden(self, x: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """With GELU: [...,K] -> [...,O] as (q, scale), from sums at least as wide as `dtype`."""
        q, scale = ops.linear_fp8_quantized(*x, self.weight, self.weight_scale, dtype, self.bias, "gelu_tanh")
        return q, scale


class Block(nn.Module):
    """One transformer block on tokens [N,T,D]."""

    def __init__(self, folded: Folded, prefix: str, head_dim: int) -> None:
        super().__init__()
        self.qkv, self.out, self.ff1, self.ff2 = (Linear(folded, f"{prefix}.{linear}") for linear in LINEARS)
        self.heads = self.out.weight.shape[1] // head_dim
        self.scale = head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x + attention, then + feed-forward."""
        mixed = ops.attention(self.qkv(ops.layer_norm_quantize(x, EPS), x.dtype), self.heads, self.scale)
        x = self.out(ops.quantize_rows(mixed), x.dtype, residual=x)
        hidden = self.ff1.hidden(ops.layer_norm_quantize(x, EPS), x.dtype)
        return self.ff2(hidden, x.dtype, residual=x)


class Transformer(nn.Module):
    """z [N,16,S,S] -> z - transformer(z), as tinysr_dit.Transformer."""

    def __init__(self, folded: Folded, head_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch = Layer(folded, "transformer.patch", ("weight", "table"))
        self.blocks = nn.ModuleList(Block(folded, f"{BLOCKS}.{i}", head_dim) for i in range(count(folded, BLOCKS)))
        self.proj_out = Layer(folded, "transformer.proj_out", ("weight", "bias"))
        self.patch_size = patch_size
        tokens = self.patch.get_buffer("table").shape[0]
        self.window = round(tokens**0.5) * patch_size

    def forward(self, z: Tensor) -> Tensor:
        """[N,C,window,window] -> the same shape, channels_last."""
        x = ops.patch_embed(z, self.patch.weight, self.patch.table)
        for block in self.blocks:
            x = block(x)
        return ops.unpatchify_subtract(
            ops.layer_norm(x, EPS), self.proj_out.weight, self.proj_out.bias, z, self.patch_size
        )
