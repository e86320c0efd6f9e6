"""Result files: measurements, environment and every raw sample; validated against the schema when written and read.

The schema is the dataclasses below (`SCHEMA` is their version). The file is rewritten after each record, so an
interrupted command keeps its results and resumes when it is run again in the same environment.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tinysr_kernels.launch.json_file import BadFile, read_json
from tinysr_kernels.runtime.environment import environment

SCHEMA = 1
LARGEST = 64 << 20
"""Bytes of a file; those of a run on a GPU have some."""
MOST = 1e30
"""Of any number in a file: larger ones overflow in reports."""
PLACES = ("package folder", "triton cache")
"""Entries of the environment that name local paths; left out of result files."""


@dataclass(frozen=True)
class Reading:
    """State of the device during a measurement; zeros where unknown, and on a CPU."""

    when: str
    clock_mhz: int = 0
    memory_clock_mhz: int = 0
    power_w: float = 0.0
    temperature_c: int = 0
    slowed: str = ""


@dataclass
class Record:
    """One measurement.

    key: unique in its file. labels: what was measured. samples_us: microseconds per call, every sample;
    disturbed: the disturbance of each, "" for none. values: derived figures by name
    (`p50_us`, `tflops`, `psnr`, ...). error: why there is no measurement; then there are no samples.
    """

    key: str
    labels: dict[str, str]
    samples_us: list[float] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    error: str = ""


@dataclass
class Results:
    """A file. device: a GPU's name or "CPU"; reduced: whether sizes are smaller than the command's own."""

    schema: int
    command: str
    device: str
    reduced: bool
    environment: dict[str, str]
    started: str
    finished: str = ""
    complete: bool = False
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def find(self, key: str) -> Record | None:
        """The record with this key, unless it is missing or failed."""
        return next((one for one in self.records if one.key == key and not one.error), None)


class Sink:
    """Collects a command's records, in memory or in a file; resumes an interrupted run's file."""

    def __init__(self, command: str, device: str, reduced: bool, path: Path | None = None) -> None:
        facts = {name: str(value) for name, value in environment().items() if name not in PLACES} | {"commit": commit()}
        self.path = path
        self.results = Results(SCHEMA, command, device, reduced, facts, _now())
        if path is not None and path.exists():
            self._resume(read(path))

    def _resume(self, earlier: Results) -> None:
        new = self.results
        same = all(getattr(earlier, name) == getattr(new, name) for name in ("command", "device", "reduced"))
        if same and not earlier.complete and _comparable(earlier.environment) == _comparable(new.environment):
            new.records = [one for one in earlier.records if not one.error]
            new.notes = [*earlier.notes, f"resumed at {new.started} with {len(new.records)} records"]
            new.started = earlier.started

    def has(self, *keys: str) -> bool:
        """Whether all of these have been measured."""
        return all(self.results.find(key) for key in keys)

    def add(self, *records: Record) -> None:
        """Add records, replacing those with the same keys, and write the file."""
        keys = {one.key for one in records}
        self.results.records = [one for one in self.results.records if one.key not in keys] + list(records)
        self.save()

    def note(self, text: str) -> None:
        """Add a note and print it."""
        self.results.notes.append(text)
        print(text, file=sys.stderr)
        self.save()

    def finish(self, complete: bool = True) -> None:
        """Mark the command as ended; complete: whether everything was measured."""
        self.results.finished, self.results.complete = _now(), complete
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        if self.path is not None:
            write(self.path, self.results)


def percentiles(samples: Iterable[float], disturbed: Iterable[str] = ()) -> dict[str, float]:
    """p50_us, p20_us, p80_us of the undisturbed samples, or of all where fewer than half are; `disturbed`: how many."""
    samples, reasons = list(samples), list(disturbed)
    clean = [one for one, why in zip(samples, reasons, strict=True) if not why] if reasons else samples
    chosen = sorted(clean if 2 * len(clean) >= len(samples) else samples)
    found = {f"p{p}_us": _percentile(chosen, p / 100) for p in (50, 20, 80)}
    return found | ({"disturbed": float(len(samples) - len(clean))} if reasons else {})


def _percentile(ordered: list[float], part: float) -> float:
    if part == 0.5:
        return statistics.median(ordered)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def commit() -> str:
    """The checkout's commit, with + if files differ from it; "unknown" outside git."""
    folder = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, results: Results) -> None:
    """Check against the schema and write: one line per record. ValueError names what does not match."""
    content = dataclasses.asdict(results)
    validate(content)
    records = content.pop("records")
    head = [f'"{name}": {json.dumps(value)}' for name, value in content.items()]
    lines = ",\n  ".join(json.dumps(record) for record in records)
    text = "{\n " + ",\n ".join([*head, f'"records": [\n  {lines}\n ]' if lines else '"records": []']) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> Results:
    """Read a result file. BadFile if it is invalid or of another schema, OSError if it cannot be read."""
    try:
        content = read_json(path, LARGEST)
        validate(content)
    except ValueError as error:
        raise BadFile(f"{path}: {error}; delete it and measure again") from error
    records = [
        Record(**{**one, "readings": [Reading(**reading) for reading in one["readings"]]})
        for one in content.pop("records")
    ]
    return Results(**content, records=records)


def validate(content: Any) -> None:
    """ValueError unless the JSON value is a `Results` of this version, with consistent records."""
    _check("file", content, Results)
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, found {content['schema']}")
    for key, times in Counter(one["key"] for one in content["records"]).items():
        if times > 1:
            raise ValueError(f"records: {key[:60]!r} occurs {times} times")
    for one in content["records"]:
        if len(one["disturbed"]) not in (0, len(one["samples_us"])):
            raise ValueError(f"{one['key']}: disturbed must be as long as samples_us")
        if any(sample <= 0 for sample in one["samples_us"]):
            raise ValueError(f"{one['key']}: samples_us must be above 0")
        if not one["error"] and not one["samples_us"] and not one["values"]:
            raise ValueError(f"{one['key']}: neither samples, nor values, nor an error")


def _check(where: str, value: Any, expected: Any) -> None:
    """ValueError unless a JSON value is of a dataclass, list, dict or plain type."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        hints = typing.get_type_hints(expected)
        if not isinstance(value, dict) or set(value) != set(hints):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where} must have {sorted(hints)}, found {str(found)[:200]}")
        for name, hint in hints.items():
            _check(f"{where}.{name}", value[name], hint)
    elif origin in (list, dict):
        if not isinstance(value, origin):
            raise ValueError(f"{where} must be a {origin.__name__}, found {type(value).__name__}")
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for place, one in pairs:
            _check(f"{where}[{place}]", one, arguments[-1])
    else:
        kinds = (int, float) if expected is float else (expected,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"{where} must be {expected.__name__}, found {type(value).__name__}")
        if isinstance(value, (int, float)) and not -MOST < value < MOST:
            raise ValueError(f"{where} must be finite, and less than {MOST:.0e} in magnitude")


def _comparable(facts: dict[str, str]) -> dict[str, str]:
    """The part of the environment that must be equal to resume a file."""
    return {name: value for name, value in facts.items() if "memory" not in name}


def device_name(device: torch.device) -> str:
    """As result files name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
