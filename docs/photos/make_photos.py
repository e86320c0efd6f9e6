"""Make the small photographs of this folder from those of scikit-image (README.md beside this file).

    python docs/photos/make_photos.py

Each photograph is reduced four times by averaging 4x4 pixels and stored as an ordinary JPEG.
"""

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

HERE = Path(__file__).parent
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
FACTOR = 4
JPEG_QUALITY = 90


def reduce(photo: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of factor x factor pixels: uint8 [H,W,3] -> uint8 [H//factor, W//factor, 3]."""
    height, width = (side // factor for side in photo.shape[:2])
    blocks = photo[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def main() -> None:
    """Write the photographs beside this file and print their sizes."""
    for name in PHOTOS:
        small = reduce(getattr(skimage.data, name)(), FACTOR)
        path = HERE / f"{name}.jpg"
        Image.fromarray(small).save(path, quality=JPEG_QUALITY)
        print(f"{path.name}: {small.shape[1]}x{small.shape[0]}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
