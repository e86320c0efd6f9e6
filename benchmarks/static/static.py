"""`python -m benchmarks static`: compile every kernel ahead of time for every architecture, and read the machine code.

Each call of `network_calls.py` is planned for that architecture, by the heuristic or by a bundled file, and its
launches are compiled with the signature, constants and alignment that the launch itself would have. No GPU is needed.

Without --op, --arch or --dtype it walks, in the networks' own dtypes, every launch that the released networks make
for one 128x128 image, on all architectures; on sm_80 and sm_90 also these in the other two dtypes; on sm_90 also those
of all other networks, sizes and batches in float16. `--dtype` walks all calls in that dtype. What was compiled from
the very same source before is not compiled again: its report is taken from the results in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.hardware import resident_warps
from benchmarks.static.machine_code import Compiled, Variant, compile_all, variant
from benchmarks.static.network_calls import CALLS, main_calls
from benchmarks.subjects.networks import DTYPES
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import GPUS, Gpu, assume
from tinysr_kernels.launch.plan import Launch, Plan
from tinysr_kernels.ops import REGISTRY, Operator

SUMMARY = "Registers, spills, shared memory and instructions of every kernel on every architecture; needs no GPU."
RESULTS = Path(__file__).parents[1] / "results"
EVERY_DTYPE = (80, 90)
"""The architectures on which the released networks are compiled in all dtypes: Ampere's products, which Ada and
consumer Blackwell share, and Hopper's."""
EVERY_CALL = (90,)
"""The architectures on which the calls of other networks, sizes and batches are compiled too."""
HOT_BYTES = 1 << 20
"""Size from which on a tensor must move in wide instructions: below, latency takes the time."""


