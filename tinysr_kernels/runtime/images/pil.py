"""PIL images of every mode: decoded honouring transparency, orientation and profile, and given back in kind.

What comes back: 1 -> L; L, LA, La, RGB, RGBA, RGBa, RGBX, I, I;16 in every byte order -> the same mode; a transparent
colour (tRNS) -> alpha; P -> RGB or RGBA; PA -> RGBA; CMYK -> RGB, with a notice; YCbCr, HSV, LAB -> the same
mode by way of RGB, with a notice; F -> refused. I is taken for what Pillow reads 16-bit files into: 0 to 65535.
The EXIF orientation is applied to the pixels. An ICC profile is converted to sRGB for the network and back and stays
with the picture; what else the picture carries (EXIF, XMP, resolution) is in the result's `info`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.device.host_memory import check_size
from tinysr_kernels.runtime.images import metadata
from tinysr_kernels.runtime.images.arrays import Enlarge, enlarge_pixels
from tinysr_kernels.runtime.images.icc import ColourSpace, ProfileError, parse_profile
from tinysr_kernels.runtime.notices import notice

# Files of these formats hold one picture and its by-products (previews, gain maps, layers beside the composite).
_ONE_PICTURE = ("MPO", "PSD", "ICO", "ICNS")
_DIRECT = ("L", "LA", "RGB", "RGBA")
_BYTE_ORDER = {"I;16": "<", "I;16L": "<", "I;16B": ">", "I;16N": "="}


@dataclass(frozen=True)
class _Decoded:
    """pixels: uint8 or uint16 [H,W,1..4]; space: of the pixels, None for sRGB; restore: pixels -> PIL image."""

    pixels: np.ndarray
    space: ColourSpace | None
    restore: Callable[[np.ndarray], Image.Image]
    keep_profile: bool = True


def pick_frame(image: Image.Image, frame: int | None, name: str = "image") -> Image.Image:
    """The one picture to enlarge. Raises InputError for several without a choice, or a frame that is not there."""
    count = int(getattr(image, "n_frames", 1))
    if frame is not None:
        if not 0 <= frame < count:
            raise InputError(f"{name}: frame {frame} was asked for, the frames are 0 to {count - 1}")
        if count > 1:
            image.seek(frame)
        return image
    if count > 1 and image.format not in _ONE_PICTURE:
        raise InputError(
            f"{name}: {count} frames ({image.format}); choose one: frame=N (--frame N), counted from 0, "
            "or image.seek(N) and image.copy()"
        )
    if count > 1 and image.format == "MPO":
        notice(f"the {count - 1} further pictures inside the file (preview, gain map) were left out")
    return image


def _cms(image: Image.Image, source: bytes, back: bool, mode: str) -> Image.Image:
    """Convert with Pillow's colour management, 8 bits: profile -> sRGB, or sRGB -> profile where `back`."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(source))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    first, second = (srgb, own) if back else (own, srgb)
    result = ImageCms.profileToProfile(image, first, second, outputMode=mode)
    assert result is not None
    return result


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


def grey_sixteen(image: Image.Image) -> np.ndarray:
    """A mode I;16 in any byte order -> uint16 [H,W]. Not numpy.asarray: it knows neither I;16L nor I;16N."""
    pixels = np.frombuffer(image.tobytes(), _BYTE_ORDER[image.mode] + "u2")
    return pixels.astype(np.uint16).reshape(image.height, image.width)


def colour_space(profile: bytes | None) -> tuple[ColourSpace | None, bool]:
    """(space, tables): the space of a matrix or grey profile, None for sRGB; whether it is made of tables instead."""
    if not profile:
        return None, False
    try:
        space = parse_profile(profile)
    except ProfileError as error:
        notice(f"the ICC profile is broken and was taken for sRGB ({error})")
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


def _decode_sixteen(image: Image.Image, space: ColourSpace | None) -> _Decoded:
    """Modes I and I;16*. A transparent grey value becomes alpha, and the result then LA in 8 bits: PIL has no LA;16."""
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
        pixels = grey_sixteen(image)

    def restore(result: np.ndarray) -> Image.Image:
        grey = result[..., 0]
        if mode == "I":
            return Image.fromarray(grey.astype(np.int32))
        if mode == "I;16":
            return Image.fromarray(np.ascontiguousarray(grey))
        data = grey.astype(_BYTE_ORDER[mode] + "u2").tobytes()
        return Image.frombytes(mode, (grey.shape[1], grey.shape[0]), data)

    key = image.info.get("transparency")
    if isinstance(key, int):
        notice("16-bit grey with a transparent value was enlarged in 8 bits, Pillow has no 16-bit mode with alpha")
        eight = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        alpha = np.where(pixels == key, 0, 255).astype(np.uint8)
        return _Decoded(np.stack([eight, alpha], -1), space, _image)
    return _Decoded(pixels[..., None], space, restore)


