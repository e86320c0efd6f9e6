"""Pruned UNet and KL decoder as one module, for training: a low-resolution image in, one four times as large out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from model.reference.kl_decoder import KLDecoder
from model.reference.pipelines import lr_multiple, run_unet
from model.reference.pruned_unet import PrunedUNet, Shapes, under
from tinysr_kernels.families import UNetConfig


class UNetSR(nn.Module):
    """LR [N,3,H,W] in [-1,1] -> SR [N,3,4H,4W] in about [-1,1], not clamped, no color fix.

    PixelUnshuffle, UNet, decoder, plus the bicubic enlargement of the input where the configuration says so. H and W
    are multiples of the unshuffling factor times two to the number of the UNet's downsamplers.
    """

    def __init__(self, shapes: Shapes, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = PrunedUNet(under(shapes, "unet"), config)
        self.decoder = KLDecoder(under(shapes, "decoder"), config)

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], config: UNetConfig) -> UNetSR:
        """Build and load from a normalized state dict (`unet.*`, `decoder.*`); RuntimeError for unexpected tensors."""
        network = cls({name: tuple(t.shape) for name, t in tensors.items()}, config)
        network.load_state_dict(dict(tensors))
        return network

    @property
    def multiple(self) -> int:
        """What the input's sides must be multiples of."""
        return lr_multiple(self.unet, self.config)

    def forward(self, lr: Tensor) -> Tensor:
        return run_unet(lr, self.unet, self.decoder, self.config)
