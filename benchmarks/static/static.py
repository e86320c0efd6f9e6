"""`python -m benchmarks static`: compile every kernel ahead of time for every architecture and check the machine code.

Each call of `network_calls.py` is planned for a GPU of that architecture, with the heuristic's or a bundled
configuration, and its launches are compiled with their signature, constants and alignment. No GPU is needed.

Without --op, --arch or --dtype it covers every launch of the released networks for one 128x128 image in their own
dtypes, on all architectures; on sm_80 and sm_90 also in the other two dtypes; on sm_90 also those of all other
networks, sizes and batches in float16. `--dtype` covers all calls in that dtype, `--released` only those networks in
their own dtypes. A variant whose source is unchanged is not compiled again: its report comes from benchmarks/results/.
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
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.device import GPUS, Gpu, assume
from tinysr_kernels.launch.json_file import BadFile, read_json
from tinysr_kernels.launch.plan import Launch, Plan
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.versions import NONE, triton_version

SUMMARY = "Registers, spills, shared memory and instructions of every kernel on every architecture; needs no GPU."
RESULTS = Path(__file__).parents[1] / "results"
EVERY_DTYPE = (80, 90)
"""The architectures for which the released networks are compiled in all dtypes: Ampere, whose MMA instructions Ada and
consumer Blackwell share, and Hopper."""
EVERY_CALL = (90,)
"""The architectures for which the calls of other networks, sizes and batches are compiled too."""
JSON: dict[str, Any] = {
    "str": str,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "tuple[str, ...]": list,
    "None": type(None),
}
"""What a file has for each type of a report's fields."""
LARGEST_FILE = 64 << 20
"""Bytes of a file of reports; one of all kernels has 1.3 MB."""
LARGE_BYTES = 1 << 20
"""Bytes from which a tensor should be accessed by wide instructions; below, latency dominates."""


@dataclass
class Compilation:
    """A compilation with a name; and the arguments that should be loaded and stored 16 bytes per thread (`_large`)."""

    variant: Variant
    op: str
    config: str
    large_loads: set[str] = field(default_factory=set)
    large_stores: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Report:
    """Resource usage of a variant (`machine_code.Code`), None if it did not compile, and its faults.

    digest: `Variant.digest`. resident_warps: warps per multiprocessor, limited by registers and shared memory.
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


def faults(code: Mapping[str, Any], one: Compilation) -> tuple[str, ...]:
    """The rules that a compiled kernel violates. `code` holds a Report's fields.

    A kernel must compile, not spill, and fit the shared memory. A dot with operands of 16 bits or fewer must use tensor
    cores; on sm_90, with at least 64 rows and 4 warps, wgmma. From sm_90 on, where programmatic dependent launch may
    start a kernel before the previous one has finished, it must wait before its first access to global memory.
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
        (code["product_rows"] and not code["tensor_core"], "has a dot without tensor-core instructions"),
        (
            v.arch == 90 and code["product_rows"] >= 64 and v.warps >= 4 and not code["wgmma"],
            f"has a dot of {code['product_rows']} rows without wgmma",
        ),
        (v.arch >= 90 and not code["waits"], "accesses global memory before griddepcontrol.wait"),
    )
    return tuple(text for violated, text in rules if violated)


def narrow(code: Mapping[str, Any], one: Compilation) -> tuple[str, ...]:
    """Large tensors accessed by narrow instructions: counted, no fault, as some layouts allow nothing else."""
    found = [f"loads {name} in less than 16 bytes" for name in code["narrow_loads"] if name in one.large_loads]
    found += [f"stores {name} in less than 16 bytes" for name in code["narrow_stores"] if name in one.large_stores]
    return tuple(found)


