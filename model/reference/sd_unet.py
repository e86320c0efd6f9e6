"""Stable Diffusion's UNet with its prompt and time step (diffusers' UNet2DConditionModel), in plain PyTorch.

The teacher of the pruned UNet in pruned_unet.py, whose pieces it is made of: here every residual block adds a
projection of the time step, and every transformer block looks at the prompt between its self attention and its
feed-forward. Built from shapes; what they leave open, the number of heads per level and of groups, is given. Checked
against diffusers (models/unets/unet_2d_condition.py, unet_2d_blocks.py, models/attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.pruned_unet import (
    Attention,
    FeedForward,
    Resnet,
    Shapes,
    convolution,
    group_norm,
    linear,
    numbered,
    shape_of,
    under,
)
from model.reference.unet_shapes import Shape, unet_shapes

TRANSFORMER_EPS = 1e-6
"""Of the GroupNorm before a transformer."""
LAYER_EPS = 1e-5
"""Of the LayerNorms within."""


def time_features(channels: int, t: float, like: Tensor) -> Tensor:
    """e(t), [1,channels]: the cosines, then the sines of t * exp(-ln(10000) i / (channels/2)), in float64 at first."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / half))
    angles = t * frequencies
    return torch.cat([angles.cos(), angles.sin()])[None].to(like)


class TimeResnet(Resnet):
    """A residual block that adds time_emb_proj(SiLU(temb)) after its first convolution."""

    def __init__(self, shapes: Shapes, groups: Sequence[int], eps: float) -> None:
        super().__init__(shapes, groups, eps)
        self.time_emb_proj = linear(under(shapes, "time_emb_proj"))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class CrossBlock(nn.Module):
    """x += attn1(norm1(x)); x += attn2(norm2(x), prompt); x += ff(norm3(x)) on tokens [N,T,C]."""

    def __init__(self, shapes: Shapes, heads: int) -> None:
        super().__init__()
        width = shape_of(shapes, "norm1.weight")[0]
        head_dim = shape_of(shapes, "attn1.to_q.weight")[0] // heads
        self.norm1 = nn.LayerNorm(width, LAYER_EPS)
        self.attn1 = Attention(under(shapes, "attn1"), head_dim)
        self.norm2 = nn.LayerNorm(width, LAYER_EPS)
        self.attn2 = Attention(under(shapes, "attn2"), head_dim)
        self.norm3 = nn.LayerNorm(width, LAYER_EPS)
        self.ff = FeedForward(under(shapes, "ff"))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), prompt)
        return x + self.ff(self.norm3(x))


