"""Stable Diffusion's AutoencoderKL in plain PyTorch: the teacher's VAE, and its pruned form.

Built from shapes like the pruned UNet (model/reference/pruned_unet.py). Widths may differ from layer to layer,
convolutions may be separable, and the middle blocks may have no attention. The decoder is that of
model/reference/kl_decoder.py plus its first convolution. Checked against diffusers (models/autoencoders/vae.py,
autoencoder_kl.py). The 1x1 convolutions around the latent are there if the shapes name them: SD 2.1's VAE has them,
SD3's does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.kl_decoder import DecoderBlock, KLDecoder
from model.reference.pruned_unet import (
    Resnet,
    SeparableConv,
    Shapes,
    convolution,
    group_norm,
    numbered,
    shape_of,
    under,
)
from model.reference.unet_shapes import Shape, convolution_shapes, decoder_shapes, resnet_shapes
from tinysr_kernels.families import UNetConfig


class KLDownsampler(nn.Module):
    """`conv` with stride 2, padded on the right and the bottom alone: [N,C,H,W] -> [N,O,H/2,W/2], H and W even."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv = convolution(under(shapes, "conv"), stride=2)
        spatial = self.conv.depthwise if isinstance(self.conv, SeparableConv) else self.conv
        assert isinstance(spatial, nn.Conv2d)
        spatial.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class EncoderBlock(nn.Module):
    """Resnets, then (but for the last level) the downsampler."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(s, config.groups, config.decoder_eps) for s in numbered(shapes, "resnets"))
        down = under(shapes, "downsamplers.0")
        self.downsamplers = nn.ModuleList([KLDownsampler(down)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class KLEncoder(nn.Module):
    """Image [N,3,H,W] in [-1,1] -> moments [N,2C,h,w]: the latent's mean, then the logarithm of its variance."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.conv_in = convolution(under(shapes, "conv_in"))
        self.down_blocks = nn.ModuleList(EncoderBlock(s, config) for s in numbered(shapes, "down_blocks"))
        self.mid_block = DecoderBlock(under(shapes, "mid_block"), config)
        self.conv_norm_out = group_norm(under(shapes, "conv_norm_out"), config.groups, config.decoder_eps)
        self.conv_out = convolution(under(shapes, "conv_out"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class FullKLDecoder(KLDecoder):
    """Latent [N,C,h,w] -> image [N,3,H,W] around [-1,1], not clamped."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__(shapes, config)
        self.conv_in = convolution(under(shapes, "conv_in"))

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(self.conv_in(z))


def pointwise(shapes: Shapes) -> nn.Module:
    """A 1x1 convolution with bias, or nothing where there are no shapes."""
    if not shapes:
        return nn.Identity()
    outputs, inputs = shape_of(shapes, "weight")[:2]
    return nn.Conv2d(inputs, outputs, 1)


class KLVAE(nn.Module):
    """Both halves, without the scaling factor, which belongs to the pipeline."""

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = KLEncoder(under(shapes, "encoder"), config)
        self.decoder = FullKLDecoder(under(shapes, "decoder"), config)
        self.quant_conv = pointwise(under(shapes, "quant_conv"))
        self.post_quant_conv = pointwise(under(shapes, "post_quant_conv"))

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], config: UNetConfig) -> KLVAE:
        """The VAE that `encoder.*` and `decoder.*` describe, in their dtype; KeyError, RuntimeError or ValueError."""
        network = cls({name: tuple(t.shape) for name, t in tensors.items()}, config)
        network.to(next(iter(tensors.values())).dtype)
        network.load_state_dict(dict(tensors))
        return network

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latent, [N,C,h,w] each."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, x: Tensor) -> Tensor:
        """Image [N,3,H,W] in [-1,1] -> the latent's mean."""
        return self.moments(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image around [-1,1], not clamped."""
        return self.decoder(self.post_quant_conv(z))


def kl_config(groups: int, eps: float = 1e-6) -> UNetConfig:
    """A configuration whose every GroupNorm has `groups` groups; eps is 1e-6 in AutoencoderKL."""
    return UNetConfig(groups=(groups,), decoder_eps=eps)


def kl_vae_shapes(channels: Sequence[int], latent: int, layers: int, quant: bool = False) -> dict[str, Shape]:
    """Names and shapes of a regular AutoencoderKL: `layers` resnets per encoder level, one more in the decoder.

    quant: with the 1x1 convolutions around the latent.
    """
    decoder = decoder_shapes(channels, layers + 1)
    encoder = convolution_shapes("conv_in", 3, channels[0], False)
    inputs = channels[0]
    for i, width in enumerate(channels):
        for j in range(layers):
            encoder |= resnet_shapes(f"down_blocks.{i}.resnets.{j}", inputs, width, False)
            inputs = width
        if i < len(channels) - 1:
            encoder |= convolution_shapes(f"down_blocks.{i}.downsamplers.0.conv", width, width, False)
    encoder |= {name: shape for name, shape in decoder.items() if name.startswith("mid_block.")}
    encoder |= {"conv_norm_out.weight": (inputs,), "conv_norm_out.bias": (inputs,)}
    encoder |= convolution_shapes("conv_out", inputs, 2 * latent, False)
    decoder = convolution_shapes("conv_in", latent, channels[-1], False) | decoder
    shapes = {f"encoder.{k}": v for k, v in encoder.items()} | {f"decoder.{k}": v for k, v in decoder.items()}
    for name, width in (("quant_conv", 2 * latent), ("post_quant_conv", latent)) if quant else ():
        shapes |= {f"{name}.weight": (width, width, 1, 1), f"{name}.bias": (width,)}
    return shapes
