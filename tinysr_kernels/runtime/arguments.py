"""The arguments of `compile` filled in by what they leave open, and as another process would need them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.errors import InputError
from tinysr_kernels.families import FAMILIES
from tinysr_kernels.ops.linear.quantize import CAPABILITY

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def choose_dtype(dtype: str | torch.dtype | None, family: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; None takes the family's own on a GPU, float32 elsewhere."""
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return DTYPES[FAMILIES[family].dtype]
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def check_fp8(device: torch.device) -> None:
    """InputError where a GPU has no e4m3."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY:
        return
    found, wanted = (".".join(map(str, c)) for c in (torch.cuda.get_device_capability(device), CAPABILITY))
    raise InputError(
        f"fp8 needs compute capability {wanted} or higher, {torch.cuda.get_device_name(device)} has {found}; "
        "use quantize=None with a checkpoint that is not quantized, or device='cpu'"
    )


def portable(source: Any) -> Any:
    """A checkpoint or embeddings as another process finds them: paths made absolute; None where tensors are in it."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        return text if text == "demo" or text.startswith("hf://") else os.path.abspath(text)
    if isinstance(source, dict):
        parts = {name: portable(part) for name, part in source.items()}
        return None if None in parts.values() else parts
    if isinstance(source, (list, tuple)):
        items = [portable(item) for item in source]
        return None if None in items else items
    return None


def recipe_of(ckpt: Any, embeddings: Any, quantize: str | None) -> dict[str, Any] | None:
    """What `compile` takes to load the same weights again in another process; None where they are only in memory."""
    source, extra = portable(ckpt), portable(embeddings)
    if source is None or (extra is None and embeddings is not None):
        return None
    return {"ckpt": source, "embeddings": extra, "quantize": quantize}


def noise(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Images [N,3,H,W] for a warm-up of this shape, (H, W) or (N, H, W): uint8, or float32 or float64 in [0,1].

    dtype: of the images to come. Raises InputError.
    """
    if len(shape) not in (2, 3) or any(int(side) < 1 for side in shape):
        raise InputError(f"a shape is (H, W) or (N, H, W) of positive numbers, found {tuple(shape)}")
    *batch, height, width = (int(side) for side in shape)
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = (batch[0] if batch else 1, 3, height, width)
    images = torch.rand(sizes, generator=generator, dtype=torch.float32, device="cpu")
    if dtype == torch.uint8:
        return images.mul(255).to(torch.uint8)
    return images.to(torch.float64) if dtype == torch.float64 else images


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")
