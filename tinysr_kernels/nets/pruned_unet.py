"""The pruned UNet (AdcSR, arXiv 2411.13383; this project's `tinysr-unet`) with every constant folded.

Folded: the range map and PixelUnshuffle into the first convolution, time biases into the bias of conv1, LayerNorms'
affine parts into the linears that follow, q, k and v into one matrix, the last feed-forward and proj_out into one
matmul over two inputs, each 1x1 shortcut into conv2, biases together, nearest enlargement into 2x2 phases.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import (
    Conv,
    Features,
    Folded,
    GroupNorm,
    InputConv,
    Linear,
    Rows,
    count,
    ops,
    tokens,
    untokens,
)


class Options(Protocol):
    """What the weights leave open; `families.UNetConfig` has these fields."""

    @property
    def input(self) -> str:
        """ "unshuffle": the image itself through PixelUnshuffle; "vae": a latent."""

    @property
    def unshuffle(self) -> int:
        """The factor of PixelUnshuffle."""

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""

    @property
    def groups(self) -> tuple[int, ...]:
        """A GroupNorm takes the first of these that divides its channels."""

    @property
    def unet_eps(self) -> float:
        """Of the residual blocks' GroupNorms and of `conv_norm_out`."""

    @property
    def transformer_norm_eps(self) -> float:
        """Of the GroupNorm before a transformer."""

    @property
    def layer_norm_eps(self) -> float:
        """Of the transformers' LayerNorms."""

    @property
    def prediction(self) -> str:
        """ "direct": the result is the UNet's output; "subtract": the latent minus it."""


def fold_unet(tensors: Mapping[str, Tensor], options: Options, dtype: torch.dtype) -> Folded:
    """Fold the tensors `unet.*` of a normalized checkpoint; names as `UNet` reads them."""
    f = Folder(tensors, dtype)
    if options.input == "unshuffle":
        f.input_conv("unet.conv_in", "unet.conv_in", unshuffle=options.unshuffle, signed_range=True)
    else:
        f.conv("unet.conv_in", "unet.conv_in")
    for prefix in block_prefixes(tensors):
        for j in range(count(tensors, f"{prefix}.resnets")):
            fold_resnet(f, f"{prefix}.resnets.{j}")
        for j in range(count(tensors, f"{prefix}.attentions")):
            _fold_transformer(f, f"{prefix}.attentions.{j}")
        for kind in ("downsamplers", "upsamplers"):
            if count(tensors, f"{prefix}.{kind}"):
                f.conv(f"{prefix}.{kind}.0", f"{prefix}.{kind}.0.conv", upsample=kind == "upsamplers")
    f.affine("unet.conv_norm_out", "unet.conv_norm_out")
    sign = -1.0 if options.prediction == "subtract" else 1.0
    f.conv("unet.conv_out", "unet.conv_out", scale=sign)
    return f.folded


def block_prefixes(names: Mapping[str, object]) -> list[str]:
    """`unet.down_blocks.0`, ..., `unet.mid_block`, `unet.up_blocks.0`, ... as far as they occur."""
    pattern = re.compile(r"unet\.(?:(?:down|up)_blocks\.\d+|mid_block)(?=\.)")
    return sorted({found.group(0) for name in names if (found := pattern.match(name))})


def fold_resnet(f: Folder, source: str) -> None:
    """norm1, conv1 (+ time bias), norm2, conv2 (+ shortcut)."""
    f.affine(f"{source}.norm1", f"{source}.norm1")
    time_bias = f.get(f"{source}.time_bias") if f.has(f"{source}.time_bias") else 0.0
    f.conv(f"{source}.conv1", f"{source}.conv1", extra_bias=time_bias)
    f.affine(f"{source}.norm2", f"{source}.norm2")
    shortcut = f"{source}.conv_shortcut" if f.has(f"{source}.conv_shortcut.weight") else None
    f.conv(f"{source}.conv2", f"{source}.conv2", shortcut=shortcut)


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


def _fold_transformer(f: Folder, prefix: str) -> None:
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


