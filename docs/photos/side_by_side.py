"""Put an enlargement beside what it was made from: input (pixels repeated), bicubic, enlargement.

python docs/photos/side_by_side.py small.jpg enlarged.png side-by-side.png
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

LABEL_HEIGHT = 28
GAP = 8


def side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """One picture with the panels, all of one size, in a row, each under its label."""
    width, height = panels[0][1].size
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=16)
    for index, (label, panel) in enumerate(panels):
        left = index * (width + GAP)
        draw.text((left + 4, 4), label, fill="black", font=font)
        sheet.paste(panel.convert("RGB"), (left, LABEL_HEIGHT))
    return sheet


def main(small_path: str, enlarged_path: str, out_path: str) -> None:
    """Read the small photograph and its enlargement, write the comparison."""
    small = ImageOps.exif_transpose(Image.open(small_path)).convert("RGB")
    enlarged = Image.open(enlarged_path)
    size = enlarged.size
    panels = [
        (f"input, {small.width}x{small.height}", small.resize(size, Image.Resampling.NEAREST)),
        ("bicubic", small.resize(size, Image.Resampling.BICUBIC)),
        (f"tinysr, {size[0]}x{size[1]}", enlarged),
    ]
    Path(out_path).parent.mkdir(parents=True, exist_ok=True)
    side_by_side(panels).save(out_path)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
