"""One step of Stable Diffusion between the halves of its VAE, with every constant folded: OSEDiff and its kin.

The enlarged image goes through the encoder, its latent z through the UNet, and the noise-free latent
x0 = (z - n p) / m through the decoder, p what the UNet predicts: with the noise eps at a step with a share a of image
n = sqrt(1-a) and m = sqrt(a). Folded besides what the UNet and the VAE fold themselves: time and prompt, -n into the
UNet's last convolution, to which z is added, and 1 / (m k) into the 1x1 convolution before the decoder, k the latent's
scale. As 1 / m may be about 15, latents are float32 or wider whatever the network's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tinysr_kernels.nets import kl_vae, pruned_unet
from tinysr_kernels.nets.diffusion.latent import LatentStep, OfVAE
from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Folded, InputConv, Layer, WideConv, ops, tokens, untokens
from tinysr_kernels.nets.networks import resize
from tinysr_kernels.nets.windows import blend_windows, window_weights

WINDOW_BATCH = 8
"""Windows of a latent that run as one batch."""


class Options(Protocol):
    """What the weights leave open."""

    @property
    def signal(self) -> float:
        """m in x0 = (z - n p) / m."""

    @property
    def noise(self) -> float:
        """n in x0 = (z - n p) / m."""

    @property
    def scaling_factor(self) -> float:
        """k, by which the encoder's latents are multiplied and the decoder's divided."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Of the UNet's GroupNorms: the first that divides the channels."""

    @property
    def vae_groups(self) -> tuple[int, ...]:
        """Of the VAE's."""

    @property
    def unet_eps(self) -> float:
        """Of the residual blocks' GroupNorms and of `conv_norm_out`."""

    @property
    def window(self) -> int:
        """Side of the UNet's windows in latents of more pixels than one has."""

    @property
    def overlap(self) -> int:
        """Latent pixels that neighboring windows share per axis."""

    @property
    def least(self) -> int:
        """Smallest side of a latent; smaller images are padded."""

    @property
    def symmetric(self) -> bool:
        """Whether the weights of windows are largest at the middle of both axes: see `window_weights`."""

    @property
    def pillow(self) -> bool:
        """Whether the image is enlarged as Pillow does it, and clamped, or as PyTorch does it."""


@dataclass(frozen=True)
class _OfUNet:
    """`pruned_unet.Options` of Stable Diffusion's UNet."""

    groups: tuple[int, ...]
    unet_eps: float
    transformer_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    input: str = "vae"
    unshuffle: int = 1
    head_dim: int = 64
    prediction: str = "subtract"


def fold(tensors: Mapping[str, Tensor], options: Options, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fold `unet.*`, `encoder.*`, `decoder.*`, `quant_conv` and `post_quant_conv` of a normalized checkpoint."""
    f = Folder(tensors, dtype)
    f.input_conv("unet.conv_in", "unet.conv_in")
    pruned_unet.fold_blocks(f)
    weight, bias = f.dense_weight("unet.conv_out")
    f.vector("unet.conv_out.wide", weight * -options.noise)
    f.vector("unet.conv_out.bias", bias * -options.noise)
    latent = weight.shape[0]
    post, shift = torch.eye(latent, dtype=torch.float64, device=weight.device), weight.new_zeros(latent)
    if f.has("post_quant_conv.weight"):
        post, shift = f.get("post_quant_conv.weight").flatten(1), f.get("post_quant_conv.bias")
    f.vector("decoder.latent.wide", post / (options.signal * options.scaling_factor))
    f.vector("decoder.latent.bias", shift)
    f.input_conv("decoder.conv_in", "decoder.conv_in")
    f.folded |= kl_vae.fold_encoder(tensors, dtype, options.scaling_factor)
    f.folded |= kl_vae.fold_decoder(tensors, OfVAE(options.vae_groups), dtype)
    return f.folded


class UNet(pruned_unet.UNet):
    """z [N,4,h,w] of any sides -> z - n p, both in float32 or wider."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__(folded, _OfUNet(options.groups, options.unet_eps))

    def _conv_in(self, folded: Folded, options: pruned_unet.Options) -> nn.Module:
        return InputConv(folded, "unet.conv_in")

    def _conv_out(self, folded: Folded) -> nn.Module:
        return WideConv(folded, "unet.conv_out")


class Decoder(nn.Module):
    """m k times the decoder's latent, [N,4,h,w] in float32 or wider -> image [N,3,8h,8w], [0,1] and overshoot."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__()
        self.latent = Layer(folded, "decoder.latent", ("wide", "bias"))
        self.conv_in = InputConv(folded, "decoder.conv_in")
        self.rest = kl_vae.KLDecoder(folded, OfVAE(options.vae_groups))
        self.factor = self.rest.factor

    def forward(self, z: Tensor) -> Tensor:
        # A 1x1 convolution before a padded 3x3 one: folding it would make the padding another than zero.
        latent = ops.linear(tokens(z), self.latent.wide, self.latent.bias)
        return self.rest(self.conv_in(untokens(latent, z.shape[2], z.shape[3])))


class OneStepSD(LatentStep):
    """[N,3,H,W] in [0,1] or uint8 -> [N,3,s*H,s*W] for any whole s, over folded tensors.

    The UNet takes latents of more pixels than a window has in windows, which overlap and are blended.
    """

    def __init__(self, folded: Folded, options: Options, upscale: int = 4) -> None:
        super().__init__(folded, OfVAE(options.vae_groups), options.least, upscale)
        self.unet = UNet(folded, options)
        self.decoder = Decoder(folded, options)
        self.window, self.overlap = options.window, options.overlap
        widths = (t.shape[2] for name, t in folded.items() if name.endswith(".cross.prompt"))
        self.prompt_width = next(widths, None)
        self.symmetric, self.pillow = options.symmetric, options.pillow

    def forward(self, image: Tensor) -> Tensor:
        dtype = self.encoder.conv_in.weight.dtype
        z = self.encoder(resize(image, self.upscale, dtype, pillow=self.pillow))
        return self.decoder(self._denoised(z))

    def _denoised(self, z: Tensor) -> Tensor:
        """z [N,4,h,w] whole, or where it has more pixels than a window in windows of at most that side."""
        height, width = z.shape[2:]
        if height * width <= self.window**2:
            found: Tensor = self.unet(z)
            return found
        side = min(self.window, height, width)
        weights = window_weights(side, z.device, self.symmetric)
        overlap = min(self.overlap, side // 2)
        return blend_windows(z, (side, side), overlap, weights, 1, WINDOW_BATCH, self.unet).to(z.dtype)
