"""A folder of pictures of every kind, and the check of what `tinysr upscale` made of it.

python .ci/mixed_folder.py make FOLDER
python .ci/mixed_folder.py check OUTPUT ERRORS     (ERRORS: what the command wrote to stderr)
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SCALE = 4
# name -> (width, height) of the input as it is to be seen, mode of the result as Pillow reads it
EXPECTED = {
    "gray.png": ((13, 9), "L"),
    "gray_alpha.png": ((13, 9), "LA"),
    "bilevel.png": ((13, 9), "L"),
    "palette.png": ((13, 9), "RGB"),
    "palette_transparent.png": ((13, 9), "RGBA"),
    "color.jpg": ((31, 17), "RGB"),
    "alpha.png": ((13, 9), "RGBA"),
    "gray_16bit.png": ((13, 9), "I;16"),
    "color_sixteen.png": ((13, 9), "RGB"),
    "cmyk.jpg": ((16, 16), "RGB"),
    "rotated.jpg": ((16, 24), "RGB"),
    "one_pixel.png": ((1, 1), "RGB"),
    "narrow.png": ((2, 37), "RGB"),
    "white.png": ((20, 20), "RGB"),
    "black.png": ((20, 20), "RGB"),
}
BROKEN = ("truncated.jpg", "empty.png", "text.jpg", "Thumbs.db")


def png_sixteen(pixels: np.ndarray) -> bytes:
    """uint16 [H,W,3] as a PNG file, which Pillow cannot write."""
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
    """Write the pictures of EXPECTED and the broken files."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)

    def picture(width: int, height: int, channels: int = 3) -> Image.Image:
        pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)

    color = picture(13, 9)
    palette = color.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    picture(13, 9, 1).save(folder / "gray.png")
    picture(13, 9, 2).save(folder / "gray_alpha.png")
    picture(13, 9, 1).convert("1").save(folder / "bilevel.png")
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_transparent.png", transparency=3)
    picture(31, 17).save(folder / "color.jpg")
    picture(13, 9, 4).save(folder / "alpha.png")
    Image.fromarray(random.integers(0, 65536, (9, 13), dtype=np.uint16)).save(folder / "gray_16bit.png")
    (folder / "color_sixteen.png").write_bytes(png_sixteen(random.integers(0, 65536, (9, 13, 3), dtype=np.uint16)))
    picture(16, 16).convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture(24, 16).save(folder / "rotated.jpg", exif=exif)
    picture(1, 1).save(folder / "one_pixel.png")
    picture(2, 37).save(folder / "narrow.png")
    Image.new("RGB", (20, 20), "white").save(folder / "white.png")
    Image.new("RGB", (20, 20), "black").save(folder / "black.png")
    whole = (folder / "color.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture\n")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(100))


def problems(output: Path, errors: str) -> list[str]:
    """What is wrong with the results, in words; empty when nothing is."""
    found = [f"{name} was not named among the errors" for name in BROKEN if name not in errors]
    present = {path.name for path in output.iterdir()}
    found += [f"{name}: unexpected" for name in sorted(present - EXPECTED.keys())]
    found += [f"{name}: missing" for name in sorted(EXPECTED.keys() - present)]
    for name in sorted(EXPECTED.keys() & present):
        (width, height), mode = EXPECTED[name]
        with Image.open(output / name) as image:
            if image.size != (SCALE * width, SCALE * height) or image.mode != mode:
                found.append(f"{name}: expected {mode} of {SCALE * width}x{SCALE * height}, found {image}")
            if image.getexif().get(0x0112, 1) != 1:
                found.append(f"{name}: would be turned twice")
    for name, level in (("white.png", 255), ("black.png", 0)):
        mean = float(np.asarray(Image.open(output / name)).mean())
        if abs(mean - level) > 2:
            found.append(f"{name}: expected a mean of about {level}, found {mean:.1f}")
    depth, kind = (output / "color_sixteen.png").read_bytes()[24:26]
    if (depth, kind) != (16, 2):
        found.append(f"color_sixteen.png: expected 16 bits RGB, found depth {depth}, color type {kind}")
    return found


def main(arguments: list[str]) -> int:
    """Run one of the two steps; 1 when the check finds something."""
    if arguments[:1] == ["make"] and len(arguments) == 2:
        make(Path(arguments[1]))
        return 0
    if arguments[:1] == ["check"] and len(arguments) == 3:
        found = problems(Path(arguments[1]), Path(arguments[2]).read_text(encoding="utf-8"))
        for line in found:
            print(f"mixed folder: {line}", file=sys.stderr)
        print(f"mixed folder: {len(EXPECTED)} pictures and {len(BROKEN)} broken files, {len(found)} problems")
        return bool(found)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
