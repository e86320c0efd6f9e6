"""The pruned KL decoder of AdcSR (arXiv 2411.13383) and of the `tinysr-unet` family, in plain PyTorch.

The decoder of diffusers' AutoencoderKL (models/autoencoders/vae.py) without its conv_in: what the UNet gives goes
straight into the middle block. Built from shapes like the UNet; every block may have any number of resnets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.pruned_unet import Resnet, Sampler, Shapes, convolution, group_norm, linear, numbered, under
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
    """Resnets with attention after the first (the middle block) or an upsampler at the end (most up blocks)."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        groups, eps = config.groups, config.decoder_eps
        self.resnets = nn.ModuleList(Resnet(s, groups, eps) for s in numbered(shapes, "resnets"))
        self.attentions = nn.ModuleList(KLAttention(s, groups, eps) for s in numbered(shapes, "attentions"))
        up = under(shapes, "upsamplers.0")
        self.upsamplers = nn.ModuleList([Sampler(up, up=True)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if i < len(self.attentions):
                x = self.attentions[i](x)
        for sampler in self.upsamplers:
            x = sampler(x)
        return x


class KLDecoder(nn.Module):
    """The decoder: [N,C,H,W] -> [N,3,H*s,W*s] in about [-1,1], s two to the number of upsamplers; not clamped.

    `shapes` maps every parameter's public name to its shape. Raises KeyError naming a missing tensor, ValueError
    where the shapes do not make a decoder.
    """

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.mid_block = DecoderBlock(under(shapes, "mid_block"), config)
        self.up_blocks = nn.ModuleList(DecoderBlock(s, config) for s in numbered(shapes, "up_blocks"))
        self.conv_norm_out = group_norm(under(shapes, "conv_norm_out"), config.groups, config.decoder_eps)
        self.conv_out = convolution(under(shapes, "conv_out"))

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], config: UNetConfig) -> KLDecoder:
        """Build from a state dict (names without prefix) and load it; RuntimeError if names are left over."""
        network = cls({name: tuple(t.shape) for name, t in tensors.items()}, config)
        network.load_state_dict(dict(tensors))
        return network

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(z)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
