"""Facts about the machine for bug reports, without private data: the home folder is written as ~."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from tinysr_kernels._version import __version__
from tinysr_kernels.first_use.machine import driver_version, triton_cache
from tinysr_kernels.runtime.device.host_memory import available_memory
from tinysr_kernels.versions import NONE, installed, triton_distributions

_PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors", "av", "tqdm", "nvidia-ml-py")
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "OMP_NUM_THREADS"),
    *("TINYSR_CACHE_DIR", "TINYSR_COMPILE_AHEAD", "TINYSR_CONFIG_DIR", "TINYSR_LAUNCH_GUARD", "TINYSR_SELF_CHECK"),
)


def without_home(text: str) -> str:
    """Replace the home folder, which contains the user's name, by ~."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _version(package: str) -> str:
    found = installed(package)
    brought = triton_distributions() if package == "triton" else {}
    if brought and set(brought) != {"triton"}:
        return f"{found} ({', '.join(f'{name} {number}' for name, number in brought.items())})"
    return "not installed" if found == NONE else found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _devices() -> dict[str, Any]:
    import torch

    from tinysr_kernels.launch.backend import obstacle

    facts: dict[str, Any] = {"cuda": torch.version.cuda or "none (CPU build)", "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["driver"] = driver_version()
        facts["cudnn"] = torch.backends.cudnn.version()
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            facts[f"gpu {index}"] = (
                f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs, "
                f"{gpu.total_memory / 2**30:.1f} GiB"
            )
            missing = obstacle(torch.device("cuda", index))
            facts[f"kernels on gpu {index}"] = f"no: {missing}; PyTorch's libraries compute" if missing else "yes"
    else:
        facts["gpu"] = "none usable by torch"
    return facts


def environment() -> dict[str, Any]:
    """Versions, processor, GPUs, free memory and relevant environment variables, by name."""
    free = available_memory()
    facts: dict[str, Any] = {
        "tinysr-kernels": __version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} threads",
        "free memory": "unknown" if free is None else f"{free / 2**30:.1f} GiB",
    }
    facts |= {package: _version(package) for package in _PACKAGES}
    facts |= _devices()
    facts["package folder"] = without_home(str(Path(__file__).resolve().parents[1]))
    facts["triton cache"] = without_home(str(triton_cache()))
    for name in _VARIABLES:
        if name in os.environ:
            facts[name] = without_home(os.environ[name])
    return facts
