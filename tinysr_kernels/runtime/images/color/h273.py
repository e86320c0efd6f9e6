"""Code points of ITU-T H.273 (ISO 23091-2, "CICP") for color: in PNG's cICP, in AVIF, HEIF and films as nclx.

Each standard-range label has the same meaning as a matrix profile, which `profile` writes. PQ, HLG and the logarithmic
curves reach beyond the white of a profile and have none: see `Label.is_untouched`.
"""

from __future__ import annotations

from typing import NamedTuple

from tinysr_kernels.runtime.images.color.icc_writer import Curve, Primaries, write_profile

D65 = (0.3127, 0.3290)
_C = (0.310, 0.316)
UNSPECIFIED = 2

SRGB_PRIMARIES: Primaries = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65)
ADOBE_RGB: Primaries = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060), D65)
_SMPTE_170M: Primaries = ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65)

# Table 2: red, green, blue, white as CIE 1931 xy.
PRIMARIES: dict[int, Primaries] = {
    1: SRGB_PRIMARIES,
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), _C),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65),
    6: _SMPTE_170M,
    7: _SMPTE_170M,
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), _C),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    10: ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1 / 3, 1 / 3)),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), D65),
}

SRGB_CURVE = Curve((2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
_BT709 = Curve((1 / 0.45, 1 / 1.0993, 0.0993 / 1.0993, 1 / 4.5, 4.5 * 0.018054))

# Table 3: from a value to linear light, as the parameters g, a, b, c, d of ICC's curves.
TRANSFERS: dict[int, Curve] = {
    **dict.fromkeys((1, 6, 11, 12, 14, 15), _BT709),
    4: Curve((2.2,)),
    5: Curve((2.8,)),
    7: Curve((1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4, 4 * 0.0228)),
    8: Curve((1.0,)),
    13: SRGB_CURVE,
    17: Curve((2.6,)),  # SMPTE ST 428-1, with its white at the largest value
}
_UNTOUCHED = {9: "logarithmic", 10: "logarithmic", 16: "PQ (HDR)", 18: "HLG (HDR)"}


class Label(NamedTuple):
    """Color primaries and transfer characteristics (H.273 tables 2 and 3) of RGB pixels, and their range of values."""

    primaries: int
    transfer: int
    full_range: bool = True

    @property
    def is_untouched(self) -> bool:
        """Whether no profile has this meaning: values pass through the network as they are, and the label stays."""
        return self.transfer in _UNTOUCHED or not self.full_range

    @property
    def name(self) -> str:
        """What is special about the values, for notices."""
        return _UNTOUCHED.get(self.transfer, f"transfer {self.transfer}" if self.full_range else "narrow-range")

    def profile(self, *, gray: bool) -> bytes | None:
        """An ICC profile with the label's meaning; None for sRGB and where the label leaves it open.

        gray: for an image of one color channel. Code points that H.273 reserves mean the same as unspecified ones.
        """
        primaries = PRIMARIES.get(self.primaries, SRGB_PRIMARIES)
        curve = TRANSFERS.get(self.transfer, SRGB_CURVE)
        if curve == SRGB_CURVE and (gray or primaries == SRGB_PRIMARIES):
            return None
        name = f"H.273 primaries {self.primaries}, transfer {self.transfer}"
        return write_profile(name, None if gray else primaries, (curve,))
