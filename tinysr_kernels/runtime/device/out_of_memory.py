"""Out-of-memory in all its forms: recognized in one place, told apart from other errors, and described truthfully."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from tinysr_kernels.errors import OutOfMemory, TinySRError
from tinysr_kernels.runtime.device.host_memory import available_memory

# How allocators without an exception type of their own report it: PyTorch's for the CPU (Linux, Windows), C++'s, CUDA's
# and its libraries' outside PyTorch's caching allocator.
_MESSAGES = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc"
    r"|(CUDA|CUDA driver) error: out of memory|Triton Error \[CUDA\]: out of memory"
    r"|CU(DNN|BLAS|SPARSE|SOLVER)_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_\w*ALLOCATION_FAILED)"
)
# oneDNN's words for every failure, the memory of its generated code and scratch pads among them.
_ONEDNN = re.compile(r"could not (create|execute) a (primitive|memory)")
SCARCE = 1 << 30
"""With less host memory free than this, in bytes, a failure of oneDNN counts as out-of-memory."""
_SIZES = re.compile(
    r"(?:Tried to allocate|tried to allocate|Unable to allocate) ([\d.]+) (bytes|[KMGT]i?B)", re.IGNORECASE
)
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU (PyTorch, numpy, Python) or a GPU. Not for an `OutOfMemory` of ours."""
    if isinstance(error, TinySRError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if _MESSAGES.search(str(error)) is not None:
        return True
    if _ONEDNN.search(str(error)) is None:
        return False
    free = available_memory()
    return free is not None and free < SCARCE


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device, those that PyTorch keeps in reserve included; None where it cannot be told."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_memory()


def empty_host_caches() -> None:
    """Free what only reference cycles hold (tensors in tracebacks), and give back what the C library keeps of it."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def shortage(device: torch.device, error: str) -> str:
    """`more than the 1.31 GB that are free on cpu (an allocation of 0.75 GB failed)`, after everything was freed.

    error: the text of the exception. Call it outside the `except` block, whose traceback would hold the memory.
    """
    free = free_memory(device)
    text = f"more than is free on {device}" if free is None else f"more than the {_amount(free)} free on {device}"
    size = _SIZES.search(error)
    if size is None:
        return text
    failed = float(size[1]) * _UNITS[size[2][0].lower()]
    return f"{text} (an allocation of {_amount(failed)} failed)"


def _amount(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def typed_out_of_memory(what: str, remedy: str = "split it, or close other programs") -> Iterator[None]:
    """Turn out-of-memory of any form inside the block into OutOfMemory. what: begins the message; remedy: ends it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        free = available_memory()
        left = "" if free is None else f", {_amount(free)} are free now"
        raise OutOfMemory(f"{what} ({reason}{left}); {remedy}") from error
