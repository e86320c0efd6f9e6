"""The color fixes: from the network's image to the image that is shown, tied to the original's colors.

adain_fix:    out = clamp((x - mean_x) * gain + mean_style, 0, 1), gain = dev_style / max(dev_x, least) and
              dev = sqrt(variance + eps), per sample and channel over all pixels, the variance unbiased (that of a
              single pixel is 0). With `clamp`, x is clamped to [0,1] before anything else.
wavelet_fix:  out = clamp(u + L(bicubic(style) - u), 0, 1), u and the bicubic enlargement clamped to [0,1], L five
              blurs in turn with [1,2,1]x[1,2,1]/16 dilated by 2^i, i = 0..4, replicate padding. The high bands of a
              five-level decomposition telescope, so this equals keeping x's details over style's colors at the cost
              of one blur chain.
clamp_image:  out = clamp(x, 0, 1): no fix.

Each gives the image, and flags that are true where x was finite: [N] of adain_fix, which counts an overflow of the
statistics as well, [N,H], one a row, of the others. Of an image that is not finite, out says nothing.

Layouts: x [N,C,H,W] of any floating dtype; style [N,C,h,w] likewise or uint8, which holds 255 times the value, with
H = factor h and W = factor w for wavelet_fix; inputs of any strides. out is channels_last in `dtype`, x's own by
default, or uint8: then it holds 255 times the value, rounded to the nearest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.image import resize
from tinysr_kernels.ops.image.kernels import color as color_kernel
from tinysr_kernels.ops.image.kernels import resize as resize_kernel
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

WAVELET_LEVELS = 5
MOST_PARTS = 256
"""Parts that an image's moments come in at most: every program of adain_fix's second launch merges them all."""
ADAIN_SCHEMA = (
    "adain_fix(Tensor x, Tensor style, float eps, float least, bool clamp=False, ScalarType? dtype=None) "
    "-> (Tensor, Tensor)"
)
WAVELET_SCHEMA = "wavelet_fix(Tensor x, Tensor style, int factor, ScalarType? dtype=None) -> (Tensor, Tensor)"
CLAMP_SCHEMA = "clamp_image(Tensor x, ScalarType? dtype=None) -> (Tensor, Tensor)"
Both = tuple[Tensor, Tensor]


def _image(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in [0,1] as an image of the dtype holds them."""
    return nhwc(v.mul(255).round().to(dtype) if dtype == torch.uint8 else v.to(dtype))


def _in_unit(style: Tensor, dtype: torch.dtype) -> Tensor:
    return style.to(dtype) / 255 if style.dtype == torch.uint8 else style.to(dtype)


def _result(x: Tensor, dtype: torch.dtype | None, *flags: int) -> Both:
    return empty_nhwc(x, tuple(x.shape), dtype or x.dtype), x.new_empty(flags, dtype=torch.bool)


def _check_dtype(dtype: torch.dtype | None) -> None:
    known = dtype is None or dtype.is_floating_point or dtype == torch.uint8
    check(known, f"dtype must be floating or torch.uint8, found {dtype}")


def _check_adain(x: Tensor, style: Tensor, eps: float, least: float, dtype: torch.dtype | None) -> None:
    check_rank("x", x, "N,C,H,W")
    check_rank("style", style, "N,C,h,w")
    check_shape("style", style, (*x.shape[:2], *style.shape[2:]))
    check(eps >= 0 and least >= 0 and max(eps, least) > 0, f"eps or least must be positive, found {eps} and {least}")
    _check_dtype(dtype)


