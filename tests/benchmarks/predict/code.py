"""Listings in nvdisasm's form, from instructions alone, and programs run from them."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.predict.emulate.disassembly import Instruction, parse
from benchmarks.predict.emulate.emulator import run
from benchmarks.predict.emulate.state import Step
from benchmarks.predict.emulate.values import Array

STALL, NO_WRITE, NO_READ = 1, 7, 7


def listing(text: str) -> str:
    """nvdisasm's text of instructions and labels, one a line; each stalls a cycle and sets no scoreboard."""
    lines, at = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        control = (STALL | NO_WRITE << 5 | NO_READ << 8) << 41
        lines += [f"        /*{at:04x}*/    {line} ;    /* 0x{0:016x} */", f"        /* 0x{control:016x} */"]
        at += 16
    return "\n".join(lines)


def code(text: str) -> list[Instruction]:
    """The instructions, EXIT added."""
    return parse(listing(text + "\nEXIT"))


def execute(
    text: str, constants: Mapping[int, int] | None = None, warps: int = 1
) -> tuple[list[tuple[Array, list[Step]]], list[Instruction]]:
    """The traces of one program, and its instructions."""
    instructions = code(text)
    groups, _ = run(instructions, constants or {}, warps, (3, 2, 1), 32 * warps)
    return groups, instructions


def stored(text: str, constants: Mapping[int, int] | None = None) -> list[int]:
    """What R0 holds per lane at the end, seen through the address of a store to shared memory."""
    groups, _ = execute(f"{text}\nSTS [R0], R1", constants)
    ((_, steps),) = groups
    access = next(access for _, access, _ in reversed(steps) if access is not None)
    assert access.address is not None
    return [int(one) for one in access.address[0]]
