"""accelerate(): the encoder and decoder of one of diffusers' autoencoders computed by the fused operators, in place."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from tinysr_kernels.errors import InputError, shorten
from tinysr_kernels.launch.backend import BACKENDS, choose_backend
from tinysr_kernels.runtime.arguments import DTYPES
from tinysr_kernels.runtime.autoencoder.half import Half
from tinysr_kernels.runtime.autoencoder.network import Settings
from tinysr_kernels.runtime.autoencoder.structure import Unknown, read

M = TypeVar("M", bound=nn.Module)
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
QUALITIES = ("exact", "high")
HALVES = ("encoder", "decoder")


def accelerate(module: M, *, quality: str = "high", backend: str = "auto", dtype: str | torch.dtype | None = None) -> M:
    """Have the encoder and decoder of an autoencoder, such as `pipe.vae`, computed by the fused operators.

    module: an AutoencoderKL (any latent channels, with or without the 1x1 convolutions around the latent) or
    AutoencoderTiny of diffusers; it is changed in place and returned, and everything it offers goes on working.
    quality: "high" folds what can be folded; "exact" keeps the order of the module's operations. backend: as for
    `compile`, but "auto" computes 16 bits on a CPU by PyTorch's libraries. dtype: in which to compute; None: the
    module's own. Weights are folded again after they have changed. With gradients, in training mode, under PyTorch's
    compiler, and after changes that are not known, the module computes itself. A second call replaces the settings.
    Raises InputError for a module that is not supported, naming what is not, and for other arguments.
    """
    settings = Settings(*_checked(quality, backend, dtype))
    halves = _halves(module)
    for half in halves:
        before = half.__dict__.get("forward")
        if before is not None and not isinstance(before, Half):
            raise InputError(
                f"{type(half).__name__}.forward has been replaced, by hooks that offload weights for example; call "
                "accelerate before they are added, or remove them first"
            )
        try:
            _, tensors = read(half)
        except Unknown as unknown:
            raise InputError(
                f"{type(module).__name__} cannot be accelerated: {unknown}; undo that, or use the module as it is"
            ) from None
        device = next(iter(tensors.values())).device
        if device.type in ("cpu", "cuda"):
            choose_backend(settings.backend, device)
    for half in halves:
        half.forward = Half(half, settings)
    return module


def restore(module: M) -> M:
    """Undo `accelerate`; nothing happens to a module that is not accelerated. Returns the module.

    Raises InputError where something else has been put around the accelerated forward since.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"restore takes the module that was accelerated, found {type(module).__name__}")
    halves = [half for name in HALVES if isinstance(half := getattr(module, name, None), nn.Module)]
    for half in halves:
        forward = half.__dict__.get("forward")
        if forward is not None and not isinstance(forward, Half) and _is_around(forward):
            raise InputError(
                f"hooks were added to {type(half).__name__} after accelerate; remove them first, then call restore"
            )
    for half in halves:
        if isinstance(half.__dict__.get("forward"), Half):
            del half.forward
    return module


def _is_around(forward: Any) -> bool:
    """Whether a replaced forward calls ours: `functools.update_wrapper` leaves the one below it in `__wrapped__`."""
    for _ in range(64):
        if isinstance(forward, Half):
            return True
        forward = getattr(forward, "__wrapped__", None)
        if forward is None:
            return False
    return True


def _checked(quality: Any, backend: Any, dtype: Any) -> tuple[str, str, torch.dtype | None]:
    """The arguments as `Settings` holds them. Raises InputError."""
    for name, value, choices in (("quality", quality, QUALITIES), ("backend", backend, BACKENDS)):
        if type(value) is not str or value not in choices:
            raise InputError(f"{name} must be one of {choices}, found {shorten(repr(value), 100)}")
    if dtype is None:
        return quality, backend, None
    chosen = DTYPES.get(str(dtype).removeprefix("torch.")) if isinstance(dtype, (str, torch.dtype)) else None
    if chosen is None:
        raise InputError(f"dtype must be one of {tuple(DTYPES)} or None, found {shorten(repr(dtype), 100)}")
    return quality, backend, chosen


def _halves(module: Any) -> list[nn.Module]:
    """The encoder and decoder of a supported autoencoder. Raises InputError."""
    name = type(module).__name__
    for one in (module, *(getattr(module, half, None) for half in HALVES)):
        if hasattr(one, "_orig_mod"):
            raise InputError(
                f"{name} is, or holds, a module that torch.compile has wrapped, which computes itself; put the module "
                "inside it (`._orig_mod`) in its place"
            )
    ours = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.split(".")[0] == "diffusers"}
    if not isinstance(module, nn.Module) or not ours & set(CLASSES):
        hint = "; pass pipe.vae" if hasattr(module, "vae") else ""
        raise InputError(f"accelerate takes one of diffusers' {' or '.join(CLASSES)}, found {name}{hint}")
    return [getattr(module, half) for half in HALVES]
