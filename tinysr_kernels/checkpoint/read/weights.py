"""The tensors of one network, taken one by one: each is checked once, and at the end none may be left over."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read.paths import release
from tinysr_kernels.checkpoint.read.text import listed, quoted, shape_text
from tinysr_kernels.errors import CheckpointError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(tensor: Tensor, where: str) -> None:
    """CheckpointError if a floating-point tensor holds NaN or infinity; without a temporary of the tensor's size."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return
    if tensor.dtype not in FLOATS:
        tensor = tensor.to(torch.float32)
    low, high = (float(v) for v in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        found = "NaN" if math.isnan(low) else "infinity"
        raise CheckpointError(f"{where}: expected finite weights, found {found}; fetch or convert the file again")


class Weights:
    """Named tensors of one network and the record of which have been taken.

    `origin` turns a name into the file and the stored key, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str | Callable[[str], str]) -> None:
        self._tensors = dict(tensors)
        self._sorted = sorted(self._tensors)
        self._left = dict.fromkeys(self._tensors)
        self._origin = origin
        self.taken: dict[str, Tensor] = {}

    def where(self, name: str) -> str:
        """File and stored key of a tensor, for messages."""
        return f"{self._origin}: {quoted(name)}" if isinstance(self._origin, str) else self._origin(name)

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is there, taken or not."""
        return name in self._tensors

    def names(self) -> list[str]:
        """All names, taken or not."""
        return list(self._tensors)

    def has_under(self, prefix: str) -> bool:
        """Whether any tensor's name starts with `prefix.`."""
        return any(True for _ in self._under(prefix))

    def _under(self, prefix: str) -> Iterator[str]:
        """The names that start with `prefix.`, in order; looks at no other: a file may have 100,000 blocks."""
        for i in range(bisect_left(self._sorted, f"{prefix}."), len(self._sorted)):
            if not self._sorted[i].startswith(f"{prefix}."):
                return
            yield self._sorted[i]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; CheckpointError if it is missing."""
        return tuple(self._get(name).shape)

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.where(name)}: expected this tensor, found none")
        return self._tensors[name]

    def count(self, prefix: str) -> int:
        """How many children `prefix.0`, `prefix.1`, ... there are; CheckpointError if their numbers have a gap."""
        start = len(prefix) + 1
        children = {name[start:].partition(".")[0] for name in self._under(prefix) if "." in name[start:]}
        numbers = {int(child) for child in children if re.fullmatch("[0-9]{1,4}", child)}
        if numbers and max(numbers) != len(numbers) - 1:
            gap = min(set(range(max(numbers))) - numbers)
            raise CheckpointError(f"{self.where(f'{prefix}.{gap}')}: expected, since number {max(numbers)} is there")
        return len(numbers)

    def take(self, name: str, shape: Sequence[int | None]) -> Tensor:
        """The tensor, checked: there, floating point, of this shape (None: any size but zero), finite."""
        tensor = self._get(name)
        fits = len(shape) == tensor.ndim and all(
            found > 0 if size is None else found == size for size, found in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise CheckpointError(
                f"{self.where(name)}: expected shape {shape_text(shape)}, found {shape_text(tensor.shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.where(name)}: expected float16, bfloat16, float32 or float64, found {tensor.dtype}"
            )
        check_finite(tensor, self.where(name))
        release(tensor)
        self._left.pop(name, None)
        self.taken[name] = tensor
        return tensor

    def ignore(self, names: Iterable[str]) -> list[str]:
        """Mark tensors as deliberately unused; returns those that were there and not yet taken."""
        gone = [name for name in names if name in self._left]
        for name in gone:
            del self._left[name]
        return gone

    def ignore_under(self, *prefixes: str) -> list[str]:
        """Mark all tensors under these prefixes as deliberately unused."""
        starts = tuple(f"{prefix}." for prefix in prefixes)
        return self.ignore([name for name in self._left if name.startswith(starts)])

    def as_linear(self, name: str) -> None:
        """View a 1x1 convolution's weight [O,I,1,1] as a linear layer's [O,I], if it is one."""
        tensor = self._tensors.get(name)
        if tensor is not None and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            self._tensors[name] = tensor.flatten(1)

    def finish(self) -> dict[str, Tensor]:
        """Everything taken; CheckpointError if a tensor is left over, for then the network would not be this one."""
        if self._left:
            first = min(self._left)
            raise CheckpointError(
                f"{self.where(first)}: unexpected; {len(self._left)} tensors have no place in this network: "
                f"{listed(self._left)}"
            )
        return self.taken


def norm(weights: Weights, name: str, channels: int) -> None:
    """Take `name.weight` and `name.bias` [C] of a normalization."""
    weights.take(f"{name}.weight", [channels])
    weights.take(f"{name}.bias", [channels])


def linear(weights: Weights, name: str, inputs: int, outputs: int | None = None, bias: bool = True) -> int:
    """Take a linear layer [O,I] (also stored as a 1x1 convolution) and its bias [O]; returns O."""
    weights.as_linear(f"{name}.weight")
    found = weights.take(f"{name}.weight", [outputs, inputs]).shape[0]
    if bias:
        weights.take(f"{name}.bias", [found])
    return found


def conv(weights: Weights, name: str, inputs: int, outputs: int | None = None, bias: bool = True) -> int:
    """Take a 3x3 convolution and return its output channels.

    Dense: `weight` [O,I,3,3] with `bias` [O] (only if stored, where `bias` is False). Separable: `depthwise.weight`
    [I,1,3,3] without bias, `pointwise.weight` [O,I,1,1] with or without `pointwise.bias` [O].
    """
    if weights.has(f"{name}.depthwise.weight") or weights.has(f"{name}.pointwise.weight"):
        weights.take(f"{name}.depthwise.weight", [inputs, 1, 3, 3])
        found = weights.take(f"{name}.pointwise.weight", [outputs, inputs, 1, 1]).shape[0]
        if weights.has(f"{name}.pointwise.bias"):
            weights.take(f"{name}.pointwise.bias", [found])
        return found
    found = weights.take(f"{name}.weight", [outputs, inputs, 3, 3]).shape[0]
    if bias or weights.has(f"{name}.bias"):
        weights.take(f"{name}.bias", [found])
    return found
