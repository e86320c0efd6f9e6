"""Upscale numpy arrays and torch tensors: checked, upscaled, returned with the same dtype, rank and device.

numpy: uint8, uint16, float16, float32, float64; [H,W] gray; [H,W,C] or [N,H,W,C] with C = 1 gray, 2 gray + alpha, 3
RGB, 4 RGB + alpha; any strides and byte order. torch: uint8, float16, bfloat16, float32, float64; RGB [3,H,W] or
[N,3,H,W]; any strides and device, also with requires_grad (the result has no gradient).

Floats must be in [0,1]. Values up to 1e-3 outside, as left by half-precision rounding, are clamped; values further
outside, NaN and infinity are refused. Integers are rounded to nearest once, at the end.

`enlarge` is the network: float32 or float64 RGB [N,3,H,W] in [0,1] -> [N,3,s*H,s*W] with the same dtype and device. If
it has an attribute `takes_bytes` that is true, it also accepts uint8 from any device, rounds its result itself, and has
a parameter `out` for the result; 8-bit RGB is then passed to it directly.

A `target` of another size than the network's has the network's image resized in floating point, color and alpha alike,
before anything is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.runtime.device.host_memory import check_size
from tinysr_kernels.runtime.images.alpha import bleed, enlarge_alpha
from tinysr_kernels.runtime.images.color.icc import ColorSpace
from tinysr_kernels.runtime.images.scaling import NATIVE, Target, resample

Enlarge = Callable[..., Tensor]

RANGE_TOLERANCE = 1e-3

# Up to this many input pixels, the whole image is converted to float and rounded on the network's device, so that only
# integers are copied back. Larger images stay in host memory, and the network's tiles bound the device memory.
DEVICE_PIXELS = 1 << 22

_NUMPY_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_TORCH_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STRIP_PIXELS = 1 << 22  # rounding works on strips of about this many pixels, to bound temporary buffers


def _enlarge_color(
    color: Tensor, enlarge: Enlarge, upscale: int, space: ColorSpace | None, final: tuple[int, int]
) -> Tensor:
    """color [N,1|3,H,W], float in [0,1], in `space` (None: sRGB) -> [N,1|3,h,w] in the same space; final: (w, h)."""
    channels = color.shape[1]
    size = (color.shape[-2] * upscale, color.shape[-1] * upscale)
    rgb = color.expand(-1, 3, -1, -1)
    residual: Tensor | None = None
    if space is not None:
        original, rgb = rgb, space.to_srgb(rgb)
        # The network sees colors clamped to the sRGB gamut. The clamped part is upscaled separately and added back.
        residual = original - space.from_srgb(rgb)
        if float(residual.abs().max()) < 2**-17:  # half a 16-bit step
            residual = None
    result = enlarge(rgb.contiguous())
    if result.shape != (color.shape[0], 3, *size):
        expected = (color.shape[0], 3, *size)
        raise TinySRError(f"expected a result of shape {expected} from the network, found {tuple(result.shape)}")
    result = resample(result, final)
    if space is not None:
        result = space.from_srgb(result)
        if residual is not None:
            large = F.interpolate(residual, size=size, mode="bicubic", align_corners=False)
            result = result + resample(large, final)
    return result if channels == 3 else result.mean(1, keepdim=True)


def _enlarge_planes(
    planes: Tensor, enlarge: Enlarge, upscale: int, space: ColorSpace | None, opaque: bool, target: Target
) -> tuple[Tensor, Tensor | None]:
    """planes [N,C,H,W], float in [0,1] -> color [N,1|3,h,w] and alpha [N,1,h,w], None if opaque."""
    final = target.output(planes.shape[-1], planes.shape[-2], upscale)
    with torch.inference_mode():
        count = 1 if planes.shape[1] < 3 else 3
        color = planes[:, :count]
        alpha = None if opaque or planes.shape[1] == count else planes[:, count:]
        if alpha is not None:
            color = bleed(color, alpha)
            alpha = resample(enlarge_alpha(alpha, upscale), final).clamp(0, 1)
        return _enlarge_color(color, enlarge, upscale, space, final), alpha


def _rounded(color: Tensor, alpha: Tensor | None, channels: int, top: int) -> Tensor:
    """color [N,1|3,H,W], alpha [N,1,H,W] or None (opaque) -> integers 0..top [N,H,W,channels], rounded to nearest.

    Returns uint8 if top is 255, else int32, because torch supports few operations on uint16.
    """
    dtype = torch.uint8 if top == 255 else torch.int32
    count, colors, height, width = color.shape
    result = torch.empty((count, height, width, channels), dtype=dtype, device=color.device)
    rows = max(1, _STRIP_PIXELS // max(1, width * count))
    for start in range(0, height, rows):
        part = slice(start, start + rows)
        planes = [color[:, :, part]]
        if channels > colors:
            planes.append(torch.ones_like(planes[0][:, :1]) if alpha is None else alpha[:, :, part])
        for index, plane in zip((slice(0, colors), slice(colors, channels)), planes, strict=False):
            result[:, part, :, index] = plane.clamp(0, 1).mul(top).round().to(dtype).permute(0, 2, 3, 1)
    return result


def _check_range(low: float, high: float) -> None:
    if low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
        return
    if math.isnan(low) or math.isnan(high):
        raise InputError("expected floats in [0, 1], found NaN; replace it first (numpy.nan_to_num, torch.nan_to_num)")
    found = f"expected floats in [0, 1], found values from {low:.6g} to {high:.6g}"
    if math.isinf(low) or math.isinf(high):
        raise InputError(f"{found}; replace the infinities first")
    if low >= 0 and high <= 255:
        raise InputError(f"{found}; divide by 255")
    if low >= 0 and high <= 65535:
        raise InputError(f"{found}; divide by 65535")
    if low >= -1 and high <= 1:
        raise InputError(f"{found}; map them from [-1, 1] with image / 2 + 0.5")
    raise InputError(f"{found}; scale or clip them")


def _work_device(height: int, width: int, device: torch.device | str | None) -> torch.device:
    if device is None or height * width > DEVICE_PIXELS:
        return torch.device("cpu")
    return torch.device(device)


def _takes_bytes(enlarge: Enlarge) -> bool:
    return getattr(enlarge, "takes_bytes", False)


def _enlarge_bytes(pixels: np.ndarray, enlarge: Enlarge, upscale: int) -> np.ndarray:
    """pixels uint8 [N,H,W,3], or [N,H,W,4] with opaque alpha -> [N,s*H,s*W,C], by a network that accepts uint8."""
    count, height, width, channels = pixels.shape
    result = torch.empty((count, height * upscale, width * upscale, 3), dtype=torch.uint8, device="cpu")
    host = torch.from_numpy(np.array(pixels[..., :3], order="C"))
    enlarge(host.permute(0, 3, 1, 2), out=result.permute(0, 3, 1, 2))
    color = result.numpy()
    return color if channels == 3 else np.concatenate([color, np.full_like(color[..., :1], 255)], -1)


def enlarge_pixels(
    pixels: np.ndarray,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    space: ColorSpace | None = None,
    target: Target = NATIVE,
) -> np.ndarray:
    """Upscale arrays without checking their layout: pixels [N,H,W,C] -> [N,s*H,s*W,C] with the same dtype.

    space: the color space of the pixels; None for sRGB. target: another size of the result. Raises InputError for
    floats out of range and for a target that is refused.
    """
    _, height, width, channels = pixels.shape
    native_size = target.output(width, height, upscale) == (width * upscale, height * upscale)
    native = pixels.dtype.newbyteorder("=")
    floating = native.kind == "f"
    top = 1 if floating else int(np.iinfo(native).max)
    opaque = channels in (2, 4) and bool((pixels[..., -1] >= top).all())
    rgb = channels == 3 or (channels == 4 and opaque)
    if native == np.uint8 and space is None and rgb and native_size and _takes_bytes(enlarge):
        return _enlarge_bytes(pixels, enlarge, upscale)
    host = torch.from_numpy(np.array(pixels, dtype=native, order="C"))  # a copy, because torch needs writable memory
    if floating:
        _check_range(*(float(value) for value in torch.aminmax(host)))
    if host.dtype == torch.uint16:
        host = host.to(torch.float32)
    planes = host.to(_work_device(height, width, device)).permute(0, 3, 1, 2)
    planes = planes.to(torch.float64 if native == np.float64 else torch.float32)
    planes = planes.clamp(0, 1) if floating else planes.div(top)
    color, alpha = _enlarge_planes(planes, enlarge, upscale, space, opaque, target)
    if not floating:
        return _rounded(color, alpha, channels, top).cpu().numpy().astype(pixels.dtype, copy=False)
    parts = [color.clamp(0, 1)]
    if channels > color.shape[1]:
        parts.append(torch.ones_like(color[:, :1]) if alpha is None else alpha)
    result = torch.cat(parts, 1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return result.astype(pixels.dtype, copy=False)


def upscale_array(
    image: np.ndarray,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    max_pixels: int | None = None,
    space: ColorSpace | None = None,
    target: Target = NATIVE,
) -> np.ndarray:
    """Upscale a numpy image or batch -> the same dtype and rank; the module docstring lists what is accepted.

    device: where the network runs; None for the CPU. max_pixels: limit on the input's pixels; None derives it from the
    free memory. space: the color space of the pixels; None for sRGB. target: another size of the result. Raises
    InputError, and OutOfMemory if the result would not fit.
    """
    shape = image.shape
    if image.dtype.newbyteorder("=") not in [np.dtype(name) for name in _NUMPY_TYPES]:
        raise InputError(
            f"expected an array of {', '.join(_NUMPY_TYPES)}, found {image.dtype}; "
            "convert it (for other integers: scale to 0..255 and use .astype(numpy.uint8))"
        )
    if image.size == 0:
        raise InputError(f"expected at least one pixel, found an empty array of shape {shape}")
    if image.ndim not in (2, 3, 4):
        raise InputError(f"expected an array [H,W,3] or [N,H,W,3], found {image.ndim} dimensions: {shape}")
    if image.ndim > 2 and shape[-1] not in (1, 2, 3, 4):
        if shape[-3] in (1, 3, 4):
            raise InputError(
                f"expected channels last, [H,W,3] or [N,H,W,3], found {shape}; "
                "channels first? use numpy.moveaxis(image, -3, -1)"
            )
        if image.ndim == 3:
            raise InputError(
                f"expected [H,W,3] or [N,H,W,3], found {shape}; a batch of gray images? use image[..., None]"
            )
        raise InputError(f"expected 1 to 4 channels in the last axis, found {shape}")
    channels_last = image[..., None] if image.ndim == 2 else image
    batch = channels_last if channels_last.ndim == 4 else channels_last[None]
    count, height, width, _ = batch.shape
    final = target.output(width, height, upscale)
    check_size(width, count * height, upscale, result=(final[0], count * final[1]), max_pixels=max_pixels)
    result = enlarge_pixels(batch, enlarge, upscale, device=device, space=space, target=target)
    if image.ndim == 4:
        return result
    return result[0] if image.ndim == 3 else result[0, :, :, 0]


def _check_tensor(image: Tensor) -> None:
    shape = tuple(image.shape)
    if image.layout != torch.strided or image.is_meta or image.is_quantized:
        raise InputError("expected a dense tensor with data; use .to_dense() or .dequantize()")
    if image.dtype != torch.uint8 and image.dtype not in _TORCH_FLOATS:
        raise InputError(
            f"expected uint8, float16, bfloat16, float32 or float64, found {image.dtype}; "
            "use .to(torch.uint8) for 0..255 or a float tensor in [0, 1]"
        )
    if image.ndim not in (3, 4):
        raise InputError(f"expected [3,H,W] or [N,3,H,W], found {image.ndim} dimensions: {shape}")
    if shape[-3] != 3:
        if shape[-1] == 3:
            order = "2, 0, 1" if image.ndim == 3 else "0, 3, 1, 2"
            raise InputError(f"expected [3,H,W] or [N,3,H,W], found {shape}; channels last? use .permute({order})")
        if shape[-3] == 1:
            raise InputError(f"expected 3 channels, found {shape}; gray? use .expand to 3 channels")
        if shape[-3] == 4:
            raise InputError(
                f"expected 3 channels, found {shape}; alpha? pass image[..., :3, :, :], or a numpy or PIL image"
            )
        raise InputError(f"expected [3,H,W] or [N,3,H,W], found {shape}")
    if image.numel() == 0:
        raise InputError(f"expected at least one pixel, found an empty tensor of shape {shape}")


def upscale_tensor(
    image: Tensor,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    max_pixels: int | None = None,
    out: Tensor | None = None,
    target: Target = NATIVE,
) -> Tensor:
    """Upscale a tensor [3,H,W] or [N,3,H,W] -> the same dtype, rank and device, without gradient.

    device: where the network runs; None for the tensor's. max_pixels: limit on the input's pixels; None derives it from
    the free host memory. out: receives the result and is returned. target: another size of the result. Raises
    InputError, and OutOfMemory if the result would not fit.
    """
    _check_tensor(image)
    final = target.output(image.shape[-1], image.shape[-2], upscale)
    if out is not None:
        _check_out(out, image, final)
    with torch.no_grad():
        batch = image.detach() if image.ndim == 4 else image.detach()[None]
        count, _, height, width = batch.shape
        if image.device.type == "cpu":
            check_size(width, count * height, upscale, result=(final[0], count * final[1]), max_pixels=max_pixels)
        if image.dtype != torch.uint8:
            _check_range(*(float(value) for value in torch.stack(torch.aminmax(batch)).tolist()))
        batch_out = None if out is None else out if image.ndim == 4 else out[None]
        if image.dtype == torch.uint8 and final == (width * upscale, height * upscale) and _takes_bytes(enlarge):
            result = enlarge_batch(batch, enlarge, upscale, batch_out)
        else:
            where = image.device if device is None else _work_device(height, width, device)
            result = enlarge_batch(batch.to(where), enlarge, upscale, target=target).to(image.device)
            if batch_out is not None:
                result = batch_out.copy_(result)
    if out is not None:
        return out
    return result if image.ndim == 4 else result[0]


def _check_out(out: Tensor, image: Tensor, size: tuple[int, int]) -> None:
    shape = (*image.shape[:-2], size[1], size[0])
    if (tuple(out.shape), out.dtype, out.device) != (shape, image.dtype, image.device):
        raise InputError(
            f"out must be {image.dtype} {shape} on {image.device}, found {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if out.requires_grad:
        raise InputError("out must not require grad; use .detach()")


def enlarge_batch(
    batch: Tensor, enlarge: Enlarge, upscale: int, out: Tensor | None = None, target: Target = NATIVE
) -> Tensor:
    """Upscale a batch without checks: [N,3,H,W] on a device that the network accepts -> [N,3,s*H,s*W], same dtype.

    out: receives the result; only for uint8, a network that accepts uint8, and no target. target: another size.
    """
    n, _, height, width = batch.shape
    native = target.output(width, height, upscale) == (width * upscale, height * upscale)
    if batch.dtype == torch.uint8 and native and _takes_bytes(enlarge):
        # Allocated outside inference mode, so that the result is not an inference tensor.
        result = batch.new_empty((n, 3, height * upscale, width * upscale)) if out is None else out
        return enlarge(batch, out=result)
    if batch.dtype == torch.uint8:
        planes = batch.to(torch.float32).div(255)
    else:
        planes = batch.to(torch.promote_types(batch.dtype, torch.float32)).clamp(0, 1)
    color, _ = _enlarge_planes(planes, enlarge, upscale, None, True, target)
    # Outside inference mode, so that the result is not an inference tensor and can be used in training.
    if batch.dtype == torch.uint8:
        return _rounded(color, None, 3, 255).permute(0, 3, 1, 2).contiguous()
    return color.clamp(0, 1).to(batch.dtype)
