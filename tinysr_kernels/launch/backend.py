"""The backends: `reference` runs the operators' plain PyTorch implementations on any device torch knows.

`triton` names handwritten kernels beneath the same operators; this version carries none yet and says so.
"""

from __future__ import annotations

from typing import Literal

from tinysr_kernels.errors import InputError

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "reference")


def choose_backend(backend: str) -> str:
    """The backend that runs when the caller asks for `backend`. InputError for an unknown or unavailable one."""
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {BACKENDS}, found {backend!r}")
    if backend == "triton":
        raise InputError("this version has no Triton kernels yet; use backend='auto' or backend='reference'")
    return "reference"