@dataclass
class Work:
    """A compilation, a name for it, and which tensors want 16-byte loads and stores, by argument (`_hot`)."""

    variant: Variant
    op: str
    config: str
    hot_loads: set[str] = field(default_factory=set)
    hot_stores: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant uses (`machine_code.Code`); None where it did not compile.

    digest: identifies what was compiled (`Variant.digest`). resident_warps: how many fit a multiprocessor.
    """

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
    kernel: str
    warps: int
    resident_warps: int | None
    wgmma: bool | None
    product_rows: int | None
    narrow_loads: tuple[str, ...] | None
    narrow_stores: tuple[str, ...] | None
    waits: bool | None
    faults: tuple[str, ...]
    error: str
    digest: str


def faults(code: Mapping[str, Any], one: Work) -> tuple[str, ...]:
    """What must not be. The one place that says so; `code` holds a Report's fields.

    It compiles, spills nothing and fits the shared memory. A product whose operands have 16 bits or fewer runs on
    tensor cores; on sm_90, with the 64 rows and 4 warps that they need, on warpgroup instructions. From sm_90 on, where
    a launch may begin before the one ahead of it has ended, it waits for that one before it touches memory.
    """
    if code["registers"] is None:
        return ("does not compile",)
    v = one.variant
    rules = (
        (code["spill_bytes"] > 0, f"spills {code['spill_bytes']} bytes"),
        (
            code["shared_bytes"] > code["shared_limit"],
            f"needs {code['shared_bytes']} bytes of shared memory of {code['shared_limit']}",
        ),
        (code["product_rows"] and not code["tensor_core"], "has a product without tensor-core instructions"),
        (
            v.arch == 90 and code["product_rows"] >= 64 and v.warps >= 4 and not code["wgmma"],
            f"has a product of {code['product_rows']} rows without wgmma",
        ),
        (v.arch >= 90 and not code["waits"], "touches memory before it waits for the launch before"),
    )
    return tuple(text for broken, text in rules if broken)


def narrow(code: Mapping[str, Any], one: Work) -> tuple[str, ...]:
    """Which large tensors move in small pieces: reported, as some layouts leave no choice (moments, narrow groups)."""
    found = [f"loads {name} in less than 16 bytes" for name in code["narrow_loads"] if name in one.hot_loads]
    found += [f"stores {name} in less than 16 bytes" for name in code["narrow_stores"] if name in one.hot_stores]
    return tuple(found)


def wanted(ops: Iterable[str], arch: int, dtypes: Iterable[str] | None) -> Iterator[tuple[str, str, Operator]]:
    """(operator, dtype, call) to compile for an architecture: all calls in `dtypes`, or the choice described above."""
    for op in ops:
        if GPUS[arch].capability < REGISTRY[op].capability:
            continue
        if dtypes is not None:
            yield from ((op, dtype, call) for dtype in dtypes for call in CALLS[op](DTYPES[dtype]))
            continue
        yield from ((op, dtype, call) for dtype, call in main_calls(op))
        if arch in EVERY_CALL:
            yield from ((op, "float16", call) for call in CALLS[op](DTYPES["float16"]))
        if arch in EVERY_DTYPE:
            for dtype in DTYPES:
                yield from ((op, dtype, call) for _, call in main_calls(op, dtype))


def work(ops: Iterable[str], archs: Iterable[int], dtypes: Iterable[str] | None = None) -> list[Work]:
    """Every distinct compilation that the calls lead to."""
    distinct: dict[Variant, Work] = {}
    ops = list(ops)
    for arch in archs:
        for op, dtype, call in wanted(ops, arch, dtypes):
            for gpu in cards(arch):
                with assume(gpu):
                    plan, choice = call.planned()
                for launch in plan.launches:
                    if isinstance(launch, Launch):
                        made = variant(arch, launch)
                        one = distinct.setdefault(made, Work(made, op, describe(choice.config, launch, dtype)))
                        loads, stores = _hot(plan, launch)
                        one.hot_loads |= loads
                        one.hot_stores |= stores
    return list(distinct.values())


def cards(arch: int) -> list[Gpu]:
    """The card that stands for an architecture, and those that have a bundled file of configurations."""
    found = [GPUS[arch]]
    for path in sorted(configs.BUNDLED.glob("*.json")):
        device = json.loads(path.read_text(encoding="utf-8"))["device"]
        gpu = Gpu(device["name"], tuple(device["capability"]), device["multiprocessors"])
        if gpu.arch == arch and gpu.name != found[0].name:
            found.append(gpu)
    return found


def _hot(plan: Plan, launch: Launch) -> tuple[set[str], set[str]]:
    """The arguments that hold a large tensor of whole 16-byte rows: those only read, and those written."""
    results = plan.result if isinstance(plan.result, tuple) else (plan.result,)
    given = {t.untyped_storage()._cdata for t in results}
    loads, stores = set(), set()
    for name, t in launch.arguments.items():
        if isinstance(t, Tensor) and t.nbytes >= HOT_BYTES and _whole_rows(t):
            scratch = name.startswith("scratch")
            if scratch or t.untyped_storage()._cdata in given:
                stores.add(name)
            if scratch or name not in stores:
                loads.add(name)
    return loads, stores


def _whole_rows(t: Tensor) -> bool:
    """Whether every row of t along the dimension that is dense in memory begins and ends on 16 bytes."""
    sides = [(extent, stride) for extent, stride in zip(t.shape, t.stride(), strict=True) if extent > 1]
    starts = [stride for _, stride in sides if stride > 1] + [t.storage_offset()]
    rows = [extent for extent, stride in sides if stride == 1]
    return bool(rows) and all(n * t.element_size() % 16 == 0 for n in (*starts, rows[0]))


def describe(config: Any, launch: Launch, dtype: str) -> str:
    """A short name: dtype, kernel, and the configuration's values by field."""
    fields = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
    return f"{dtype} {launch.kernel.function.__name__} {fields}"


def report(one: Work, compiled: Compiled) -> Report:
    """A compilation's outcome, judged."""
    v, limit = one.variant, GPUS[one.variant.arch].shared_limit
    names = [field.name for field in dataclasses.fields(Report)]
    code: dict[str, Any] = dict.fromkeys(names)
    if compiled.code is not None:
        code |= dataclasses.asdict(compiled.code)
        code["resident_warps"] = resident_warps(v.arch, v.warps, code["registers"], code["shared_bytes"])
    code |= {"shared_limit": limit, "op": one.op, "config": one.config, "arch": v.arch, "kernel": v.kernel}
    code |= {"warps": v.warps, "triton": compiled.triton, "seconds": compiled.seconds, "error": compiled.error}
    code |= {"faults": faults(code, one), "digest": v.digest}
    return Report(**{name: code[name] for name in names})


