"""Which device a model runs on: the CPU or an NVIDIA GPU; anything else is refused by what is true of it."""

from __future__ import annotations

from typing import Any

import torch

from tinysr_kernels.errors import DeviceError, InputError
from tinysr_kernels.runtime.device.device_error import FORKED

_LONGEST_QUOTE = 60


def choose_device(device: Any = None) -> torch.device:
    """The given device, checked, or cuda if present, else cpu.

    device: "cpu", "cuda", "cuda:N", a torch.device, or a number N of a GPU. Raises InputError naming what is wrong and
    what is available, DeviceError where a GPU is meant in a process that was forked after CUDA was initialized: there
    it seems to be absent.
    """
    if device is None and torch.cuda._is_in_bad_fork():
        raise DeviceError(f"{FORKED}; device='cpu' works here")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    quoted = repr(str(device) if isinstance(device, torch.device) else device)
    quoted = quoted if len(quoted) <= _LONGEST_QUOTE else f"{quoted[:_LONGEST_QUOTE]}..."
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise InputError(f"device must be a name such as 'cuda' or a torch.device, found {quoted}; {_available()}")
    try:
        # Without a GPU torch reads a number as some other accelerator's.
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"device {quoted} is unknown; {_available()}") from error
    if chosen.type == "cpu":
        if chosen.index not in (None, 0):
            raise InputError(f"device {quoted} does not exist: there is one 'cpu'; {_available()}")
        return torch.device("cpu")
    if chosen.type == "meta":
        raise InputError(f"device {quoted} holds no data; {_available()}")
    if chosen.type != "cuda":
        raise InputError(f"device {quoted} is not supported: networks run on the CPU and on CUDA GPUs; {_available()}")
    return _gpu(chosen, quoted)


def _gpu(device: torch.device, quoted: str) -> torch.device:
    """The CUDA device with its index, which is the current one's where none is given. quoted: what was asked for."""
    if torch.cuda._is_in_bad_fork():
        raise DeviceError(FORKED)
    if not torch.cuda.is_available():
        built = "torch finds no CUDA device here (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        if torch.version.cuda is None and torch.version.hip is None:
            built = "this torch is a CPU build (https://pytorch.org has those for GPUs)"
        raise InputError(f"device {quoted} was asked for, but {built}; {_available()}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if not 0 <= index < torch.cuda.device_count():
        raise InputError(f"device {quoted} does not exist; {_available()}")
    return torch.device("cuda", index)


def _available() -> str:
    """`available here: cpu, cuda:0`, for messages."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", *(f"cuda:{index}" for index in range(min(count, 16)))]
    return f"available here: {', '.join(names)}"
