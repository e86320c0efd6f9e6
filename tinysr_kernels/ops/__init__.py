"""The fused operators `torch.ops.tinysr.*`. Importing this package registers them all."""

from tinysr_kernels.ops.attention import attention
from tinysr_kernels.ops.call import REGISTRY, Cost, Operator
from tinysr_kernels.ops.conv import conv3x3, input_conv, sepconv, sepconv_block, upsample_conv
from tinysr_kernels.ops.image import adain, clamp_image, resize, tanh_scaled, wavelet
from tinysr_kernels.ops.linear import linear, linear_fp8, patch_embed, quantize, unpatchify
from tinysr_kernels.ops.norm import group_norm, layer_norm

__all__ = [
    "REGISTRY",
    "Cost",
    "Operator",
    "adain",
    "attention",
    "clamp_image",
    "conv3x3",
    "group_norm",
    "input_conv",
    "layer_norm",
    "linear",
    "linear_fp8",
    "patch_embed",
    "quantize",
    "resize",
    "sepconv",
    "sepconv_block",
    "tanh_scaled",
    "unpatchify",
    "upsample_conv",
    "wavelet",
]
