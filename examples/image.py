"""Enlarge one image four times.

python examples/image.py [IMAGE] [-o OUTPUT] [--model CKPT]
"""

import argparse
from pathlib import Path

from PIL import Image

import tinysr_kernels

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Read the image, run the model, write the result."""
    parser = argparse.ArgumentParser(description="Enlarge one image four times.")
    parser.add_argument("image", nargs="?", type=Path, default=ROOT / "docs/photos/chelsea.jpg")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/image.png"))
    parser.add_argument("--model", default="demo", help='a file or folder, or "demo" (default)')
    arguments = parser.parse_args()

    model = tinysr_kernels.compile(arguments.model)
    with Image.open(arguments.image) as image:
        result = model(image)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result.save(arguments.output)
    print(f"{arguments.output}: {result.width}x{result.height}")


if __name__ == "__main__":
    main()
