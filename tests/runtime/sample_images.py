"""Shared by the tests of images, files and runs: predictable networks, sample images and ICC profiles."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels.files.encode import Encoding
from tinysr_kernels.files.picture_io import read_image, upscale_image_file, write_image

SCALE = 4


def nearest(rgb: Tensor) -> Tensor:
    """A network that repeats pixels, so that any other change is due to the code around it."""
    return F.interpolate(rgb, scale_factor=SCALE, mode="nearest")


def bicubic(rgb: Tensor) -> Tensor:
    return F.interpolate(rgb, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1)


class FakeModel:
    """Replaces a compiled model: the same interface, with repeated pixels."""

    def __init__(self) -> None:
        self.upscale = SCALE
        self.device = torch.device("cpu")
        self.calls = 0

    def enlarge(self, rgb: Tensor) -> Tensor:
        self.calls += 1
        return nearest(rgb)

    def stream(self, frames: Iterable[np.ndarray], *, on_error: str = "raise") -> Iterator[np.ndarray]:
        for frame in frames:
            yield frame.repeat(SCALE, 0).repeat(SCALE, 1)

    def info(self) -> dict[str, object]:
        return {"family": "fake", "parameters": 0}

    def save(self, path, replace=True) -> None:
        with open(path, "wb") as file:
            file.write(b"weights")


def repeated(pixels: np.ndarray) -> np.ndarray:
    """The expected result of `nearest` for [H,W] or [H,W,C]."""
    return pixels.repeat(SCALE, 0).repeat(SCALE, 1)


def noise(height: int, width: int, channels: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return generator.random((height, width, channels)).astype(kind)
    return generator.integers(0, np.iinfo(kind).max, (height, width, channels), dtype=kind, endpoint=True)


def sample_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Random noise in any PIL mode; "P+" is a palette with transparency."""
    rgb = Image.fromarray(noise(height, width, 3, seed=seed))
    rgba = Image.fromarray(noise(height, width, 4, seed=seed))
    if mode.startswith("I;16"):
        order = ">" if mode == "I;16B" else "<"
        data = noise(height, width, 1, "uint16", seed).astype(order + "u2").tobytes()
        return Image.frombytes(mode, (width, height), data)
    if mode == "I":
        return Image.fromarray(noise(height, width, 1, "uint16", seed)[..., 0].astype(np.int32))
    if mode in ("La", "LA"):
        gray = Image.merge("LA", [rgba.getchannel(0), rgba.getchannel(3)])
        return gray if mode == "LA" else gray.convert("La")
    if mode in ("RGBa", "RGBA"):
        return rgba if mode == "RGBA" else rgba.convert("RGBa")
    if mode in ("P", "P+", "PA"):
        palette = rgb.quantize(16)
        if mode == "P+":
            palette.info["transparency"] = 0
        return palette.convert("PA") if mode == "PA" else palette
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        made = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
        assert made is not None
        return made
    return rgb.convert(mode)


# The mode of the result for each input mode.
MODES = {
    **{mode: mode for mode in ("L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV", "LAB")},
    **{mode: mode for mode in ("I", "I;16", "I;16L", "I;16B", "I;16N")},
    "1": "L",
    "P": "RGB",
    "P+": "RGBA",
    "PA": "RGBA",
    "CMYK": "RGB",
}


def bytes_of(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def exif(orientation: int = 6) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[0x010F] = orientation, "maker"
    made.get_ifd(0x8769)[0xA002], made.get_ifd(0x8769)[0xA003] = 9, 7
    made.get_ifd(0x8825)[1] = "N"
    return made


def enlarge_file(source: Path, target: Path, encoding: Encoding | None = None) -> None:
    image, metadata = upscale_image_file(read_image(source), nearest, SCALE)
    write_image(target, image, metadata, encoding)


# D50-adapted colorants from the published primaries; gamma as a one-entry curve.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    table, body = b"", b""
    start = 132 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02400000, kind, space, connection)
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + d50 + b"\0" * 48
    return header + struct.pack(">I", len(tags)) + table + body


def _text(name: bytes) -> dict[bytes, bytes]:
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + b"\0" * 78
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    return {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": white}


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(
    ">5i", *(round(number * 65536) for number in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)


def matrix_profile(colorants: tuple[tuple[float, ...], ...] = DISPLAY_P3, tone: bytes = SRGB_CURVE) -> bytes:
    """An RGB profile of three colorants and one tone curve."""
    tags = _text(b"matrix")
    for name, colorant in zip((b"r", b"g", b"b"), colorants, strict=True):
        numbers = [round(value * 65536) for value in colorant]
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + struct.pack(">3i", *numbers)
        tags[name + b"TRC"] = tone
    return _profile(b"RGB ", b"XYZ ", tags)


def gray_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {**_text(b"gray"), b"kTRC": curve(gamma)})


def _table(inputs: int, outputs: int, corners: np.ndarray) -> bytes:
    """A lut8 table with two grid points per axis and linear curves; corners [2**inputs, outputs] uint8."""
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    ramp = bytes(range(256))
    head = b"mft1\0\0\0\0" + bytes([inputs, outputs, 2, 0]) + identity
    return head + ramp * inputs + corners.astype(np.uint8).tobytes() + ramp * outputs


def table_profile(space: bytes = b"RGB ", both_ways: bool = True) -> bytes:
    """A coarse but valid profile of look-up tables: the gray axis is exact, colors are desaturated."""
    count = 4 if space == b"CMYK" else 3
    corners = np.array(np.meshgrid(*[[0, 1]] * count, indexing="ij")).reshape(count, -1).T
    light = 1 - corners.max(1) if space == b"CMYK" else corners.mean(1)
    to_lab = np.stack([light * 255, np.full_like(light, 128.0), np.full_like(light, 128.0)], 1)
    tags = {**_text(b"tables"), b"A2B0": _table(count, 3, to_lab)}
    if both_ways:
        lab = np.array(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij")).reshape(3, -1).T
        back = np.repeat(lab[:, :1] * 255, count, 1) if space != b"CMYK" else np.repeat(255 - lab[:, :1] * 255, 4, 1)
        tags[b"B2A0"] = _table(3, count, back)
    return _profile(space, b"Lab ", tags, b"prtr" if both_ways else b"scnr")
