"""The fused networks: normalised checkpoint tensors in, one nn.Module of `tinysr::` operators out.

folded = fold(family, config, tensors, dtype)      # every constant folded, rounded once; with quantize="fp8" in e4m3
placed = place(folded, device, dtype)
network = build(family, config, placed)            # Latent or Pixel, see networks.py
"""

from tinysr_kernels.nets.fold import folds, place
from tinysr_kernels.nets.fp8 import is_fp8, to_fp8
from tinysr_kernels.nets.networks import LatentNetwork, Network, PixelNetwork, build, check_quantize, fold, resize

__all__ = [
    "LatentNetwork",
    "Network",
    "PixelNetwork",
    "build",
    "check_quantize",
    "fold",
    "folds",
    "is_fp8",
    "place",
    "resize",
    "to_fp8",
]
