"""What the color fixes share: adain_fix, wavelet_fix and clamp_image, from the network's image to the image shown.

Each returns the image in [0,1] and flags that are True where x was finite; where x was not, the image is unspecified.

Layouts: x [N,C,H,W] of any floating dtype, style likewise or uint8, which holds 255 times the value; both of any
strides. The result is channels_last in `dtype`, x's own by default, or uint8: then it holds 255 times the value,
rounded to the nearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinysr_kernels.launch.plan import next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator
from tinysr_kernels.ops.checks import check
from tinysr_kernels.ops.layout import empty_nhwc, nbytes, nhwc


class ColorFix(Operator):
    """Base of the color fixes; subclasses have these two fields, others between them."""

    __slots__ = ()
    returns = "(Tensor, Tensor)"

    x: Tensor
    dtype: torch.dtype | None

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the image that results."""
        return self.dtype or self.x.dtype

    @property
    def flags_shape(self) -> tuple[int, ...]:
        """[N,H]: one flag per row."""
        return self.x.shape[0], self.x.shape[2]

    def check_dtype(self) -> None:
        """ValueError unless dtype is None, floating or uint8."""
        known = self.dtype is None or self.dtype.is_floating_point or self.dtype == torch.uint8
        check(known, f"dtype must be floating or torch.uint8, found {self.dtype}")

    def empty(self) -> tuple[Tensor, Tensor]:
        """[N,C,H,W] in channels_last memory, of `out_dtype`; bool flags of `flags_shape`."""
        image = empty_nhwc(self.x, tuple(self.x.shape), self.out_dtype)
        return image, self.x.new_empty(self.flags_shape, dtype=torch.bool)

    def cost_of(self, flops: int) -> Cost:
        """A cost of so many FLOPs; bytes of every tensor once."""
        image = self.x.numel() * self.out_dtype.itemsize
        return Cost(flops, nbytes(*self.tensors) + image + math.prod(self.flags_shape))

    def bucket(self) -> str:
        """dtypes, channels, pixels per sample up to a power of two."""
        names = (str(t).removeprefix("torch.") for t in (self.x.dtype, self.out_dtype))
        return f"{'->'.join(names)} {self.x.shape[1]} {next_power_of_2(self.x.shape[2] * self.x.shape[3])}"

    def as_image(self, v: Tensor) -> Tensor:
        """The reference's image: values in [0,1], rounded once to `out_dtype`, channels_last."""
        return nhwc(v.mul(255).round().to(torch.uint8) if self.out_dtype == torch.uint8 else v.to(self.out_dtype))


def in_unit_range(style: Tensor, dtype: torch.dtype) -> Tensor:
    """An image in [0,1] in another dtype; uint8 is divided by 255."""
    return style.to(dtype) / 255 if style.dtype == torch.uint8 else style.to(dtype)


def is_finite(u: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Whether all values over these dimensions are finite."""
    return torch.linalg.vector_norm(u, math.inf, dim=dim) < math.inf


def strides_of(x: Tensor, prefix: str = "") -> dict[str, int]:
    """The strides of [N,C,H,W] as kernel arguments: sample_stride, channel_stride, row_stride, column_stride."""
    names = ("sample_stride", "channel_stride", "row_stride", "column_stride")
    return {prefix + name: stride for name, stride in zip(names, x.stride(), strict=True)}


def is_dense(x: Tensor, rows: int | None = None) -> bool:
    """Whether the first `rows` rows (None: all) of each sample are dense, with channels innermost."""
    return x[0, :, :rows].permute(1, 2, 0).is_contiguous()


def row_block(x: Tensor, most: int) -> int:
    """Elements of an image row up to a power of two, at most `most`."""
    return next_power_of_2(x.shape[3] * x.shape[1], least=32, most=most)
