"""Arrays and tensors through the network: checked, enlarged, and returned in the same dtype, rank and device.

numpy: uint8, uint16, float16, float32, float64 as [H,W] grey; [H,W,C] or [N,H,W,C] with C = 1 grey, 2 grey + alpha,
3 RGB, 4 RGB + alpha; any strides and byte order. torch: uint8, float16, bfloat16, float32, float64 as RGB [3,H,W] or
[N,3,H,W]; any strides, any device, also with requires_grad (the result carries no gradient).

Floats lie in [0,1]. Values up to 1e-3 outside, as rounding in half precision leaves them, are clamped; more is
refused, and so are NaN and infinity. Integers are rounded to nearest once, at the very end.

`enlarge` is the network: float32 or float64 RGB [N,3,H,W] in [0,1] -> [N,3,s*H,s*W] of the same dtype and device. With
an attribute `takes_bytes` it takes uint8 as well, from any device, rounds by itself, and has a parameter `out` for the
result; 8-bit RGB then goes straight through it.
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
from tinysr_kernels.runtime.images.icc import ColourSpace

Enlarge = Callable[..., Tensor]

RANGE_TOLERANCE = 1e-3

# Up to this many input pixels the whole picture, as float, goes to the network's device and is rounded there, so
# that only integers travel. Above, it stays in host memory, and device memory is bounded by the network's tiles.
DEVICE_PIXELS = 1 << 22

_NUMPY_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_TORCH_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STRIP_PIXELS = 1 << 22  # rounding works on strips of about this many pixels: bounded temporaries


def _enlarge_colour(colour: Tensor, enlarge: Enlarge, upscale: int, space: ColourSpace | None) -> Tensor:
    """colour [N,1|3,H,W] float in [0,1], in `space` (None: sRGB) -> [N,1|3,s*H,s*W] in the same space."""
    channels = colour.shape[1]
    size = (colour.shape[-2] * upscale, colour.shape[-1] * upscale)
    rgb = colour.expand(-1, 3, -1, -1)
    lost: Tensor | None = None
    if space is not None:
        own, rgb = rgb, space.to_srgb(rgb)
        # Colours outside sRGB are clamped for the network. What that takes away is put back, enlarged, at the end.
        lost = own - space.from_srgb(rgb)
        if float(lost.abs().max()) < 2**-17:  # half a step of 16 bits
            lost = None
    result = enlarge(rgb.contiguous())
    if result.shape != (colour.shape[0], 3, *size):
        expected = (colour.shape[0], 3, *size)
        raise TinySRError(f"the network gave {tuple(result.shape)} where {expected} was due")
    if space is not None:
        result = space.from_srgb(result)
        if lost is not None:
            result = result + F.interpolate(lost, size=size, mode="bicubic", align_corners=False)
    return result if channels == 3 else result.mean(1, keepdim=True)


def _enlarge_planes(
    planes: Tensor, enlarge: Enlarge, upscale: int, space: ColourSpace | None, opaque: bool
) -> tuple[Tensor, Tensor | None]:
    """planes [N,C,H,W] float in [0,1] -> colour [N,1|3,s*H,s*W] and alpha [N,1,s*H,s*W], None where it is opaque."""
    with torch.inference_mode():
        colours = 1 if planes.shape[1] < 3 else 3
        colour = planes[:, :colours]
        alpha = None if opaque or planes.shape[1] == colours else planes[:, colours:]
        if alpha is not None:
            colour = bleed(colour, alpha)
            alpha = enlarge_alpha(alpha, upscale)
        return _enlarge_colour(colour, enlarge, upscale, space), alpha


def _rounded(colour: Tensor, alpha: Tensor | None, channels: int, top: int) -> Tensor:
    """colour [N,1|3,H,W], alpha [N,1,H,W] or None (opaque) -> integers 0..top [N,H,W,channels], rounded to nearest.

    uint8 for a top of 255, else int32: torch has few operations for uint16.
    """
    dtype = torch.uint8 if top == 255 else torch.int32
    count, colours, height, width = colour.shape
    result = torch.empty((count, height, width, channels), dtype=dtype, device=colour.device)
    rows = max(1, _STRIP_PIXELS // max(1, width * count))
    for start in range(0, height, rows):
        part = slice(start, start + rows)
        planes = [colour[:, :, part]]
        if channels > colours:
            planes.append(torch.ones_like(planes[0][:, :1]) if alpha is None else alpha[:, :, part])
        for index, plane in zip((slice(0, colours), slice(colours, channels)), planes, strict=False):
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
    """pixels uint8 [N,H,W,3], or [N,H,W,4] with opaque alpha -> [N,s*H,s*W,C], by a network that takes bytes."""
    count, height, width, channels = pixels.shape
    result = torch.empty((count, height * upscale, width * upscale, 3), dtype=torch.uint8)
    host = torch.from_numpy(np.array(pixels[..., :3], order="C"))
    enlarge(host.permute(0, 3, 1, 2), out=result.permute(0, 3, 1, 2))
    colour = result.numpy()
    return colour if channels == 3 else np.concatenate([colour, np.full_like(colour[..., :1], 255)], -1)


def enlarge_pixels(
    pixels: np.ndarray,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    space: ColourSpace | None = None,
) -> np.ndarray:
    """The array path, without checks of the layout: pixels [N,H,W,C] -> [N,s*H,s*W,C] of the same dtype.

    space: the colour space of the pixels; None stands for sRGB. Raises InputError for floats out of range.
    """
    _, height, width, channels = pixels.shape
    native = pixels.dtype.newbyteorder("=")
    floating = native.kind == "f"
    top = 1 if floating else int(np.iinfo(native).max)
    opaque = channels in (2, 4) and bool((pixels[..., -1] >= top).all())
    if native == np.uint8 and space is None and (channels == 3 or (channels == 4 and opaque)) and _takes_bytes(enlarge):
        return _enlarge_bytes(pixels, enlarge, upscale)
    host = torch.from_numpy(np.array(pixels, dtype=native, order="C"))  # a copy: the caller's array may be read-only
    if floating:
        _check_range(*(float(value) for value in torch.aminmax(host)))
    if host.dtype == torch.uint16:
        host = host.to(torch.float32)
    planes = host.to(_work_device(height, width, device)).permute(0, 3, 1, 2)
    planes = planes.to(torch.float64 if native == np.float64 else torch.float32)
    planes = planes.clamp(0, 1) if floating else planes.div(top)
    colour, alpha = _enlarge_planes(planes, enlarge, upscale, space, opaque)
    if not floating:
        return _rounded(colour, alpha, channels, top).cpu().numpy().astype(pixels.dtype, copy=False)
    parts = [colour.clamp(0, 1)]
    if channels > colour.shape[1]:
        parts.append(torch.ones_like(colour[:, :1]) if alpha is None else alpha)
    result = torch.cat(parts, 1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return result.astype(pixels.dtype, copy=False)


def upscale_array(
    image: np.ndarray,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    max_pixels: int | None = None,
    space: ColourSpace | None = None,
) -> np.ndarray:
    """A numpy image or batch as listed at the top -> the same dtype and rank. Raises InputError."""
    shape = image.shape
    if image.dtype.newbyteorder("=") not in [np.dtype(name) for name in _NUMPY_TYPES]:
        raise InputError(
            f"expected an array of {', '.join(_NUMPY_TYPES)}, found {image.dtype}; "
            "convert it (integers of other widths: scale to 0..255 and .astype(numpy.uint8))"
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
            raise InputError(f"expected [H,W,3] or [N,H,W,3], found {shape}; a batch of grey? use image[..., None]")
        raise InputError(f"expected 1 to 4 channels in the last axis, found {shape}")
    grey = image[..., None] if image.ndim == 2 else image
    batch = grey if grey.ndim == 4 else grey[None]
    check_size(
        shape[1] if image.ndim < 4 else shape[2],
        batch.shape[0] * batch.shape[1],
        upscale,
        max_pixels=max_pixels,
    )
    result = enlarge_pixels(batch, enlarge, upscale, device=device, space=space)
    if image.ndim == 4:
        return result
    return result[0] if image.ndim == 3 else result[0, :, :, 0]


def _check_tensor(image: Tensor) -> None:
    shape = tuple(image.shape)
    if image.layout != torch.strided or image.is_meta or image.is_quantized:
        raise InputError("expected an ordinary dense tensor with data; use .to_dense() or .dequantize()")
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
            raise InputError(f"expected 3 channels, found {shape}; grey? use .expand with 3 in place of the 1")
        if shape[-3] == 4:
            raise InputError(
                f"expected 3 channels, found {shape}; alpha? pass [..., :3, :, :], or a numpy or PIL image"
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
) -> Tensor:
    """A torch image [3,H,W] or [N,3,H,W] -> the same dtype, rank and device, without gradient. Raises InputError.

    out: takes the result and is returned.
    """
    _check_tensor(image)
    if out is not None:
        _check_out(out, image, upscale)
    with torch.no_grad():
        batch = image.detach() if image.ndim == 4 else image.detach()[None]
        count, _, height, width = batch.shape
        if image.device.type == "cpu":
            check_size(width, count * height, upscale, max_pixels=max_pixels)
        if image.dtype != torch.uint8:
            _check_range(*(float(value) for value in torch.stack(torch.aminmax(batch)).tolist()))
        taken = None if out is None else out if image.ndim == 4 else out[None]
        if image.dtype == torch.uint8 and _takes_bytes(enlarge):
            result = enlarge_batch(batch, enlarge, upscale, taken)
        else:
            where = image.device if device is None else _work_device(height, width, device)
            result = enlarge_batch(batch.to(where), enlarge, upscale).to(image.device)
            if taken is not None:
                result = taken.copy_(result)
    if out is not None:
        return out
    return result if image.ndim == 4 else result[0]


def _check_out(out: Tensor, image: Tensor, upscale: int) -> None:
    shape = (*image.shape[:-2], image.shape[-2] * upscale, image.shape[-1] * upscale)
    if (tuple(out.shape), out.dtype, out.device) != (shape, image.dtype, image.device):
        raise InputError(
            f"out must be {image.dtype} {shape} on {image.device}, found {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if out.requires_grad:
        raise InputError("out must not require grad; use .detach()")


def enlarge_batch(batch: Tensor, enlarge: Enlarge, upscale: int, out: Tensor | None = None) -> Tensor:
    """The tensor path, without checks: batch [N,3,H,W] where the network wants it -> [N,3,s*H,s*W], the same dtype.

    out: takes the result, for uint8 and a network that takes bytes.
    """
    if batch.dtype == torch.uint8 and _takes_bytes(enlarge):
        n, _, height, width = batch.shape
        # Made outside inference mode, so that the result is an ordinary tensor.
        result = batch.new_empty((n, 3, height * upscale, width * upscale)) if out is None else out
        return enlarge(batch, out=result)
    if batch.dtype == torch.uint8:
        planes = batch.to(torch.float32).div(255)
    else:
        planes = batch.to(torch.promote_types(batch.dtype, torch.float32)).clamp(0, 1)
    colour, _ = _enlarge_planes(planes, enlarge, upscale, None, True)
    # Outside inference mode, so that the result is an ordinary tensor that later code may train on.
    if batch.dtype == torch.uint8:
        return _rounded(colour, None, 3, 255).permute(0, 3, 1, 2).contiguous()
    return colour.clamp(0, 1).to(batch.dtype)
