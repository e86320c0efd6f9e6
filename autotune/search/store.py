"""Writes what was found into the device's file: merged with what is there, replaced whole, one writer at a time.

What an earlier run found stays, with the versions it was measured with; for the same bucket a new entry replaces the
one that it was measured against. If another process put a third one there meanwhile, the faster stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysr_kernels.launch import config_file
from tinysr_kernels.launch.config_file import SCHEMA, Facts, hashes_of, seal
from tinysr_kernels.launch.plan import Tunable


@dataclass(frozen=True)
class Found:
    """A new entry. beaten: the seal of the file's entry that was the incumbent, if it was one."""

    operator: type[Tunable]
    bucket: str
    config: Any
    time_us: float
    incumbent_us: float
    candidates: int
    beaten: str | None = None


def merge(path: Path, facts: Facts, found: Iterable[Found], pdl: bool | None = None) -> None:
    """Put the new entries into the file. A file that is damaged or of another device is set aside as NAME.old.

    pdl: whether programmatic dependent launch measured faster; what the file says stays where it is None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        content, obstacle = config_file.read(path)
        if obstacle or (content and config_file.conflicts(content, facts)):
            os.replace(path, f"{path}.old")
            content = {}
        merged = {**_header(facts), "operations": _kept(content, facts)}
        pdl = config_file.pdl(content) if pdl is None else pdl
        if pdl is not None:
            merged[config_file.PDL] = pdl
        for one in found:
            _enter(merged, facts, one)
        _replace(path, merged)


def seal_of(path: Path, op: str, bucket: str) -> str | None:
    """The seal of the file's entry for a bucket, if it has one."""
    raw: Any = config_file.read(path)[0]
    for name in ("operations", op, "entries", bucket, "seal"):
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw if isinstance(raw, str) else None


def export(path: Path, facts: Facts, operators: Mapping[str, type[Tunable]]) -> dict[str, Any]:
    """The file's content with only those entries that count here: what may be contributed."""
    content, _ = config_file.read(path)
    if not content or config_file.conflicts(content, facts):
        return {}
    there = dict(_items(content.get("operations")))
    operations: dict[str, Any] = {}
    for op, operator in operators.items():
        entries = _items(dict(_items(there.get(op))).get("entries"))
        good = {b: raw for b, raw in entries if config_file.entry(content, facts, operator, b)[0]}
        if good:
            operations[op] = {**hashes_of(operator), "entries": good}
    return {**content, "operations": operations}


def _header(facts: Facts) -> dict[str, Any]:
    gpu = facts.gpu
    return {
        "schema": SCHEMA,
        "device": {
            "name": gpu.name,
            "capability": list(gpu.capability),
            "multiprocessors": gpu.multiprocessors,
            "memory_mib": facts.memory_mib,
            "power_limit_w": facts.power_limit_w,
        },
        "driver": facts.driver,
        "triton": facts.triton,
        "torch": facts.torch,
    }


def _kept(content: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """The file's undamaged entries; those that other versions measured say so from now on."""
    old = {name: content.get(name) for name in ("driver", "triton", "torch")}
    changed = old != {name: getattr(facts, name) for name in old}
    operations: dict[str, Any] = {}
    for op, operation in _items(content.get("operations")):
        if not isinstance(operation, dict) or not all(isinstance(operation.get(h), str) for h in config_file.WHAT):
            continue
        hashes = {name: operation[name] for name in config_file.WHAT}
        entries = {}
        for bucket, raw in _items(operation.get("entries")):
            if not isinstance(raw, dict) or raw.get("seal") != seal(op, bucket, hashes, raw):
                continue
            entries[bucket] = raw
            if changed and "environment" not in raw:
                entries[bucket] = _sealed(op, bucket, hashes, {**raw, "environment": old})
        operations[op] = {**hashes, "entries": entries}
    return operations


def _enter(merged: dict[str, Any], facts: Facts, one: Found) -> None:
    hashes = hashes_of(one.operator)
    operation = merged["operations"].get(one.operator.name)
    if operation is None or any(operation[name] != value for name, value in hashes.items()):
        # Entries of other source count nowhere.
        operation = merged["operations"][one.operator.name] = {**hashes, "entries": {}}
    there = operation["entries"].get(one.bucket)
    if there is not None and there["seal"] != one.beaten:
        entry, _ = config_file.entry(merged, facts, one.operator, one.bucket)
        if entry is not None and entry.time_us <= one.time_us:
            return
    raw = {
        "config": dataclasses.asdict(one.config),
        "time_us": round(one.time_us, 4),
        "incumbent_us": round(one.incumbent_us, 4),
        "candidates": one.candidates,
    }
    operation["entries"][one.bucket] = _sealed(one.operator.name, one.bucket, hashes, raw)


def _sealed(op: str, bucket: str, hashes: dict[str, str], raw: dict[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in raw.items() if name != "seal"}
    return {**content, "seal": seal(op, bucket, hashes, content)}


def _items(value: object) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The lock is on a file of its own, because the file itself is replaced."""
    file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write beside and rename: a reader sees the old file or the new one. Only the holder of the lock gets here."""
    beside = Path(f"{path}.part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
