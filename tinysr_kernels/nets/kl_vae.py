"""The halves of a KL VAE (AutoencoderKL, blocks of any width) with every constant folded.

The decoder begins with its middle block; its output map (y+1)/2 is folded into the last convolution. The encoder takes
the image in [0,1], and gives the mean of the latent alone: the 1x1 convolution behind it and the latent's scale are
folded into its last convolution. q, k and v of the single-head attentions are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    WideConv,
    count,
    ops,
    tokens,
    untokens,
)
from tinysr_kernels.nets.pruned_unet import Resnet, fold_resnet
from tinysr_kernels.nets.transformer import fold_qkv


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
    fold_middle(f, "decoder.mid_block")
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


def fold_encoder(tensors: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> Folded:
    """Fold `encoder.*` and, where it is there, `quant_conv`; the output is `scale` times the latent's mean, wide."""
    f = Folder(tensors, dtype)
    f.input_conv("encoder.conv_in", "encoder.conv_in", signed_range=True)
    for i in range(count(tensors, "encoder.down_blocks")):
        block = f"encoder.down_blocks.{i}"
        for j in range(count(tensors, f"{block}.resnets")):
            fold_resnet(f, f"{block}.resnets.{j}")
        if count(tensors, f"{block}.downsamplers"):
            f.conv(f"{block}.downsamplers.0", f"{block}.downsamplers.0.conv")
    fold_middle(f, "encoder.mid_block")
    f.affine("encoder.conv_norm_out", "encoder.conv_norm_out")
    weight, bias = f.dense_weight("encoder.conv_out")
    latent = weight.shape[0] // 2  # the other half of the channels is the variance
    if f.has("quant_conv.weight"):
        quant = f.get("quant_conv.weight").flatten(1)[:latent]
        weight, bias = torch.einsum("oc,cikl->oikl", quant, weight), quant @ bias + f.get("quant_conv.bias")[:latent]
    f.vector("encoder.conv_out.wide", weight[:latent] * scale)
    f.vector("encoder.conv_out.bias", bias[:latent] * scale)
    return f.folded


def fold_middle(f: Folder, name: str, resnet: Callable[[Folder, str], None] = fold_resnet) -> None:
    """Resnets and the attention between them. resnet: folds one residual block."""
    for j in range(count(f.tensors, f"{name}.resnets")):
        resnet(f, f"{name}.resnets.{j}")
    for j in range(count(f.tensors, f"{name}.attentions")):
        source = f"{name}.attentions.{j}"
        f.affine(f"{source}.norm", f"{source}.group_norm")
        fold_qkv(f, f"{source}.qkv", source)
        weight = f.get(f"{source}.to_out.0.weight")
        f.linear(f"{source}.out", weight, f.bias(f"{source}.to_out.0", weight))


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


class Middle(nn.Module):
    """The resnets of a middle block, each followed by its attention if there is one."""

    def __init__(self, folded: Folded, prefix: str, options: Options) -> None:
        super().__init__()
        groups, eps = options.groups, options.decoder_eps
        self.resnets = nn.ModuleList(
            Resnet(folded, f"{prefix}.resnets.{j}", groups, eps) for j in range(count(folded, f"{prefix}.resnets"))
        )
        self.attentions = nn.ModuleList(
            Attention(folded, f"{prefix}.attentions.{j}", options) for j in range(count(folded, f"{prefix}.attentions"))
        )

    def layers(self) -> Iterator[nn.Module]:
        """In order."""
        for j, resnet in enumerate(self.resnets):
            yield resnet
            if j < len(self.attentions):
                yield self.attentions[j]


class KLEncoder(nn.Module):
    """Image in [0,1] [N,3,F*h,F*w] -> scaled mean of the latent [N,C,h,w] in float32 or wider."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__()
        self.groups, eps = options.groups, options.decoder_eps
        self.conv_in = InputConv(folded, "encoder.conv_in", border=0.5)
        self.down_blocks = nn.ModuleList(
            nn.ModuleList(block_layers(folded, f"encoder.down_blocks.{i}", self.groups, eps))
            for i in range(count(folded, "encoder.down_blocks"))
        )
        self.middle = Middle(folded, "encoder.mid_block", options)
        self.conv_norm_out = GroupNorm(folded, "encoder.conv_norm_out", self.groups, eps)
        self.conv_out = WideConv(folded, "encoder.conv_out")
        self.factor = 2 ** sum(isinstance(layer, Conv) for block in self.down_blocks for layer in block.children())

    def forward(self, image: Tensor) -> Tensor:
        layers = [*(layer for block in self.down_blocks for layer in block.children()), *self.middle.layers()]
        h = run_layers(layers, Features(self.conv_in(image)), self.groups, self.conv_norm_out)
        return self.conv_out(self.conv_norm_out(h))


class KLDecoder(nn.Module):
    """[N,C,h,w] -> image [N,3,F*h,F*w], [0,1] up to overshoot; F = 2 to the number of upsamplers."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__()
        self.groups, eps = options.groups, options.decoder_eps
        self.middle = Middle(folded, "decoder.mid_block", options)
        self.up_blocks = nn.ModuleList(
            nn.ModuleList(block_layers(folded, f"decoder.up_blocks.{i}", self.groups, eps))
            for i in range(count(folded, "decoder.up_blocks"))
        )
        self.conv_norm_out = GroupNorm(folded, "decoder.conv_norm_out", self.groups, eps)
        self.conv_out = Conv(folded, "decoder.conv_out")
        self.factor = 2 ** sum(isinstance(layer, Conv) for block in self.up_blocks for layer in block.children())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layers = [*self.middle.layers(), *(layer for block in self.up_blocks for layer in block.children())]
        # The last convolution does its GroupNorm's work where the moments are there.
        h = run_layers(layers, Features(x), self.groups, self.conv_norm_out, moments=self.conv_out.can_fuse_norm)
        return self.conv_out.with_norm(self.conv_norm_out, h, residual=residual)


def block_layers(folded: Folded, prefix: str, groups: tuple[int, ...], eps: float) -> list[nn.Module]:
    """The resnets of a block, then its sampler if it has one."""
    layers: list[nn.Module] = [
        Resnet(folded, f"{prefix}.resnets.{j}", groups, eps) for j in range(count(folded, f"{prefix}.resnets"))
    ]
    if count(folded, f"{prefix}.downsamplers"):
        layers.append(Conv(folded, f"{prefix}.downsamplers.0", stride=2, one_sided=True))
    if count(folded, f"{prefix}.upsamplers"):
        layers.append(Conv(folded, f"{prefix}.upsamplers.0", upsample=True))
    return layers


def run_layers(
    layers: list[nn.Module], h: Features, groups: tuple[int, ...], last_norm: GroupNorm, moments: bool = False
) -> Features:
    """The layers in turn, each with the norm that follows it. moments: ask the last one for channel statistics."""
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        last = following is None
        next_norm = last_norm if last else _first_norm(following)
        if isinstance(layer, Conv):
            h = layer.features(h.image, groups, next_norm=next_norm, moments=moments and last)
        elif isinstance(layer, Resnet):
            h = layer(h, next_norm=next_norm, moments=moments and last)
        else:
            h = layer(h)
    return h


def _first_norm(layer: nn.Module | None) -> GroupNorm | None:
    """The GroupNorm that a layer puts its input through first, if it does."""
    if isinstance(layer, Resnet):
        return layer.norm1
    return layer.norm if isinstance(layer, Attention) else None
