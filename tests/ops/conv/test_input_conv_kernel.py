"""input_conv's kernel, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

from tests.ops.conv import test_input_conv
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.ops.conv.input_conv import Config
from tinysr_kernels.ops.conv.kernels import input_conv as input_conv_kernel


class TestInputConvKernels(KernelContract):
    contract = test_input_conv.TestInputConv
    kernels = input_conv_kernel
    configs: ClassVar = {"several blocks": Config(block_m=16, block_n=16, block_k=16, num_warps=1)}
    mutations: ClassVar = {
        "zero border": ("other=0).to(tl.float32), border * UNIT)", "other=0).to(tl.float32), 0.0)"),
        "border of bytes as it is": (", border * UNIT)", ", border)"),
        "bytes as they are": ("acc * (1.0 / UNIT)", "acc"),
        "transposed kernel": ("top[:, None] + (tap // KERNEL_SIZE)", "top[:, None] + (tap % KERNEL_SIZE)"),
        "no left border": ("& (column >= 0) & (column < width)", "& (column < width)"),
        "one step": ("tl.static_range(0, DEPTH, BLOCK_K)", "tl.static_range(0, BLOCK_K, BLOCK_K)"),
        "no stride": ("pixel // out_width * STRIDE - PADDING", "pixel // out_width - PADDING"),
        "no bias": ("+ bias_row(bias,", "+ 0.0 * bias_row(bias,"),
        "one sample": ("x += sample * sample_stride", "x += 0 * sample * sample_stride"),
        "one channel": ("(k % CHANNELS).to(tl.int64)", "(k % 1).to(tl.int64)"),
    }
