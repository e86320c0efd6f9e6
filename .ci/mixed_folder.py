"""Create a folder with images of many types, and check what `tinysr upscale` wrote for it.

python .ci/mixed_folder.py make FOLDER
python .ci/mixed_folder.py check OUTPUT ERRORS     (ERRORS: the command's stderr)
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SCALE = 4
# name -> (width, height) of the upright input in pixels, Pillow's mode of the result
EXPECTED = {
    "gray.png": ((13, 9), "L"),
    "gray_alpha.png": ((13, 9), "LA"),
    "bilevel.png": ((13, 9), "L"),
    "palette.png": ((13, 9), "RGB"),
    "palette_transparent.png": ((13, 9), "RGBA"),
    "color.jpg": ((31, 17), "RGB"),
    "alpha.png": ((13, 9), "RGBA"),
    "gray16.png": ((13, 9), "I;16"),
    "rgb16.png": ((13, 9), "RGB"),
    "cmyk.jpg": ((16, 16), "RGB"),
    "rotated.jpg": ((16, 24), "RGB"),
    "one_pixel.png": ((1, 1), "RGB"),
    "narrow.png": ((2, 37), "RGB"),
    "white.png": ((20, 20), "RGB"),
    "black.png": ((20, 20), "RGB"),
}
CORRUPT = ("truncated.jpg", "empty.png", "text.jpg")
RECORDS = ".tinysr-results"
"""Which input made which result; see docs/command-line.md."""


def png_16bit(pixels: np.ndarray) -> bytes:
    """uint16 [H,W,3] as the bytes of a PNG file, which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make(folder: Path) -> None:
    """Write the images of EXPECTED and the corrupt files."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)

    def noise(width: int, height: int, channels: int = 3) -> Image.Image:
        pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)

    color = noise(13, 9)
    palette = color.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    noise(13, 9, 1).save(folder / "gray.png")
    noise(13, 9, 2).save(folder / "gray_alpha.png")
    noise(13, 9, 1).convert("1").save(folder / "bilevel.png")
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_transparent.png", transparency=3)
    noise(31, 17).save(folder / "color.jpg")
    noise(13, 9, 4).save(folder / "alpha.png")
    Image.fromarray(random.integers(0, 65536, (9, 13), dtype=np.uint16)).save(folder / "gray16.png")
    (folder / "rgb16.png").write_bytes(png_16bit(random.integers(0, 65536, (9, 13, 3), dtype=np.uint16)))
    noise(16, 16).convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    noise(24, 16).save(folder / "rotated.jpg", exif=exif)
    noise(1, 1).save(folder / "one_pixel.png")
    noise(2, 37).save(folder / "narrow.png")
    Image.new("RGB", (20, 20), "white").save(folder / "white.png")
    Image.new("RGB", (20, 20), "black").save(folder / "black.png")
    complete = (folder / "color.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(complete[: len(complete) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image\n")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(100))


def problems(output: Path, errors: str) -> list[str]:
    """Descriptions of all problems of the results; empty if they are correct."""
    found = [f"{name} is not named in the errors" for name in CORRUPT if name not in errors]
    if "Thumbs.db" in errors or "ignored: 1 not images or films" not in errors:
        found.append("Thumbs.db is named, or not counted as ignored")
    present = {path.name for path in output.iterdir() if path.name != RECORDS}
    found += [f"{name}: unexpected" for name in sorted(present - EXPECTED.keys())]
    found += [f"{name}: missing" for name in sorted(EXPECTED.keys() - present)]
    for name in sorted(EXPECTED.keys() & present):
        (width, height), mode = EXPECTED[name]
        with Image.open(output / name) as image:
            if image.size != (SCALE * width, SCALE * height) or image.mode != mode:
                found.append(f"{name}: expected {mode} of {SCALE * width}x{SCALE * height}, found {image}")
            if image.getexif().get(0x0112, 1) != 1:
                found.append(f"{name}: the orientation would be applied twice")
    for name, level in (("white.png", 255), ("black.png", 0)):
        mean = float(np.asarray(Image.open(output / name)).mean())
        if abs(mean - level) > 2:
            found.append(f"{name}: expected a mean of about {level}, found {mean:.1f}")
    depth, kind = (output / "rgb16.png").read_bytes()[24:26]
    if (depth, kind) != (16, 2):
        found.append(f"rgb16.png: expected 16-bit RGB, found depth {depth}, color type {kind}")
    return found


def main(arguments: list[str]) -> int:
    """Run one of the two steps; the exit code is 1 if the check finds a problem."""
    if arguments[:1] == ["make"] and len(arguments) == 2:
        make(Path(arguments[1]))
        return 0
    if arguments[:1] == ["check"] and len(arguments) == 3:
        found = problems(Path(arguments[1]), Path(arguments[2]).read_text(encoding="utf-8"))
        for line in found:
            print(f"mixed folder: {line}", file=sys.stderr)
        print(f"mixed folder: {len(EXPECTED)} images and {len(CORRUPT)} corrupt files, {len(found)} problems")
        return bool(found)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
