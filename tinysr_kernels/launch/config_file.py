"""The file of launch configurations measured on one GPU: its content, and which of its entries are valid here.

    {"schema": 1,
     "device": {"name", "capability": [9, 0], "multiprocessors", "memory_mib", "power_limit_w"},
     "driver", "triton", "torch": versions, "programmatic_dependent_launch": whether it measured faster,
     "operations": {OP: {"kernel_hash", "space_hash", "entries": {BUCKET: {
         "config": {FIELD: VALUE}, "time_us", "incumbent_us", "candidates", "environment", "seal"}}}}}

time_us and incumbent_us: microseconds of a call with this configuration and with the one it replaced; candidates:
configurations measured; environment: versions, if they differ from the file's; seal: a hash of the entry.

Hard metadata decide whether an entry is valid: schema, device, Triton's major and minor version, kernel source, search
space, seal. If one conflicts or is missing, the entry is ignored and the reason reported. Soft metadata (memory, power
limit, driver, torch, Triton's patch level) do not invalidate an entry: a difference is reported. What is unknown on
this machine is not compared.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import stat
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.kernel import Kernel
from tinysr_kernels.launch.plan import Tunable

SCHEMA = 1
WHAT = {"kernel_hash": "kernel source", "space_hash": "search space"}
PDL = "programmatic_dependent_launch"
LARGEST = 64 << 20
"""Bytes: a file for every shape of every network stays below 1 MB."""


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
    """A valid configuration with its times in microseconds; environment: versions that differ from the file's."""

    config: Any
    time_us: float
    incumbent_us: float
    candidates: int
    environment: Mapping[str, Any] = field(default_factory=dict)


def facts(gpu: Gpu) -> Facts:
    """The facts known without asking the driver."""
    return Facts(gpu, installed("triton"), installed("torch"))


@functools.cache
def installed(package: str) -> str:
    """The version of an installed package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def read(path: Path) -> tuple[dict[str, Any], str]:
    """A file's content, or why it is unusable; neither for a missing file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            return {}, f"is no file of at most {LARGEST >> 20} MiB"
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except OSError as error:
        return {}, f"cannot be read: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON: {error}"
    return (content, "") if isinstance(content, dict) else ({}, "is no JSON object")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


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
    """Soft metadata that differ or are missing, for the file or for one entry; it stays valid."""
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


def entry(content: Mapping[str, Any], here: Facts, operator: type[Tunable], bucket: str) -> tuple[Entry | None, str]:
    """The file's entry for a bucket of an operator, and why one that is there is not valid."""
    op = operator.name
    operation = _table(_table(content, "operations"), op)
    entries = _table(operation, "entries")
    if bucket not in entries:
        return None, ""
    raw = entries[bucket]
    if not isinstance(raw, dict):
        return None, f"{op} {bucket}: is no JSON object"
    hashes = hashes_of(operator)
    for name, expected in hashes.items():
        if operation.get(name) != expected or not expected:
            return None, f"{op}: measured with another {WHAT[name]}"
    triton = {**content, **_table(raw, "environment")}.get("triton")
    if _minor(triton) != _minor(here.triton):
        return None, f"measured with Triton {_short(triton)}, here {here.triton}"
    if raw.get("seal") != seal(op, bucket, hashes, raw):
        return None, f"{op} {bucket}: was changed after it was measured"
    config = parse(operator, raw.get("config"))
    numbers = [raw.get(name) for name in ("time_us", "incumbent_us", "candidates")]
    known = [n for n in numbers if isinstance(n, (int, float)) and n >= 0]
    if config is None or len(known) < len(numbers):
        return None, f"{op} {bucket}: its configuration is none of this operation"
    return Entry(config, known[0], known[1], int(known[2]), _table(raw, "environment")), ""


def parse(operator: type[Tunable], fields: object) -> Any:
    """The configuration in a JSON object, or None unless it has exactly the fields and their types."""
    expected = {f.name: str(f.type) for f in dataclasses.fields(operator.config)}
    if not isinstance(fields, dict) or set(fields) != set(expected):
        return None
    if any(type(fields[name]).__name__ != expected[name] for name in expected):
        return None
    return operator.config(**fields)


def seal(op: str, bucket: str, hashes: Mapping[str, str], raw: Mapping[str, Any]) -> str:
    """A hash of an entry and of what it belongs to, so that damage is detected."""
    content = {name: value for name, value in raw.items() if name != "seal"}
    try:
        text = json.dumps([op, bucket, hashes["kernel_hash"], hashes["space_hash"], content], sort_keys=True)
    except RecursionError:  # as deep as the reader still took it; no entry is written so
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _minor(text: object) -> str:
    """3.7.1 -> 3.7; empty for anything but a version."""
    return ".".join(text.split(".")[:2]) if isinstance(text, str) else ""


def _public(value: object) -> object:
    """A version without its build (2.13.0+cu130 -> 2.13.0), anything else as it is."""
    return value.split("+")[0] if isinstance(value, str) else value
