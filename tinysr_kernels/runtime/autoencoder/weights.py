"""Whether weights are still those that were folded.

PyTorch counts in-place changes of a tensor (`_version`), and a tensor whose `.data` was set has another storage. A
change through `.data` itself (`p.data.add_(...)`, as libraries merge adapters and averages) does neither, so values
are compared too: up to `SAMPLES` of each tensor, spread over it. On a GPU this waits for the work enqueued before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SAMPLES = 64
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Snapshot:
    """Weights as they were when it was taken. It holds none of their memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in tensors.values()]
        self._layouts = _layouts(tensors)
        self._values = _values(tensors.values())

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors are the same, with the same values."""
        if self._layouts != _layouts(tensors):
            return False
        # A weak reference keeps the storage's address from being given to another one.
        same = zip(self._storages, tensors.values(), strict=True)
        if any(kept.cdata != t.untyped_storage()._cdata for kept, t in same):
            return False
        return _is_capturing(tensors.values()) or torch.equal(self._values, _values(tensors.values()))


def _layouts(tensors: Mapping[str, Tensor]) -> list[tuple[object, ...]]:
    return [(n, _version(t), t.dtype, t.device, t.shape, t.stride(), t.storage_offset()) for n, t in tensors.items()]


def _version(t: Tensor) -> int:
    """In-place changes so far; tensors made in inference mode do not count them."""
    return -1 if t.is_inference() else t._version


def _values(tensors: Iterable[Tensor]) -> Tensor:
    """The bits of some values of each tensor, in the order of its memory."""
    return torch.cat([_sample(t.detach()) for t in tensors])


def _sample(t: Tensor) -> Tensor:
    numel = t.numel()
    if not (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)):
        t = t.contiguous()
    step = max(numel // SAMPLES, 1) | 1
    return t.as_strided((-(-numel // step),), (step,), t.storage_offset()).view(_BITS[t.element_size()])


def _is_capturing(tensors: Iterable[Tensor]) -> bool:
    """Whether the caller captures a CUDA graph, which must not wait."""
    cuda = next(iter(tensors)).device.type == "cuda"
    return cuda and torch.cuda.is_current_stream_capturing()
