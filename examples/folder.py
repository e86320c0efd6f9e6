"""Enlarge every image of a folder; a file that cannot be read is named and skipped.

python examples/folder.py [FOLDER] [-o OUTPUT] [--model CKPT]

`tinysr upscale FOLDER -o OUTPUT --model CKPT` does this and more: sub-folders, resuming, reports, batches on a GPU.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

import tinysr_kernels

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def main() -> int:
    """Enlarge the folder's images one after another; exit code 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Enlarge every image of a folder four times.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs/photos")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/folder"))
    parser.add_argument("--model", default="demo", help='a file or folder, or "demo" (default)')
    arguments = parser.parse_args()

    model = tinysr_kernels.compile(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in sorted(arguments.folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        try:
            with Image.open(path) as image:
                result = model(image)
        except (OSError, tinysr_kernels.TinySRError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed += 1
            continue
        output = arguments.output / f"{path.stem}.png"
        result.save(output)
        print(f"{output}: {result.width}x{result.height}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
