"""AutoencoderTiny's encoder and decoder with their own ranges.

    encoder: image [N,C,H,W] in [-1,1] -> latent [N,L,H/F,W/F]; decoder: latent [N,L,h,w] -> image [N,C,F*h,F*w]

Source: diffusers models/autoencoders/vae.py (EncoderTiny, DecoderTiny). "high" folds the encoder's (x+1)/2 into its
first convolution, whose zero padding then is the border -1 of x, the 3 of tanh(z/3)*3 and the decoder's 2y-1 into its
first and last one, and nearest enlargements into phases.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Conv, Folded, InputConv, ops
from tinysr_kernels.nets.tiny_vae import BLOCK_CONVS, Block, Step, decoder_steps, encoder_steps


def _steps(half: str, blocks: tuple[int, ...]) -> list[Step]:
    return list((encoder_steps if half == "encoder" else decoder_steps)(blocks))


def fold_tiny(
    tensors: Mapping[str, Tensor], half: str, dtype: torch.dtype, blocks: tuple[int, ...], *, exact: bool
) -> Folded:
    """Fold the half "encoder" or "decoder" of an AutoencoderTiny, whose tensors are named `<half>.layers.K.*`."""
    f = Folder(tensors, dtype)
    steps = _steps(half, blocks)
    for kind, k in steps:
        name = f"{half}.layers.{k}"
        if kind == "block":
            for j in BLOCK_CONVS:
                f.conv(f"{name}.conv.{j}", f"{name}.conv.{j}")
        elif half == "encoder" and k == 0:
            weight, bias = f.dense_weight(name)
            if not exact:
                weight, bias = weight / 2, bias + weight.sum((1, 2, 3)) / 2
            f.matrix(f"{name}.weight", weight)
            f.vector(f"{name}.bias", bias)
        elif exact or half == "encoder":
            f.conv(name, name)
        else:
            scale, shift = (2.0, -1.0) if k == steps[-1][1] else (1.0, 0.0)
            in_scale = 3.0 if k == 0 else 1.0
            f.conv(name, name, scale=scale, in_scale=in_scale, extra_bias=shift, upsample=kind == "up")
    return f.folded


class TinyHalf(nn.Module):
    """One half over tensors of `fold_tiny`; least: the smallest side of its input."""

    def __init__(self, folded: Folded, half: str, blocks: tuple[int, ...], *, exact: bool) -> None:
        super().__init__()
        self.exact = exact
        self.is_encoder = half == "encoder"
        self.least = 1
        self.steps = _steps(half, blocks)
        self.layers = nn.ModuleDict()
        for kind, k in self.steps:
            name = f"{half}.layers.{k}"
            if kind == "block":
                self.layers[str(k)] = Block(folded, name)
            elif half == "encoder" and k == 0:
                self.layers[str(k)] = InputConv(folded, name, border=0.0 if exact else -1.0)
            else:
                stride = 2 if kind == "down" else 1
                self.layers[str(k)] = Conv(folded, name, stride=stride, upsample=kind == "up" and not exact)

    def forward(self, x: Tensor) -> Tensor:
        if self.exact and self.is_encoder:
            x = x.add(1).div(2)
        elif self.exact:
            x = torch.tanh(x / 3) * 3
        elif not self.is_encoder:
            x = ops.tanh_scaled(x, 1 / 3)
        for (kind, k), layer in zip(self.steps, self.layers.values(), strict=True):
            if self.exact and kind == "up":
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = layer(x, activation="relu") if k == 0 and not self.is_encoder else layer(x)
        return x.mul(2).sub(1) if self.exact and not self.is_encoder else x
