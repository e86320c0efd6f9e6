"""ICC profiles: the picture's own RGB or grey to sRGB for the network, and back, in floating point.

Nearly every embedded profile is a matrix with tone curves (sRGB, Adobe RGB, Display P3, ProPhoto) or one grey
curve. Those are read here after ICC.1:2022 (sections 8.3, 9.2, 10.6, 10.18) and applied to tensors, so that 16-bit
pictures lose nothing and the only rounding stays the final one. Profiles made of look-up tables are left to
Pillow's ImageCms (pil.py), which works on 8 bits.
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
_CURVE_SIZE = 65536  # so that every 8-bit (x257) and 16-bit value hits an entry exactly
_INVERSE_SIZE = 16384


class ProfileError(ValueError):
    """A profile that is damaged or contradicts itself."""


def _srgb_encode(linear: Tensor) -> Tensor:
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


def _srgb_decode(value: Tensor) -> Tensor:
    return torch.where(value <= 0.04045, value / 12.92, ((value.clamp(min=0) + 0.055) / 1.055) ** 2.4)


def _look_up(table: np.ndarray, position: Tensor) -> Tensor:
    """Linear interpolation in a table over [0,1]; position of any shape, clamped; the same shape comes back."""
    values = torch.as_tensor(table, dtype=position.dtype, device=position.device)
    scaled = position.clamp(0, 1) * (len(table) - 1)
    low = scaled.floor().clamp(max=len(table) - 2)
    index = low.long()
    below = values[index]
    return below + (scaled - low) * (values[index + 1] - below)


@dataclass(frozen=True)
class ColourSpace:
    """A matrix or grey profile. Tensors are [N,3,H,W] float; values outside [0,1] are clamped on the way in."""

    curves: tuple[np.ndarray, ...]  # three (or for grey one) tables over [0,1], to linear light
    inverses: tuple[np.ndarray, ...]  # the way back, tables over the cube root of linear light
    matrix: np.ndarray  # [3,3] linear device RGB -> linear sRGB

    def _apply(self, matrix: np.ndarray, linear: Tensor) -> Tensor:
        weights = torch.as_tensor(matrix, dtype=linear.dtype, device=linear.device)
        return torch.einsum("ij,njhw->nihw", weights, linear)

    def to_srgb(self, colour: Tensor) -> Tensor:
        """The picture's values [N,3,H,W] -> sRGB [N,3,H,W] in [0,1]; colours that sRGB lacks are clamped."""
        linear = torch.stack([_look_up(self.curves[i % len(self.curves)], colour[:, i]) for i in range(3)], 1)
        return _srgb_encode(self._apply(self.matrix, linear).clamp(0, 1))

    def from_srgb(self, colour: Tensor) -> Tensor:
        """sRGB [N,3,H,W] -> the picture's own values [N,3,H,W] in [0,1]."""
        linear = self._apply(np.linalg.inv(self.matrix), _srgb_decode(colour.clamp(0, 1))).clamp(0, 1)
        # The cube root spreads the dark end, where the inverse of a power curve is steep.
        root = linear ** (1 / 3)
        return torch.stack([_look_up(self.inverses[i % len(self.inverses)], root[:, i]) for i in range(3)], 1)

    def is_srgb(self) -> bool:
        """Whether the conversion moves no colour by more than one 8-bit step, so that it can be left out."""
        axis = torch.linspace(0, 1, 9, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).reshape(1, 3, -1, 1)
        return float((self.to_srgb(grid) - grid).abs().max()) < 1 / 255


def _tags(profile: bytes) -> dict[bytes, bytes]:
    if len(profile) < 132 or profile[36:40] != b"acsp":
        raise ProfileError("not an ICC profile")
    (count,) = struct.unpack_from(">I", profile, 128)
    if count > 1000 or 132 + 12 * count > len(profile):
        raise ProfileError("the tag table is damaged")
    tags = {}
    for index in range(count):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if offset + size > len(profile):
            raise ProfileError(f"tag {name!r} lies outside the profile")
        tags[name] = profile[offset : offset + size]
    return tags


def _parametric(kind: int, p: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """The parametric curves of ICC.1 section 10.18, with parameters g a b c d e f."""
    g, a, b, c, d, e, f = (*p, *(0.0,) * (7 - len(p)))
    if kind == 0:
        return x**g
    if kind in (1, 2):
        if a == 0:
            raise ProfileError("a parametric curve with a = 0")
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
            raise ProfileError(f"unknown kind of tone curve {tag[:4]!r}")
    except (struct.error, ValueError, IndexError) as error:
        raise ProfileError(f"a tone curve is damaged: {error}") from error
    if not np.isfinite(table).all() or table[-1] <= table[0]:
        raise ProfileError("a tone curve does not rise")
    return np.maximum.accumulate(np.clip(table, 0, 1))


def _inverse(table: np.ndarray) -> np.ndarray:
    light = np.linspace(0.0, 1.0, _INVERSE_SIZE) ** 3
    first = np.concatenate([[True], np.diff(table) > 0])  # flat stretches: the first value that reaches the light
    return np.interp(light, table[first], np.linspace(0.0, 1.0, len(table))[first])


def _xyz(tag: bytes) -> tuple[float, float, float]:
    try:
        x, y, z = struct.unpack_from(">3i", tag, 8)
    except struct.error as error:
        raise ProfileError("a colorant is damaged") from error
    return x / 65536, y / 65536, z / 65536


def parse_profile(profile: bytes) -> ColourSpace | None:
    """Read a matrix or grey profile.

    Returns None for a profile that is sound but made of look-up tables (or for CMYK): ImageCms's work.
    Raises ProfileError for a damaged one.
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
            raise ProfileError("the colorants do not span a colour space")
        matrix = np.linalg.inv(_SRGB_TO_XYZ) @ colorants
    else:
        return None
    return ColourSpace(curves, tuple(_inverse(curve) for curve in curves), matrix)
