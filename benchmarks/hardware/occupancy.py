"""How many warps of a kernel fit a multiprocessor, from the limits in the CUDA programming guide's table of compute
capabilities and the granularity at which registers and shared memory are given out (CUDA occupancy calculator)."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 1 << 16
REGISTER_UNIT = 256
"""Registers are given to a warp in multiples of this, from one of four equal shares of the file."""
SHARED_RESERVED = 1024
"""Bytes of shared memory that every program has for the system."""
SHARED_UNIT = 128


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: warps, programs and KiB of shared memory."""

    warps: int
    programs: int
    shared_kib: int


LIMITS = {
    80: Limits(64, 32, 164),
    86: Limits(48, 16, 100),
    89: Limits(48, 24, 100),
    90: Limits(64, 32, 228),
    100: Limits(64, 32, 228),
    120: Limits(48, 24, 100),
}


def resident_warps(arch: int, warps: int, registers: int, shared: int) -> int:
    """Warps on one multiprocessor at once; given: those of a program, its registers a thread, its bytes."""
    limits = LIMITS[arch]
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = 4 * (REGISTERS // 4 // per_warp) // warps
    per_program = -(-shared // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    by_shared = limits.shared_kib * 1024 // per_program
    return warps * min(limits.warps // warps, limits.programs, by_registers, by_shared)
