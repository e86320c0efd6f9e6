"""Analysis of a kernel's PTX: global loads and stores with bytes per thread, by tensor; tensor-core instructions.

ptxas neither merges nor splits these accesses and maps every MMA to one instruction, so the SASS, whose disassembly
takes longer than compiling, is not needed. In PTX every address can be traced back to its kernel parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

PARAMETER = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
DEFINITION = re.compile(r"^\s*(?:@!?%p\d+ )?[a-z][\w.]*\s+(%rd\d+), (.*);", re.MULTILINE)
REGISTER = re.compile(r"%rd\d+")
LOAD = re.compile(r"ld\.global(?:\.[a-zA-Z_]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\s+[^\[;]*\[\s*(%rd\d+)")
STORE = re.compile(r"st\.global(?:\.[a-zA-Z_]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\s+\[\s*(%rd\d+)")
CP_ASYNC = re.compile(
    r"cp\.async\.c[ag]\.shared\.global[.\w:]*\s+\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(0x[0-9a-f]+|\d+)"
)
GLOBAL_ACCESS = re.compile(r"^.*\b(?:ld|st|red|atom)\.global\b|^.*\bcp\.async\b", re.MULTILINE)
WAIT = re.compile(r"^\s*griddepcontrol\.wait;", re.MULTILINE)
MMA = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
WGMMA = re.compile(r"\bwgmma\.mma_async\b")

Access = tuple[str, int]
"""The register that holds an address, and the bytes moved per thread."""


def accesses(ptx: str) -> tuple[list[Access], list[Access]]:
    """The instructions that load from global memory, and those that store to it."""
    loads = [(at, int(vector or 1) * int(bits) // 8) for vector, bits, at in LOAD.findall(ptx)]
    loads += [(at, int(size, 0)) for at, size in CP_ASYNC.findall(ptx)]
    return loads, [(at, int(vector or 1) * int(bits) // 8) for vector, bits, at in STORE.findall(ptx)]


def waits(ptx: str) -> bool:
    """Whether the kernel executes griddepcontrol.wait before its first access to global memory.

    Basic blocks are in program order, so instructions after the wait cannot run before it.
    """
    wait, access = WAIT.search(ptx), GLOBAL_ACCESS.search(ptx)
    return wait is not None and (access is None or wait.start() < access.start())


def widths(ptx: str, names: Sequence[str]) -> tuple[Mapping[str, list[int]], Mapping[str, list[int]]]:
    """(bytes per thread of each load, of each store), by tensor. names: of the kernel parameters, in order."""
    origins = _origins(ptx)
    loads: dict[str, list[int]] = {}
    stores: dict[str, list[int]] = {}
    for side, found in zip((loads, stores), accesses(ptx), strict=True):
        for register, width in found:
            for parameter in origins(register):
                if parameter < len(names):
                    side.setdefault(names[parameter], []).append(width)
    return loads, stores


def _origins(ptx: str) -> Callable[[str], set[int]]:
    """A function from a register to the indices of the parameters that its value is computed from."""
    parameters: dict[str, int] = {register: int(number) for register, number in PARAMETER.findall(ptx)}
    sources: dict[str, set[str]] = {}
    for register, operands in DEFINITION.findall(ptx):
        sources.setdefault(register, set()).update(REGISTER.findall(operands))

    def origins(register: str) -> set[int]:
        waiting, seen = [register], set()
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting += sources.get(one, ())
        return {parameters[one] for one in seen if one in parameters}

    return origins
