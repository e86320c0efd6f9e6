"""The fused operators `torch.ops.tinysr.*`: one class each. Importing this package registers them all."""

from tinysr_kernels.ops.attention.attention import Attention
from tinysr_kernels.ops.attention.cross_attention import CrossAttention
from tinysr_kernels.ops.attention.joint_attention import JointAttention
from tinysr_kernels.ops.call import REGISTRY, Cost, Operator
from tinysr_kernels.ops.conv.conv3x3 import Conv3x3, Conv3x3Moments, Conv3x3Norm
from tinysr_kernels.ops.conv.input_conv import InputConv
from tinysr_kernels.ops.conv.sepconv import SepConv, SepConvMoments
from tinysr_kernels.ops.conv.sepconv_block import SepConvBlock
from tinysr_kernels.ops.conv.upsample_conv import UpsampleConv, UpsampleConvNorm
from tinysr_kernels.ops.image.adain import AdaINFix
from tinysr_kernels.ops.image.clamp_image import ClampImage
from tinysr_kernels.ops.image.resize import ResizeBicubic
from tinysr_kernels.ops.image.tanh_scaled import TanhScaled
from tinysr_kernels.ops.image.wavelet import WaveletFix
from tinysr_kernels.ops.linear.linear import Linear, LinearRowMoments
from tinysr_kernels.ops.linear.linear_fp8 import LinearFp8, LinearFp8Quantized
from tinysr_kernels.ops.linear.patch_embed import PatchEmbed, PatchEmbedRowMoments
from tinysr_kernels.ops.linear.quantize import LayerNormQuantize, QuantizeRows
from tinysr_kernels.ops.linear.unpatchify import UnpatchifySubtract
from tinysr_kernels.ops.norm.group_norm import GroupNorm
from tinysr_kernels.ops.norm.layer_norm import LayerNorm

__all__ = [
    "REGISTRY",
    "AdaINFix",
    "Attention",
    "ClampImage",
    "Conv3x3",
    "Conv3x3Moments",
    "Conv3x3Norm",
    "Cost",
    "CrossAttention",
    "GroupNorm",
    "InputConv",
    "JointAttention",
    "LayerNorm",
    "LayerNormQuantize",
    "Linear",
    "LinearFp8",
    "LinearFp8Quantized",
    "LinearRowMoments",
    "Operator",
    "PatchEmbed",
    "PatchEmbedRowMoments",
    "QuantizeRows",
    "ResizeBicubic",
    "SepConv",
    "SepConvBlock",
    "SepConvMoments",
    "TanhScaled",
    "UnpatchifySubtract",
    "UpsampleConv",
    "UpsampleConvNorm",
    "WaveletFix",
]
