"""sepconv_block: three separable convolutions of equal width with ReLUs and the skip, the block of TinySR's VAE.

    h1 = relu(c1(x)), h2 = relu(c2(h1))
    out = relu(c3(h2) + x)          each c as `sepconv` with stride 1, h1 and h2 rounded to x's dtype

Layouts as in `sepconv`: x and out [N,C,H,W] in channels_last memory; per convolution a depthwise kernel [C,3,3] with
the channels last in memory, a pointwise one [C,C] and a bias [C] or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Plan, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check_rank, check_shape
from tinysr_kernels.ops.conv.sepconv import Config, SepConv, sepconv_heuristic, sepconv_space
from tinysr_kernels.ops.layout import dtype_name, empty_nhwc, nbytes, nhwc


@register
@dataclass(slots=True, eq=False)
class SepConvBlock(Operator):
    """Three separable convolutions; fields and mathematics as in the module's docstring."""

    name = "sepconv_block"
    config = Config
    tuned_by = ("x",)

    x: Tensor
    depthwise1: Tensor
    pointwise1: Tensor
    bias1: Tensor | None
    depthwise2: Tensor
    pointwise2: Tensor
    bias2: Tensor | None
    depthwise3: Tensor
    pointwise3: Tensor
    bias3: Tensor | None

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        c = self.x.shape[1]
        for number in (1, 2, 3):
            check_shape(f"depthwise{number}", getattr(self, f"depthwise{number}"), (c, 3, 3))
            check_shape(f"pointwise{number}", getattr(self, f"pointwise{number}"), (c, c))
            check_shape(f"bias{number}", getattr(self, f"bias{number}"), (c,))

    def convolutions(self, x: Tensor, h1: Tensor, h2: Tensor) -> tuple[SepConv, SepConv, SepConv]:
        """The three calls on these inputs."""
        return (
            SepConv(x, self.depthwise1, self.pointwise1, self.bias1, activation="relu"),
            SepConv(h1, self.depthwise2, self.pointwise2, self.bias2, activation="relu"),
            SepConv(h2, self.depthwise3, self.pointwise3, self.bias3, x, activation="relu"),
        )

    def reference(self) -> Tensor:
        """`sepconv`'s reference three times."""
        return self._in_turn(SepConv.reference)

    def library(self) -> Tensor:
        """`sepconv`'s library form three times."""
        return self._in_turn(SepConv.library)

    def _in_turn(self, compute: Callable[[SepConv], Tensor]) -> Tensor:
        """The three calls, each on the result of the one before it."""
        x = self.x
        h1 = compute(self.convolutions(x, x, x)[0])
        h2 = compute(self.convolutions(x, h1, h1)[1])
        return compute(self.convolutions(x, h1, h2)[2])

    def empty(self) -> Tensor:
        """[N,C,H,W] in channels_last memory, of x's dtype."""
        return empty_nhwc(self.x, tuple(self.x.shape))

    def cost(self) -> Cost:
        """FLOPs of the three convolutions; bytes of every argument and the result once, of h1 and h2 none."""
        x = self.x
        return Cost(3 * 2 * x.numel() * (9 + x.shape[1]), nbytes(*self.tensors) + x.numel() * x.element_size())

    def bucket(self) -> str:
        """dtype, channels, pixels up to a power of two."""
        n, c, h, w = self.x.shape
        return f"{dtype_name(self.x)} {c} {next_power_of_2(n * h * w)}"

    def heuristic(self, gpu: Gpu) -> Config:
        """`sepconv_heuristic`, for each of the three launches."""
        return sepconv_heuristic(gpu, self.x.shape[1], self._out_shape, self.x.element_size())

    @property
    def _out_shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = self.x.shape
        return n, c, h, w

    def plan(self, config: Config) -> Plan:
        """Three launches."""
        x = nhwc(self.x)
        images = [empty_nhwc(x, self._out_shape) for _ in range(3)]
        calls = self.convolutions(x, images[0], images[1])
        launches = (call.launch(config, out) for call, out in zip(calls, images, strict=True))
        return Plan(images[2], tuple(launches))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """`sepconv_space` for the shape of the result."""
        return sepconv_space(self.x.shape[1], self._out_shape)
