"""The color space that an image declares, by whatever means its format has, as an ICC profile or a label.

PNG: cICP, else iCCP, else sRGB, else gAMA and cHRM (third edition, section 4.3). AVIF, HEIF, JPEG 2000: ICC, else code
points. TIFF: ICC, else WhitePoint, PrimaryChromaticities and TransferFunction. BMP: its header. EXIF in any format:
Adobe RGB, if nothing else is declared. An image that declares nothing is sRGB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from PIL import Image

from tinysr_kernels.runtime.images.color.h273 import ADOBE_RGB, SRGB_CURVE, SRGB_PRIMARIES, Label
from tinysr_kernels.runtime.images.color.icc_writer import Curve, Primaries, write_profile
from tinysr_kernels.runtime.images.tags.exif import is_adobe_rgb
from tinysr_kernels.runtime.images.tags.header import Header
from tinysr_kernels.runtime.notices import notice

# Writers state sRGB's curve as 1/2.2 and its primaries rounded; libpng, too, takes these for sRGB.
_SRGB_GAMMA = (0.45, 0.4595)
_SAME_POINT = 0.002
_WHITE_POINT, _CHROMATICITIES, _TRANSFER_FUNCTION = 318, 319, 301


def _is_srgb(primaries: Primaries) -> bool:
    pairs = zip(primaries, SRGB_PRIMARIES, strict=True)
    return all(abs(a - b) <= _SAME_POINT for found, known in pairs for a, b in zip(found, known, strict=True))


def _points(numbers: Any) -> Primaries:
    """Eight numbers, x and y of white, red, green and blue -> primaries."""
    w_x, w_y, *rest = (float(number) for number in numbers)
    r_x, r_y, g_x, g_y, b_x, b_y = rest
    return (r_x, r_y), (g_x, g_y), (b_x, b_y), (w_x, w_y)


def _png(image: Image.Image, gray: bool) -> bytes | None:
    """gAMA and cHRM, which Pillow reports; a missing one is that of sRGB."""
    info = image.info
    if isinstance(info.get("srgb"), int):
        return None
    points, stated = info.get("chromaticity"), info.get("gamma")  # or texts of these names
    primaries = _points(points) if isinstance(points, tuple) else SRGB_PRIMARIES
    gamma = stated if isinstance(stated, float) else _SRGB_GAMMA[0]
    if not 0.05 <= gamma <= 20:
        raise ValueError(f"gAMA {gamma:.6g}")
    srgb_like = _is_srgb(primaries) or gray
    if srgb_like and _SRGB_GAMMA[0] <= gamma <= _SRGB_GAMMA[1]:
        return None
    curve = Curve((1 / gamma,)) if isinstance(stated, float) else SRGB_CURVE
    return write_profile("PNG gAMA and cHRM", None if gray else primaries, (curve,))


def _tiff(image: Image.Image, gray: bool) -> bytes | None:
    """Tags 301, 318 and 319 (TIFF 6.0, section 20). Without a transfer function it is a power of 2.2."""
    tags: Any = getattr(image, "tag_v2", {})
    colors = _WHITE_POINT in tags and _CHROMATICITIES in tags and not gray
    if not colors and _TRANSFER_FUNCTION not in tags:
        return None
    primaries = _points([*tags[_WHITE_POINT], *tags[_CHROMATICITIES]]) if colors else SRGB_PRIMARIES
    curves: tuple[Curve, ...] = (Curve((2.2,)),)
    if _TRANSFER_FUNCTION in tags:
        values = tags[_TRANSFER_FUNCTION]
        count = 1 if len(values) % 3 else 3  # a power of two, once or for each channel
        size = len(values) // count
        if size < 2:
            raise ValueError("a transfer function without values")
        tables = [[value / 65535 for value in values[index * size : (index + 1) * size]] for index in range(count)]
        curves = tuple(Curve(table=tuple(table)) for table in tables)
    elif _is_srgb(primaries):
        return None
    return write_profile("TIFF transfer function", None if gray else primaries, curves)


def _from_exif(exif: bytes | None, gray: bool) -> bytes | None:
    if not exif or not is_adobe_rgb(exif):
        return None
    return write_profile("Adobe RGB (1998)", None if gray else ADOBE_RGB, (Curve((563 / 256,)),))


def _attempt(what: str, read: Callable[[], bytes | None]) -> bytes | None:
    try:
        return read()
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, OverflowError, struct.error) as error:
        notice(f"the {what} is invalid; the pixels were treated as sRGB ({error})")
        return None


def _pillow_label(info: dict[Any, Any]) -> Label | None:
    """The label in an image's `info`: "cicp", which results of this package have, or pillow-heif's "nclx_profile"."""
    cicp, nclx = info.get("cicp"), info.get("nclx_profile")
    if isinstance(cicp, (tuple, list)) and len(cicp) == 4:
        return Label(int(cicp[0]), int(cicp[1]), bool(cicp[3]))
    if isinstance(nclx, dict) and {"color_primaries", "transfer_characteristics"} <= nclx.keys():
        return Label(int(nclx["color_primaries"]), int(nclx["transfer_characteristics"]))
    return None


def declared_color(
    image: Image.Image, header: Header, exif: bytes | None, *, gray: bool
) -> tuple[bytes | None, Label | None]:
    """The ICC profile of an image's colors (None: sRGB) and the label that means the same, if the file has one.

    PQ and HLG, which no profile can mean, come as a label alone, with a notice. exif: of the image. gray: whether
    its pixels have one color channel.
    """
    icc = image.info.get("icc_profile") or header.profile
    icc = icc if isinstance(icc, bytes) else None
    label = header.label or _pillow_label(image.info)
    if label is not None and (icc is None or image.format == "PNG"):  # elsewhere ICC takes precedence
        if label.is_untouched:
            notice(f"{label.name} values went through the network as they are, because it knows sRGB only")
            return None, label
        icc = label.profile(gray=gray)
        return icc, label if icc else None
    if icc is not None:
        return icc, None
    if image.mode in ("CMYK", "LAB"):
        return None, None
    if any(isinstance(image.info.get(key), (int, float, tuple)) for key in ("srgb", "gamma", "chromaticity")):
        return _attempt("gAMA or cHRM", lambda: _png(image, gray)), None
    if image.format == "TIFF":
        icc = _attempt("TIFF transfer function or primaries", lambda: _tiff(image, gray))
    return icc or _attempt("EXIF color space", lambda: _from_exif(exif, gray)), None
