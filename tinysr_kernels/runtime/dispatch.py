"""The entry point for in-memory images: any accepted type in, the same type out, `upscale` times larger per side.

Accepted are PIL images of every mode except F (images/pil.py lists the resulting modes), numpy arrays and torch tensors
(images/arrays.py lists dtypes, shapes and value ranges). Anything else raises an InputError that states the remedy.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.device.device_error import typed_device_error
from tinysr_kernels.runtime.device.modes import without_autocast
from tinysr_kernels.runtime.device.out_of_memory import typed_out_of_memory
from tinysr_kernels.runtime.images.arrays import Enlarge, upscale_array, upscale_tensor
from tinysr_kernels.runtime.images.pil import upscale_pil
from tinysr_kernels.runtime.images.scaling import NATIVE, Target

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
    target: Target = NATIVE,
) -> Kind:
    """Upscale one image, or a batch as an array or tensor, of any accepted type.

    image: see images/pil.py and images/arrays.py. enlarge, upscale: the network and its factor s. device: where the
    network runs; None leaves arrays and PIL images on the CPU. max_pixels: limit on the input's pixels; None derives it
    from the free memory. frame: index of the frame of a multi-frame PIL image. out: for tensors, receives the result.
    target: another size of the result than s times the image's.
    Raises InputError for images that are not accepted, OutOfMemory if the result would not fit into host memory,
    DeviceError if the GPU fails, and whatever `enlarge` raises.
    """
    if out is not None and not (isinstance(image, Tensor) and isinstance(out, Tensor)):
        raise InputError(
            f"out requires image and out to be tensors, found {type(image).__name__} and {type(out).__name__}"
        )
    if frame is not None and isinstance(image, (np.ndarray, Tensor)):
        raise InputError(f"frame={frame} is for PIL images only; index the {type(image).__name__} instead")
    options: dict[str, Any] = {"device": device, "max_pixels": max_pixels, "target": target}
    what = "the image or its result does not fit into host memory"
    with without_autocast(), typed_device_error(), typed_out_of_memory(what):
        if isinstance(image, Image.Image):
            return upscale_pil(image, enlarge, upscale, frame=frame, **options)
        if isinstance(image, np.ndarray):
            return upscale_array(image, enlarge, upscale, **options)
        if isinstance(image, Tensor):
            return upscale_tensor(image, enlarge, upscale, out=out, **options)
    hint = ""
    if isinstance(image, (str, bytes)) or hasattr(image, "__fspath__"):
        hint = "; open a file with PIL.Image.open, or use the command: tinysr upscale"
    elif isinstance(image, (list, tuple)):
        hint = "; pass images of different sizes one by one, or stack equal ones with numpy.stack or torch.stack"
    raise InputError(f"expected a PIL image, a numpy array or a torch tensor, found {type(image).__name__}{hint}")