class CrossTransformer(nn.Module):
    """GroupNorm, pixels as tokens, linear proj_in, blocks, linear proj_out, plus the input; [N,C,H,W] -> same."""

    def __init__(self, shapes: Shapes, groups: Sequence[int], heads: int) -> None:
        super().__init__()
        self.norm = group_norm(under(shapes, "norm"), groups, TRANSFORMER_EPS)
        self.proj_in = linear(under(shapes, "proj_in"))
        self.transformer_blocks = nn.ModuleList(CrossBlock(s, heads) for s in numbered(shapes, "transformer_blocks"))
        self.proj_out = linear(under(shapes, "proj_out"))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, prompt)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Sampler(nn.Module):
    """`conv`, of stride 2 on the way down."""

    def __init__(self, shapes: Shapes, stride: int) -> None:
        super().__init__()
        self.conv = convolution(under(shapes, "conv"), stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """The modules of one down, middle or up block."""

    def __init__(self, shapes: Shapes, groups: Sequence[int], eps: float, heads: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(TimeResnet(s, groups, eps) for s in numbered(shapes, "resnets"))
        self.attentions = nn.ModuleList(CrossTransformer(s, groups, heads) for s in numbered(shapes, "attentions"))
        down, up = under(shapes, "downsamplers.0"), under(shapes, "upsamplers.0")
        self.downsamplers = nn.ModuleList([Sampler(down, 2)] if down else [])
        self.upsamplers = nn.ModuleList([Sampler(up, 1)] if up else [])

    def step(self, x: Tensor, i: int, temb: Tensor, prompt: Tensor) -> Tensor:
        """Resnet i and the transformer that follows it, if there is one."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, prompt) if i < len(self.attentions) else x


class SDUNet(nn.Module):
    """z [N,C,h,w] of any sides, a time step and a prompt's embedding [1,T,X] -> the prediction [N,O,h,w].

    shapes: every parameter's public name and shape. heads: attention heads per level, in the order of the down blocks;
    the middle has the last one's. Raises KeyError naming a missing tensor, ValueError where the shapes make no UNet.
    """

    def __init__(self, shapes: Shapes, heads: Sequence[int], groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        norms = (groups,)
        self.time_embedding = nn.ModuleDict(
            {name: linear(under(shapes, f"time_embedding.{name}")) for name in ("linear_1", "linear_2")}
        )
        self.conv_in = convolution(under(shapes, "conv_in"))
        downs, ups = numbered(shapes, "down_blocks"), numbered(shapes, "up_blocks")
        self.down_blocks = nn.ModuleList(Level(s, norms, eps, n) for s, n in zip(downs, heads, strict=True))
        self.mid_block = Level(under(shapes, "mid_block"), norms, eps, heads[-1])
        self.up_blocks = nn.ModuleList(Level(s, norms, eps, n) for s, n in zip(ups, reversed(heads), strict=True))
        self.conv_norm_out = group_norm(under(shapes, "conv_norm_out"), norms, eps)
        self.conv_out = convolution(under(shapes, "conv_out"))

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], heads: Sequence[int], groups: int = 32, eps: float = 1e-5
    ) -> SDUNet:
        """Build from a public state dict and load it in its dtype; RuntimeError if names are left over."""
        network = cls({name: tuple(t.shape) for name, t in tensors.items()}, heads, groups, eps)
        network.to(next(iter(tensors.values())).dtype)
        network.load_state_dict(dict(tensors))
        return network.requires_grad_(False)

    def temb(self, t: float) -> Tensor:
        """The time step's embedding, [1,E]."""
        first = self.time_embedding["linear_1"]
        assert isinstance(first, nn.Linear)
        hidden = F.silu(first(time_features(first.in_features, t, first.weight)))
        return self.time_embedding["linear_2"](hidden)

    def forward(self, z: Tensor, t: float, prompt: Tensor) -> Tensor:
        temb, prompt = self.temb(t), prompt.expand(len(z), -1, -1)
        x = self.conv_in(z)
        skips = [x]
        for level in _levels(self.down_blocks):
            for i in range(len(level.resnets)):
                x = level.step(x, i, temb, prompt)
                skips.append(x)
            for sampler in level.downsamplers:
                x = sampler(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = self.mid_block.step(x, i, temb, prompt)
        for level in _levels(self.up_blocks):
            for i in range(len(level.resnets)):
                x = level.step(torch.cat([x, skips.pop()], dim=1), i, temb, prompt)
            for sampler in level.upsamplers:
                # An odd side was rounded up on the way down. What is too much goes before the convolution pads.
                height, width = skips[-1].shape[2:]
                x = sampler(F.interpolate(x, scale_factor=2.0, mode="nearest")[..., :height, :width])
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _levels(blocks: nn.ModuleList) -> Iterator[Level]:
    """The blocks, typed."""
    for block in blocks:
        assert isinstance(block, Level)
        yield block


def sd_unet_shapes(
    channels: Sequence[int], layers: int, transformers: Sequence[bool], *, prompt: int, latent: int = 4
) -> dict[str, Shape]:
    """Names and shapes of a regular UNet of `latent` channels in and out, for prompts of `prompt` features.

    transformers: per level, whether its resnets have one; SD 2.1 has them on all levels but the last.
    """
    embedding = 4 * channels[0]
    shapes = unet_shapes(latent, latent, channels, layers, transformers=transformers)
    for name in [name for name in shapes if name.endswith(".conv1.bias")]:
        projection = name.replace(".conv1.bias", ".time_emb_proj")
        shapes |= {f"{projection}.weight": (*shapes[name], embedding), f"{projection}.bias": shapes[name]}
    for name in [name for name in shapes if name.endswith(".norm3.weight")]:
        block, (width,) = name.removesuffix(".norm3.weight"), shapes[name]
        shapes |= {f"{block}.norm2.weight": (width,), f"{block}.norm2.bias": (width,)}
        shapes |= {f"{block}.attn2.to_q.weight": (width, width), f"{block}.attn2.to_out.0.weight": (width, width)}
        shapes |= {f"{block}.attn2.to_{part}.weight": (width, prompt) for part in "kv"}
        shapes[f"{block}.attn2.to_out.0.bias"] = (width,)
    for number, inputs in ((1, channels[0]), (2, embedding)):
        shapes[f"time_embedding.linear_{number}.weight"] = (embedding, inputs)
        shapes[f"time_embedding.linear_{number}.bias"] = (embedding,)
    return shapes
