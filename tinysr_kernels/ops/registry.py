"""Registration of the fused operators and the table that benchmarks, tuning and counting walk.

Every operator is one `torch.library` definition `tinysr::<name>` with an implementation for any device, a
fake implementation that returns the true shape, dtype and strides, and a cost function over the call's own
arguments. The first argument of every operator is a tensor. An operator with kernels runs them where the backend says
so (`launch/backend.py`) and the call's dtypes allow it; everything else is computed by its reference.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch import configs
from tinysr_kernels.launch.backend import kernels_run_on
from tinysr_kernels.launch.device import gpu_of
from tinysr_kernels.launch.plan import Implementation, Plan

LIBRARY = torch.library.Library("tinysr", "DEF")
ACTIVATIONS = ("none", "relu", "silu")
SUMMED = 192
"""Features that oneDNN sums in a row, as many as MKL does: over 1536 its error would be twice that."""


@dataclass(frozen=True)
class Cost:
    """What one call cannot do without.

    flops: multiplications and additions counted apart (one multiply-add is 2); bytes: each distinct input
    read once and each output written once, at their own dtypes.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Operator:
    """One registered operator: its name, its plain PyTorch reference, its cost function, and its kernels if any."""

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    kernels: Implementation | None = None

    @property
    def overload(self) -> Any:
        """The callable `torch.ops.tinysr.<name>.default`."""
        return getattr(torch.ops.tinysr, self.name).default

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A call's arguments by name, in the schema's order, with the defaults filled in."""
        missing = len(self._names) - len(args)
        if not kwargs and 0 <= missing <= len(self._defaults):
            # As the dispatcher calls, by position: 1 us where binding to the signature takes 5 to 18.
            return dict(zip(self._names, args + self._defaults[len(self._defaults) - missing :], strict=True))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(self._signature.parameters)

    @functools.cached_property
    def _defaults(self) -> tuple[Any, ...]:
        values = (p.default for p in self._signature.parameters.values())
        return tuple(value for value in values if value is not inspect.Parameter.empty)

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.reference)

    def plan(self, *args: Any, **kwargs: Any) -> tuple[Plan, configs.Choice]:
        """The launches of a call and their configuration, on tensors of any device, meta included.

        ValueError if the operator has no kernels, or none for the tensors' GPU.
        """
        if self.kernels is None:
            raise ValueError(f"{self.name} has no kernels")
        return self._plan(self.kernels, self.arguments(*args, **kwargs))

    def _plan(self, kernels: Implementation, arguments: dict[str, Any]) -> tuple[Plan, configs.Choice]:
        gpu = gpu_of(next(iter(arguments.values())))
        if gpu.capability < kernels.capability:
            found, wanted = (".".join(map(str, c)) for c in (gpu.capability, kernels.capability))
            raise ValueError(f"{self.name} needs compute capability {wanted}, {gpu.name} has {found}")
        choice = configs.choose(self.name, kernels, gpu, arguments)
        return kernels.plan(choice.config, **arguments), choice

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        """Compute a call on real tensors: by the kernels where they apply, else by the reference."""
        if self.kernels is None or not kernels_run_on(first.device):
            return self.reference(first, *rest)
        arguments = self.arguments(first, *rest)
        if not self.kernels.takes(arguments):
            return self.reference(first, *rest)
        return self._plan(self.kernels, arguments)[0].run(configs.pdl(gpu_of(first)))


REGISTRY: dict[str, Operator] = {}


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    kernels: Implementation | None = None,
) -> Operator:
    """Define `tinysr::<schema>` with its reference, fake implementation, cost and kernels; enter it in REGISTRY."""
    name = schema[: schema.index("(")]
    operator = Operator(name, reference, cost, kernels)
    LIBRARY.define(schema)
    LIBRARY.impl(name, _without_autocast(operator), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinysr::{name}", fake, lib=LIBRARY)
    REGISTRY[name] = operator
    return operator


def _without_autocast(operator: Operator) -> Callable[..., Any]:
    # Autocast stays active inside an operator: it would turn the reference's float32 products into bfloat16.
    def run(first: Tensor, *rest: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return operator(first, *rest)
        with torch.autocast(device, enabled=False):
            return operator(first, *rest)

    return run


def size(*tensors: Tensor | None) -> int:
    """Bytes of the given tensors together.

    None counts nothing, a tensor given twice counts once, a broadcast view counts its own storage only.
    """
    given = {id(t): t for t in tensors if t is not None}
    return sum(_distinct(t) * t.element_size() for t in given.values())


def _distinct(t: Tensor) -> int:
    """Elements of t that occupy memory of their own (dimensions with stride 0 count once)."""
    count = 1
    for extent, stride in zip(t.shape, t.stride(), strict=True):
        count *= extent if stride else 1
    return count


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype references compute in: float32 for half precision, the dtype itself when it is wider."""
    return torch.promote_types(dtype, torch.float32)