def calls_to_compile(
    ops: Iterable[str], arch: int, dtypes: Iterable[str] | None, released: bool = False
) -> Iterator[tuple[str, str, Operator]]:
    """(operator, dtype, call) to compile for an architecture: all calls in `dtypes`, or the default of the module.

    released: only the released networks' calls in their own dtypes.
    """
    for op in ops:
        if GPUS[arch].capability < REGISTRY[op].capability:
            continue
        if dtypes is not None:
            yield from ((op, dtype, call) for dtype in dtypes for call in CALLS[op](DTYPES[dtype]))
            continue
        yield from ((op, dtype, call) for dtype, call in main_calls(op))
        if released:
            continue
        if arch in EVERY_CALL:
            yield from ((op, "float16", call) for call in CALLS[op](DTYPES["float16"]))
        if arch in EVERY_DTYPE:
            for dtype in DTYPES:
                yield from ((op, dtype, call) for _, call in main_calls(op, dtype))


def compilations(
    ops: Iterable[str], archs: Iterable[int], dtypes: Iterable[str] | None = None, released: bool = False
) -> list[Compilation]:
    """Every distinct compilation of the calls; see `calls_to_compile`."""
    distinct: dict[Variant, Compilation] = {}
    ops = list(ops)
    for arch in archs:
        for op, dtype, call in calls_to_compile(ops, arch, dtypes, released):
            for gpu in gpus(arch):
                with assume(gpu):
                    plan, choice = call.planned()
                for launch in plan.launches:
                    if isinstance(launch, Launch):
                        made = variant(arch, launch)
                        one = distinct.setdefault(made, Compilation(made, op, describe(choice.config, launch, dtype)))
                        loads, stores = _large(plan, launch)
                        one.large_loads |= loads
                        one.large_stores |= stores
    return list(distinct.values())


def gpus(arch: int) -> list[Gpu]:
    """The GPU that represents an architecture, and those with a bundled configuration file."""
    found = [GPUS[arch]]
    for path in sorted(configs.BUNDLED.glob("*.json")):
        device = read_json(path, config_file.LARGEST)["device"]
        gpu = Gpu(device["name"], tuple(device["capability"]), device["multiprocessors"])
        if gpu.arch == arch and gpu.name != found[0].name:
            found.append(gpu)
    return found


def _large(plan: Plan, launch: Launch) -> tuple[set[str], set[str]]:
    """The arguments that are large tensors with rows of whole 16-byte units: those only read, and those written."""
    results = plan.result if isinstance(plan.result, tuple) else (plan.result,)
    outputs = {t.untyped_storage()._cdata for t in results}
    loads, stores = set(), set()
    for name, t in launch.arguments.items():
        if isinstance(t, Tensor) and t.nbytes >= LARGE_BYTES and _has_aligned_rows(t):
            scratch = name.startswith("scratch")
            if scratch or t.untyped_storage()._cdata in outputs:
                stores.add(name)
            if scratch or name not in stores:
                loads.add(name)
    return loads, stores


def _has_aligned_rows(t: Tensor) -> bool:
    """Whether every row of t, along its contiguous dimension, begins and ends on a 16-byte boundary."""
    sides = [(extent, stride) for extent, stride in zip(t.shape, t.stride(), strict=True) if extent > 1]
    starts = [stride for _, stride in sides if stride > 1] + [t.storage_offset()]
    rows = [extent for extent, stride in sides if stride == 1]
    return bool(rows) and all(n * t.element_size() % 16 == 0 for n in (*starts, rows[0]))


def describe(config: Any, launch: Launch, dtype: str) -> str:
    """A short name: dtype, kernel, and the configuration's fields."""
    fields = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
    return f"{dtype} {launch.kernel.function.__name__} {fields}"


def report(one: Compilation, compiled: Compiled) -> Report:
    """The report of a compilation, with its faults."""
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


def stored_reports(path: Path) -> list[Report]:
    """The reports in a file that `static --keep` wrote. BadFile unless all of them are whole, OSError if unreadable."""
    try:
        entries = read_json(path, LARGEST_FILE)
        if not isinstance(entries, list) or not all(map(_is_report, entries)):
            raise BadFile("is no list of reports")
    except BadFile as error:
        raise BadFile(f"{path} {error}; `make tables` writes it anew") from error
    return [Report(**one) for one in entries]