def adain_reference(
    x: Tensor, style: Tensor, eps: float, least: float, clamp: bool = False, dtype: torch.dtype | None = None
) -> Both:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Raises ValueError naming argument, expected and found.
    """
    _check_adain(x, style, eps, least, dtype)
    u = contiguous_as(x, compute_dtype(torch.promote_types(x.dtype, style.dtype)))
    finite = torch.linalg.vector_norm(u, math.inf, dim=(1, 2, 3)) < math.inf
    u = u.clamp(0, 1) if clamp else u
    (mean, variance), (style_mean, style_variance) = (
        _moments(u),
        _moments(contiguous_as(_in_unit(style, u.dtype), u.dtype)),
    )
    finite &= (variance < math.inf).all(1)
    gain = (style_variance + eps).sqrt() / (variance + eps).sqrt().clamp(min=least)
    mean, gain, style_mean = (t[:, :, None, None] for t in (mean, gain, style_mean))
    return _image(((u - mean) * gain + style_mean).clamp(0, 1), dtype or x.dtype), finite


def _moments(x: Tensor) -> Both:
    """Mean and unbiased variance, [N,C]."""
    flat = x.flatten(2)
    variance, mean = torch.var_mean(flat, 2, correction=min(1, flat.shape[2] - 1))
    return mean, variance


def adain_fake(
    x: Tensor, style: Tensor, eps: float, least: float, clamp: bool = False, dtype: torch.dtype | None = None
) -> Both:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check_adain(x, style, eps, least, dtype)
    return _result(x, dtype, x.shape[0])


def adain_cost(
    x: Tensor, style: Tensor, eps: float, least: float, clamp: bool = False, dtype: torch.dtype | None = None
) -> Cost:
    """FLOPs: 4 per element of both for the moments, 3 of x for the map; bytes of every tensor once."""
    flops = 4 * (x.numel() + style.numel()) + 3 * x.numel()
    return Cost(flops, nbytes(x, style) + x.numel() * (dtype or x.dtype).itemsize + x.shape[0])


def _check_wavelet(x: Tensor, style: Tensor, factor: int, dtype: torch.dtype | None) -> None:
    check_rank("x", x, "N,C,H,W")
    check(factor >= 1, f"factor must be at least 1, found {factor}")
    check_shape("style", style, (*x.shape[:2], x.shape[2] // factor, x.shape[3] // factor))
    check_shape("x", x, (*style.shape[:2], style.shape[2] * factor, style.shape[3] * factor))
    _check_dtype(dtype)


def wavelet_reference(x: Tensor, style: Tensor, factor: int, dtype: torch.dtype | None = None) -> Both:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Raises ValueError naming argument, expected and found.
    """
    _check_wavelet(x, style, factor, dtype)
    u = x.to(compute_dtype(torch.promote_types(x.dtype, style.dtype)))
    finite = torch.linalg.vector_norm(u, math.inf, dim=(1, 3)) < math.inf
    u = u.clamp(0, 1)
    low = resize.reference(_in_unit(style, u.dtype), factor).clamp(0, 1) - u
    # Made on the device: a copy from the host cannot be captured in a CUDA graph.
    taps = 0.5 - 0.25 * torch.arange(-1, 2, dtype=u.dtype, device=u.device).abs()
    for level in range(WAVELET_LEVELS):
        low = _blur(low, taps, 2**level)
    return _image((u + low).clamp(0, 1), dtype or x.dtype), finite


def _blur(x: Tensor, taps: Tensor, dilation: int) -> Tensor:
    """One separable blur of dilated [1,2,1]/4 per axis with replicate padding."""
    c = x.shape[1]
    row = taps.view(1, 1, 1, 3).expand(c, 1, 1, 3)
    column = taps.view(1, 1, 3, 1).expand(c, 1, 3, 1)
    x = F.pad(x, (dilation,) * 4, mode="replicate")
    x = F.conv2d(x, row, groups=c, dilation=dilation)
    return F.conv2d(x, column, groups=c, dilation=dilation)


def wavelet_fake(x: Tensor, style: Tensor, factor: int, dtype: torch.dtype | None = None) -> Both:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check_wavelet(x, style, factor, dtype)
    return _result(x, dtype, x.shape[0], x.shape[2])


def wavelet_cost(x: Tensor, style: Tensor, factor: int, dtype: torch.dtype | None = None) -> Cost:
    """FLOPs: 16 of the enlargement, 5 levels of 2 x 3 taps, the difference and the sum; bytes of every tensor once."""
    flags = x.shape[0] * x.shape[2]
    moved = nbytes(x, style) + x.numel() * (dtype or x.dtype).itemsize + flags
    return Cost(x.numel() * (16 + WAVELET_LEVELS * 12 + 2), moved)


def clamp_reference(x: Tensor, dtype: torch.dtype | None = None) -> Both:
    """Plain PyTorch; ValueError unless x has four dimensions and the dtype is floating or uint8."""
    check_rank("x", x, "N,C,H,W")
    _check_dtype(dtype)
    u = x.to(compute_dtype(x.dtype))
    finite = torch.linalg.vector_norm(u, math.inf, dim=(1, 3)) < math.inf
    return _image(u.clamp(0, 1), dtype or x.dtype), finite


