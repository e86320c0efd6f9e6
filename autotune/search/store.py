"""Writes tuned entries into the device's configuration file: merged, replaced atomically, under a lock.

Entries of earlier runs stay, with the versions they were measured with. A new entry replaces the entry of its bucket
that it was measured against. If another process has written a third one meanwhile, the faster one stays.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from autotune.items.log import LOCK_SECONDS
from tinysr_kernels.launch import config_file
from tinysr_kernels.launch.config_file import SCHEMA, Facts, hashes_of, is_sealed, seal
from tinysr_kernels.launch.plan import Tunable


@dataclass(frozen=True)
class NewEntry:
    """A new entry. replaces: the seal of the incumbent, if that was an entry of this file."""

    operator: type[Tunable]
    bucket: str
    config: Any
    time_us: float
    incumbent_us: float
    candidates: int
    replaces: str | None = None


def merge(path: Path, facts: Facts, entries: Iterable[NewEntry], pdl: bool | None = None) -> None:
    """Merge the new entries into the file. A file that is invalid or of another device is renamed to NAME.old.

    A link in the file's place is read, and replaced by a file: nothing but the user's own folder is written to. pdl:
    whether programmatic dependent launch measured faster; None leaves the file's value as it is. OSError if another
    process holds the lock for a minute, or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # On a separate file, because the file itself is replaced.
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        content, obstacle = config_file.read(path)
        if obstacle or (content and config_file.conflicts(content, facts)):
            os.replace(path, _free_name(path))
            content = {}
        merged = {**_header(facts), "operations": _valid_operations(content, facts)}
        pdl = config_file.pdl(content) if pdl is None else pdl
        if pdl is not None:
            merged[config_file.PDL] = pdl
        for one in entries:
            _add(merged, facts, one)
        _replace(path, merged)


def write_predicted(path: Path, facts: Facts, entries: Iterable[NewEntry]) -> None:
    """Write a file of predicted configurations in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**_header(facts), config_file.PREDICTED: True, "operations": {}}
    for one in entries:
        _add(content, facts, one)
    _replace(path, content)


def seal_of(path: Path, op: str, bucket: str) -> str | None:
    """The seal of the file's entry for a bucket, if it has one."""
    raw: Any = config_file.read(path)[0]
    for name in ("operations", op, "entries", bucket, "seal"):
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw if isinstance(raw, str) else None


def export(path: Path, facts: Facts, operators: Mapping[str, type[Tunable]]) -> dict[str, Any]:
    """The file's content reduced to the entries that are valid for this device and version, to contribute."""
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
    header = {name: content[name] for name in (*_header(facts), config_file.PDL) if name in content}
    return {**header, "operations": operations}


def _free_name(path: Path) -> str:
    """NAME.old, or NAME.old.2 and so on if that is there: an earlier one may hold a user's entries."""
    names = itertools.chain([f"{path}.old"], (f"{path}.old.{n}" for n in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


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


def _valid_operations(content: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """The file's valid entries. Those measured with other versions get an `environment` that names these."""
    found = {name: content.get(name) for name in ("driver", "triton", "torch")}
    old = {name: value if isinstance(value, str) else None for name, value in found.items()}
    changed = old != {name: getattr(facts, name) for name in old}
    operations: dict[str, Any] = {}
    for op, operation in _items(content.get("operations")):
        if not isinstance(operation, dict) or not all(isinstance(operation.get(h), str) for h in config_file.WHAT):
            continue
        hashes = {name: operation[name] for name in config_file.WHAT}
        entries = {}
        for bucket, raw in _items(operation.get("entries")):
            if not isinstance(raw, dict) or not is_sealed(op, bucket, hashes, raw):
                continue
            entries[bucket] = raw
            if changed and "environment" not in raw:
                entries[bucket] = _sealed(op, bucket, hashes, {**raw, "environment": old})
        operations[op] = {**hashes, "entries": entries}
    return operations


def _add(merged: dict[str, Any], facts: Facts, one: NewEntry) -> None:
    hashes = hashes_of(one.operator)
    operation = merged["operations"].get(one.operator.name)
    if operation is None or any(operation[name] != value for name, value in hashes.items()):
        # Entries of other kernel source are invalid everywhere.
        operation = merged["operations"][one.operator.name] = {**hashes, "entries": {}}
    there = operation["entries"].get(one.bucket)
    if there is not None and there["seal"] != one.replaces:
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


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write a temporary file and rename it, so that readers see the old or the new content. Call under the lock."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    if len(text) > config_file.LARGEST:
        raise ValueError(f"{path} would have more than {config_file.LARGEST >> 20} MiB; move it away to start anew")
    temporary = Path(f"{path}.part")
    temporary.unlink(missing_ok=True)  # of a killed process; never a link that would be followed
    with open(temporary, "x", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
