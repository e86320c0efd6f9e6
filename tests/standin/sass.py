"""Reading SASS, the machine code of a GPU: the order of its memory accesses, waits and barriers."""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]+ )?([A-Z][A-Z0-9_.]+)")
GLOBAL = re.compile(r"LDG|STG|LDGSTS|LD\.|ST\.|UBLKCP|UTMALDG|UTMASTG|RED|ATOM")
LOAD, STORE = "LDG", "STG"
WAIT = "ACQBULK"
"""griddepcontrol.wait: until the launch before has finished."""
EARLY = ("PREEXIT", "LAUNCHDEP")
"""griddepcontrol.launch_dependents."""
BARRIER = "BAR"


def instructions(sass: str) -> list[str]:
    """The names of the instructions, in the order of the code."""
    return INSTRUCTION.findall(sass)


def waits_first(names: list[str]) -> bool:
    """Whether the wait comes before every access to global memory; the next launch may begin from then on at most."""
    wait = next((i for i, name in enumerate(names) if name.startswith(WAIT)), None)
    others = (i for i, name in enumerate(names) if GLOBAL.match(name) or name.startswith(EARLY))
    return wait is not None and wait < next(others, len(names))


def barrier_before_reloading(names: list[str]) -> bool:
    """Whether a barrier of the block stands right before the last loop, which loads as many values as it stores."""
    last = max((i for i, name in enumerate(names) if name.startswith(BARRIER)), default=len(names))
    loads, stores = (sum(name.startswith(kind) for name in names[last:]) for kind in (LOAD, STORE))
    return loads == stores > 0