def known(path: Path) -> dict[str, Report]:
    """The reports of an earlier run by what was compiled; none where there is no such file, or an older form of it."""
    if not path.exists():
        return {}
    names = {field.name for field in dataclasses.fields(Report)}
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {one["digest"]: Report(**one) for one in entries if set(one) == names}


def again(one: Work, old: Report) -> Report:
    """An earlier report under its present name, judged anew."""
    return dataclasses.replace(old, op=one.op, config=one.config, faults=faults(vars(old), one))


def installed(folder: Path | None) -> str:
    """The version of the installed Triton, or of the one in a folder. ValueError where there is none."""
    found = distributions(name="triton", path=[str(folder)]) if folder else distributions(name="triton")
    for one in found:
        return one.version
    raise ValueError(f"no Triton is installed{f' in {folder}' if folder else ''}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--op", action="append", choices=sorted(CALLS), help="this operator alone (repeatable)")
    parser.add_argument("--arch", action="append", type=int, choices=sorted(GPUS), help="such as 90 (repeatable)")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="all calls in this one (repeatable)")
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all reports there")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="write them to benchmarks/results/ as well, beside what is kept there of others",
    )
    parser.add_argument("--fresh", action="store_true", help="compile also what the kept results hold")
    parser.add_argument("--triton", type=Path, metavar="DIR", help="another Triton: pip install --target DIR triton==V")


def main(options: argparse.Namespace) -> int:
    """Compile, print a table, write the JSON files. 1 if anything is at fault."""
    # What somebody tuned for himself is not checked here.
    os.environ[configs.USER_FOLDER] = os.devnull
    configs.forget()
    todo = work(options.op or CALLS, options.arch or GPUS, options.dtype)
    results = RESULTS / f"static-triton-{installed(options.triton)}.json"
    kept = {} if options.fresh else known(results)
    new = [one for one in todo if one.variant.digest not in kept]
    compiled = compile_all([one.variant for one in new], options.workers, options.triton)
    made = {one.variant: report(one, result) for one, result in zip(new, compiled, strict=True)}
    reports = [made.get(one.variant) or again(one, kept[one.variant.digest]) for one in todo]
    for line in table(reports):
        print(line)
    if options.json is not None:
        write(options.json, reports)
    if options.keep:
        # Of a part of the work, what is kept of the rest stays.
        whole = not (options.op or options.arch or options.dtype)
        mine = {one.digest for one in reports}
        write(results, [*reports, *(one for digest, one in known(results).items() if not whole and digest not in mine)])
    bad = [one for one in reports if one.faults]
    for one in bad:
        print(f"{one.op} sm_{one.arch} {one.config}: {', '.join(one.faults)} {one.error}", file=sys.stderr)
    small = sum(bool(r.registers and narrow(vars(r), one)) for r, one in zip(reports, todo, strict=True))
    print(f"{small} move a large tensor in pieces of less than 16 bytes")
    print(f"{len(reports)} kernels, {len(new)} of them compiled, {len(bad)} with faults")
    return 1 if bad else 0


def write(path: Path, reports: Iterable[Report]) -> None:
    """One report a line."""
    lines = ",\n ".join(json.dumps(dataclasses.asdict(one)) for one in reports)
    path.write_text(f"[\n {lines}\n]\n", encoding="utf-8")


def table(reports: list[Report]) -> list[str]:
    """One line a report: registers, warps that fit a multiprocessor, shared memory, instructions."""
    width = max((len(one.config) for one in reports), default=6)
    head = f"{'op':<20} {'arch':>4} {'config':<{width}} {'regs':>4} {'spill':>5} {'shared':>6} {'warps':>5}"
    rows = [f"{head} {'mma':<5} wide ld/st {'s':>5}"]
    for r in reports:
        numbers = [math.nan if v is None else v for v in (r.registers, r.spill_bytes, r.shared_bytes, r.resident_warps)]
        core = "wgmma" if r.wgmma else "mma" if r.tensor_core else "-"
        rows.append(
            f"{r.op:<20} {r.arch:>4} {r.config:<{width}} {numbers[0]:>4} {numbers[1]:>5} {numbers[2]:>6} "
            f"{numbers[3]:>5} {core:<5} {r.wide_loads!s:>4}/{r.wide_stores!s:<5} {r.seconds:>5.1f}"
        )
    return rows
