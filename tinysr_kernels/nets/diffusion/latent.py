"""What the one-step networks between the halves of Stable Diffusion's VAE share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinysr_kernels.nets import kl_vae
from tinysr_kernels.nets.layers import Folded
from tinysr_kernels.nets.networks import PixelNetwork


@dataclass(frozen=True)
class OfVAE:
    """`kl_vae.Options` of Stable Diffusion's VAE."""

    groups: tuple[int, ...]
    decoder_eps: float = 1e-6
    residual: str = "none"


class LatentStep(PixelNetwork):
    """A network on latents of the VAE's encoder, whose smallest side is `least_latent`.

    The halves of the VAE normalize over the whole image and so take it whole.
    """

    def __init__(self, folded: Folded, vae: OfVAE, least_latent: int, upscale: int) -> None:
        super().__init__(upscale)
        self.encoder = kl_vae.KLEncoder(folded, vae)
        self.least_latent = least_latent
        self.set_upscale(upscale)

    def set_upscale(self, upscale: int) -> bool:
        """Any factor: the image is enlarged before anything else."""
        factor = self.encoder.factor
        multiple = factor // math.gcd(factor, upscale)
        least = -(-self.least_latent * factor // upscale)
        self.upscale, self.multiple, self.least = upscale, multiple, -(-least // multiple) * multiple
        return True
