"""Machine code of variants, compiled once and kept below build/."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.predict.emulate.disassembly import dump
from benchmarks.static.machine_code import Variant, build

FOLDER = Path(__file__).parents[2] / "build" / "predict"


@dataclass(frozen=True)
class Cubin:
    """A compiled variant: nvdisasm's listing; registers and spilled bytes per thread; shared bytes per program."""

    listing: str
    registers: int
    shared: int
    spilled: int


@functools.cache
def triton_version() -> str:
    """The installed Triton's version, which decides the machine code together with the variant."""
    import triton

    return triton.__version__


def _path(v: Variant) -> Path:
    return FOLDER / "cubins" / triton_version() / f"sm_{v.arch}-{v.kernel}-{v.digest}.cubin"


def cubin(v: Variant) -> Cubin:
    """The variant's machine code, compiled unless it is there. RuntimeError or triton.TritonError where that fails."""
    path = _path(v)
    facts, listing = path.with_suffix(".json"), path.with_suffix(".sass.gz")
    if not facts.exists():
        _compile(v, path)
    if not listing.exists():  # nvdisasm takes longer than all the rest of a prediction
        _write(listing, gzip.compress(dump(path.read_bytes(), "nvdisasm", "-c", "-hex").encode()))
    text = gzip.decompress(listing.read_bytes()).decode()
    return Cubin(text, **json.loads(facts.read_text(encoding="utf-8")))


def _compile(v: Variant, path: Path) -> None:
    built = build(v)
    code = built.asm["cubin"]
    usage = dump(code, "cuobjdump", "--dump-resource-usage")
    registers, spilled = (max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK"))
    facts = {"registers": registers, "shared": built.metadata.shared, "spilled": spilled}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, code)
    _write(path.with_suffix(".json"), json.dumps(facts).encode())


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, though several processes may write the same."""
    made = path.with_name(f"{path.name}.{os.getpid()}")
    made.write_bytes(content)
    made.replace(path)
