"""Free host memory, and whether an upscaled image fits into it, before any pixel is decoded."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from tinysr_kernels.errors import InputError, OutOfMemory

# Peak host bytes per output pixel: float32 RGB from the network (12) and one working copy of it for blending and
# color (12), up to four 16-bit samples as integers (8), Pillow's copy (4), the encoded file (4).
BYTES_PER_PIXEL = 40

# Results with fewer pixels are not checked: querying the system would cost more than it saves.
_UNCHECKED_PIXELS = 1 << 24


def _cgroup_free() -> int | None:
    """Bytes left under the memory limit of the container (cgroup v2 or v1); None without a limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such file, or "max" for no limit
            continue
    return None


def _windows_free() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.free)


def available_memory() -> int | None:
    """Free host memory in bytes, including reclaimable caches; None if it is unknown."""
    if sys.platform == "win32":
        return _windows_free()
    free: int | None = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    if free is None and hasattr(os, "sysconf"):
        try:  # macOS has no cheap query for free memory: assume half of the total
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (OSError, ValueError):
            free = None
    limits = [amount for amount in (free, _cgroup_free()) if amount is not None]
    return max(min(limits), 0) if limits else None


def check_size(width: int, height: int, upscale: int, *, max_pixels: int | None = None, name: str = "image") -> None:
    """Check the size of an image before it is decoded.

    width, height: of the input in pixels. upscale: the factor. max_pixels: limit on width * height; None derives it
    from the free memory. name: used in messages. Raises InputError above max_pixels, OutOfMemory if the result would
    not fit.
    """
    pixels = width * height
    if max_pixels is not None:
        if pixels > max_pixels:
            raise InputError(
                f"{name}: {width}x{height} are {pixels} pixels, the limit is {max_pixels}; "
                "raise max_pixels (--max-pixels) if the image is genuine"
            )
        return
    if pixels * upscale**2 < _UNCHECKED_PIXELS:
        return
    free = available_memory()
    needed = pixels * upscale**2 * BYTES_PER_PIXEL
    if free is not None and needed > free:
        raise OutOfMemory(
            f"{name}: {width}x{height} upscaled by {upscale} needs about {needed / 1e9:.1f} GB of host memory, "
            f"{free / 1e9:.1f} GB are free; split the image, or set max_pixels (--max-pixels) to try anyway"
        )
