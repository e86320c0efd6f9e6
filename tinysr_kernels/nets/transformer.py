"""The transformers of a UNet on image tokens, with every constant folded; with or without a prompt.

Folded: LayerNorms' affine parts into the linears that follow, q, k and v into one matrix, the last feed-forward and
proj_out into one matmul over two inputs. The prompt's keys and values are constants, or where each image has a prompt
of its own computed from its embedding, which `prompted` sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Features, Folded, GroupNorm, Layer, Linear, Rows, count, ops, tokens, untokens


@dataclass(frozen=True)
class _Prompt:
    """An embedding [T,X], and the keys and values that each cross-attention has computed from it."""

    embedding: Tensor
    computed: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


_PROMPT: ContextVar[_Prompt | None] = ContextVar("prompt", default=None)


@contextmanager
def prompted(embedding: Tensor | None) -> Iterator[None]:
    """Inside, networks whose prompt is an input attend to this embedding [T,X], whatever images they get."""
    token = _PROMPT.set(None if embedding is None else _Prompt(embedding))
    try:
        yield
    finally:
        _PROMPT.reset(token)


def current_prompt() -> tuple[Tensor, ...]:
    """The embedding that `prompted` has set, if it has: what a captured step takes beside its images."""
    prompt = _PROMPT.get()
    return () if prompt is None else (prompt.embedding,)


class Options(Protocol):
    """What the weights leave open."""

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""

    @property
    def groups(self) -> tuple[int, ...]:
        """A GroupNorm takes the first of these that divides its channels."""

    @property
    def transformer_norm_eps(self) -> float:
        """Of the GroupNorm before a transformer."""

    @property
    def layer_norm_eps(self) -> float:
        """Of the transformers' LayerNorms."""


def fold_qkv(f: Folder, name: str, source: str, gain: Tensor | None = None, shift: Tensor | None = None) -> None:
    """q, k and v as one linear on gain * x + shift."""
    parts = [f.get(f"{source}.to_{which}.weight") for which in "qkv"]
    weight = torch.cat(parts)
    bias = torch.cat([f.bias(f"{source}.to_{which}", part) for which, part in zip("qkv", parts, strict=True)])
    fold_affine_linear(f, name, weight, bias, gain, shift)


def fold_affine_linear(
    f: Folder, name: str, weight: Tensor, bias: Tensor, gain: Tensor | None, shift: Tensor | None
) -> None:
    """W (gain * x + shift) + b as one linear on x."""
    if shift is not None:
        bias = bias + weight @ shift
    if gain is not None:
        weight = weight * gain
    f.linear(name, weight, bias)


def _plain_linear(f: Folder, name: str, source: str) -> None:
    weight = f.get(f"{source}.weight")
    f.linear(name, weight, f.bias(source, weight))


def fold_transformer(f: Folder, prefix: str) -> None:
    """GroupNorm, proj_in, the blocks, and the last feed-forward with proj_out."""
    f.affine(f"{prefix}.norm", f"{prefix}.norm")
    _plain_linear(f, f"{prefix}.proj_in", f"{prefix}.proj_in")
    blocks = count(f.tensors, f"{prefix}.transformer_blocks")
    for i in range(blocks):
        source, name = f"{prefix}.transformer_blocks.{i}", f"{prefix}.blocks.{i}"
        fold_qkv(
            f,
            f"{name}.qkv",
            f"{source}.attn1",
            f.get(f"{source}.norm1.weight"),
            f.get(f"{source}.norm1.bias"),
        )
        _plain_linear(f, f"{name}.out", f"{source}.attn1.to_out.0")
        if f.has(f"{source}.attn2.to_q.weight"):
            _fold_cross(f, f"{name}.cross", source)
        ff = f.get(f"{source}.ff.net.0.proj.weight")
        gain, shift = f.get(f"{source}.norm3.weight"), f.get(f"{source}.norm3.bias")
        fold_affine_linear(f, f"{name}.ff1", ff, f.bias(f"{source}.ff.net.0.proj", ff), gain, shift)
        if i < blocks - 1:
            _plain_linear(f, f"{name}.ff2", f"{source}.ff.net.2")
    out = f.get(f"{prefix}.proj_out.weight")
    last = f"{prefix}.transformer_blocks.{blocks - 1}.ff.net.2"
    ff2 = f.get(f"{last}.weight")
    bias = f.bias(f"{prefix}.proj_out", out) + out @ f.bias(last, ff2)
    f.linear(f"{prefix}.proj_out", out, bias)
    f.matrix(f"{prefix}.proj_out.weight2", out @ ff2)


