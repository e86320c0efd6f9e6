"""The pruned UNet of AdcSR (arXiv 2411.13383) and of this project's own `tinysr-unet` family, in plain PyTorch.

Stable Diffusion 2.1's UNet without time embedding, time projections and cross attention. Nothing is configured that
the weights' shapes say: a network is built from a mapping `name -> shape` (names as in diffusers'
UNet2DConditionModel), so depths, widths, dense or separable convolutions and the presence of transformers may differ
from block to block, as pruning leaves them. `unet_shapes` writes that mapping for a regular network.

The blocks and their order were checked against diffusers' UNet2DConditionModel (models/unets, models/resnet.py,
models/attention.py); the numbers of groups against the public AdcSR code (github.com/Guaishou74851/AdcSR, model.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinysr_kernels.families import UNetConfig

Shapes = Mapping[str, Sequence[int]]


# ---------------------------------------------------------------------------------------------- reading shapes
def shape_of(shapes: Shapes, name: str) -> Sequence[int]:
    """The shape of tensor `name`; KeyError naming it when it is missing."""
    if name not in shapes:
        raise KeyError(f"missing tensor {name!r}")
    return shapes[name]


def under(shapes: Shapes, prefix: str) -> dict[str, Sequence[int]]:
    """The entries whose names start with `prefix.`, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in shapes.items() if k.startswith(prefix + ".")}


def count(shapes: Shapes, name: str) -> int:
    """How many numbered children `name.0`, `name.1`, ... exist; KeyError if the numbers have a gap."""
    pattern = re.compile(re.escape(name) + r"\.(\d+)\.")
    numbers = {int(found.group(1)) for key in shapes if (found := pattern.match(key))}
    if numbers != set(range(len(numbers))):
        raise KeyError(f"{name}: numbered {sorted(numbers)}, expected 0 to {len(numbers) - 1}")
    return len(numbers)


def numbered(shapes: Shapes, name: str) -> list[dict[str, Sequence[int]]]:
    """The entries under `name.0`, `name.1`, ..., each without its prefix."""
    return [under(shapes, f"{name}.{i}") for i in range(count(shapes, name))]


