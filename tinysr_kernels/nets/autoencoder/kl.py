"""AutoencoderKL's encoder and decoder between their first and last convolution, without the 1x1 ones around the latent.

    encoder: image [N,3,H,W] in [-1,1] -> moments [N,2C,H/F,W/F]; decoder: latent [N,C,h,w] -> image [N,3,F*h,F*w]

Source: diffusers models/autoencoders/vae.py (Encoder, Decoder). Both are one chain: conv_in, blocks, norm and SiLU,
conv_out. "high" folds 1x1 shortcuts into the second convolution of their block, q, k and v into one matrix, nearest
enlargements into phases, and takes the statistics of a GroupNorm from the accumulators before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.kl_vae import Attention, Middle, block_layers, fold_middle, run_layers
from tinysr_kernels.nets.layers import (
    Conv,
    Features,
    Folded,
    GroupNorm,
    InputConv,
    Linear,
    count,
    tokens,
    untokens,
)
from tinysr_kernels.nets.pruned_unet import fold_resnet


@dataclass(frozen=True)
class Norms:
    """`kl_vae.Options` of a half whose GroupNorms are all alike."""

    groups: tuple[int, ...]
    decoder_eps: float
    residual: str = "none"


def fold_kl(tensors: Mapping[str, Tensor], half: str, dtype: torch.dtype, *, exact: bool) -> Folded:
    """Fold the half "encoder" or "decoder" of an AutoencoderKL, whose tensors are named `<half>.*`."""
    f = Folder(tensors, dtype)
    resnet = _fold_exact_resnet if exact else fold_resnet
    f.input_conv(f"{half}.conv_in", f"{half}.conv_in")
    for block in _blocks(tensors, half):
        if block.endswith("mid_block"):
            fold_middle(f, block, resnet)
            continue
        for j in range(count(tensors, f"{block}.resnets")):
            resnet(f, f"{block}.resnets.{j}")
        if count(tensors, f"{block}.downsamplers"):
            f.conv(f"{block}.downsamplers.0", f"{block}.downsamplers.0.conv")
        if count(tensors, f"{block}.upsamplers"):
            f.conv(f"{block}.upsamplers.0", f"{block}.upsamplers.0.conv", upsample=not exact)
    f.affine(f"{half}.conv_norm_out", f"{half}.conv_norm_out")
    f.conv(f"{half}.conv_out", f"{half}.conv_out")
    return f.folded


def _blocks(names: Mapping[str, object], half: str) -> list[str]:
    """The blocks of a half in order."""
    middle = f"{half}.mid_block"
    if half == "decoder":
        return [middle, *(f"{half}.up_blocks.{i}" for i in range(count(names, f"{half}.up_blocks")))]
    return [*(f"{half}.down_blocks.{i}" for i in range(count(names, f"{half}.down_blocks"))), middle]


def _fold_exact_resnet(f: Folder, source: str) -> None:
    for j in (1, 2):
        f.affine(f"{source}.norm{j}", f"{source}.norm{j}")
        f.conv(f"{source}.conv{j}", f"{source}.conv{j}")
    if f.has(f"{source}.conv_shortcut.weight"):
        weight = f.get(f"{source}.conv_shortcut.weight").flatten(1)
        f.linear(f"{source}.shortcut", weight, f.bias(f"{source}.conv_shortcut", weight))


class ExactResnet(nn.Module):
    """x, or its 1x1 shortcut, + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), operation by operation."""

    def __init__(self, folded: Folded, prefix: str, norms: Norms) -> None:
        super().__init__()
        self.norm1 = GroupNorm(folded, f"{prefix}.norm1", norms.groups, norms.decoder_eps)
        self.conv1 = Conv(folded, f"{prefix}.conv1")
        self.norm2 = GroupNorm(folded, f"{prefix}.norm2", norms.groups, norms.decoder_eps)
        self.conv2 = Conv(folded, f"{prefix}.conv2")
        self.shortcut = Linear(folded, f"{prefix}.shortcut") if f"{prefix}.shortcut.weight" in folded else None

    def forward(self, features: Features) -> Features:
        """[N,I,H,W] -> [N,O,H,W]."""
        x = features.image
        h = self.norm2(Features(self.conv1(self.norm1(features))))
        if self.shortcut is not None:
            x = untokens(self.shortcut(tokens(x)), x.shape[2], x.shape[3])
        return Features(self.conv2(h, residual=x))


class ExactSampler(nn.Module):
    """Nearest x2 and a convolution, or a convolution of stride 2 padded on the right and the bottom."""

    def __init__(self, folded: Folded, prefix: str, *, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.conv = Conv(folded, prefix) if upsample else Conv(folded, prefix, stride=2, one_sided=True)

    def forward(self, features: Features) -> Features:
        """[N,C,H,W] -> [N,C,2H,2W] or [N,C,H/2,W/2]."""
        x = features.image
        return Features(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.upsample else x))


class KLHalf(nn.Module):
    """One half over tensors of `fold_kl`; least: the smallest side of its input."""

    def __init__(self, folded: Folded, half: str, norms: Norms, *, exact: bool) -> None:
        super().__init__()
        self.exact = exact
        self.groups = norms.groups
        self.conv_in = InputConv(folded, f"{half}.conv_in")
        make = _exact_layers if exact else _layers
        self.layers = nn.ModuleList(layer for block in _blocks(folded, half) for layer in make(folded, block, norms))
        self.conv_norm_out = GroupNorm(folded, f"{half}.conv_norm_out", norms.groups, norms.decoder_eps)
        self.conv_out = Conv(folded, f"{half}.conv_out")
        self.least = 2 ** sum(f"{block}.downsamplers.0.weight" in folded for block in _blocks(folded, half))

    def forward(self, x: Tensor) -> Tensor:
        h = Features(self.conv_in(x))
        if self.exact:
            for layer in self.layers:
                h = layer(h)
            return self.conv_out(self.conv_norm_out(h))
        fused = self.conv_out.can_fuse_norm
        h = run_layers(list(self.layers), h, self.groups, self.conv_norm_out, moments=fused)
        return self.conv_out.with_norm(self.conv_norm_out, h)


def _layers(folded: Folded, block: str, norms: Norms) -> Iterator[nn.Module]:
    """The layers of a block, which `run_layers` takes in turn."""
    if block.endswith("mid_block"):
        yield from Middle(folded, block, norms).layers()
    else:
        yield from block_layers(folded, block, norms.groups, norms.decoder_eps)


def _exact_layers(folded: Folded, block: str, norms: Norms) -> Iterator[nn.Module]:
    """The same without folds: modules from Features to Features."""
    for j in range(count(folded, f"{block}.resnets")):
        yield ExactResnet(folded, f"{block}.resnets.{j}", norms)
        if j < count(folded, f"{block}.attentions"):
            yield Attention(folded, f"{block}.attentions.{j}", norms)
    for kind in ("downsamplers", "upsamplers"):
        if count(folded, f"{block}.{kind}"):
            yield ExactSampler(folded, f"{block}.{kind}.0", upsample=kind == "upsamplers")
