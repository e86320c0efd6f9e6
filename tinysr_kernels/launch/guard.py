"""The launch guard: where an operator's kernels cannot be compiled or launched, PyTorch's libraries compute it.

The first failure bars the kernels with one notice of the reason and the remedy: a missing C compiler or Python.h, a GPU
that this Triton does not know, a kernel that needs more than the GPU has, a cache folder that cannot be written.
Out-of-memory and errors of the device are not the kernels' and propagate, as does everything in Triton's interpreter,
while a CUDA graph is captured, and with TINYSR_LAUNCH_GUARD=0 in the environment.

What the self-check (`first_use/self_check.py`) found wrong is barred before the first launch.
"""

from __future__ import annotations

import logging
import os
import subprocess
from types import TracebackType

import torch

from tinysr_kernels.errors import shorten
from tinysr_kernels.launch.kernel import interpreting

SWITCH = "TINYSR_LAUNCH_GUARD"
EVERYTHING = "*"
"""Bars all operators of a device: what failed is the way every kernel is built."""
EVERY_VARIANT = "*"
"""Bars an operator at all sizes."""
_FOREIGN = ("no kernel image", "invalid device function", "kernel image is invalid")
"""CUDA's errors in a launch of code that is not for this GPU or not for this driver."""
_TOO_LARGE = "too many resources"

REPORT = "Please report it with the output of `tinysr doctor`."

logger = logging.getLogger("tinysr_kernels")
_barred: set[tuple[str, torch.device, str]] = set()


def is_barred(name: str, device: torch.device, variant: str) -> bool:
    """Whether the kernels of an operator's variant failed before on the device."""
    keys = (name, device, variant), (name, device, EVERY_VARIANT), (EVERYTHING, device, "")
    return not _barred.isdisjoint(keys)


def anything_barred() -> bool:
    """Whether `is_barred` need be asked."""
    return bool(_barred)


def bar(name: str, device: torch.device, variant: str, error: Exception) -> None:
    """Bar what failed with this error, and say so once. Raises the error itself if it is not the kernels'."""
    found = None if interpreting() or is_off() or _capturing(device) else judge(error)
    if found is None:
        raise error
    general, remedy = found
    key = (EVERYTHING, device, "") if general else (name, device, variant)
    if key in _barred:
        return
    _barred.add(key)
    reason = shorten(f"{type(error).__name__}: {error}", 500).rstrip(". ")
    what = "Triton cannot build kernels" if general else f"{name} ({variant}): its kernels cannot run"
    logger.warning(f"{what} on {device}: {reason}. PyTorch computes instead, slower. {remedy}")


def bar_known(name: str, device: torch.device, variant: str = EVERY_VARIANT) -> None:
    """Bar what is known to fail before it is launched; the caller says why. name: or EVERYTHING."""
    _barred.add((name, device, "" if name == EVERYTHING else variant))


def allow(device: torch.device) -> None:
    """Try everything on a device again."""
    _barred.difference_update([key for key in _barred if key[1] == device])


def is_off() -> bool:
    """Whether TINYSR_LAUNCH_GUARD=0 asks that nothing is replaced."""
    return os.environ.get(SWITCH) == "0"


def forget() -> None:
    """Try everything again."""
    _barred.clear()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def judge(error: Exception) -> tuple[bool, str] | None:
    """Whether an error concerns all kernels, and the remedy; None for an error that is not the kernels'."""
    text, modules = str(error), _modules(error.__traceback__)
    if "triton" not in modules or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return None
    if isinstance(error, subprocess.CalledProcessError) or "C compiler" in text:
        return True, "Install a C compiler and the headers of Python (Debian, Ubuntu: apt-get install gcc python3-dev)."
    if isinstance(error, OSError):
        return True, "Triton writes to ~/.triton: make it writable, or name another folder in TRITON_CACHE_DIR."
    if type(error).__name__ == "OutOfResources":
        return False, "A tuned launch configuration may be too large: `python -m autotune show` lists them."
    if type(error).__module__.partition(".")[0] == "triton":
        return False, REPORT
    if isinstance(error, RuntimeError) and modules[-1] == "triton":
        if "Triton Error [CUDA]" not in text:
            return True, "This Triton may be too old for this GPU: update PyTorch, which brings its own."
        if any(words in text for words in _FOREIGN):
            return True, "This Triton or the driver may be too old for this GPU: update PyTorch and the driver."
        if _TOO_LARGE in text:
            return False, REPORT
    return None


def _modules(traceback: TracebackType | None) -> list[str]:
    """The packages whose code an exception passed through, the innermost last."""
    found = []
    while traceback is not None:
        found.append(str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        traceback = traceback.tb_next
    return found