# ------------------------------------------------------------------------------------------------------ pieces
class SeparableConv(nn.Module):
    """Depthwise 3x3 (no bias, carries the stride) followed by pointwise 1x1, nothing in between."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


def convolution(shapes: Shapes, stride: int = 1) -> nn.Module:
    """A 3x3 convolution, padding 1: dense if `weight` is there, separable if `depthwise.weight` is."""
    if "depthwise.weight" in shapes:
        outputs, inputs = shape_of(shapes, "pointwise.weight")[:2]
        return SeparableConv(inputs, outputs, stride, "pointwise.bias" in shapes)
    outputs, inputs = shape_of(shapes, "weight")[:2]
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias="bias" in shapes)


def linear(shapes: Shapes) -> nn.Linear:
    """A linear layer [O, I], with a bias if the shapes name one."""
    outputs, inputs = shape_of(shapes, "weight")[:2]
    return nn.Linear(inputs, outputs, "bias" in shapes)


def group_norm(shapes: Shapes, groups: Sequence[int], eps: float) -> nn.GroupNorm:
    """GroupNorm with the largest of `groups` that divides the channels; ValueError if none does."""
    channels = shape_of(shapes, "weight")[0]
    fitting = [g for g in groups if channels % g == 0]
    if not fitting:
        raise ValueError(f"none of the group counts {tuple(groups)} divides {channels} channels")
    return nn.GroupNorm(max(fitting), channels, eps)


class Resnet(nn.Module):
    """conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + time_bias))) + shortcut(x); x [N,C,H,W] -> [N,O,H,W].

    `time_bias` [O] is what a time projection came to for the one time step of a one-step model; most networks have
    none.
    """

    def __init__(self, shapes: Shapes, groups: Sequence[int], eps: float) -> None:
        super().__init__()
        self.norm1 = group_norm(under(shapes, "norm1"), groups, eps)
        self.conv1 = convolution(under(shapes, "conv1"))
        self.norm2 = group_norm(under(shapes, "norm2"), groups, eps)
        self.conv2 = convolution(under(shapes, "conv2"))
        self.time_bias: nn.Parameter | None = None
        if "time_bias" in shapes:
            self.time_bias = nn.Parameter(torch.zeros(tuple(shapes["time_bias"])))
        self.conv_shortcut: nn.Conv2d | None = None
        if "conv_shortcut.weight" in shapes:
            outputs, inputs = shapes["conv_shortcut.weight"][:2]
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1, bias="conv_shortcut.bias" in shapes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_bias is not None:
            h = h + self.time_bias[:, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Attention over tokens [N,T,C] with heads of `head_dim` channels, scale 1/sqrt(head_dim), not causal.

    Keys and values come from the tokens themselves, or from a context [N,S,X].
    """

    def __init__(self, shapes: Shapes, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = linear(under(shapes, "to_q"))
        self.to_k = linear(under(shapes, "to_k"))
        self.to_v = linear(under(shapes, "to_v"))
        self.to_out = nn.ModuleList([linear(under(shapes, "to_out.0"))])
        if self.to_q.out_features % head_dim:
            raise ValueError(f"attention of width {self.to_q.out_features} has no heads of {head_dim}")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        parts = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """(a, g) = proj(x) in halves; a * gelu(g) with the exact GELU."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.proj = linear(under(shapes, "proj"))

    def forward(self, x: Tensor) -> Tensor:
        a, gate = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU, then a linear layer; the public names leave number 1 to a dropout that does nothing here."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(under(shapes, "net.0")), nn.Identity(), linear(under(shapes, "net.2"))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """x += attn1(norm1(x)); x += ff(norm3(x)) on tokens [N,T,C]; the cross attention (norm2, attn2) is pruned."""

    def __init__(self, shapes: Shapes, head_dim: int, eps: float) -> None:
        super().__init__()
        width = shape_of(shapes, "norm1.weight")[0]
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn1 = Attention(under(shapes, "attn1"), head_dim)
        self.norm3 = nn.LayerNorm(width, eps)
        self.ff = FeedForward(under(shapes, "ff"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """GroupNorm, pixels as tokens, linear proj_in, blocks, linear proj_out, plus the input; [N,C,H,W] -> same."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.norm = group_norm(under(shapes, "norm"), config.groups, config.transformer_norm_eps)
        self.proj_in = linear(under(shapes, "proj_in"))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(s, config.head_dim, config.layer_norm_eps) for s in numbered(shapes, "transformer_blocks")
        )
        self.proj_out = linear(under(shapes, "proj_out"))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Sampler(nn.Module):
    """`conv` with stride 2 and symmetric padding 1, or after a nearest x2 enlargement."""

    def __init__(self, shapes: Shapes, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = convolution(under(shapes, "conv"), stride=1 if up else 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Block(nn.Module):
    """The modules of one down, middle or up block."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(s, config.groups, config.unet_eps) for s in numbered(shapes, "resnets"))
        self.attentions = nn.ModuleList(Transformer(s, config) for s in numbered(shapes, "attentions"))
        down, up = under(shapes, "downsamplers.0"), under(shapes, "upsamplers.0")
        self.downsamplers = nn.ModuleList([Sampler(down, up=False)] if down else [])
        self.upsamplers = nn.ModuleList([Sampler(up, up=True)] if up else [])

    def step(self, x: Tensor, i: int) -> Tensor:
        """Resnet i and the transformer that follows it, if there is one."""
        x = self.resnets[i](x)
        return self.attentions[i](x) if i < len(self.attentions) else x


class DownBlock(Block):
    """Resnets, then the downsampler; leaves what each of them gives in `skips`."""

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(x, i)
            skips.append(x)
        for sampler in self.downsamplers:
            x = sampler(x)
            skips.append(x)
        return x


class MidBlock(Block):
    """Resnet, transformer, resnet; without transformers the resnets simply follow one another."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(x, i)
        return x


class UpBlock(Block):
    """Resnets, each on its input beside the skip that was left last, then the upsampler."""

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(torch.cat([x, skips.pop()], dim=1), i)
        for sampler in self.upsamplers:
            x = sampler(x)
        return x


# ----------------------------------------------------------------------------------------------- the network
class PrunedUNet(nn.Module):
    """The UNet: [N,C,H,W] -> [N,O,H,W], H and W divisible by two to the number of downsamplers.

    `shapes` maps every parameter's public name to its shape. Raises KeyError naming a missing tensor, ValueError
    where the shapes do not make a UNet.
    """

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        down = [DownBlock(s, config) for s in numbered(shapes, "down_blocks")]
        up = [UpBlock(s, config) for s in numbered(shapes, "up_blocks")]
        skips = 1 + sum(len(block.resnets) + len(block.downsamplers) for block in down)
        if skips != (taken := sum(len(block.resnets) for block in up)):
            raise ValueError(f"the down blocks leave {skips} skips, the up blocks take {taken}")
        self.conv_in = convolution(under(shapes, "conv_in"))
        self.down_blocks = nn.ModuleList(down)
        self.mid_block = MidBlock(under(shapes, "mid_block"), config)
        self.up_blocks = nn.ModuleList(up)
        self.conv_norm_out = group_norm(under(shapes, "conv_norm_out"), config.groups, config.unet_eps)
        self.conv_out = convolution(under(shapes, "conv_out"))

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], config: UNetConfig) -> PrunedUNet:
        """Build from a state dict (names without prefix) and load it; RuntimeError if names are left over."""
        network = cls({name: tuple(t.shape) for name, t in tensors.items()}, config)
        network.load_state_dict(dict(tensors))
        return network

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, skips)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
