"""Upscale PIL images of all modes, with transparency, orientation and color profile applied.

Resulting modes: 1 -> L; L, LA, La, RGB, RGBA, RGBa, RGBX, I, I;16 in any byte order -> the same mode; a transparent
color (tRNS) -> alpha; P -> RGB or RGBA; PA -> RGBA; CMYK -> RGB, with a notice; YCbCr, HSV, LAB -> the same mode,
converted through RGB, with a notice; F -> refused. Mode I is treated as 16-bit data, 0 to 65535. The EXIF orientation
is applied to the pixels. Pixels with an ICC profile are converted to sRGB for the network and back; the profile is
kept. Colors declared otherwise (PNG's gAMA, code points, Adobe RGB in EXIF) are handled like a profile of the same
meaning, which the result then has. Other metadata is in the result's `info`, under Pillow's names.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.runtime.device.host_memory import check_size
from tinysr_kernels.runtime.images import metadata
from tinysr_kernels.runtime.images.arrays import Enlarge, enlarge_pixels
from tinysr_kernels.runtime.images.bounds import DECODE_ERRORS, check_opened
from tinysr_kernels.runtime.images.color.icc import ColorSpace, ProfileError, parse_profile
from tinysr_kernels.runtime.images.scaling import NATIVE, Target
from tinysr_kernels.runtime.images.tags.header import Header, read_header
from tinysr_kernels.runtime.notices import notice

# Files of these formats contain one main image; other frames are previews, gain maps or layers.
_SINGLE_IMAGE = ("MPO", "PSD", "ICO", "ICNS")
_DIRECT = ("L", "LA", "RGB", "RGBA")
_BYTE_ORDER = {"I;16": "<", "I;16L": "<", "I;16B": ">", "I;16N": "="}


@dataclass(frozen=True)
class _Decoded:
    """pixels: uint8 or uint16 [H,W,1..4]. space: their color space, None for sRGB. restore: pixels -> PIL image.

    keep_profile: whether the ICC profile applies to the restored image.
    """

    pixels: np.ndarray
    space: ColorSpace | None
    restore: Callable[[np.ndarray], Image.Image]
    keep_profile: bool = True


def pick_frame(image: Image.Image, frame: int | None, name: str = "image") -> Image.Image:
    """Seek to the frame to upscale. Raises InputError if the choice is missing or out of range. name: for messages."""
    count = int(getattr(image, "n_frames", 1))
    if frame is not None:
        if not 0 <= frame < count:
            raise InputError(f"{name}: frame {frame} is out of range; the frames are 0 to {count - 1}")
        if count > 1:
            image.seek(frame)
        return image
    if count > 1 and image.format not in _SINGLE_IMAGE:
        raise InputError(
            f"{name}: {count} frames ({image.format}); select one with frame=N (--frame N), counted from 0, "
            "or with image.seek(N) and image.copy()"
        )
    if count > 1 and image.format == "MPO":
        notice(f"{count - 1} secondary images in the file (preview, gain map) were dropped")
    return image


def _apply_profile(image: Image.Image, profile: bytes, mode: str, *, from_srgb: bool = False) -> Image.Image:
    """Convert with ImageCms in 8 bits: profile -> sRGB, or sRGB -> profile with `from_srgb`. mode: of the result."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    first, second = (srgb, own) if from_srgb else (own, srgb)
    result = ImageCms.profileToProfile(image, first, second, outputMode=mode)
    assert result is not None
    return result


def profile_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Mode L or RGB with a profile -> sRGB in 8 bits, mode RGB, for files that cannot hold a profile."""
    try:
        converted = _apply_profile(image, profile, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        notice(f"the ICC profile cannot be applied and was dropped ({error})")
        return image
    notice("the colors were converted to sRGB, because the format cannot store an ICC profile")
    return converted


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """Mode LAB (relative to D50) -> sRGB, mode RGB."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    result = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert result is not None
    return result


def _rgb_to_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    result = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    assert result is not None
    return result


def gray_16bit(image: Image.Image) -> np.ndarray:
    """Mode I;16 in any byte order -> uint16 [H,W]. numpy.asarray supports neither I;16L nor I;16N."""
    pixels = np.frombuffer(image.tobytes(), _BYTE_ORDER[image.mode] + "u2")
    return pixels.astype(np.uint16).reshape(image.height, image.width)


