"""ICC profiles: convert from the image's color space to sRGB for the network and back, in floating point.

Most embedded profiles are matrix profiles with tone curves (sRGB, Adobe RGB, Display P3, ProPhoto) or single gray
curves. They are parsed here following ICC.1:2022 (sections 8.3, 9.2, 10.6, 10.18) and applied to tensors, so that
16-bit images lose no precision before the final rounding. Profiles based on look-up tables are left to Pillow's
ImageCms (pil.py), which works on 8 bits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Linear sRGB -> XYZ relative to D50, the profile connection space (IEC 61966-2-1, Bradford-adapted).
_SRGB_TO_XYZ = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
_CURVE_SIZE = 65536  # every 8-bit (x257) and 16-bit value is exactly one entry
_INVERSE_SIZE = 16384


class ProfileError(ValueError):
    """A corrupt or inconsistent profile."""


def _srgb_encode(linear: Tensor) -> Tensor:
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


def _srgb_decode(value: Tensor) -> Tensor:
    return torch.where(value <= 0.04045, value / 12.92, ((value.clamp(min=0) + 0.055) / 1.055) ** 2.4)


def _look_up(table: np.ndarray, position: Tensor) -> Tensor:
    """Linear interpolation in a table over [0,1]. position: any shape, clamped to [0,1]; the result has its shape."""
    values = torch.as_tensor(table, dtype=position.dtype, device=position.device)
    scaled = position.clamp(0, 1) * (len(table) - 1)
    low = scaled.floor().clamp(max=len(table) - 2)
    index = low.long()
    below = values[index]
    return below + (scaled - low) * (values[index + 1] - below)


@dataclass(frozen=True)
class ColorSpace:
    """A matrix or gray profile. Tensors are float [N,3,H,W]; inputs are clamped to [0,1]."""

    curves: tuple[np.ndarray, ...]  # three tables (gray: one) over [0,1] that map to linear light
    inverses: tuple[np.ndarray, ...]  # the inverse tables, over the cube root of linear light
    matrix: np.ndarray  # [3,3] linear device RGB -> linear sRGB

    def _apply(self, matrix: np.ndarray, linear: Tensor) -> Tensor:
        weights = torch.as_tensor(matrix, dtype=linear.dtype, device=linear.device)
        return torch.einsum("ij,njhw->nihw", weights, linear)

    def to_srgb(self, color: Tensor) -> Tensor:
        """Values in this space [N,3,H,W] -> sRGB [N,3,H,W] in [0,1]; out-of-gamut colors are clamped."""
        linear = torch.stack([_look_up(self.curves[i % len(self.curves)], color[:, i]) for i in range(3)], 1)
        return _srgb_encode(self._apply(self.matrix, linear).clamp(0, 1))

    def from_srgb(self, color: Tensor) -> Tensor:
        """sRGB [N,3,H,W] -> values in this space [N,3,H,W] in [0,1]."""
        linear = self._apply(np.linalg.inv(self.matrix), _srgb_decode(color.clamp(0, 1))).clamp(0, 1)
        # The cube root gives more entries to dark values, where the inverse of a power curve is steep.
        root = linear ** (1 / 3)
        return torch.stack([_look_up(self.inverses[i % len(self.inverses)], root[:, i]) for i in range(3)], 1)

    def is_srgb(self) -> bool:
        """Whether the conversion changes no color by more than one 8-bit step and can be skipped."""
        axis = torch.linspace(0, 1, 9, dtype=torch.float64, device="cpu")
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).reshape(1, 3, -1, 1)
        return float((self.to_srgb(grid) - grid).abs().max()) < 1 / 255


def _tags(profile: bytes) -> dict[bytes, bytes]:
    if len(profile) < 132 or profile[36:40] != b"acsp":
        raise ProfileError("not an ICC profile")
    (count,) = struct.unpack_from(">I", profile, 128)
    if count > 1000 or 132 + 12 * count > len(profile):
        raise ProfileError("the tag table is corrupt")
    tags = {}
    for index in range(count):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if offset + size > len(profile):
            raise ProfileError(f"tag {name!r} is outside the profile")
        tags[name] = profile[offset : offset + size]
    return tags


def _parametric(kind: int, p: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """The parametric curves of ICC.1 section 10.18, with parameters g a b c d e f."""
    g, a, b, c, d, e, f = (*p, *(0.0,) * (7 - len(p)))
    if kind == 0:
        return x**g
    if kind in (1, 2):
        if a == 0:
            raise ProfileError("a parametric curve has a = 0")
        shift = c if kind == 2 else 0.0
        return np.where(x >= -b / a, np.maximum(a * x + b, 0) ** g + shift, shift)
    above, below = (e, f) if kind == 4 else (0.0, 0.0)
    return np.where(x >= d, np.maximum(a * x + b, 0) ** g + above, c * x + below)


def _curve(tag: bytes) -> np.ndarray:
    """A tone curve tag -> a table of 65536 linear-light values over [0,1]."""
    x = np.linspace(0.0, 1.0, _CURVE_SIZE)
    try:
        if tag[:4] == b"curv":
            (count,) = struct.unpack_from(">I", tag, 8)
            values = np.frombuffer(tag, ">u2", count, 12).astype(np.float64)
            if count == 0:
                table = x
            elif count == 1:
                table = x ** (values[0] / 256)
            else:
                table = np.interp(x, np.linspace(0, 1, count), values / 65535)
        elif tag[:4] == b"para":
            (kind,) = struct.unpack_from(">H", tag, 8)
            if kind > 4:
                raise ProfileError(f"unknown parametric curve {kind}")
            numbers = struct.unpack_from(f">{(1, 3, 4, 5, 7)[kind]}i", tag, 12)
            table = _parametric(kind, tuple(number / 65536 for number in numbers), x)
        else:
            raise ProfileError(f"unknown tone curve type {tag[:4]!r}")
    except (struct.error, ValueError, IndexError) as error:
        raise ProfileError(f"a tone curve is corrupt: {error}") from error
    if not np.isfinite(table).all() or table[-1] <= table[0]:
        raise ProfileError("a tone curve is not increasing")
    return np.maximum.accumulate(np.clip(table, 0, 1))


def _inverse(table: np.ndarray) -> np.ndarray:
    light = np.linspace(0.0, 1.0, _INVERSE_SIZE) ** 3
    first = np.concatenate([[True], np.diff(table) > 0])  # on flat segments use the first value
    return np.interp(light, table[first], np.linspace(0.0, 1.0, len(table))[first])


def _xyz(tag: bytes) -> tuple[float, float, float]:
    try:
        x, y, z = struct.unpack_from(">3i", tag, 8)
    except struct.error as error:
        raise ProfileError("a colorant is corrupt") from error
    return x / 65536, y / 65536, z / 65536


def parse_profile(profile: bytes) -> ColorSpace | None:
    """Parse a matrix or gray profile.

    Returns None for a valid profile that is based on look-up tables or is for CMYK, which ImageCms handles. Raises
    ProfileError for a corrupt profile.
    """
    tags = _tags(profile)
    space = profile[16:20]
    if space == b"GRAY" and b"kTRC" in tags:
        curves: tuple[np.ndarray, ...] = (_curve(tags[b"kTRC"]),)
        matrix = np.eye(3)
    elif space == b"RGB " and {b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"} <= tags.keys():
        curves = tuple(_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
        colorants = np.array([_xyz(tags[name]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]).T
        if abs(np.linalg.det(colorants)) < 1e-6:
            raise ProfileError("the colorants do not span a color space")
        matrix = np.linalg.inv(_SRGB_TO_XYZ) @ colorants
    else:
        return None
    return ColorSpace(curves, tuple(_inverse(curve) for curve in curves), matrix)
