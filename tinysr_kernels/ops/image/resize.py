"""resize_bicubic: enlargement by a whole factor with the Keys kernel, as in torch's bicubic interpolation or Pillow's.

    out = mul * bicubic(x) + add          half-pixel centers (align_corners False); with clamp, clamped to [0,1]

torch: a = -0.75, border pixels repeated. pillow, torch's `antialias=True` as well: a = -0.5, pixels outside the image
left out and the weights of the others scaled to a sum of one.

Layouts: x [N,C,H,W] of any floating dtype or uint8 (then mul usually includes the 1/255) and of any strides,
out [N,C,H*factor,W*factor] channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_rank
from tinysr_kernels.ops.image.kernels import resize as kernels
from tinysr_kernels.ops.layout import empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of resize_bicubic, per program. block_n: consecutive elements of the output rows, over columns and
    channels; block_m: gaps between input rows.
    """

    block_n: int
    block_m: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class ResizeBicubic(Operator):
    """One enlargement; fields and mathematics as in the module's docstring.

    dtype: of the result, floating; None for x's own (float32 for uint8).
    """

    name = "resize_bicubic"
    config = Config
    tuned_by = ("x", "factor", "dtype")

    x: Tensor
    factor: int
    mul: float = 1.0
    add: float = 0.0
    dtype: torch.dtype | None = None
    pillow: bool = False
    clamp: bool = False

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the result."""
        if self.dtype is not None:
            return self.dtype
        return self.x.dtype if self.x.dtype.is_floating_point else torch.float32

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N,C,H*factor,W*factor] of the result."""
        n, c, h, w = self.x.shape
        return n, c, h * self.factor, w * self.factor

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        check(self.factor >= 1, f"factor must be at least 1, found {self.factor}")
        check(self.out_dtype.is_floating_point, f"dtype must be floating, found {self.dtype}")

    def reference(self) -> Tensor:
        """torch's own bicubic interpolation in float32 or wider."""
        u = nhwc(self.x.to(compute_dtype(torch.promote_types(self.out_dtype, self.x.dtype))))
        y = F.interpolate(u, size=self.out_shape[2:], mode="bicubic", align_corners=False, antialias=self.pillow)
        y = y * self.mul + self.add
        return nhwc((y.clamp(0, 1) if self.clamp else y).to(self.out_dtype))

    def empty(self) -> Tensor:
        """[N,C,H*factor,W*factor] in channels_last memory, of `out_dtype`."""
        return empty_nhwc(self.x, self.out_shape, self.out_dtype)

    def cost(self) -> Cost:
        """FLOPs: 2 passes of 4 taps and the affine map per output element; bytes of x and the result once."""
        outputs = self.x.numel() * self.factor**2
        return Cost(outputs * 18, nbytes(self.x) + outputs * self.out_dtype.itemsize)

    def bucket(self) -> str:
        """dtypes, factor, output elements per sample up to a power of two."""
        names = (str(t).removeprefix("torch.") for t in (self.x.dtype, self.out_dtype))
        return f"{'->'.join(names)} x{self.factor} {next_power_of_2(self.x[0].numel() * self.factor**2)}"

    def heuristic(self, gpu: Gpu) -> Config:
        """The same on every GPU."""
        return self.default_config()

    def default_config(self) -> Config:
        """Two elements per thread. Four gaps per program: of its seven input rows, the next one reads three again."""
        return Config(self._block_n(256), 4, 4)

    def _block_n(self, most: int) -> int:
        """Elements of an output row up to a power of two, at most `most`."""
        return next_power_of_2(self.out_shape[3] * self.x.shape[1], least=32, most=most)

    def plan(self, config: Config) -> Plan:
        """One launch, which reads x with the strides that it has."""
        out = self.empty()
        return Plan(out, (self.launch(config, out),))

    def launch(self, config: Config, out: Tensor, base: Tensor | None = None) -> Launch:
        """The launch of the call into `out`.

        base: an image of out's shape and any strides; then out = clamp(result) - clamp(base), both clamped to [0,1].
        """
        n, c, h, w = self.x.shape
        strides = (0, 0, 0, 0) if base is None else base.stride()
        arguments = {
            "x": self.x,
            "base": base,
            "out": out,
            "mul": float(self.mul),
            "add": float(self.add),
            "height": h,
            "width": w,
            "channels": c,
            "sample_stride": self.x.stride(0),
            "channel_stride": self.x.stride(1),
            "row_stride": self.x.stride(2),
            "column_stride": self.x.stride(3),
            "base_sample_stride": strides[0],
            "base_channel_stride": strides[1],
            "base_row_stride": strides[2],
            "base_column_stride": strides[3],
            "PILLOW": self.pillow,
            "CLAMP": self.clamp,
            "FACTOR": self.factor,
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
        }
        # Between h rows and around them lie h + 1 gaps.
        grid = (cdiv(h + 1, config.block_m) * cdiv(w * self.factor * c, config.block_n), n)
        return Launch(kernels.enlarge, grid, arguments, config.num_warps, 1)

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """More and fewer elements and rows per program."""
        for most, block_m, num_warps in itertools.product((128, 256, 512, 1024), (1, 2, 4, 8), (2, 4, 8)):
            yield Config(self._block_n(most), block_m, num_warps)
