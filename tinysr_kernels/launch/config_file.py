"""The file of launch configurations measured on one GPU: its content, and which of its entries are valid here.

    {"schema": 1,
     "device": {"name", "capability": [9, 0], "multiprocessors", "memory_mib", "power_limit_w"},
     "predicted": whether the times are predictions,
     "driver", "triton", "torch": versions, "programmatic_dependent_launch": whether it measured faster,
     "operations": {OP: {"kernel_hash", "space_hash", "entries": {BUCKET: {
         "config": {FIELD: VALUE}, "time_us", "incumbent_us", "candidates", "environment", "seal"}}}}}

time_us and incumbent_us: microseconds of a call with this configuration and with the one it replaced; candidates:
configurations measured; environment: versions, if they differ from the file's; seal: a hash of the entry.

Hard metadata decide whether an entry is valid: schema, device, Triton's major and minor version, kernel source, search
space, seal. If one conflicts or is missing, the entry is ignored and the reason reported. Soft metadata (memory, power
limit, driver, torch, Triton's patch level) do not invalidate an entry: a difference is reported. What is unknown on
this machine is not compared. The seal shows damage, not who wrote the entry, so nothing in a file is trusted:
`limits.py` says which configurations can be launched at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinysr_kernels.launch import limits
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.json_file import read_json
from tinysr_kernels.launch.kernel import Kernel
from tinysr_kernels.launch.plan import Tunable
from tinysr_kernels.versions import installed

SCHEMA = 1
WHAT = {"kernel_hash": "kernel source", "space_hash": "search space"}
PDL = "programmatic_dependent_launch"
PREDICTED = "predicted"
LARGEST = 4 << 20
"""Bytes: a file for every shape of every network stays below 1 MB."""
MOST = 1e12
"""Microseconds, or candidates: eleven days."""


@dataclass(frozen=True)
class Facts:
    """What is known of this machine; None is unknown and not compared."""

    gpu: Gpu
    triton: str
    torch: str
    driver: str | None = None
    memory_mib: int | None = None
    power_limit_w: int | None = None


@dataclass(frozen=True)
class Entry:
    """A valid configuration with its times in microseconds; environment: versions that differ from the file's.

    predicted: whether the times were predicted, not measured.
    """

    config: Any
    time_us: float
    incumbent_us: float
    candidates: int
    environment: Mapping[str, Any] = field(default_factory=dict)
    predicted: bool = False


@dataclass(frozen=True)
class Entries:
    """A file's valid entries by operator and bucket, and how many others there are.

    reasons: why those are invalid. differences: soft metadata in which valid ones differ. No reason occurs twice.
    """

    valid: Mapping[tuple[str, str], Entry]
    invalid: int
    reasons: tuple[str, ...]
    differences: tuple[str, ...]


def facts(gpu: Gpu) -> Facts:
    """The facts known without asking the driver."""
    return Facts(gpu, installed("triton"), installed("torch"))


def read(path: Path) -> tuple[dict[str, Any], str]:
    """A file's content, or why it is unusable; neither for a missing file."""
    try:
        content = read_json(path, LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except OSError as error:
        return {}, f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return {}, str(error)
    return (content, "") if isinstance(content, dict) else ({}, "is no JSON object")


def conflicts(content: Mapping[str, Any], here: Facts, *, nearest: bool = False) -> str:
    """Why the whole file is invalid, or nothing. nearest: accept another device of the same architecture."""
    device = _table(content, "device")
    wanted: dict[str, Any] = {"schema": SCHEMA, "capability": list(here.gpu.capability)}
    found = {"schema": content.get("schema"), **device}
    if not nearest:
        wanted |= {"name": here.gpu.name, "multiprocessors": here.gpu.multiprocessors}
    for name, value in wanted.items():
        if name not in found or found[name] is None:
            return f"does not say its {name}"
        # In JSON true is no number, though Python counts it as 1.
        if found[name] != value or isinstance(found[name], bool):
            return f"has {name} {_short(found[name])}, expected {value!r}"
    return ""


def differences(content: Mapping[str, Any], here: Facts, one: Entry | None = None) -> list[str]:
    """Soft metadata that differ or are missing, for the file or for one entry; it stays valid. None of predictions."""
    if is_predicted(content):
        return []
    device = _table(content, "device")
    found = {**{k: device.get(k) for k in ("memory_mib", "power_limit_w")}, **content}
    found |= one.environment if one is not None else {}
    said = []
    for name in ("driver", "triton", "torch", "memory_mib", "power_limit_w"):
        known = getattr(here, name)
        if known is not None and _public(found.get(name)) != _public(known):
            said.append(f"{name} {_short(found.get(name))}, here {known}")
    return said


def pdl(content: Mapping[str, Any]) -> bool | None:
    """Whether programmatic dependent launch measured faster, or None if the file does not say."""
    found = content.get(PDL)
    return found if isinstance(found, bool) else None


def is_predicted(content: Mapping[str, Any]) -> bool:
    """Whether a file says of its times that they were predicted, not measured."""
    return content.get(PREDICTED) is True


def entries(content: Mapping[str, Any], here: Facts, operators: Mapping[str, type[Tunable]]) -> Entries:
    """Every entry of a file that `conflicts` accepts, checked against its operator."""
    valid: dict[tuple[str, str], Entry] = {}
    reasons: list[str] = []
    for op, operation in _items(content.get("operations"), "operations", reasons):
        if op not in operators:
            reasons += [f"there is no operator {_short(op)}"] * max(len(_table(operation, "entries")), 1)
            continue
        for bucket in dict(_items(_items_of(operation), op, reasons)):
            found, reason = entry(content, here, operators[op], bucket)
            if found is None:
                reasons.append(reason)
            else:
                valid[op, bucket] = found
    differing = [difference for one in valid.values() for difference in differences(content, here, one)]
    return Entries(valid, len(reasons), tuple(dict.fromkeys(reasons)), tuple(dict.fromkeys(differing)))


def _items_of(operation: object) -> object:
    return operation.get("entries", {}) if isinstance(operation, dict) else operation


def _items(table: object, name: str, reasons: list[str]) -> Iterable[tuple[str, Any]]:
    """A table's items; a reason for anything but a table that stands in its place."""
    if isinstance(table, dict):
        return table.items()
    if table is not None:
        reasons.append(f"{name}: is no JSON object")
    return ()


def entry(content: Mapping[str, Any], here: Facts, operator: type[Tunable], bucket: str) -> tuple[Entry | None, str]:
    """The file's entry for a bucket of an operator, and why one that is there is not valid."""
    op = operator.name
    operation = _table(_table(content, "operations"), op)
    entries = _table(operation, "entries")
    if bucket not in entries:
        return None, ""
    raw, name = entries[bucket], f"{op} {_short(bucket)}"
    if not isinstance(raw, dict):
        return None, f"{name}: is no JSON object"
    hashes = hashes_of(operator)
    for kind, expected in hashes.items():
        if operation.get(kind) != expected or not expected:
            return None, f"{op}: measured with another {WHAT[kind]}"
    triton = {**content, **_table(raw, "environment")}.get("triton")
    if _minor(triton) != _minor(here.triton) and not is_predicted(content):
        return None, f"measured with Triton {_short(triton)}, here {here.triton}"
    if not is_sealed(op, bucket, hashes, raw):
        return None, f"{name}: was changed after it was measured"
    numbers = [raw.get(key) for key in ("time_us", "incumbent_us", "candidates")]
    config = parse(operator, raw.get("config"))
    if config is None or not all(map(_is_positive, numbers)):
        return None, f"{name}: its configuration is none of this operation"
    obstacle = limits.of_fields(vars(config))
    if obstacle:
        return None, f"{name}: {obstacle}"
    time_us, incumbent_us, candidates = map(float, numbers)  # type: ignore[arg-type]
    environment = _table(raw, "environment")
    return Entry(config, time_us, incumbent_us, int(candidates), environment, is_predicted(content)), ""


def _is_positive(value: object) -> bool:
    """Whether a JSON value is a number that can be one of microseconds or candidates."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MOST


def parse(operator: type[Tunable], fields: object) -> Any:
    """The configuration in a JSON object, or None unless it has exactly the fields and their types."""
    expected = {f.name: str(f.type) for f in dataclasses.fields(operator.config)}
    if not isinstance(fields, dict) or set(fields) != set(expected):
        return None
    if any(type(fields[name]).__name__ != expected[name] for name in expected):
        return None
    return operator.config(**fields)


def seal(op: str, bucket: str, hashes: Mapping[str, str], raw: Mapping[str, Any]) -> str:
    """A hash of an entry and of what it belongs to, so that damage is detected; empty if it cannot be written."""
    content = [op, bucket, hashes["kernel_hash"], hashes["space_hash"], {k: v for k, v in raw.items() if k != "seal"}]
    try:
        text = json.dumps(content, sort_keys=True, allow_nan=False)
    except ValueError:  # numbers that could be read, but cannot be written: infinite, or of thousands of digits
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_sealed(op: str, bucket: str, hashes: Mapping[str, str], raw: Mapping[str, Any]) -> bool:
    """Whether an entry is as it was written, and can be written again."""
    expected = seal(op, bucket, hashes, raw)
    return expected != "" and raw.get("seal") == expected


def hashes_of(operator: type[Tunable]) -> dict[str, str]:
    """What must be unchanged for an operator's entries to be valid, as the file stores it."""
    return {"kernel_hash": kernel_hash(operator), "space_hash": space_hash(operator)}


@functools.cache
def kernel_hash(operator: type[Tunable]) -> str:
    """Identifies the source of the kernels and of what plans their launches.

    That is the operator's own module, and what this one reaches through its imports: modules with kernels, and modules
    of operators' folders.
    """
    found: list[str] = [operator.__module__]
    for name in found:  # grows meanwhile
        homes = [_home(value) for value in vars(sys.modules[name]).values()]
        found += dict.fromkeys(home for home in homes if home not in found and _matters(home))
    return _hash_of(*(sys.modules[name] for name in sorted(found)))


def _home(value: object) -> str:
    """The module that a module's global is or comes from."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return str(getattr(value.function if isinstance(value, Kernel) else value, "__module__", ""))


def _matters(name: str) -> bool:
    """Whether a module is one of an operator's folder, or holds device functions."""
    module = sys.modules.get(name)
    if module is None or not name.startswith("tinysr_kernels.ops."):
        return False
    return name.count(".") > 2 or any(isinstance(value, Kernel) for value in vars(module).values())


@functools.cache
def space_hash(operator: type[Tunable]) -> str:
    """Identifies the search space: the source of the method that gives it and of its configurations."""
    return _hash_of(operator.space, operator.config)


def _hash_of(*objects: Any) -> str:
    """A hash of the objects' source; empty if the source is unavailable."""
    try:
        text = "".join(inspect.getsource(one) for one in objects)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _table(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _short(value: object) -> str:
    """A value for a message, at most 60 characters, whatever a damaged file holds."""
    if value is None:
        return "unknown"
    if isinstance(value, int):
        value = max(min(value, 10**50), -(10**50))  # longer ones cannot be printed from 4300 digits on
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _minor(text: object) -> str:
    """3.7.1 -> 3.7; empty for anything but a version."""
    return ".".join(text.split(".")[:2]) if isinstance(text, str) else ""


def _public(value: object) -> object:
    """A version without its build (2.13.0+cu130 -> 2.13.0), anything else as it is."""
    return value.split("+")[0] if isinstance(value, str) else value
