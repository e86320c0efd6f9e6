"""The building blocks of fused networks, their folding, and the two forms of a whole network.

Everything here is made of `tinysr::` operators and knows no family: tensors of a normalized checkpoint come in under
the names their modules have, and what tensors leave open comes as values. A family's `fold` and `build`
(`tinysr_kernels/families/`) put the pieces together.
"""

from tinysr_kernels.nets.fold import folds, place
from tinysr_kernels.nets.fp8 import is_fp8, to_fp8
from tinysr_kernels.nets.networks import LatentNetwork, Network, PixelNetwork, resize

__all__ = ["LatentNetwork", "Network", "PixelNetwork", "folds", "is_fp8", "place", "resize", "to_fp8"]
