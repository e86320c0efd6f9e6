"""Whether a launch configuration from a file can be launched: what the tuner could have measured, and nothing larger.

The names of the fields (`block_m`, `num_warps`, ...) say what they are: sizes have "block" in their name, or are
`tile_width`; every other integer counts something, such as parts (`split_k`) or rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Tunable

LARGEST = 1 << 16
"""Of any field. Tiles have at most 2**20 elements in Triton."""
LEAST_TILE = 16
"""The narrowest operand of a matmul in Triton."""
MOST_WARPS = 32
"""1024 threads per block (CUDA C++ Programming Guide, technical specifications)."""
MOST_STAGES = 8
MOST_PARTS = 16
"""Counts up to this one are accepted even where the call's own space has smaller ones: calls of a bucket differ in
shape, and with it in the number of parts that suits them."""


def of_fields(fields: Mapping[str, Any]) -> str:
    """Why no call can be launched with these fields, or nothing. 0 stands for what a form has no use for."""
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if not 0 <= value <= LARGEST:
            return f"{name} must be from 0 to {LARGEST}, found {_number(value)}"
        if (_is_size(name) or name.endswith("num_warps")) and value & (value - 1):
            return f"{name} must be a power of two, found {value}"
        most = {"num_warps": MOST_WARPS, "num_stages": MOST_STAGES}.get(name.removeprefix("norm_"), LARGEST)
        if value > most:
            return f"{name} must be at most {most}, found {value}"
    return ""


def of_call(call: Tunable, config: Any, gpu: Gpu) -> str:
    """Why this call cannot be launched with the configuration on this GPU, or nothing.

    The configuration must need no more than the heuristic's or one of the operator's own search space, which ends where
    registers and shared memory do; the operator and its launches must accept it.
    """
    if not any(_covers(vars(known), vars(config)) for known in _known(call, gpu)):
        return "is outside of the search space"
    try:
        call.on_meta().plan(config)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        return str(error)[:200]
    return ""


def _known(call: Tunable, gpu: Gpu) -> Iterator[Any]:
    yield call.heuristic(gpu)
    yield from call.space(gpu)


def _covers(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a configuration needs no more than a known one: as many threads or more, tiles no larger."""
    return all(_field_covers(name, value, wanted[name]) for name, value in known.items())


def _field_covers(name: str, known: Any, wanted: Any) -> bool:
    if known == wanted:
        return True
    if isinstance(known, (str, bool)) or wanted == 0 or known == 0:
        return False
    if name.endswith("num_warps"):
        return bool(wanted > known)
    if name.endswith("num_stages"):
        return bool(wanted < known)
    if "block" in name:
        return bool(min(known, LEAST_TILE) <= wanted < known)
    return bool(wanted <= max(2 * known, MOST_PARTS))


def _is_size(name: str) -> bool:
    return "block" in name or name == "tile_width"


def _number(value: int) -> str:
    """A number for a message, also one of thousands of digits."""
    return str(value) if abs(value) < 10**18 else f"one of {value.bit_length()} bits"
