"""The pruned KL decoder (AutoencoderKL's mid and up blocks of any width) with every constant folded.

Its output map (y+1)/2 is folded into the last convolution; q, k and v of the single-head attention are one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Conv, Features, Folded, GroupNorm, Linear, count, ops, tokens, untokens
from tinysr_kernels.nets.pruned_unet import Resnet, fold_qkv, fold_resnet


class Options(Protocol):
    """What the weights leave open; `families.UNetConfig` has these fields."""

    @property
    def groups(self) -> tuple[int, ...]:
        """A GroupNorm takes the first of these that divides its channels."""

    @property
    def decoder_eps(self) -> float:
        """Of every GroupNorm."""

    @property
    def residual(self) -> str:
        """ "bicubic": the enlarged input is added to the output; "none"."""


def fold_decoder(tensors: Mapping[str, Tensor], options: Options, dtype: torch.dtype) -> Folded:
    """Fold `decoder.*` of a normalized checkpoint; the output is the image in [0,1].

    With the bicubic residual u in [0,1] the sum of two images in [-1,1], y + (2u-1), is y/2 + u in [0,1].
    """
    f = Folder(tensors, dtype)
    for j in range(count(tensors, "decoder.mid_block.resnets")):
        fold_resnet(f, f"decoder.mid_block.resnets.{j}")
    for j in range(count(tensors, "decoder.mid_block.attentions")):
        source = f"decoder.mid_block.attentions.{j}"
        f.affine(f"{source}.norm", f"{source}.group_norm")
        fold_qkv(f, f"{source}.qkv", source)
        weight = f.get(f"{source}.to_out.0.weight")
        f.linear(f"{source}.out", weight, f.bias(f"{source}.to_out.0", weight))
    for i in range(count(tensors, "decoder.up_blocks")):
        block = f"decoder.up_blocks.{i}"
        for j in range(count(tensors, f"{block}.resnets")):
            fold_resnet(f, f"{block}.resnets.{j}")
        if count(tensors, f"{block}.upsamplers"):
            f.conv(f"{block}.upsamplers.0", f"{block}.upsamplers.0.conv", upsample=True)
    f.affine("decoder.conv_norm_out", "decoder.conv_norm_out")
    f.conv(
        "decoder.conv_out",
        "decoder.conv_out",
        scale=0.5,
        extra_bias=0.0 if options.residual == "bicubic" else 0.5,
    )
    return f.folded


class Attention(nn.Module):
    """GroupNorm, single-head attention over all pixels, output projection, residual."""

    def __init__(self, folded: Folded, prefix: str, options: Options) -> None:
        super().__init__()
        self.norm = GroupNorm(folded, f"{prefix}.norm", options.groups, options.decoder_eps, silu=False)
        self.qkv = Linear(folded, f"{prefix}.qkv")
        self.out = Linear(folded, f"{prefix}.out")

    def forward(self, features: Features) -> Features:
        """[N,C,H,W] -> the same shape."""
        x = features.image
        qkv = self.qkv(tokens(self.norm(features)))
        mixed = ops.attention(qkv, 1, self.out.weight.shape[1] ** -0.5)
        return Features(untokens(self.out(mixed, residual=tokens(x)), x.shape[2], x.shape[3]))


class KLDecoder(nn.Module):
    """[N,C,h,w] -> image [N,3,F*h,F*w], [0,1] up to overshoot; F = 2 to the number of upsamplers."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__()
        groups, eps = options.groups, options.decoder_eps
        self.groups = groups
        mid = "decoder.mid_block"
        self.mid_resnets = nn.ModuleList(
            Resnet(folded, f"{mid}.resnets.{j}", groups, eps) for j in range(count(folded, f"{mid}.resnets"))
        )
        self.mid_attentions = nn.ModuleList(
            Attention(folded, f"{mid}.attentions.{j}", options) for j in range(count(folded, f"{mid}.attentions"))
        )
        self.up_blocks = nn.ModuleList(
            nn.ModuleList(self._up_block(folded, f"decoder.up_blocks.{i}", groups, eps))
            for i in range(count(folded, "decoder.up_blocks"))
        )
        self.conv_norm_out = GroupNorm(folded, "decoder.conv_norm_out", groups, eps)
        self.conv_out = Conv(folded, "decoder.conv_out")
        ups = sum(isinstance(layer, Conv) for block in self.up_blocks for layer in block.children())
        self.factor = 2**ups

    @staticmethod
    def _up_block(folded: Folded, prefix: str, groups: tuple[int, ...], eps: float) -> list[nn.Module]:
        layers: list[nn.Module] = [
            Resnet(folded, f"{prefix}.resnets.{j}", groups, eps) for j in range(count(folded, f"{prefix}.resnets"))
        ]
        if count(folded, f"{prefix}.upsamplers"):
            layers.append(Conv(folded, f"{prefix}.upsamplers.0", upsample=True))
        return layers

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layers = [*self.middle(), *(layer for block in self.up_blocks for layer in block.children())]
        h = Features(x)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            last = following is None
            next_norm = self.conv_norm_out if last else _first_norm(following)
            # The last convolution does its GroupNorm's work where the moments are there.
            moments = last and self.conv_out.can_fuse_norm
            if isinstance(layer, Conv):
                h = layer.features(h.image, self.groups, next_norm=next_norm, moments=moments)
            elif isinstance(layer, Resnet):
                h = layer(h, next_norm=next_norm, moments=moments)
            else:
                h = layer(h)
        return self.conv_out.with_norm(self.conv_norm_out, h, residual=residual)

    def middle(self) -> Iterator[nn.Module]:
        """The resnets of the middle, each followed by its attention if there is one."""
        for j, resnet in enumerate(self.mid_resnets):
            yield resnet
            if j < len(self.mid_attentions):
                yield self.mid_attentions[j]


def _first_norm(layer: nn.Module | None) -> GroupNorm | None:
    """The GroupNorm that a layer puts its input through first, if it does."""
    if isinstance(layer, Resnet):
        return layer.norm1
    return layer.norm if isinstance(layer, Attention) else None