def _decode_cmyk(image: Image.Image, profile: bytes | None) -> _Decoded:
    notice("CMYK was converted to RGB")
    if profile:
        try:
            return _Decoded(_array(_cms(image, profile, False, "RGB")), None, _image, keep_profile=False)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            notice(f"the ICC profile is broken and was left out ({error})")
    return _Decoded(_array(image.convert("RGB")), None, _image, keep_profile=False)


def _through_tables(image: Image.Image, profile: bytes) -> _Decoded | None:
    """A picture of 8 bits whose profile is made of look-up tables, by ImageCms; None where that does not work."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colour = image.convert("L" if image.mode in ("L", "LA") else "RGB") if alpha is not None else image
    mode = colour.mode
    try:
        converted = _cms(colour, profile, False, "RGB")
        _cms(Image.new("RGB", (1, 1)), profile, True, mode)  # input-only profiles have no way back
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        notice(f"the ICC profile cannot be used in both directions and was taken for sRGB ({error})")
        return None
    if alpha is not None:
        converted.putalpha(alpha)

    def restore(result: np.ndarray) -> Image.Image:
        restored = _cms(_image(result[..., :3]), profile, True, mode)
        if alpha is not None:
            restored.putalpha(_image(result[..., 3:]))
        return restored

    return _Decoded(_array(converted), None, restore)


_PLAIN = {"1": "L", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "PA": "RGBA", "YCbCr": "RGB", "HSV": "RGB"}


def _plain(image: Image.Image) -> Image.Image:
    """Any 8-bit mode -> L, LA, RGB or RGBA, honouring a palette's and a colour key's transparency."""
    mode = image.mode
    if mode == "P":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if mode in ("1", "L", "RGB") and "transparency" in image.info:
        return image.convert("RGBA" if mode == "RGB" else "LA")
    if mode == "LAB":
        return lab_to_rgb(image)
    return image if mode in _DIRECT else image.convert(_PLAIN[mode])


def _decode(image: Image.Image, profile: bytes | None) -> _Decoded:
    mode = image.mode
    if mode == "CMYK":
        return _decode_cmyk(image, profile)
    space, tables = colour_space(profile)
    if mode in _BYTE_ORDER or mode == "I":
        if tables:
            notice("an ICC profile of tables cannot be applied to 16 bits; the pixels were taken for sRGB")
        return _decode_sixteen(image, space)
    if mode == "F" or (mode not in _DIRECT and mode not in (*_PLAIN, "P", "LAB")):
        raise InputError(
            f"mode {mode} has no defined range; convert the image to L, RGB or I;16, or pass a float array in [0, 1]"
        )
    plain = _plain(image)
    if mode in ("YCbCr", "HSV", "LAB"):
        notice(f"{mode} was converted to RGB for the network and back")
    if tables and profile and mode not in ("YCbCr", "HSV", "LAB", "La", "RGBa", "RGBX"):
        through = _through_tables(plain, profile)
        if through is not None:
            return through

    def restore(result: np.ndarray) -> Image.Image:
        made = _image(result)
        if mode == "LAB":
            return _rgb_to_lab(made)
        return made.convert(mode) if mode in ("La", "RGBa", "RGBX", "YCbCr", "HSV") else made

    return _Decoded(_array(plain), None if mode == "LAB" else space, restore)


def upscale_loaded(
    image: Image.Image,
    carried: metadata.Metadata,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
) -> tuple[Image.Image, metadata.Metadata]:
    """A loaded and oriented image -> the enlarged one, and what it carries: all of `carried` but a CMYK profile.

    Raises InputError for a mode that is not accepted.
    """
    decoded = _decode(image, carried.icc)
    pixels = enlarge_pixels(decoded.pixels[None], enlarge, upscale, device=device, space=decoded.space)[0]
    return decoded.restore(pixels), carried if decoded.keep_profile else replace(carried, icc=None)


def upscale_pil(
    image: Image.Image,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    max_pixels: int | None = None,
    frame: int | None = None,
) -> Image.Image:
    """A PIL image -> a PIL image, `upscale` times larger; see the top of this file and dispatch.upscale_image.

    Raises InputError for what is not accepted, also for pixels that cannot be decoded.
    """
    if image.width == 0 or image.height == 0:
        raise InputError(f"expected at least one pixel, found an image of {image.width}x{image.height}")
    check_size(image.width, image.height, upscale, max_pixels=max_pixels)
    image = pick_frame(image, frame)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the image cannot be decoded: {error}") from error
    carried = metadata.collect(image).resized(image.width * upscale, image.height * upscale)
    if metadata.orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
        carried = carried.resized(image.width * upscale, image.height * upscale)
    result, carried = upscale_loaded(image, carried, enlarge, upscale, device=device)
    fields = {"icc_profile": carried.icc, "exif": carried.exif, "xmp": carried.xmp, "dpi": carried.dpi}
    result.info = {key: value for key, value in fields.items() if value is not None}
    return result