def color_space(profile: bytes | None) -> tuple[ColorSpace | None, bool]:
    """The color space of a profile (None for sRGB) and whether the profile is based on look-up tables instead."""
    if not profile:
        return None, False
    try:
        space = parse_profile(profile)
    except ProfileError as error:
        notice(f"the ICC profile is corrupt; the pixels were treated as sRGB ({error})")
        return None, False
    if space is None:
        return None, True
    return (None if space.is_srgb() else space), False


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H,W,1..4] -> L, LA, RGB, RGBA; uint16 [H,W,1] -> I;16."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _decode_16bit(image: Image.Image, space: ColorSpace | None) -> _Decoded:
    """Modes I and I;16*. A transparent gray value becomes alpha; the result is then 8-bit LA, as PIL has no LA;16."""
    mode = image.mode
    if mode == "I":
        wide = np.asarray(image)
        if wide.size and (wide.min() < 0 or wide.max() > 65535):
            raise InputError(
                f"expected mode I with values 0 to 65535, found {wide.min()} to {wide.max()}; "
                "scale to 16 bits, or pass a float array in [0, 1]"
            )
        pixels = wide.astype(np.uint16)
    else:
        pixels = gray_16bit(image)

    def restore(result: np.ndarray) -> Image.Image:
        gray = result[..., 0]
        if mode == "I":
            return Image.fromarray(gray.astype(np.int32))
        if mode == "I;16":
            return Image.fromarray(np.ascontiguousarray(gray))
        data = gray.astype(_BYTE_ORDER[mode] + "u2").tobytes()
        return Image.frombytes(mode, (gray.shape[1], gray.shape[0]), data)

    key = image.info.get("transparency")
    if isinstance(key, int):
        notice("16-bit gray with a transparent value was reduced to 8 bits: Pillow has no 16-bit mode with alpha")
        pixels8 = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        alpha = np.where(pixels == key, 0, 255).astype(np.uint8)
        return _Decoded(np.stack([pixels8, alpha], -1), space, _image)
    return _Decoded(pixels[..., None], space, restore)


def _decode_cmyk(image: Image.Image, profile: bytes | None) -> _Decoded:
    notice("CMYK was converted to RGB")
    if profile:
        try:
            return _Decoded(_array(_apply_profile(image, profile, "RGB")), None, _image, keep_profile=False)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            notice(f"the ICC profile is corrupt and was dropped ({error})")
    return _Decoded(_array(image.convert("RGB")), None, _image, keep_profile=False)


