"""Machine code of variants, compiled once and kept below build/."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.predict.emulate.disassembly import dump
from benchmarks.static.machine_code import Variant, build, compile_all

FOLDER = Path(__file__).parents[2] / "build" / "predict"


@dataclass(frozen=True)
class Cubin:
    """A compiled variant: registers per thread, bytes of shared memory per program, bytes spilled per thread."""

    code: bytes
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
    """The variant's machine code, compiled if it is not there yet. RuntimeError or triton.TritonError if it cannot."""
    path = _path(v)
    facts = path.with_suffix(".json")
    if not facts.exists():
        keep(v)
    return Cubin(path.read_bytes(), **json.loads(facts.read_text(encoding="utf-8")))


def keep(v: Variant) -> None:
    """Compile and keep a variant."""
    built = build(v)
    code = built.asm["cubin"]
    usage = dump(code, "cuobjdump", "--dump-resource-usage")
    registers, spilled = (max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK"))
    made = asdict(Cubin(b"", registers, built.metadata.shared, spilled))
    del made["code"]
    path = _path(v)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(code)
    path.with_suffix(".json").write_text(json.dumps(made), encoding="utf-8")  # last: it says that both are whole


def keep_all(variants: Iterable[Variant], workers: int) -> None:
    """Compile and keep those that are not there yet, in this many processes."""
    missing = [v for v in dict.fromkeys(variants) if not _path(v).with_suffix(".json").exists()]
    compile_all(missing, workers, function=keep)