def plain(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype` and contiguous memory: the library picks its algorithm, and so the rounding, by the strides."""
    # Through one dimension, because a dimension of one element may otherwise keep any stride.
    return t.to(dtype).contiguous().view(-1).view(t.shape)


def nhwc(t: Tensor) -> Tensor:
    """[N,C,H,W] dense in channels_last memory order (no copy when it already is)."""
    t = t.contiguous(memory_format=torch.channels_last)
    _, c, h, w = t.shape
    # A single channel or pixel may keep other strides, which the library would take for another layout.
    strides = (h * w * c, 1, w * c, c)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def empty_nhwc(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last tensor on the device of `like`, of its dtype unless one is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def activate(t: Tensor, activation: str) -> Tensor:
    """none, relu or silu, elementwise and in place. ValueError for anything else."""
    if activation == "relu":
        return t.relu_()
    if activation == "silu":
        return torch.nn.functional.silu(t, inplace=True)
    check_choice("activation", activation, ACTIVATIONS)
    return t


def finish(
    y: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activate_residual: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue all convolutions share, in y's wide dtype: bias, activation, residual, then one rounding.

    activation(y + bias + residual) when activate_residual, else activation(y + bias) + residual. y is overwritten: on
    a CPU, memory for a new image takes several times as long as the sum.
    """
    if bias is not None:
        y.add_(bias.to(y.dtype).view(1, -1, 1, 1))
    if residual is not None and activate_residual:
        y.add_(residual.to(y.dtype))
    activate(y, activation)
    if residual is not None and not activate_residual:
        y.add_(residual.to(y.dtype))
    return nhwc(y.to(out_dtype))


def shortcut_1x1(y: Tensor, shortcut: Tensor | None, skip: Tensor | None, weight: Tensor | None) -> Tensor:
    """y + weight @ concat(shortcut, skip) over channels, without the concatenated tensor; y if there is none.

    y [N,O,H,W] channels_last, overwritten; shortcut [N,C1,H,W]; skip [N,C2,H,W] or None; weight [O,C1+C2].
    """
    if shortcut is None or weight is None:
        return y
    first, second = weight.to(y.dtype).tensor_split([shortcut.shape[1]], 1)
    rows(y).add_(product(rows(nhwc(shortcut.to(y.dtype))), first))
    if skip is not None:
        rows(y).add_(product(rows(nhwc(skip.to(y.dtype))), second))
    return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, x [...,K], weight [O,K], bias [O], all of one dtype, as torch.nn.functional.linear.

    In float32 on a CPU by oneDNN, where torch has it: torch itself asks MKL, which leaves half an AMD processor idle.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0 or not _has_onednn():
        return torch.nn.functional.linear(x, weight, bias)
    y, parts = None, -(-x.shape[-1] // SUMMED)
    for part, own in zip(x.reshape(-1, x.shape[-1]).chunk(parts, 1), weight.chunk(parts, 1), strict=True):
        added = torch.ops.mkldnn._linear_pointwise(part.contiguous(), own.contiguous(), bias, "none", [], "")
        y, bias = added if y is None else y.add_(added), None
    assert y is not None
    return y.view(*x.shape[:-1], weight.shape[0])


@functools.cache
def _has_onednn() -> bool:
    """Whether torch was built with oneDNN and still has the operator by which its own compiler calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def rows(t: Tensor) -> Tensor:
    """The pixels of an image [N,C,H,W] in channels_last memory as rows [N*H*W,C], a view."""
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1])


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds (works under fake tensors and torch.compile)."""
    if not condition:
        raise ValueError(message)


def check_rank(name: str, t: Tensor, layout: str) -> None:
    """Raise ValueError unless t has as many dimensions as `layout` (such as "N,C,H,W") names."""
    check(t.dim() == layout.count(",") + 1, f"{name} must be [{layout}], found {list(t.shape)}")


def check_shape(name: str, t: Tensor | None, expected: Sequence[int]) -> None:
    """Raise ValueError unless t is None or has exactly the expected shape."""
    if t is not None and tuple(t.shape) != tuple(expected):
        raise ValueError(f"{name} must be {list(expected)}, found {list(t.shape)}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    check(value in choices, f"{name} must be one of {tuple(choices)}, found {value!r}")


def check_epilogue(
    out: tuple[int, int, int, int], bias: Tensor | None, residual: Tensor | None, activation: str
) -> None:
    """ValueError unless bias [O] and residual fit the result [N,O,H,W] and the activation is known."""
    check_shape("bias", bias, (out[1],))
    check_shape("residual", residual, out)
    check_choice("activation", activation, ACTIVATIONS)


def check_shortcut(
    out: tuple[int, int, int, int], shortcut: Tensor | None, skip: Tensor | None, weight: Tensor | None
) -> None:
    """ValueError unless the shortcut's tensors come together and fit the result's shape [N,O,H,W].

    shortcut [N,C1,H,W]; skip [N,C2,H,W] or None; weight [O,C1+C2].
    """
    if shortcut is None or weight is None:
        given = [
            name for name, t in (("shortcut", shortcut), ("skip", skip), ("shortcut_weight", weight)) if t is not None
        ]
        check(not given, f"shortcut and shortcut_weight must be given together, found only {given}")
        return
    n, o, h, w = out
    channels = 0
    for name, t in (("shortcut", shortcut), ("skip", skip)):
        if t is not None:
            check_rank(name, t, "N,C,H,W")
            check_shape(name, t, (n, t.shape[1], h, w))
            channels += t.shape[1]
    check_shape("shortcut_weight", weight, (o, channels))
