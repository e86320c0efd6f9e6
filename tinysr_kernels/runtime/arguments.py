"""The arguments of `compile` and `save`: checked before anything is done with them, filled in, and as another process
would need them.

Types are exact: an object may claim any class, compare equal to anything, or raise when it is asked. Whether a choice
can be had on this machine, or with this checkpoint, is judged later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint import check_replaceable, check_target
from tinysr_kernels.errors import InputError, shorten
from tinysr_kernels.families import COLOR_FIXES, FAMILIES
from tinysr_kernels.launch.backend import BACKENDS
from tinysr_kernels.launch.device import has_bfloat16
from tinysr_kernels.ops.linear.quantize import CAPABILITY

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
LARGEST_SCALE = 8
LONGEST_PROMPT = 1 << 16
MOST_ADAPTERS, LARGEST_STRENGTH = 8, 100
LARGEST = 1 << 20
"""Of sides of tiles and numbers of graphs."""


def check_types(
    device: Any,
    dtype: Any,
    backend: Any,
    quantize: Any,
    cuda_graphs: Any,
    color_fix: Any,
    upscale: Any,
    tile: Any,
    max_graph_shapes: Any,
    prompt: Any = None,
) -> None:
    """InputError for the first argument of `compile` of another type, or with a value outside its choices or range."""
    _check_device(device)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.") if type(dtype) is torch.dtype else dtype
        _check_choice("dtype", name, tuple(DTYPES))
    _check_choice("backend", backend, BACKENDS)
    if quantize is not None:
        _check_choice("quantize", quantize, (None, *{kind for one in FAMILIES.values() for kind in one.quantizations}))
    if type(cuda_graphs) is not bool:
        raise InputError(f"cuda_graphs must be True or False, found {_shown(cuda_graphs)}")
    if color_fix is not None:
        _check_choice("color_fix", color_fix, COLOR_FIXES)
    _check_whole("upscale", upscale, 1, LARGEST_SCALE)
    if tile is not None:
        _check_whole("tile", tile, 16, LARGEST)
    _check_whole("max_graph_shapes", max_graph_shapes, 1, LARGEST)
    if prompt is not None and (type(prompt) is not str or len(prompt) > LONGEST_PROMPT):
        raise InputError(f"prompt must be a text of at most {LONGEST_PROMPT} characters, found {_shown(prompt)}")


def check_lora(alpha: Any, weights: Any) -> dict[str, Any]:
    """lora_alpha and lora_weights of `compile` as `load` takes them; InputError for what are no such numbers."""
    if alpha is not None and not (type(alpha) in (int, float) and 0 < alpha <= LARGEST):
        raise InputError(f"lora_alpha must be a positive number, found {_shown(alpha)}")
    if weights is None:
        return {"lora_alpha": alpha, "lora_weights": None}
    listed = type(weights) in (list, tuple) and 0 < len(weights) <= MOST_ADAPTERS
    if not listed or not all(type(one) in (int, float) and abs(one) <= LARGEST_STRENGTH for one in weights):
        raise InputError(
            f"lora_weights must be a list of numbers within {LARGEST_STRENGTH} of zero, one for each adapter, found "
            f"{shorten(repr([_shown(one) for one in weights[:MOST_ADAPTERS]]), 200) if listed else _shown(weights)}"
        )
    return {"lora_alpha": alpha, "lora_weights": tuple(float(one) for one in weights)}


def check_save(path: Any, *, replace: bool) -> None:
    """InputError where `CompiledSR.save` would refuse to write, whatever the model: to be asked before it is loaded."""
    check_replaceable(check_target(path), replace, None)


def _check_device(device: Any) -> None:
    kind = type(device)
    if device is None or kind is torch.device or (kind is str and device):
        return
    if kind is not int or not 0 <= device < 256:
        raise InputError(f"device must be a name such as 'cpu' or 'cuda:0', or a torch.device, found {_shown(device)}")


def _check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if type(value) is not str or value not in choices:
        raise InputError(f"{name} must be one of {choices}, found {_shown(value)}")


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}, found {_shown(value)}")


def _shown(value: Any) -> str:
    """The value where it is plain, else its type: a caller's object may be megabytes long, or raise."""
    if value is None or type(value) in (bool, int, float, str):
        return shorten(repr(value) if type(value) is str else value, 100)
    return f"a {shorten(type(value).__name__, 100)}"


def choose_dtype(dtype: str | torch.dtype | None, family: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; None takes the family's own on a GPU, float32 elsewhere.

    Where a GPU does not compute in bfloat16, float16 takes its place; what overflows in it is computed again in a wider
    dtype (`runtime/runner.py`).
    """
    if dtype is not None:
        return DTYPES[dtype] if isinstance(dtype, str) else dtype
    if device.type != "cuda":
        return torch.float32
    own = DTYPES[FAMILIES[family].dtype]
    return torch.float16 if own == torch.bfloat16 and not has_bfloat16(device) else own


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


def recipe_of(
    ckpt: Any, embeddings: Any, quantize: str | None, prompt: str | None = None, **lora: Any
) -> dict[str, Any] | None:
    """What `compile` takes to load the same weights again in another process; None where they are only in memory."""
    source, extra = portable(ckpt), portable(embeddings)
    if source is None or (extra is None and embeddings is not None):
        return None
    return {"ckpt": source, "embeddings": extra, "quantize": quantize, "prompt": prompt, **lora}


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
