"""Encode images to file bytes: the output formats, their limits, and the options each is written with."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.writing.metadata import fitted, save_options, stamp_avif
from tinysr_kernels.files.writing.png import encode_png, to_8bit
from tinysr_kernels.files.writing.tiff import encode_tiff
from tinysr_kernels.runtime.images.color.h273 import Label
from tinysr_kernels.runtime.images.metadata import Metadata
from tinysr_kernels.runtime.images.pil import color_space, gray_16bit, lab_to_rgb, profile_to_srgb
from tinysr_kernels.runtime.notices import notice

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".avif": "AVIF",
}
# The maximum side in pixels. A JPEG header can state 65535, but libjpeg stops at 65500.
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383, "AVIF": 65536}
_NO_ALPHA = ("JPEG", "BMP")
_RGB_ONLY = ("WEBP", "AVIF")
_LABELLED = ("PNG", "AVIF")  # formats that can state PQ and HLG


@dataclass(frozen=True)
class Encoding:
    """Options of the encoders.

    quality: of JPEG, WebP and AVIF, 1 to 100. lossless: for WebP. strip: drop all metadata but that of color.
    """

    quality: int = 95
    lossless: bool = False
    strip: bool = False


def writable(suffix: str) -> bool:
    """Whether files with this suffix (".png", in any case) can be written."""
    form = FORMATS.get(suffix.lower())
    return form is not None and (form not in ("WEBP", "AVIF") or bool(features.check(form.lower())))


def unsupported_reason(suffix: str, size: tuple[int, int], alpha: bool, label: Label | None = None) -> str | None:
    """Why the format cannot store an image of this size (width, height); None if it can.

    alpha: whether any pixel is not opaque. label: of the colors, as in `Metadata`.
    """
    form = FORMATS[suffix.lower()]
    max_side = _MAX_SIDE.get(form)
    if max_side and max(size) > max_side:
        return f"{form} is limited to {max_side} pixels per side, the image is {size[0]}x{size[1]}"
    if alpha and form in _NO_ALPHA:
        return f"{form} does not support transparency"
    if label is not None and label.is_untouched and form not in _LABELLED:
        return f"{form} cannot state that its values are {label.name}"
    return None


def has_alpha(image: Image.Image | np.ndarray) -> bool:
    """Whether any pixel is not opaque. image: PIL, or uint8 or uint16 [H,W] or [H,W,1..4]."""
    if isinstance(image, np.ndarray):
        return image.shape[-1] in (2, 4) and bool((image[..., -1] < np.iinfo(image.dtype).max).any())
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        return bool((np.asarray(image.getchannel(len(image.getbands()) - 1)) < 255).any())
    return False


_MODE_AS_WRITTEN = {
    "La": "LA",
    "RGBa": "RGBA",
    "RGBX": "RGB",
    "HSV": "RGB",
    "YCbCr": "RGB",
    "P": "RGBA",
    "PA": "RGBA",
    "CMYK": "RGB",
    "1": "L",
}


def _to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """Any image -> uint8 or uint16 [H,W,C] with C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha."""
    if isinstance(image, np.ndarray):
        return image[..., None] if image.ndim == 2 else image
    if image.mode == "LAB":
        notice("LAB was converted to RGB")
        image = lab_to_rgb(image)
    if image.mode.startswith("I"):
        wide = np.asarray(image).clip(0, 65535).astype(np.uint16) if image.mode == "I" else gray_16bit(image)
        return wide[..., None]
    mode = _MODE_AS_WRITTEN.get(image.mode, image.mode)
    if mode not in ("L", "LA", "RGB", "RGBA"):
        raise InputError(f"cannot write an image of mode {image.mode}; convert it to RGB")
    pixels = np.asarray(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode(image: Image.Image | np.ndarray, suffix: str, metadata: Metadata, encoding: Encoding) -> bytes:
    """Encode an image in the format of the suffix -> the bytes of the file.

    image: PIL, or uint8 or uint16 [H,W,1..4]. Raises InputError for an unknown suffix, and for an image that the format
    cannot store (see `unsupported_reason`).
    """
    form = FORMATS.get(suffix.lower())
    if form is None or not writable(suffix):
        known = " ".join(name for name in FORMATS if writable(name))
        raise InputError(f"cannot write {suffix or 'a file without a suffix'}; choose one of {known}")
    size = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    pixels = _to_array(image)
    reason = unsupported_reason(suffix, size, has_alpha(pixels), metadata.label)
    if reason:
        raise InputError(f"{reason}; write PNG instead")
    if encoding.strip:
        metadata = metadata.stripped()
    metadata = fitted(metadata, form)
    if form in _NO_ALPHA and pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1]  # opaque: checked above
    if form == "TIFF":
        return encode_tiff(pixels, metadata)
    if pixels.dtype == np.uint16:
        if form == "PNG":
            return encode_png(pixels, metadata)
        notice(f"{form} stores 8 bits per channel: the 16-bit image was rounded")
        pixels = to_8bit(pixels)
    if form in _RGB_ONLY and (metadata.icc or b"")[16:20] == b"GRAY":
        pixels, metadata = _gray_to_srgb(pixels, metadata)
    pil_image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    if form == "BMP" and metadata.icc:
        pil_image = profile_to_srgb(pil_image, metadata.icc)
    stream = io.BytesIO()
    pil_image.save(stream, format=form, **_options(form, metadata, encoding))
    return stamp_avif(stream.getvalue(), metadata) if form == "AVIF" else stream.getvalue()


def _gray_to_srgb(pixels: np.ndarray, metadata: Metadata) -> tuple[np.ndarray, Metadata]:
    """uint8 [H,W,C] with a gray profile, which is invalid in an RGB file -> sRGB values and no profile."""
    space, _ = color_space(metadata.icc)
    if space is not None:
        levels = torch.linspace(0, 1, 256, dtype=torch.float64, device="cpu").expand(1, 3, 1, 256)
        table = (space.to_srgb(levels)[0, 0, 0] * 255).round().to(torch.uint8).numpy()
        pixels = np.concatenate([table[pixels[..., :1]], pixels[..., 1:]], -1)
        notice("the gray ICC profile was applied and dropped, because the format stores RGB only")
    return pixels, metadata.without_color()


def _options(form: str, metadata: Metadata, encoding: Encoding) -> dict[str, Any]:
    options = save_options(metadata, form)
    if form == "JPEG":
        options |= {"quality": encoding.quality, "subsampling": 0}
    elif form == "WEBP":
        options |= {"quality": encoding.quality, "lossless": encoding.lossless}
    elif form == "AVIF":
        options |= {"quality": encoding.quality, "subsampling": "4:4:4"}
    return options
