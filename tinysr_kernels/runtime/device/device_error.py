"""Errors of a GPU and its driver: told apart from all others, and named with what can be done.

After an illegal memory access and the like every later call of the process fails too (CUDA runtime API, "cudaError"):
whoever works on many images ends there instead of failing each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinysr_kernels.errors import DeviceError, TinySRError

FORKED = (
    "a GPU cannot be used in a process that was forked after CUDA was initialized; start processes with "
    "multiprocessing.get_context('spawn'), or compile the model in the child alone"
)
_MESSAGES = re.compile(
    r"CUDA error: |CUDA driver error: |Triton Error \[CUDA\]: "
    r"|CU(DNN|BLAS)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)
_REMEDIES = (
    (
        r"no kernel image|device kernel image is invalid",
        "this build of PyTorch has no code for the GPU: install one for its compute capability, or use device='cpu'",
    ),
    (r"busy or unavailable|exclusive", "another program holds the GPU: end it, or name another device"),
    (r"driver version is insufficient|PTX JIT|unsupported toolchain", "update the GPU's driver, or use device='cpu'"),
    (r"ECC|uncorrectable|fallen off|hardware", "the GPU reports a fault: see nvidia-smi, reset it or use another one"),
)
_OTHERWISE = (
    "the GPU cannot be used by this process any more: start it again; if it happens again, set CUDA_LAUNCH_BLOCKING=1 "
    "and report the message with the output of `tinysr env`"
)


def device_error(error: BaseException) -> DeviceError | None:
    """The error to raise for one of a GPU or its driver, None for any other. Not for out-of-memory, nor for ours."""
    if isinstance(error, torch.OutOfMemoryError | TinySRError) or not isinstance(error, RuntimeError):
        return None
    text = str(error).strip().partition("\n")[0]
    if "forked subprocess" in text:
        return DeviceError(FORKED)
    if "out of memory" in text or not (isinstance(error, torch.AcceleratorError) or _MESSAGES.search(text)):
        return None
    remedy = next((remedy for words, remedy in _REMEDIES if re.search(words, text, re.IGNORECASE)), _OTHERWISE)
    return DeviceError(f"{text}; {remedy}")


@contextmanager
def typed_device_error() -> Iterator[None]:
    """Turn errors of a GPU or its driver inside the block into DeviceError."""
    try:
        yield
    except RuntimeError as error:
        lost = device_error(error)
        if lost is None:
            raise
        raise lost from error