def _decode_table_profile(image: Image.Image, profile: bytes) -> _Decoded | None:
    """An 8-bit image whose profile is based on look-up tables, converted by ImageCms; None if that fails."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    color = image.convert("L" if image.mode in ("L", "LA") else "RGB") if alpha is not None else image
    mode = color.mode
    try:
        converted = _apply_profile(color, profile, "RGB")
        _apply_profile(Image.new("RGB", (1, 1)), profile, mode, from_srgb=True)  # fails for input-only profiles
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        notice(f"the ICC profile cannot be applied in both directions; the pixels were treated as sRGB ({error})")
        return None
    if alpha is not None:
        converted.putalpha(alpha)

    def restore(result: np.ndarray) -> Image.Image:
        restored = _apply_profile(_image(result[..., :3]), profile, mode, from_srgb=True)
        if alpha is not None:
            restored.putalpha(_image(result[..., 3:]))
        return restored

    return _Decoded(_array(converted), None, restore)


_DIRECT_MODE = {"1": "L", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "PA": "RGBA", "YCbCr": "RGB", "HSV": "RGB"}


def _to_direct_mode(image: Image.Image) -> Image.Image:
    """Any 8-bit mode -> L, LA, RGB or RGBA. Transparency of a palette or color key becomes alpha."""
    mode = image.mode
    if mode == "P":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if mode in ("1", "L", "RGB") and "transparency" in image.info:
        return image.convert("RGBA" if mode == "RGB" else "LA")
    if mode == "LAB":
        return lab_to_rgb(image)
    return image if mode in _DIRECT else image.convert(_DIRECT_MODE[mode])


def _decode(image: Image.Image, profile: bytes | None) -> _Decoded:
    mode = image.mode
    if mode == "CMYK":
        return _decode_cmyk(image, profile)
    space, tables = color_space(profile)
    if mode in _BYTE_ORDER or mode == "I":
        if tables:
            notice("a table-based ICC profile cannot be applied to 16-bit images; the pixels were treated as sRGB")
        return _decode_16bit(image, space)
    if mode == "F" or (mode not in _DIRECT and mode not in (*_DIRECT_MODE, "P", "LAB")):
        raise InputError(
            f"mode {mode} has no defined range; convert the image to L, RGB or I;16, or pass a float array in [0, 1]"
        )
    if isinstance(image.info.get("transparency"), str):  # a text of this name in a PNG
        image = image.copy()
        del image.info["transparency"]
    direct = _to_direct_mode(image)
    if mode in ("YCbCr", "HSV", "LAB"):
        notice(f"{mode} was converted to RGB for the network and back")
    if tables and profile and mode not in ("YCbCr", "HSV", "LAB", "La", "RGBa", "RGBX"):
        decoded = _decode_table_profile(direct, profile)
        if decoded is not None:
            return decoded

    def restore(result: np.ndarray) -> Image.Image:
        restored = _image(result)
        if mode == "LAB":
            return _rgb_to_lab(restored)
        return restored.convert(mode) if mode in ("La", "RGBa", "RGBX", "YCbCr", "HSV") else restored

    return _Decoded(_array(direct), None if mode == "LAB" else space, restore)


def _header(image: Image.Image) -> Header:
    """What the file of an image states; if Pillow has closed it, by its name."""
    stream, name = getattr(image, "fp", None), getattr(image, "filename", None)
    if stream is None and isinstance(name, str) and os.path.isfile(name):
        with suppress(OSError), open(name, "rb") as reopened:
            return read_header(reopened, image.format)
    return read_header(stream, image.format)


def upscale_loaded(
    image: Image.Image,
    carried: metadata.Metadata,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    target: Target = NATIVE,
) -> tuple[Image.Image, metadata.Metadata]:
    """Upscale a loaded and oriented image -> the new image and its metadata.

    carried: metadata of the new image; a CMYK profile is removed from it. target: another size of the result. Raises
    InputError for a mode that is not accepted, and for an image without pixels.
    """
    if 0 in image.size:
        raise InputError(f"expected at least one pixel, found an image of {image.width}x{image.height}")
    decoded = _decode(image, carried.icc)
    batch = decoded.pixels[None]
    pixels = enlarge_pixels(batch, enlarge, upscale, device=device, space=decoded.space, target=target)[0]
    return decoded.restore(pixels), carried if decoded.keep_profile else carried.without_color()


def upscale_pil(
    image: Image.Image,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    max_pixels: int | None = None,
    frame: int | None = None,
    target: Target = NATIVE,
) -> Image.Image:
    """Upscale a PIL image -> a PIL image; the module docstring lists the modes, dispatch.upscale_image the arguments.

    Raises InputError for images that are not accepted or cannot be decoded, OutOfMemory if the result would not fit.
    """
    if image.width == 0 or image.height == 0:
        raise InputError(f"expected at least one pixel, found an image of {image.width}x{image.height}")
    check_size(image.width, image.height, upscale, max_pixels=max_pixels)
    check_opened(image, upscale, frame=frame, max_pixels=max_pixels)
    try:
        image = pick_frame(image, frame)
        header = _header(image)
        check_size(image.width, image.height, upscale, max_pixels=max_pixels)
        image.load()
    except TinySRError:
        raise
    except DECODE_ERRORS as error:
        raise InputError(f"the image cannot be decoded: {error or type(error).__name__}") from error
    carried = metadata.collect(image, header)
    if metadata.orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    final = target.output(image.width, image.height, upscale)  # of the upright image
    check_size(image.width, image.height, upscale, result=final, max_pixels=max_pixels)
    carried = carried.resized(*final)
    result, carried = upscale_loaded(image, carried, enlarge, upscale, device=device, target=target)
    result.info = metadata.as_info(carried)
    return result
