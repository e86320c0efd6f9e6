"""The one path around the network: any accepted image in, the same kind of image out, `upscale` times larger.

PIL images of every mode but F (pil.py says what becomes of each), numpy arrays and torch tensors (images.py lists
dtypes, ranks and ranges). Anything else is an InputError that says what to do.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.images.arrays import Enlarge, upscale_array, upscale_tensor
from tinysr_kernels.runtime.images.pil import upscale_pil

Kind = TypeVar("Kind", Image.Image, np.ndarray, Tensor)


def upscale_image(
    image: Kind,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    max_pixels: int | None = None,
    frame: int | None = None,
    out: Tensor | None = None,
) -> Kind:
    """Enlarge one image (or a batch, as an array or tensor) of any accepted kind.

    image: see pil.py and images.py. enlarge, upscale: the network and its factor s. device: where the network
    computes; None leaves arrays and PIL images on the CPU. max_pixels: refuse larger ones; None lets the free memory
    decide. frame: which frame of a multi-frame PIL image, from 0. out: for a tensor, what takes the result. Raises
    InputError for what is not accepted, OutOfMemory where the result cannot fit into host memory, and whatever
    `enlarge` raises.
    """
    if out is not None and not (isinstance(image, Tensor) and isinstance(out, Tensor)):
        raise InputError(f"out takes a tensor for an image that is a tensor, found a {type(image).__name__}")
    if isinstance(image, Image.Image):
        return upscale_pil(image, enlarge, upscale, device=device, max_pixels=max_pixels, frame=frame)
    if frame is not None:
        raise InputError(f"frame={frame} chooses a picture of a PIL image's; index the {type(image).__name__} instead")
    if isinstance(image, np.ndarray):
        return upscale_array(image, enlarge, upscale, device=device, max_pixels=max_pixels)
    if isinstance(image, Tensor):
        return upscale_tensor(image, enlarge, upscale, device=device, max_pixels=max_pixels, out=out)
    hint = ""
    if isinstance(image, (str, bytes)) or hasattr(image, "__fspath__"):
        hint = "; open a file with PIL.Image.open, or use the command: tinysr upscale"
    elif isinstance(image, (list, tuple)):
        hint = "; enlarge pictures of different sizes one by one, stack equal ones with numpy.stack or torch.stack"
    raise InputError(f"expected a PIL image, a numpy array or a torch tensor, found {type(image).__name__}{hint}")
