"""The photographs of the evaluation: those that come inside scikit-image's wheel, so nothing is downloaded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Every color photograph of the wheel, and two gray ones. The rest are renderings, textures and scanned text.
NAMES = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "stereo_motorcycle",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
    "camera",
    "coins",
)
LARGEST = 512


def photograph(name: str) -> NDArray[np.uint8]:
    """The photograph [H,W,3] uint8: its middle, at most 512 a side, sides multiples of 32; gray repeated to RGB.

    Thirty-two, so that the reduced image needs no padding in a network that reduces by eight inside. Raises
    ImportError without scikit-image and ValueError for a name that is not in NAMES.
    """
    if name not in NAMES:
        raise ValueError(f"no photograph {name!r}; there are {', '.join(NAMES)}")
    from skimage import data

    found = getattr(data, name)()
    image = np.asarray(found[0] if isinstance(found, tuple) else found)
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    sides = [min(side, LARGEST) // 32 * 32 for side in image.shape[:2]]
    y, x = ((have - want) // 2 for have, want in zip(image.shape[:2], sides, strict=True))
    return np.ascontiguousarray(image[y : y + sides[0], x : x + sides[1], :3])
