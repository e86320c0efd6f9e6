"""Calls of PyTorch's libraries that several operators share, in the dtype of their first argument.

Float32 stays float32: no call here rounds to tf32 unless the caller has asked PyTorch for it. For matmuls PyTorch's own
default is the same (`torch.backends.cuda.matmul.allow_tf32`), for cuDNN it is not; the flags are the whole process's,
so that nothing here sets them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.layout import as_rows, empty_nhwc, nhwc


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv2d, never in tf32; x and weight of one dtype in channels_last memory, bias [O] of any.

    On a GPU the bias is a step of its own, as torch itself adds it after cuDNN's convolution; in float32, if it is.
    """
    if x.dtype == torch.float32 and _by_cudnn(x):
        # benchmark False, deterministic True, allow_tf32 False.
        sizes = ([padding] * 2, [stride] * 2, [dilation] * 2)
        y = torch.ops.aten.cudnn_convolution(x, weight, *sizes, groups, False, True, False)
    elif x.device.type == "cpu":
        own = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight, own, stride=stride, padding=padding, dilation=dilation, groups=groups)
    else:
        y = F.conv2d(x, weight, None, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if y.is_meta:  # it comes as planes, which hold what libraries return in channels_last memory
        y = y.as_strided(y.shape, empty_nhwc(y, tuple(y.shape)).stride())
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def _by_cudnn(x: Tensor) -> bool:
    """Whether torch would convolve x by cuDNN, and so float32 in tf32 unless that is switched off for all."""
    cudnn = torch.backends.cudnn
    return x.is_cuda and torch.version.hip is None and cudnn.is_available() and cudnn.enabled


def add_1x1(y: Tensor, shortcut: Tensor | None, skip: Tensor | None, weight: Tensor | None) -> Tensor:
    """y += weight @ concat(shortcut, skip) over channels, without the concatenated tensor; y if there is none.

    y [N,O,H,W] in channels_last memory; shortcut [N,C1,H,W]; skip [N,C2,H,W] or None; weight [O,C1+C2].
    """
    if shortcut is None or weight is None:
        return y
    first, second = weight.to(y.dtype).tensor_split([shortcut.shape[1]], 1)
    for image, part in ((shortcut, first), (skip, second)):
        if image is not None:
            as_rows(y).addmm_(as_rows(nhwc(image.to(y.dtype))), part.T)
    return y


def narrow(t: Tensor) -> bool:
    """Whether results in t's dtype are rounded from float32 sums: float16 and bfloat16."""
    return t.element_size() == 2