class Resnet(nn.Module):
    """conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))) + shortcut, on one tensor or on the concatenation of two."""

    def __init__(self, folded: Folded, prefix: str, groups: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.norm1 = GroupNorm(folded, f"{prefix}.norm1", groups, eps)
        self.conv1 = Conv(folded, f"{prefix}.conv1")
        self.norm2 = GroupNorm(folded, f"{prefix}.norm2", groups, eps)
        self.conv2 = Conv(folded, f"{prefix}.conv2")

    def forward(
        self,
        x: Features,
        skip: Features | None = None,
        next_norm: GroupNorm | None = None,
        next_skip: Features | None = None,
        moments: bool = False,
    ) -> Features:
        """[N,C1,H,W] (and [N,C2,H,W]) -> [N,O,H,W].

        next_norm: the GroupNorm that consumes the result, over the concatenation with `next_skip`; moments: see
        `Conv.features`.
        """
        h = self.norm2(self.conv1.features(self.norm1(x, skip), self.groups, next_norm=self.norm2))
        other = None if skip is None else skip.image
        residual, shortcut = None, x.image
        if self.conv2.shortcut_weight is None:
            residual = shortcut if other is None else torch.cat([shortcut, other], 1)
        return self.conv2.features(
            h,
            self.groups,
            next_norm=next_norm,
            next_skip=None if next_skip is None else next_skip.image,
            moments=moments,
            residual=residual,
            shortcut=shortcut,
            skip=other,
        )


class TransformerBlock(nn.Module):
    """Self-attention and GEGLU feed-forward on tokens; the last block leaves ff2 to proj_out."""

    def __init__(self, folded: Folded, prefix: str, options: Options) -> None:
        super().__init__()
        self.qkv = Linear(folded, f"{prefix}.qkv", norm_eps=options.layer_norm_eps)
        self.out = Linear(folded, f"{prefix}.out")
        self.ff1 = Linear(folded, f"{prefix}.ff1", "geglu", norm_eps=options.layer_norm_eps)
        self.ff2 = Linear(folded, f"{prefix}.ff2") if f"{prefix}.ff2.weight" in folded else None
        self.heads = self.out.weight.shape[1] // options.head_dim
        self.scale = options.head_dim**-0.5

    def forward(self, rows: Rows) -> tuple[Rows, Tensor]:
        """(x after attention [and ff2 when present], the feed-forward's hidden features)."""
        x, moments = rows
        mixed = ops.attention(self.qkv(x, row_moments=moments), self.heads, self.scale)
        x, moments = self.out.with_row_moments(mixed, residual=x)
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


class Stage(nn.Module):
    """One down, middle or up block: resnets, each followed by its transformer if there is one, then a sampler."""

    def __init__(self, folded: Folded, prefix: str, options: Options) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(folded, f"{prefix}.resnets.{j}", options.groups, options.unet_eps)
            for j in range(count(folded, f"{prefix}.resnets"))
        )
        self.attentions = nn.ModuleList(
            Transformer(folded, f"{prefix}.attentions.{j}", options)
            for j in range(count(folded, f"{prefix}.attentions"))
        )
        self.downsamplers = nn.ModuleList(
            Conv(folded, f"{prefix}.downsamplers.{j}", stride=2) for j in range(count(folded, f"{prefix}.downsamplers"))
        )
        self.upsamplers = nn.ModuleList(
            Conv(folded, f"{prefix}.upsamplers.{j}", upsample=True)
            for j in range(count(folded, f"{prefix}.upsamplers"))
        )

    def step(
        self, j: int, x: Features, skip: Features | None, next_norm: GroupNorm | None, next_skip: Features | None
    ) -> Features:
        """Resnet j and the transformer after it; next_norm, next_skip: what takes the result, as `Resnet` says."""
        if j >= len(self.attentions):
            found: Features = self.resnets[j](x, skip, next_norm, next_skip)
            return found
        transformer = self.attentions[j]
        mixed: Features = transformer(self.resnets[j](x, skip, transformer.norm))
        return mixed

    def places(self, kind: str, groups: tuple[int, ...]) -> Iterator[Place]:
        """What a stage of this kind, "down", "mid" or "up", does in order."""
        for j, resnet in enumerate(self.resnets):
            norm = resnet.norm1 if isinstance(resnet, Resnet) else None
            yield Place(functools.partial(self.step, j), norm, kind == "up", kind == "down")
        for sampler in (*self.downsamplers, *self.upsamplers):
            yield Place(functools.partial(_sample, sampler, groups), None, False, kind == "down")


