"""The fused network of a half, made from its weights as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinysr_kernels.first_use import self_check
from tinysr_kernels.first_use.compile_ahead import compile_ahead
from tinysr_kernels.launch.backend import choose_backend, using
from tinysr_kernels.launch.device import assume, gpu_at
from tinysr_kernels.nets import place
from tinysr_kernels.nets.autoencoder import KLHalf, TinyHalf, fold_kl, fold_tiny
from tinysr_kernels.nets.autoencoder.kl import Norms
from tinysr_kernels.nets.layers import Folded
from tinysr_kernels.ops import Operator
from tinysr_kernels.ops.trace import trace
from tinysr_kernels.runtime.autoencoder.structure import Structure
from tinysr_kernels.runtime.autoencoder.weights import Snapshot

TRACE_SIDE = 64
"""Of the input whose kernels are compiled and checked when a network is made on a GPU."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `accelerate`. dtype: None computes in the module's own."""

    quality: str = "high"
    backend: str = "auto"
    dtype: torch.dtype | None = None


class Made:
    """A network that computes in `dtype` by `backend`, and what it was made from."""

    def __init__(
        self, structure: Structure, tensors: Mapping[str, Tensor], settings: Settings, dtype: torch.dtype
    ) -> None:
        """Fold the weights where they lie. InputError where the backend cannot run there."""
        device = next(iter(tensors.values())).device
        self.structure, self.dtype = structure, dtype
        self.backend = _backend(settings.backend, device, dtype)
        # Ordinary tensors, whatever the mode of the call that needs them first.
        with torch.inference_mode(False), torch.no_grad():
            self.snapshot = Snapshot(tensors)
            exact = settings.quality == "exact"
            detached = {name: t.detach() for name, t in tensors.items()}
            folded = place(_fold(structure, detached, dtype, exact), device, dtype)
            self.network = _build(structure, folded, exact)
            if self.backend == "triton" and device.type == "cuda":
                self._prepare(folded, device, exact)

    @property
    def least(self) -> int:
        """The smallest side of an input; the module itself refuses smaller ones."""
        return self.network.least

    def fits(self, structure: Structure, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """Whether it is still the module's network."""
        return (structure, dtype) == (self.structure, self.dtype) and self.snapshot.is_of(tensors)

    def __call__(self, x: Tensor) -> Tensor:
        """The half's function of x, in the network's dtype and channels_last memory."""
        with using(self.backend):
            found: Tensor = self.network(x.to(self.dtype))
        return found

    def _prepare(self, folded: Folded, device: torch.device, exact: bool) -> None:
        """Compile the kernels, several at once, and hold them to the references once per GPU."""
        meta = _build(self.structure, {name: t.to("meta") for name, t in folded.items()}, exact)
        operators = planned(meta, folded[self.structure.first_weight].shape[1], self.dtype, device)
        compile_ahead(operators, device)
        self_check.at_compile(operators, device)


def _backend(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """What computes. On a CPU the references would compute 16 bits in float32, half as fast as the module itself."""
    if asked == "auto" and device.type == "cpu" and dtype.itemsize == 2:
        return "library"
    return choose_backend(asked, device)


def planned(meta: nn.Module, channels: int, dtype: torch.dtype, device: torch.device) -> list[Operator]:
    """The operator calls of a network on meta tensors for one square input."""
    x = torch.empty((1, channels, TRACE_SIDE, TRACE_SIDE), dtype=dtype, device="meta")
    with assume(gpu_at(device)), using("triton"):
        calls = trace(lambda: meta(x), kernels=True)
    return [call.operator for call in calls if call.operator is not None]


def _fold(structure: Structure, tensors: Mapping[str, Tensor], dtype: torch.dtype, exact: bool) -> Folded:
    if structure.blocks:
        return fold_tiny(tensors, structure.half, dtype, structure.blocks, exact=exact)
    return fold_kl(tensors, structure.half, dtype, exact=exact)


def _build(structure: Structure, folded: Folded, exact: bool) -> KLHalf | TinyHalf:
    if structure.blocks:
        return TinyHalf(folded, structure.half, structure.blocks, exact=exact)
    return KLHalf(folded, structure.half, Norms((structure.groups,), structure.eps), exact=exact)
