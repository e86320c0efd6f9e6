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


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _cgroup() -> tuple[int, int] | None:
    """(limit, use) in bytes of the container's memory (cgroup v2 or v1); None without a limit."""
    for limit, used in _CGROUPS:
        try:
            return int(Path(limit).read_text()), int(Path(used).read_text())
        except (OSError, ValueError):  # no such file, or "max" for no limit
            continue
    return None


def _process_free() -> list[int]:
    """Bytes left under the limits of this process (ulimit -v, ulimit -d), for each that is set."""
    if sys.platform == "win32":
        return []
    import resource

    try:
        pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
    except (OSError, ValueError):
        return []
    page = os.sysconf("SC_PAGE_SIZE")
    used = {resource.RLIMIT_AS: pages[0] * page, resource.RLIMIT_DATA: pages[5] * page}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    return [limits[kind] - used[kind] for kind in used if limits[kind] != resource.RLIM_INFINITY]


def _windows(field: str) -> int | None:
    """A figure of GlobalMemoryStatusEx: "total" or "free" bytes of physical memory."""

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(getattr(status, field))


def available_memory() -> int | None:
    """Free host memory in bytes, including reclaimable caches; None if it is unknown.

    What is left under the limits of the container and of the process counts as well.
    """
    if sys.platform == "win32":
        return _windows("free")
    amounts = _process_free()
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    total = None if amounts else _physical_memory()
    if total is not None:  # macOS has no cheap query for free memory: assume half of the total
        amounts.append(total // 2)
    cgroup = _cgroup()
    if cgroup is not None:
        amounts.append(cgroup[0] - cgroup[1])
    return max(min(amounts), 0) if amounts else None


def total_memory() -> int | None:
    """Host memory in bytes, at most the container's limit; None if it is unknown. It does not vary with the load."""
    amounts = [_windows("total") if sys.platform == "win32" else _physical_memory(), (_cgroup() or (None,))[0]]
    return min((amount for amount in amounts if amount is not None), default=None)


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def check_size(
    width: int,
    height: int,
    upscale: int,
    *,
    result: tuple[int, int] | None = None,
    max_pixels: int | None = None,
    name: str = "image",
) -> None:
    """Check the size of an image before it is decoded.

    width, height: of the input in pixels. upscale: the factor. result: (width, height) of the result if the network's
    image is resized to it, which takes memory beside it. max_pixels: limit on width * height; None derives it from the
    free memory. name: used in messages. Raises InputError above max_pixels, OutOfMemory if the result would not fit.
    """
    pixels = width * height
    enlarged = pixels * upscale**2
    resized = 0 if result is None or result == (width * upscale, height * upscale) else result[0] * result[1]
    if max_pixels is not None:
        if pixels > max_pixels:
            raise InputError(
                f"{name}: {width}x{height} are {pixels} pixels, the limit is {max_pixels}; "
                "raise max_pixels (--max-pixels) if the image is genuine"
            )
        return
    if enlarged + resized < _UNCHECKED_PIXELS:
        return
    free = available_memory()
    needed = (enlarged + resized) * BYTES_PER_PIXEL
    if free is not None and needed > free:
        and_resized = f" and resized to {result[0]}x{result[1]}" if result is not None and resized else ""
        raise OutOfMemory(
            f"{name}: {width}x{height} upscaled by {upscale}{and_resized} needs about {needed / 1e9:.1f} GB of host "
            f"memory, {free / 1e9:.1f} GB are free; split the image, or set max_pixels (--max-pixels) to try anyway"
        )