def clamp_fake(x: Tensor, dtype: torch.dtype | None = None) -> Both:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    check_rank("x", x, "N,C,H,W")
    _check_dtype(dtype)
    return _result(x, dtype, x.shape[0], x.shape[2])


def clamp_cost(x: Tensor, dtype: torch.dtype | None = None) -> Cost:
    """No FLOPs; bytes of every tensor once."""
    return Cost(0, nbytes(x) + x.numel() * (dtype or x.dtype).itemsize + x.shape[0] * x.shape[2])


@dataclass(frozen=True)
class Config:
    """A launch of a color fix: neighbouring numbers that a program takes at once. adain_fix: `lanes` and `warps` are of
    the second launch, `parts` are the numbers that a program of the first takes at once.
    """

    lanes: int
    warps: int
    parts: int = 0


def bucket(x: Tensor, dtype: torch.dtype | None, **_: Any) -> str:
    """Calls that share a configuration: dtypes, channels, pixels of a sample up to a power of two."""
    names = (str(t).removeprefix("torch.") for t in (x.dtype, dtype or x.dtype))
    return f"{'->'.join(names)} {x.shape[1]} {next_power_of_2(x.shape[2] * x.shape[3])}"


def _strides(x: Tensor, prefix: str = "") -> dict[str, int]:
    names = ("sample_stride", "channel_stride", "row_stride", "column_stride")
    return {prefix + name: stride for name, stride in zip(names, x.stride(), strict=True)}


def _dense(x: Tensor, rows: int | None = None) -> bool:
    """Whether the first `rows` rows of a sample (by default all) lie without gaps, channels innermost."""
    return x[0, :, :rows].permute(1, 2, 0).is_contiguous()


def adain_heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """Whatever the batch, so that a sample's sums have the same order in any. 16 numbers a thread: wide stores."""
    numbers = x[0].numel()
    parts = next_power_of_2(cdiv(numbers, MOST_PARTS), least=256, most=1024)
    return Config(next_power_of_2(numbers, least=256, most=4096), 8, parts)


