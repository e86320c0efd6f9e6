"""What kernels need of a machine besides PyTorch, each as found here: driver, compiler, headers, folders."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

from tinysr_kernels.atomic import has_room

CACHE_BYTES = 64 << 20
"""What the compiled kernels of one network take in Triton's cache, rounded up."""


@functools.cache
def driver_version() -> str:
    """The NVIDIA driver's version, as "580.65.06"; where only its interface's is known, "CUDA 13.0"; or "unknown"."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return _version_of_nvml() or _version_of_interface() or "unknown"


def _version_of_nvml() -> str:
    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        try:
            found = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""
    return found.decode() if isinstance(found, bytes) else str(found)


def _version_of_interface() -> str:
    import torch

    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # absent from CPU builds
    number = ask() if ask is not None else 0
    return f"CUDA {number // 1000}.{number % 1000 // 10}" if number else ""


def has_nvidia_driver() -> bool:
    """Whether the system has NVIDIA's driver, hence most likely a GPU, whatever torch says. Nothing is started."""
    if os.name == "nt":  # the driver brings it
        return shutil.which("nvidia-smi") is not None
    return any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")))


def c_compiler() -> str:
    """The C compiler that Triton would call: $CC, else gcc or clang; empty where there is none."""
    named = os.environ.get("CC")
    names = (named,) if named else ("gcc", "clang") if os.name != "nt" else ("cl", "gcc", "clang", "tcc")
    return next((found for name in names if (found := shutil.which(name))), "")


def python_headers() -> str:
    """The folder of Python.h; empty where it is missing."""
    folder = sysconfig.get_paths()["include"]
    return folder if os.path.isfile(os.path.join(folder, "Python.h")) else ""


def triton_cache() -> Path:
    """The folder of Triton's compiled kernels."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))


def obstacle_to_writing(folder: Path, size: int = CACHE_BYTES) -> str:
    """Why files of `size` bytes cannot be written to a folder, or made with it if it is not there; or nothing."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is no folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "not writable"
    return "" if has_room(folder, size) else f"less than {size >> 20} MiB are free"


def ptxas() -> str:
    """The assembler that Triton would call: $TRITON_PTXAS_PATH, else the one inside Triton; empty if it is missing."""
    named = os.environ.get("TRITON_PTXAS_PATH")
    if named:
        return named if os.access(named, os.X_OK) else ""
    spec = importlib.util.find_spec("triton")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [Path(root, "backends", "nvidia", "bin", name) for root in roots for name in ("ptxas", "ptxas.exe")]
    return next((str(path) for path in found if os.access(path, os.X_OK)), "")


def triton_of_torch() -> str:
    """The version of Triton that this torch was built for; empty where its metadata name none, as of CPU builds."""
    try:
        wanted = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = (re.match(r"(?:pytorch-)?triton\s*==\s*([\w.]+)", line) for line in wanted)
    return next((match[1] for match in found if match), "")
