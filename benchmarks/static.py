"""`python -m benchmarks static`: compile every kernel ahead of time for every architecture, and read the machine code.

Each call of `calls.py` is planned as on that architecture's card, and its launches are compiled with the signature,
constants and alignment that the launch itself would have. No GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.calls import CALLS
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY

SUMMARY = "Registers, spills, shared memory and instructions of every kernel on every architecture; needs no GPU."
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
ALIGNED = [["tt.divisibility", 16]]
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|UTC[A-Z]*MMA|QMMA|OMMA)\b")
WIDE_LOAD = re.compile(r"\b(?:LDG\.E(?:\.\w+)*\.128|LDGSTS\.E(?:\.\w+)*\.128|UTMALDG|UBLKCP)\b")
WIDE_STORE = re.compile(r"\b(?:STG\.E(?:\.\w+)*\.128|UTMASTG)\b")


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel by module and name, its arguments as Triton specialises them, and the target."""

    op: str
    config: str
    arch: int
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant uses; counts are of instructions. None where it did not compile."""

    op: str
    config: str
    arch: int
    triton: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    shared_limit: int
    tensor_core: bool | None
    wide_loads: int | None
    wide_stores: int | None
    seconds: float

    @property
    def faults(self) -> list[str]:
        """What must not be: nothing for clean code."""
        if self.registers is None or self.spill_bytes is None or self.shared_bytes is None:
            return ["does not compile"]
        found = [f"spills {self.spill_bytes} bytes"] if self.spill_bytes else []
        if self.shared_bytes > self.shared_limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory of {self.shared_limit}")
        return found


def variant(op: str, config: str, arch: int, launch: Launch) -> Variant:
    """A launch as Triton would specialise it: None and 1 are constants, multiples of 16 and tensors are aligned."""
    signature, constants, aligned = {}, {}, []
    for name in launch.kernel.names:
        value = launch.arguments[name]
        kind = _kind(value)
        if name in launch.kernel.constants or value is None or (isinstance(value, int) and value == 1):
            constants[name], kind = value, "constexpr"
        elif _is_aligned(value):
            aligned.append(name)
        signature[name] = kind
    function = launch.kernel.function
    return Variant(
        op,
        config,
        arch,
        function.__module__,
        function.__qualname__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        launch.warps,
        launch.stages,
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return "constexpr"


def _is_aligned(value: Any) -> bool:
    """Tensors begin on 16 bytes, as torch allocates them, unless they are views that begin elsewhere."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def describe(config: Any, launch: Launch, dtype: str) -> str:
    """A short name: dtype, kernel, and the configuration's values by field."""
    fields = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
    return f"{dtype} {launch.kernel.function.__name__} {fields}"


def variants(ops: Iterable[str], archs: Iterable[int], dtypes: Iterable[str]) -> list[Variant]:
    """Every distinct compilation that the networks' calls lead to."""
    found: dict[Variant, None] = {}
    for arch in archs:
        with assume(GPUS[arch]):
            for op in ops:
                for dtype in dtypes:
                    for arguments in CALLS[op](DTYPES[dtype]):
                        plan, choice = REGISTRY[op].plan(**arguments)
                        for launch in (one for one in plan.launches if isinstance(one, Launch)):
                            found[variant(op, describe(choice.config, launch, dtype), arch, launch)] = None
    return list(found)


def compile_variant(v: Variant) -> tuple[Report, str]:
    """Compile and read the machine code; the second value says why where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(v.module), v.kernel).made
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(v.signature),
        constexprs={(index[name],): value for name, value in v.constants},
        attrs={(index[name],): ALIGNED for name in v.aligned},
    )
    limit = GPUS[v.arch].shared_limit
    started = time.perf_counter()
    try:
        options = {"num_warps": v.warps, "num_stages": v.stages}
        built = triton.compile(source, target=GPUTarget("cuda", v.arch, 32), options=options)
    except (triton.TritonError, RuntimeError, ValueError, TypeError) as error:
        nothing: Mapping[str, Any] = dict.fromkeys(
            ("registers", "spill_bytes", "shared_bytes", "tensor_core", "wide_loads", "wide_stores")
        )
        seconds = time.perf_counter() - started
        return Report(v.op, v.config, v.arch, triton.__version__, shared_limit=limit, seconds=seconds, **nothing), str(
            error
        )
    seconds = time.perf_counter() - started
    code = read_code(built.asm["cubin"])
    report = Report(
        v.op, v.config, v.arch, triton.__version__, shared_bytes=built.metadata.shared, shared_limit=limit,
        seconds=round(seconds, 3), **code,
    )  # fmt: skip
    return report, ""


def read_code(cubin: bytes) -> dict[str, Any]:
    """Registers, bytes of stack (where spills go) and kinds of instructions of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tool, "--dump-resource-usage", file.name)
        text = _run(tool, "--dump-sass", file.name)
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    local = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return {
        "registers": max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        "spill_bytes": max(stack, 4 * local),
        "tensor_core": bool(TENSOR_CORE.search(text)),
        "wide_loads": len(WIDE_LOAD.findall(text)),
        "wide_stores": len(WIDE_STORE.findall(text)),
    }


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def compile_all(todo: list[Variant], workers: int) -> list[tuple[Report, str]]:
    """Compile in worker processes, which leave this one's choice between compiler and interpreter alone."""
    context = multiprocessing.get_context("spawn")
    workers = min(workers, max(len(todo), 1))
    with ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_start_worker) as pool:
        return list(pool.map(compile_variant, todo))


def _start_worker() -> None:
    """Before Triton is imported: compile, and past Triton's cache, which would hide the time."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--op", action="append", choices=sorted(CALLS), help="this operator alone (repeatable)")
    parser.add_argument("--arch", action="append", type=int, choices=sorted(GPUS), help="such as 90 (repeatable)")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="of the tensors (repeatable)")
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all reports there")


def main(options: argparse.Namespace) -> int:
    """Compile, print a table, write the JSON file. 1 if anything spills, fails or needs too much shared memory."""
    todo = variants(options.op or CALLS, options.arch or GPUS, options.dtype or DTYPES)
    done = compile_all(todo, options.workers)
    reports = [report for report, _ in done]
    for line in table(reports):
        print(line)
    if options.json:
        text = json.dumps([dataclasses.asdict(report) for report in reports], indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    bad = [(report, why) for report, why in done if report.faults]
    for report, why in bad:
        print(f"{report.op} sm_{report.arch} {report.config}: {', '.join(report.faults)} {why}", file=sys.stderr)
    print(f"{len(reports)} kernels compiled, {len(bad)} with faults")
    return 1 if bad else 0


def table(reports: list[Report]) -> list[str]:
    """One line a report: registers, warps that fit a multiprocessor by registers, shared memory, instructions."""
    width = max((len(report.config) for report in reports), default=6)
    head = f"{'op':<12} {'arch':>4} {'config':<{width}} {'regs':>4} {'spill':>5} {'shared':>6} tc wide ld/st {'s':>5}"
    rows = [head]
    for r in reports:
        numbers = [math.nan if v is None else v for v in (r.registers, r.spill_bytes, r.shared_bytes)]
        rows.append(
            f"{r.op:<12} {r.arch:>4} {r.config:<{width}} {numbers[0]:>4} {numbers[1]:>5} {numbers[2]:>6} "
            f"{'y' if r.tensor_core else '-':>2} {r.wide_loads!s:>4}/{r.wide_stores!s:<4} {r.seconds:>5.1f}"
        )
    return rows