def adain_plan(
    config: Config, x: Tensor, style: Tensor, eps: float, least: float, clamp: bool, dtype: torch.dtype | None
) -> Plan:
    """Two launches: the moments of parts of both images; their merging and the map, in every program.

    Raises what the reference raises.
    """
    _check_adain(x, style, eps, least, dtype)
    n, c, h, w = x.shape
    out, finite = _result(x, dtype, n)
    parts = [_parts(t[0].numel(), config.parts, c) for t in (x, style)]
    scratch = x.new_empty((n, 3, 2 * c, max(parts)), dtype=torch.float32)
    shared = {"scratch_moments": scratch, "most": max(parts), "x_parts": parts[0], "style_parts": parts[1]}
    measured = {
        **shared,
        "x": x,
        "x_blocks": cdiv(h * w * c, config.parts),
        "x_pixels": h * w,
        "x_width": w,
        **_strides(x, "x_"),
        "style": style,
        "style_blocks": cdiv(style[0].numel(), config.parts),
        "style_pixels": style.shape[2] * style.shape[3],
        "style_width": style.shape[3],
        **_strides(style, "style_"),
        "CHANNELS": c,
        "CLAMP": clamp,
        "X_DENSE": _dense(x),
        "STYLE_DENSE": _dense(style),
        "LANES": config.parts,
    }
    mapped = {
        **shared,
        "x": x,
        "out": out,
        "finite": finite,
        "unit": 1 / 255 if style.dtype == torch.uint8 else 1.0,
        "eps": float(eps),
        "least": float(least),
        "pixels": h * w,
        "width": w,
        **_strides(x),
        "CHANNELS": c,
        "CLAMP": clamp,
        "DENSE": _dense(x),
        "GROUP": next_power_of_2(2 * c, least=1),
        "PARTS": next_power_of_2(max(parts), least=1),
        "LANES": config.lanes,
    }
    grid = (cdiv(h * w * c, config.lanes), n)
    # Four numbers a thread, two of a large block: with more, registers spill on some architectures.
    warps = max(config.parts // (64 if config.parts >= 1024 else 128), 1)
    measure = Launch(color_kernel.measure, (sum(parts), n), measured, warps, 1)
    return Plan((out, finite), (measure, Launch(color_kernel.adain, grid, mapped, config.warps, 1)))


def _parts(numbers: int, lanes: int, channels: int) -> int:
    """One a block of so many numbers; where they take several blocks each, a multiple of the channels."""
    least = cdiv(numbers, lanes)
    return least if least <= MOST_PARTS else max(MOST_PARTS // channels, 1) * channels


def adain_space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """More and fewer numbers a program."""
    for lanes, parts, warps in itertools.product((1024, 2048, 4096), (256, 512, 1024, 2048), (4, 8)):
        if lanes <= 512 * warps:
            yield Config(lanes, warps, parts)


def _row(x: Tensor, most: int) -> int:
    return next_power_of_2(x.shape[3] * x.shape[1], least=32, most=most)


def wavelet_heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """A part of a row: neighbouring programs read its neighbours from the cache."""
    return Config(_row(x, 512), 4)


def wavelet_plan(config: Config, x: Tensor, style: Tensor, factor: int, dtype: torch.dtype | None) -> Plan:
    """A launch for the band to blur and one for each level; raises what the reference raises."""
    _check_wavelet(x, style, factor, dtype)
    n, c, h, w = x.shape
    out, finite = _result(x, dtype, n, h)
    bands = [empty_nhwc(x, tuple(x.shape), torch.float32) for _ in range(2)]
    unit = 1 / 255 if style.dtype == torch.uint8 else 1.0
    launches = [resize.launch(resize.rows(style, factor), style, bands[0], factor, unit, 0.0, base=x)]
    for level in range(WAVELET_LEVELS):
        last = level == WAVELET_LEVELS - 1
        arguments = {
            "low": bands[level % 2],
            "x": x if last else None,
            "out": out if last else bands[1 - level % 2],
            "finite": finite if last else None,
            "height": h,
            "width": w,
            "channels": c,
            **_strides(x),
            "DILATION": 2**level,
            "DENSE": _dense(x, 1),
            # The result is narrower than the bands: as many bytes a thread.
            "LANES": _row(x, 4 * config.lanes) if last else config.lanes,
        }
        grid = (1 if last else cdiv(w * c, config.lanes), h, n)
        launches.append(Launch(color_kernel.blur, grid, arguments, config.warps, 1))
    return Plan((out, finite), tuple(launches))


def wavelet_space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """More and fewer numbers a program."""
    for lanes, warps in itertools.product((128, 256, 512, 1024), (2, 4, 8)):
        yield Config(_row(x, lanes), warps)


def clamp_heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """A whole row, or 16 numbers a thread: wide stores."""
    return Config(_row(x, 2048), 4)


def clamp_plan(config: Config, x: Tensor, dtype: torch.dtype | None) -> Plan:
    """The launch; raises what the reference raises. The strides of x are taken as they are."""
    out, finite = clamp_fake(x, dtype)
    n, c, h, w = x.shape
    arguments = {
        "x": x,
        "out": out,
        "finite": finite,
        "height": h,
        "width": w,
        "channels": c,
        **_strides(x),
        "DENSE": _dense(x, 1),
        "LANES": config.lanes,
    }
    return Plan((out, finite), (Launch(color_kernel.clamp, (h, n), arguments, config.warps, 1),))


def clamp_space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """More and fewer numbers a program."""
    for lanes, warps in itertools.product((512, 1024, 2048, 4096), (2, 4, 8)):
        yield Config(_row(x, lanes), warps)


_COLOR = (color_kernel.__name__, device_functions.__name__)
ADAIN = Implementation(Config, bucket, adain_heuristic, adain_plan, adain_space, _COLOR)
WAVELET = Implementation(
    Config, bucket, wavelet_heuristic, wavelet_plan, wavelet_space, (*_COLOR, resize_kernel.__name__)
)
CLAMP = Implementation(Config, bucket, clamp_heuristic, clamp_plan, clamp_space, _COLOR)

adain_fix = register(ADAIN_SCHEMA, adain_reference, adain_fake, adain_cost, ADAIN)
wavelet_fix = register(WAVELET_SCHEMA, wavelet_reference, wavelet_fake, wavelet_cost, WAVELET)
clamp_image = register(CLAMP_SCHEMA, clamp_reference, clamp_fake, clamp_cost, CLAMP)