def _fold_cross(f: Folder, name: str, source: str) -> None:
    """The queries' LayerNorm, and the prompt's keys and values [heads,T,d], which no longer depend on anything.

    Where they do, on each image's prompt: the projections to both, [2 heads,d,X].
    """
    query = f.get(f"{source}.attn2.to_q.weight")
    gain, shift = f.get(f"{source}.norm2.weight"), f.get(f"{source}.norm2.bias")
    fold_affine_linear(f, f"{name}.query", query, query.new_zeros(query.shape[0]), gain, shift)
    if f.has(f"{source}.attn2.keys"):
        f.matrix(f"{name}.keys", f.get(f"{source}.attn2.keys"))
        f.matrix(f"{name}.values", f.get(f"{source}.attn2.values"))
    else:
        parts = [f.get(f"{source}.attn2.to_{part}") for part in ("keys", "values")]
        f.matrix(f"{name}.prompt", torch.cat(parts))
    _plain_linear(f, f"{name}.out", f"{source}.attn2.to_out.0")


class CrossAttention(Layer):
    """Attention of the tokens to a prompt, of as many heads as its keys have; LayerNorm before, x added.

    The prompt is constant, or where its projections are kept the one that `prompted` has set.
    """

    keys: Tensor
    values: Tensor
    prompt: Tensor | None

    def __init__(self, folded: Folded, prefix: str, eps: float) -> None:
        constant = f"{prefix}.prompt" not in folded
        super().__init__(folded, prefix, ("keys", "values") if constant else (), ("prompt",))
        self.query = Linear(folded, f"{prefix}.query", norm_eps=eps)
        self.out = Linear(folded, f"{prefix}.out")
        if self.prompt is None:
            self.heads, _, head_dim = self.keys.shape
        else:
            both, head_dim, _ = self.prompt.shape
            self.heads = both // 2
        self.scale = head_dim**-0.5

    def _keys_and_values(self) -> tuple[Tensor, Tensor]:
        """[heads,T,d] each; of an image's own prompt once, in a batched matmul that leaves each head contiguous."""
        if self.prompt is None:
            return self.keys, self.values
        prompt = _PROMPT.get()
        if prompt is None:
            raise RuntimeError("a network whose prompt is an input was called outside of `prompted`")
        if self not in prompt.computed:
            both = torch.matmul(prompt.embedding.to(self.prompt.dtype), self.prompt.mT)
            half = len(both) // 2
            prompt.computed[self] = both[:half], both[half:]
        return prompt.computed[self]

    def forward(self, rows: Rows) -> Rows:
        """x + out(softmax(q keys^T) values)."""
        x, moments = rows
        keys, values = self._keys_and_values()
        mixed = ops.cross_attention(self.query(x, row_moments=moments), keys, values, self.scale)
        return self.out.with_row_moments(mixed, residual=x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention where there is a prompt, and GEGLU feed-forward on tokens.

    The last block leaves ff2 to proj_out. Both attentions have the heads that the prompt's keys have; without a prompt
    heads are `head_dim` wide.
    """

    def __init__(self, folded: Folded, prefix: str, options: Options) -> None:
        super().__init__()
        self.qkv = Linear(folded, f"{prefix}.qkv", norm_eps=options.layer_norm_eps)
        self.out = Linear(folded, f"{prefix}.out")
        self.ff1 = Linear(folded, f"{prefix}.ff1", "geglu", norm_eps=options.layer_norm_eps)
        self.ff2 = Linear(folded, f"{prefix}.ff2") if f"{prefix}.ff2.weight" in folded else None
        attends = f"{prefix}.cross.query.weight" in folded
        self.cross = CrossAttention(folded, f"{prefix}.cross", options.layer_norm_eps) if attends else None
        width = self.out.weight.shape[1]
        self.heads = width // options.head_dim if self.cross is None else self.cross.heads
        self.scale = (width // self.heads) ** -0.5

    def forward(self, rows: Rows) -> tuple[Rows, Tensor]:
        """(x after the attentions [and ff2 when present], the feed-forward's hidden features)."""
        x, moments = rows
        mixed = ops.attention(self.qkv(x, row_moments=moments), self.heads, self.scale)
        rows = self.out.with_row_moments(mixed, residual=x)
        x, moments = rows if self.cross is None else self.cross(rows)
        hidden = self.ff1(x, row_moments=moments)
        if self.ff2 is not None:
            x, moments = self.ff2.with_row_moments(hidden, residual=x)
        return (x, moments), hidden


class Transformer(nn.Module):
    """GroupNorm, proj_in, blocks, proj_out, residual; [N,C,H,W] -> the same shape."""

    def __init__(self, folded: Folded, prefix: str, options: Options) -> None:
        super().__init__()
        self.norm = GroupNorm(folded, f"{prefix}.norm", options.groups, options.transformer_norm_eps, silu=False)
        self.proj_in = Linear(folded, f"{prefix}.proj_in")
        self.blocks = nn.ModuleList(
            TransformerBlock(folded, f"{prefix}.blocks.{i}", options) for i in range(count(folded, f"{prefix}.blocks"))
        )
        self.proj_out = Linear(folded, f"{prefix}.proj_out")

    def forward(self, features: Features) -> Features:
        x = features.image
        rows = self.proj_in.with_row_moments(tokens(self.norm(features)))
        hidden = rows[0]
        for block in self.blocks:
            rows, hidden = block(rows)
        out = self.proj_out(rows[0], residual=tokens(x), x2=hidden)
        return Features(untokens(out, x.shape[2], x.shape[3]))
