"""The pruned KL decoder of AdcSR (arXiv 2411.13383) and of the `tinysr-unet` family, in plain PyTorch.

The decoder of diffusers' AutoencoderKL (models/autoencoders/vae.py) without its conv_in: what the UNet gives goes
straight into the middle block. Built from shapes like the UNet; every block may have any number of resnets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from model.pruned_unet import Resnet, Sampler, Shapes, convolution, count, group_norm, linear, under
from tinysr_kernels.families import UNetConfig


class KLAttention(nn.Module):
    """Single-head attention over pixels: x + to_out(softmax(q k / sqrt(C)) v) with q, k, v of GroupNorm(x)."""

    def __init__(self, shapes: Shapes, groups: Sequence[int], eps: float) -> None:
        super().__init__()
        self.group_norm = group_norm(under(shapes, "group_norm"), groups, eps)
        self.to_q = linear(under(shapes, "to_q"))
        self.to_k = linear(under(shapes, "to_k"))
        self.to_v = linear(under(shapes, "to_v"))
        self.to_out = nn.ModuleList([linear(under(shapes, "to_out.0"))])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (f(tokens)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class DecoderBlock(nn.Module):
    """Resnets, then (the middle block) attention or (an up block) an upsampler, whichever the shapes name."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        groups, eps = config.groups, config.decoder_eps
        resnets = [under(shapes, f"resnets.{i}") for i in range(count(shapes, "resnets"))]
        self.resnets = nn.ModuleList(Resnet(s, groups, eps) for s in resnets)
        attention, up = under(shapes, "attentions.0"), under(shapes, "upsamplers.0")
        self.attentions = nn.ModuleList([KLAttention(attention, groups, eps)] if attention else [])
        self.upsamplers = nn.ModuleList([Sampler(up, up=True)] if up else [])


class KLDecoder(nn.Module):
    """The decoder: [N,C,H,W] -> [N,3,H*s,W*s] in about [-1,1], s two to the number of upsamplers; not clamped.

    `shapes` maps every parameter's public name to its shape. Raises KeyError naming a missing tensor, ValueError
    where the shapes do not make a decoder.
    """

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.mid_block = DecoderBlock(under(shapes, "mid_block"), config)
        blocks = [under(shapes, f"up_blocks.{i}") for i in range(count(shapes, "up_blocks"))]
        self.up_blocks = nn.ModuleList(DecoderBlock(s, config) for s in blocks)
        self.conv_norm_out = group_norm(under(shapes, "conv_norm_out"), config.groups, config.decoder_eps)
        self.conv_out = convolution(under(shapes, "conv_out"))

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], config: UNetConfig) -> KLDecoder:
        """Build from a state dict (names without prefix) and load it; RuntimeError if names are left over."""
        network = cls({name: tuple(t.shape) for name, t in tensors.items()}, config)
        network.load_state_dict(dict(tensors))
        return network

    def forward(self, z: Tensor) -> Tensor:
        x = z
        for i, resnet in enumerate(self.mid_block.resnets):
            x = resnet(x)
            if i == 0:
                for attention in self.mid_block.attentions:
                    x = attention(x)
        for block in self.up_blocks:
            for module in (*block.resnets, *block.upsamplers):
                x = module(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
