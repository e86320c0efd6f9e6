"""Triton kernels as plain functions: Triton is imported at the first launch, not with the module that holds them.

A module of kernels says `from tinysr_kernels.launch.kernel import jit, tl`, postpones its annotations
(`from __future__ import annotations`) and decorates with `@jit`. It then imports where Triton is not installed, and
whether the compiler or the interpreter runs the kernels (TRITON_INTERPRET=1) is settled when the first one is needed.

Triton compiles a kernel anew for every combination of its integers that equal 1 or are multiples of 16. That is right
for numbers that a network fixes, such as channels: an innermost axis of whole 16-byte units is accessed 16 bytes at a
time. The size of an image would make nearly every new size compile anew, so kernels annotate what depends on it, as
far as their machine code allows: `extent` (never specialized) and `extent_or_1` (a constant if it is 1, such as the
stride of the innermost axis or a loop of one step, else not specialized).
"""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Callable
from typing import Any, TypeAlias

from tinysr_kernels.versions import NONE, triton_version


class _Language:
    """Stands for the module `triton.language` in the source of kernels until they are made."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"tl.{name} exists inside kernels only")


tl: Any = _Language()

extent: TypeAlias = Any
"""Annotation of an integer argument for which no variants are compiled, whatever its value."""
extent_or_1: TypeAlias = Any
"""Annotation of an integer argument with a variant for the value 1, and one for all others."""


class Kernel:
    """A Triton kernel or device function, not yet passed to `triton.jit`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self.function: Any = function
        self.stand_in: Any = None
        parameters = inspect.signature(function).parameters.values()
        self.names = tuple(p.name for p in parameters)
        # Annotations are strings here; Triton reads them the same way.
        self.constants = frozenset(p.name for p in parameters if "constexpr" in str(p.annotation))
        self.extents = frozenset(p.name for p in parameters if p.annotation == "extent")
        self.extents_or_1 = frozenset(p.name for p in parameters if p.annotation == "extent_or_1")

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Kernels call each other by name; outside kernels they are launched (`launch/plan.py`)."""
        raise RuntimeError(f"{self.function.__name__} is launched, not called")

    def interpreted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function that replaces this one in the interpreter, where that differs from the compiler."""
        self.stand_in = function
        return function

    def reachable(self) -> list[Kernel]:
        """This kernel and all functions that it calls, each once; the order depends on their names alone."""
        found = {self.function.__name__: self}
        for name in sorted(self.function.__code__.co_names):
            called = self.function.__globals__.get(name)
            if isinstance(called, Kernel):
                found |= {one.function.__name__: one for one in called.reachable()} | found
        return list(found.values())

    @functools.cached_property
    def multiplies(self) -> bool:
        """Whether it multiplies matrices: `tl.dot` stands in its code or in that of a function it calls."""
        return any("dot" in one.function.__code__.co_names for one in self.reachable())

    @property
    def options(self) -> dict[str, list[str]]:
        """What `triton.jit` is told about the arguments."""
        return {
            "do_not_specialize": sorted(self.extents),
            "do_not_specialize_on_alignment": sorted(self.extents_or_1),
        }

    @functools.cached_property
    def made(self) -> Any:
        """The function compiled by `triton.jit`, with globals in which `tl` and other kernels are real."""
        import triton
        import triton.language

        original = self.stand_in if self.stand_in is not None and interpreting() else self.function
        # The interpreter wants `tl` there even in a function that does not name it.
        names = {k: triton.language if v is tl else v for k, v in original.__globals__.items()}
        # Triton reads annotations as expressions too: any type of its own will do.
        names |= {"extent": triton.language.dtype, "extent_or_1": triton.language.dtype}
        for name in original.__code__.co_names:
            if isinstance(names.get(name), Kernel):
                names[name] = names[name].made
        function = types.FunctionType(
            original.__code__, names, original.__name__, original.__defaults__, original.__closure__
        )
        # Triton asks for the annotations, the module and the source lines as well.
        functools.update_wrapper(function, original)
        del function.__wrapped__  # type: ignore[attr-defined]
        return triton.jit(function, **self.options)


def jit(function: Callable[..., Any]) -> Kernel:
    """Mark a function as a Triton kernel (see the module's docstring)."""
    return Kernel(function)


@functools.cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; asking does not import it."""
    return triton_version() != NONE


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
