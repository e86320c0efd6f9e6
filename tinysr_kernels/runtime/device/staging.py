"""Copies between pageable host memory and a GPU, through pinned memory in slices.

PyTorch rounds pinned allocations up to powers of two and keeps them for the life of the process: an image of 805 MB
would hold 1 GiB of it. Slices bound that to two of SLICE bytes for each copy under way, and one slice travels while the
processor copies another. Where the driver gives no pinned memory (WSL, a limit on locked memory), copies are pageable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinysr_kernels.runtime.notices import notice

SLICE = 32 << 20
"""Bytes; a power of two, so that all slices come from one size of PyTorch's cache."""


class _Slot:
    """Pinned bytes, and the event that says when their last copy has finished."""

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
        into, of = _bytes(target), _bytes(source)
        slots, stream = self._slots(len(of)), torch.cuda.current_stream(self._device)
        if not slots:
            into.copy_(of)
        for number, start in enumerate(range(0, len(of), SLICE) if slots else ()):
            slot, part = slots[number % len(slots)], of[start : start + SLICE]
            slot.copied.synchronize()
            staged = slot.bytes[: len(part)].copy_(part)
            into[start : start + SLICE].copy_(staged, non_blocking=True)
            slot.copied.record(stream)

    def to_host(self, target: Tensor, source: Tensor) -> None:
        """Copy device memory to the host; both dense with equal strides. The target is complete on return."""
        into, of = _bytes(target), _bytes(source)
        slots, stream = self._slots(len(of)), torch.cuda.current_stream(self._device)
        if not slots:
            into.copy_(of)
            return
        starts = list(range(0, len(of), SLICE))
        for number in range(len(starts) + len(slots) - 1):
            if number < len(starts):
                slot, part = slots[number % len(slots)], of[starts[number] : starts[number] + SLICE]
                slot.bytes[: len(part)].copy_(part, non_blocking=True)
                slot.copied.record(stream)
            done = number - len(slots) + 1
            if done >= 0:
                slot, part = slots[done % len(slots)], into[starts[done] : starts[done] + SLICE]
                slot.copied.synchronize()
                part.copy_(slot.bytes[: len(part)])

    def _slots(self, nbytes: int) -> list[_Slot]:
        """Two slots for copies of more than a slice, else one; none where there is no pinned memory."""
        if not self.pins or nbytes == 0:
            return []
        try:
            return [_Slot(min(nbytes, SLICE)) for _ in range(1 if nbytes <= SLICE else 2)]
        except RuntimeError as error:
            self.pins = False
            reason = str(error).strip().partition("\n")[0]
            notice(f"no pinned host memory ({reason}); copies from and to the GPU use pageable memory and are slower")
            return []


def _bytes(t: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of memory."""
    return t.as_strided((t.numel(),), (1,)).view(torch.uint8)
