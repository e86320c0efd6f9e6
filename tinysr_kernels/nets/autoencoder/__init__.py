"""The halves of diffusers' autoencoders as they stand in other programs, for `accelerate`: their own ranges in and out.

`kl.py` is AutoencoderKL, `tiny.py` AutoencoderTiny. Each half comes in two qualities. "high" folds what can be folded;
"exact" keeps the order of the module's operations: no sums of weights, no statistics from accumulators, every 1x1
shortcut and every enlargement for itself. Both normalize with float32 statistics.
"""

from tinysr_kernels.nets.autoencoder.kl import KLHalf, fold_kl
from tinysr_kernels.nets.autoencoder.tiny import TinyHalf, fold_tiny

__all__ = ["KLHalf", "TinyHalf", "fold_kl", "fold_tiny"]
