"""Write small ICC profiles, version 4: three primaries or gray, with tone curves (ICC.1:2022, sections 7 to 10)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]
Primaries = tuple[Point, Point, Point, Point]
"""Red, green, blue and white as CIE 1931 xy."""

D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_TABLE_SIZE = 4096


@dataclass(frozen=True)
class Curve:
    """From a value in [0,1] to linear light in [0,1].

    parameters: (g,) for x**g, or (g, a, b, c, d) for (a*x + b)**g where x >= d, else c*x. table: used instead of them
    if it is given, values in [0,1] at equal steps of x.
    """

    parameters: tuple[float, ...] = (1.0,)
    table: tuple[float, ...] | None = None

    def tag(self) -> bytes:
        """The curve as the contents of an ICC tag."""
        if self.table is not None:
            x = np.linspace(0, 1, min(len(self.table), _TABLE_SIZE))
            values = np.interp(x, np.linspace(0, 1, len(self.table)), self.table)
            return b"curv\0\0\0\0" + struct.pack(">I", len(x)) + np.round(values * 65535).astype(">u2").tobytes()
        kind = 0 if len(self.parameters) == 1 else 3
        return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _fixed(self.parameters)


def _fixed(numbers: tuple[float, ...] | np.ndarray) -> bytes:
    """Numbers as s15Fixed16."""
    return struct.pack(f">{len(numbers)}i", *(round(float(number) * 65536) for number in numbers))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded


def _xyz(point: Point) -> np.ndarray:
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


def adaptation(white: Point) -> np.ndarray:
    """The matrix [3,3] that adapts XYZ from a white point to D50 (Bradford)."""
    return np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ np.array(D50) / (_BRADFORD @ _xyz(white))) @ _BRADFORD


def colorants(primaries: Primaries) -> np.ndarray:
    """Linear RGB -> XYZ relative to D50, as a matrix [3,3]. Raises ValueError if the points span no color space."""
    *points, white = primaries
    # Columns are scaled to sum to white, so that xyz instead of XYZ / Y allows y = 0.
    columns = np.array([(x, y, 1 - x - y) for x, y in points]).T
    if not np.isfinite(columns).all() or white[1] < 1e-3 or abs(np.linalg.det(columns)) < 1e-4:
        raise ValueError("the primaries span no color space")
    scale = np.linalg.solve(columns, _xyz(white))
    if (scale <= 0).any():
        raise ValueError("the white point lies outside the primaries")
    return adaptation(white) @ columns * scale


def write_profile(name: str, primaries: Primaries | None, curves: tuple[Curve, ...]) -> bytes:
    """The bytes of a profile. name: in ASCII. primaries: None for gray. curves: one for all channels, or three.

    Raises ValueError if the primaries span no color space.
    """
    tags = {b"desc": _text(name), b"cprt": _text("No copyright"), b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50)}
    if primaries is None:
        tags[b"kTRC"] = curves[0].tag()
    else:
        matrix = colorants(primaries)
        tags[b"chad"] = b"sf32\0\0\0\0" + _fixed(adaptation(primaries[3]).ravel())
        for index, letter in enumerate((b"r", b"g", b"b")):
            tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(matrix[:, index])
            tags[letter + b"TRC"] = curves[index % len(curves)].tag()
    table, body = b"", b""
    start = 132 + 12 * len(tags)
    placed: dict[bytes, int] = {}
    for tag, content in tags.items():
        if content not in placed:  # equal tags share their bytes
            placed[content] = start + len(body)
            body += content + b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", tag, placed[content], len(content))
    space = b"GRAY" if primaries is None else b"RGB "
    date = struct.pack(">6H", 2026, 1, 1, 0, 0, 0)  # fixed: the same input gives the same bytes
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x04300000, b"mntr", space, b"XYZ ")
    header += date + b"acsp" + b"\0" * 28 + _fixed(D50) + b"\0" * 48
    return header + struct.pack(">I", len(tags)) + table + body
