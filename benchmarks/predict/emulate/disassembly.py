"""Machine code as instructions with operands and control bits, parsed from the text of nvdisasm.

An instruction is 128 bits. From sm_70 on, bits 105 to 125 say how the hardware schedules it (Jia et al., "Dissecting
the NVIDIA Volta GPU architecture via microbenchmarking", arXiv:1804.06826, section 2.1): 4 bits of stall cycles, a
yield flag, the scoreboard that its result releases (7: none), the scoreboard that its source registers release (7:
none), and a mask of six scoreboards that it waits for.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NO_SCOREBOARD = 7
MASK = 0xFFFFFFFF

LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
FIRST_HALF = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);?\s*/\* 0x[0-9a-f]{16} \*/")
SECOND_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
GUARD = re.compile(r"@(!?U?P[T\d])\s+(.*)")
TARGET = re.compile(r"`\(([.$\w]+)\)")
PART = re.compile(r"(.*)\.(H0_H0|H1_H1|H0_H1|H1_H0|B[0-3]|U32|X4|X8|X16|64|F32|U16)$")
REGISTER = re.compile(r"(UR|UP|R|P)(\d+)$")
CONSTANT = re.compile(r"c\[(?:0x0)\]\[(0x[0-9a-f]+)\]$")
NUMBER = re.compile(r"-?(0x[0-9a-f]+|\d|\.\d)|[+-]?(INF|QNAN|SNAN)")
FILES = {"R": "R", "UR": "UR", "P": "P", "UP": "UP"}


class UnknownCode(Exception):
    """Machine code that the emulator does not know: nothing is predicted from a guess."""


@dataclass(frozen=True)
class Operand:
    """One operand. file: "R", "UR", "P" or "UP" (registers and predicates, index -1 for RZ and PT), "constant" (index:
    the byte in bank 0, -1 for any other address), "number" (index: its 32 bits), "memory" (terms: what the address is
    the sum of) or "other".

    negated, inverted, absolute: -x or !p, ~x, |x|. part: the half, byte or scale after the dot. text: as printed.
    """

    file: str
    index: int
    text: str
    negated: bool = False
    inverted: bool = False
    absolute: bool = False
    part: str = ""
    terms: tuple[Operand, ...] = ()

    @property
    def is_predicate(self) -> bool:
        """Whether it is a predicate register."""
        return self.file in ("P", "UP")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard base.modifiers operands`; the index of its branch target, and its control bits."""

    text: str
    base: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Operand | None = None
    target: int | None = None
    stall: int = 1
    write_barrier: int = NO_SCOREBOARD
    read_barrier: int = NO_SCOREBOARD
    wait: int = 0
    flags: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flags", frozenset(self.modifiers))


def dump(cubin: bytes, tool: str, *options: str) -> str:
    """What one of the CUDA binary utilities that Triton ships says of a cubin."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing by `nvdisasm -c -hex`."""
    texts: list[str] = []
    controls: list[int] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(texts)
        elif found := FIRST_HALF.search(line):
            texts.append(found[2].strip().rstrip(";").strip())
        elif found := SECOND_HALF.match(line):
            controls.append(int(found[1], 16) >> 41)
    if not texts or len(texts) != len(controls):
        raise UnknownCode(f"the listing has {len(texts)} instructions and {len(controls)} control words")
    return [_instruction(text, control, labels) for text, control in zip(texts, controls, strict=True)]


def _instruction(text: str, control: int, labels: dict[str, int]) -> Instruction:
    found = GUARD.match(text)
    guard, body = (operand(found[1]), found[2]) if found else (None, text)
    name, _, rest = body.partition(" ")
    base, *modifiers = name.split(".")
    target = TARGET.search(text)
    return Instruction(
        text=text,
        base=base,
        modifiers=tuple(modifiers),
        operands=tuple(operand(one) for one in split(rest)),
        guard=guard,
        target=labels.get(target[1]) if target else None,
        stall=control & 15,
        write_barrier=control >> 5 & 7,
        read_barrier=control >> 8 & 7,
        wait=control >> 11 & 63,
    )


def split(operands: str) -> Iterable[str]:
    """The operands of "a, b[c, d], e", split at the commas outside brackets."""
    depth, current = 0, ""
    for character in operands + ",":
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            if current.strip():
                yield current.strip()
            current = ""
        else:
            current += character


@functools.cache
def operand(text: str) -> Operand:
    """One operand from its text."""
    body = text.replace(".reuse", "")
    if body.endswith("]") and not body.startswith(("c[", "-c[", "|c[", "-|c[")):
        inner = re.sub(r"^g?desc\[[^\]]*\]", "", body)
        terms = tuple(operand(one.strip()) for one in inner.strip("[]").split("+") if one.strip())
        return Operand("memory", 0, body, terms=terms)
    if NUMBER.match(body):
        return Operand("number", _bits(body), body)
    negated = body.startswith(("-", "!"))
    inverted = body.startswith("~")
    body = body.lstrip("-!~")
    absolute = body.startswith("|")
    body, part = body.strip("|"), ""
    if found := PART.match(body):
        body, part = found[1], found[2]
    file, index = _place(body.strip("|"))
    return Operand(file, index, text, negated, inverted, absolute, part)


def _place(body: str) -> tuple[str, int]:
    if body in ("RZ", "SRZ"):
        return "R", -1
    if body == "URZ":
        return "UR", -1
    if body in ("PT", "UPT"):
        return body[:-1], -1
    if found := REGISTER.match(body):
        return FILES[found[1]], int(found[2])
    if found := CONSTANT.match(body):
        return "constant", int(found[1], 16)
    return ("constant", -1) if body.startswith("c[") else ("other", -1)


def _bits(text: str) -> int:
    """The 32 bits of a number: integers are printed in hexadecimal, everything else is a float32."""
    if "0x" in text:
        return int(text, 16) & MASK
    if "NAN" in text:
        return 0x7FFFFFFF
    return int(np.float32(text.replace("INF", "inf")).view(np.uint32))