@dataclass(frozen=True)
class Place:
    """One step of the UNet.

    run(x, skip, next_norm, next_skip). norm: the GroupNorm at its input, if any. takes_skip: whether it pops the last
    skip. returns_skip: whether its result is pushed as one.
    """

    run: Callable[[Features, Features | None, GroupNorm | None, Features | None], Features]
    norm: GroupNorm | None
    takes_skip: bool
    returns_skip: bool


def _sample(
    sampler: Conv,
    groups: tuple[int, ...],
    x: Features,
    skip: Features | None,
    next_norm: GroupNorm | None,
    next_skip: Features | None,
) -> Features:
    """The convolution that halves or doubles the image after the resnets."""
    skip_image = None if next_skip is None else next_skip.image
    return sampler.features(x.image, groups, next_norm=next_norm, next_skip=skip_image)


class UNet(nn.Module):
    """Image in [0,1] (PixelUnshuffle input) or latent -> the decoder's input."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__()
        self.conv_in: nn.Module
        if options.input == "unshuffle":
            self.conv_in = InputConv(folded, "unet.conv_in", stride=options.unshuffle, border=0.5)
        else:
            self.conv_in = Conv(folded, "unet.conv_in")
        downs, ups = (count(folded, f"unet.{kind}_blocks") for kind in ("down", "up"))
        self.down_blocks = nn.ModuleList(Stage(folded, f"unet.down_blocks.{i}", options) for i in range(downs))
        self.mid_block = Stage(folded, "unet.mid_block", options)
        self.up_blocks = nn.ModuleList(Stage(folded, f"unet.up_blocks.{i}", options) for i in range(ups))
        self.conv_norm_out = GroupNorm(folded, "unet.conv_norm_out", options.groups, options.unet_eps)
        self.conv_out = Conv(folded, "unet.conv_out")
        self.subtract = options.prediction == "subtract"
        self.groups = options.groups
        self.factor = 2 ** sum(len(stage.downsamplers) for stage in self.stages("down"))

    def stages(self, kind: str) -> list[Stage]:
        """The down or up blocks, typed."""
        blocks = self.down_blocks if kind == "down" else self.up_blocks
        return [stage for stage in blocks if isinstance(stage, Stage)]

    def forward(self, x: Tensor) -> Tensor:
        """[N,3,H,W] or latent [N,C,h,w] -> [N,O,h,w]; skips go last in, first out."""
        places = [
            *(place for stage in self.stages("down") for place in stage.places("down", self.groups)),
            *self.mid_block.places("mid", self.groups),
            *(place for stage in self.stages("up") for place in stage.places("up", self.groups)),
        ]
        norms = [*(place.norm for place in places), self.conv_norm_out]
        takes = [*(place.takes_skip for place in places), False]
        h = self._first(x, norms[0])
        skips = [h]
        for place, norm, take in zip(places, norms[1:], takes[1:], strict=True):
            skip = skips.pop() if place.takes_skip else None
            # If the next step takes this very result as its skip, its norm cannot be fused here.
            next_norm = None if take and place.returns_skip else norm
            h = place.run(h, skip, next_norm, skips[-1] if take else None)
            if place.returns_skip:
                skips.append(h)
        return self.conv_out(self.conv_norm_out(h), residual=x if self.subtract else None)

    def _first(self, x: Tensor, next_norm: GroupNorm | None) -> Features:
        if isinstance(self.conv_in, Conv):
            return self.conv_in.features(x, self.groups, next_norm=next_norm)
        return Features(self.conv_in(x))