def _is_report(entry: Any) -> bool:
    kinds = {one.name: str(one.type) for one in dataclasses.fields(Report)}
    if not isinstance(entry, dict) or set(entry) != set(kinds):
        return False
    return all(any(isinstance(entry[name], JSON[one]) for one in kind.split(" | ")) for name, kind in kinds.items())


def read_reports(path: Path) -> dict[str, Report]:
    """The reports of an earlier run by digest; none if there is no file or they are not of this form."""
    try:
        return {one.digest: one for one in stored_reports(path)}
    except FileNotFoundError:
        return {}
    except (BadFile, OSError) as error:
        print(f"{error}; nothing of it is used", file=sys.stderr)
        return {}


def reuse(one: Compilation, old: Report) -> Report:
    """An earlier report with its current name, checked against the current rules."""
    return dataclasses.replace(old, op=one.op, config=one.config, faults=faults(vars(old), one))


def installed(folder: Path | None) -> str:
    """The version of the installed Triton, or of the one in a folder. ValueError if there is none."""
    if folder is None and triton_version() != NONE:
        return triton_version()
    for one in distributions(name="triton", path=[str(folder)]) if folder else ():
        return one.version
    raise ValueError(f"no Triton is installed{f' in {folder}' if folder else ''}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--op", action="append", choices=sorted(CALLS), help="only this operator (repeatable)")
    parser.add_argument(
        "--arch",
        action="append",
        type=int,
        choices=sorted(GPUS),
        help="only this architecture, such as 90 (repeatable)",
    )
    calls = parser.add_mutually_exclusive_group()
    calls.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="all calls in this dtype (repeatable)")
    calls.add_argument("--released", action="store_true", help="only the released networks, in their own dtypes")
    parser.add_argument("--workers", type=int, default=2, help="parallel compilations (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all reports to this file")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="also update the reports in benchmarks/results/",
    )
    parser.add_argument("--fresh", action="store_true", help="compile everything, ignoring benchmarks/results/")
    parser.add_argument("--triton", type=Path, metavar="DIR", help="another Triton: pip install --target DIR triton==V")


def main(options: argparse.Namespace) -> int:
    """Compile, print a table, write the JSON files. 1 if any kernel has a fault."""
    # Ignore the user's own configuration files.
    os.environ[configs.USER_FOLDER] = os.devnull
    configs.forget()
    todo = compilations(options.op or CALLS, options.arch or GPUS, options.dtype, options.released)
    results = RESULTS / f"static-triton-{installed(options.triton)}.json"
    stored = {} if options.fresh else read_reports(results)
    new = [one for one in todo if one.variant.digest not in stored]
    compiled = compile_all([one.variant for one in new], options.workers, options.triton)
    made = {one.variant: report(one, result) for one, result in zip(new, compiled, strict=True)}
    reports = [made.get(one.variant) or reuse(one, stored[one.variant.digest]) for one in todo]
    for line in table(reports):
        print(line)
    if options.json is not None:
        write_reports(options.json, reports)
    if options.keep:
        # After a partial run, reports of other variants stay.
        complete = not (options.op or options.arch or options.dtype or options.released)
        mine = {one.digest for one in reports}
        write_reports(
            results,
            [*reports, *(one for digest, one in read_reports(results).items() if not complete and digest not in mine)],
        )
    bad = [one for one in reports if one.faults]
    for one in bad:
        print(f"{one.op} sm_{one.arch} {one.config}: {', '.join(one.faults)} {one.error}", file=sys.stderr)
    small = sum(bool(r.registers and narrow(vars(r), one)) for r, one in zip(reports, todo, strict=True))
    print(f"{small} access a large tensor in units of less than 16 bytes per thread")
    print(f"{len(reports)} kernels, {len(new)} of them compiled, {len(bad)} with faults")
    return 1 if bad else 0


def write_reports(path: Path, reports: Iterable[Report]) -> None:
    """One report per line."""
    lines = ",\n ".join(json.dumps(dataclasses.asdict(one)) for one in reports)
    path.write_text(f"[\n {lines}\n]\n", encoding="utf-8")


def table(reports: list[Report]) -> list[str]:
    """One line per report: registers, spills, shared memory, resident warps, instructions, compile time."""
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
