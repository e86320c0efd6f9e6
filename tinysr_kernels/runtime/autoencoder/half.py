"""What takes the place of the `forward` of an encoder or decoder.

Every call reads the module anew (`structure.py`) and folds its weights again if they have changed (`weights.py`). Where
the fused network would give another result than the module itself, or no gradients, the module computes itself, and one
notice per reason says so.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tinysr_kernels.runtime.autoencoder.network import Made, Settings
from tinysr_kernels.runtime.autoencoder.structure import Unknown, read
from tinysr_kernels.runtime.notices import notice

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Plain(Exception):
    """The module is to compute itself. The text says why, for the user; empty where its own error says it better."""


class Half:
    """Called in place of `module.forward`. A copy or pickle of the module has one of its own, which folds again."""

    __slots__ = ("_lock", "_made", "_module", "_said", "settings")

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.__setstate__((module, settings))

    def __getstate__(self) -> tuple[nn.Module, Settings]:
        return self.module, self.settings

    def __setstate__(self, state: tuple[nn.Module, Settings]) -> None:
        module, self.settings = state
        self._module = weakref.ref(module)  # no circle, so that memory is free as soon as the module is
        self._lock = threading.Lock()
        self._made: Made | None = None
        self._said: set[str] = set()

    @property
    def module(self) -> nn.Module:
        """The half whose forward it is. ReferenceError if that is gone."""
        module = self._module()
        if module is None:
            raise ReferenceError("the accelerated module no longer exists; keep it, not its forward alone")
        return module

    @property
    def __wrapped__(self) -> Any:
        """The module's own forward: what `inspect.signature` shows."""
        return type(self.module).forward.__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the class's `forward` gives for the module, computed by the fused network where that is the same."""
        if torch.compiler.is_compiling():  # PyTorch's compiler sees the plain module
            return type(self.module).forward(self.module, *args, **kwargs)
        made: Made | None = None
        try:
            x = _input(args, kwargs)
            made = self._network(x)
        except Plain as reason:
            self._say(str(reason))
        if made is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._as_plain(made(x), x, made.structure.attends)

    def _network(self, x: Tensor) -> Made:
        """The network for x, made now if the module has changed. Raises Plain, and InputError for the backend."""
        try:
            structure, tensors = read(self.module)
        except Unknown as unknown:
            raise Plain(str(unknown)) from None
        if self.module.training:
            raise Plain("it is in training mode; call eval()")
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors.values())):
            raise Plain("gradients are recorded; call it under torch.no_grad() or torch.inference_mode()")
        kinds = {(t.dtype, t.device) for t in tensors.values()}
        if len(kinds) > 1 or next(iter(kinds))[0] not in FLOATS:
            raise Plain("its parameters are not all of one floating dtype on one device")
        ((dtype, device),) = kinds
        if device.type not in ("cpu", "cuda"):
            raise Plain(f"its parameters lie on a {device.type} device")
        cast = _autocast(x)
        if x.device != device or (x.dtype != dtype and cast is None):
            raise Plain  # the module's own error says so
        wanted = self.settings.dtype or cast or dtype
        with self._lock:
            if self._made is None or not self._made.fits(structure, tensors, wanted):
                self._made = None  # not two at a time
                self._made = Made(structure, tensors, self.settings, wanted)
            made = self._made
        if x.shape[1] != tensors[structure.first_weight].shape[1] or min(x.shape[2:]) < made.least or 0 in x.shape:
            raise Plain  # as above, or there is nothing to compute
        return made

    def _as_plain(self, result: Tensor, x: Tensor, attends: bool) -> Tensor:
        """The result in the dtype and memory layout that the module gives.

        Channels last if its input or its weights are, or if it attends: attention leaves its image so.
        """
        cast = _autocast(x)
        weight = next(p for p in self.module.parameters() if p.dim() == 4)
        nhwc = attends and cast is None
        for t in (x, weight):
            nhwc |= t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        layout = torch.channels_last if nhwc else torch.contiguous_format
        return result.to(cast or x.dtype).contiguous(memory_format=layout)

    def _say(self, reason: str) -> None:
        if reason and reason not in self._said:
            self._said.add(reason)
            notice(f"{type(self.module).__name__}: the plain module computes, not the fused network: {reason}")


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The only input, [N,C,H,W] and an ordinary tensor. Raises Plain."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if len(given) != 1:
        raise Plain("it is called with further inputs" if given else "")
    (x,) = given
    traced = torch._C._is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if traced or type(x) not in (Tensor, nn.Parameter):
        raise Plain("it is traced, or its input is not an ordinary tensor")
    if forward_ad._current_level >= 0:
        raise Plain("forward-mode derivatives are computed")
    if x.dim() != 4 or x.dtype not in FLOATS:
        raise Plain
    return x


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype in which the caller's autocast has convolutions of x computed, or None."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
