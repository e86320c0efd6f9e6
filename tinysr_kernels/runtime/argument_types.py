"""What callers pass to `compile` and `save`, checked for its type and range before anything is done with it.

Types are exact: an object may claim any class, compare equal to anything, or raise when it is asked. Whether a choice
can be had on this machine, or with this checkpoint, is judged later.
"""

from __future__ import annotations

from typing import Any

import torch

from tinysr_kernels.checkpoint import check_replaceable, check_target
from tinysr_kernels.errors import InputError, shorten
from tinysr_kernels.families import COLOR_FIXES, FAMILIES
from tinysr_kernels.launch.backend import BACKENDS

DTYPES = ("float16", "bfloat16", "float32", "float64")
LARGEST_SCALE = 8
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
) -> None:
    """InputError for the first argument of `compile` of another type, or with a value outside its choices or range."""
    _check_device(device)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.") if type(dtype) is torch.dtype else dtype
        _check_choice("dtype", name, DTYPES)
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
