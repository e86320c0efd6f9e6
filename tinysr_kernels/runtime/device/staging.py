"""Copies between pageable host memory and a GPU, through pinned memory in slices.

PyTorch rounds pinned allocations up to powers of two and keeps them for the life of the process: an image of 805 MB
would hold 1 GiB of it. Slices bound what a copy holds at a time to IN_FLIGHT bytes, and one slice travels while the
processor copies another. Where the driver gives no pinned memory (WSL, a limit on locked memory), copies are pageable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from tinysr_kernels.runtime.notices import notice

SLICE = 32 << 20
"""Bytes; a power of two, so that all whole slices come from one size of PyTorch's cache."""
IN_FLIGHT = 2 * SLICE


class _Slot:
    """A slice of pinned memory, and the event that says when its copy has finished."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.copied = torch.cuda.Event()


class Staging:
    """Copies from and to one device, on the current stream of the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.pins = True
        """Whether pinned memory can be allocated, as far as is known."""

    def to_device(self, target: Tensor, source: Tensor) -> None:
        """Copy host memory to the device; both dense with equal strides. The source may be changed afterwards."""
        stream, under_way = torch.cuda.current_stream(self._device), deque[_Slot]()
        for into, of in _slices(target, source):
            while under_way and sum(len(slot.bytes) for slot in under_way) + len(of) > IN_FLIGHT:
                under_way.popleft().copied.synchronize()
            slot = self._slot(len(of))
            if slot is None:
                into.copy_(of)
                continue
            into.copy_(slot.bytes.copy_(of), non_blocking=True)
            slot.copied.record(stream)
            under_way.append(slot)

    def to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy device memory to the host: (target, source), dense with equal strides. Targets are complete on return.

        Everything that fits is under way before the host waits for the first.
        """
        stream, under_way = torch.cuda.current_stream(self._device), deque[tuple[_Slot, Tensor]]()

        def arrive() -> None:
            slot, into = under_way.popleft()
            slot.copied.synchronize()
            into.copy_(slot.bytes)

        for target, source in pairs:
            for into, of in _slices(target, source):
                while under_way and sum(len(slot.bytes) for slot, _ in under_way) + len(of) > IN_FLIGHT:
                    arrive()
                slot = self._slot(len(of))
                if slot is None:
                    into.copy_(of)
                    continue
                slot.bytes.copy_(of, non_blocking=True)
                slot.copied.record(stream)
                under_way.append((slot, into))
        while under_way:
            arrive()

    def _slot(self, nbytes: int) -> _Slot | None:
        """A new slot, whose memory PyTorch takes from its cache; None where there is no pinned memory."""
        if not self.pins:
            return None
        try:
            return _Slot(nbytes)
        except RuntimeError as error:
            self.pins = False
            reason = str(error).strip().partition("\n")[0]
            notice(f"no pinned host memory ({reason}); copies from and to the GPU use pageable memory and are slower")
            return None


def _slices(target: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The bytes of two dense tensors in the order of memory, a slice at a time."""
    into, of = (t.as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (target, source))
    return [(into[start : start + SLICE], of[start : start + SLICE]) for start in range(0, len(of), SLICE)]
