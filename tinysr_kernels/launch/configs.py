"""Which launch configuration a call gets: the user's file, the bundled file for exactly this GPU, the heuristic.

A file is JSON, {"format": 1, "gpu": NAME, "triton": "3.7", "entries": {OP: {BUCKET: {FIELD: VALUE}}}, "sources":
{OP: HASH}}. It counts only for the GPU whose exact name it carries, the Triton it was measured with, and, operation by
operation, the kernels' source as it was then; whatever is missing or otherwise is passed over, and the heuristic runs.
The user's files lie in the folder named by TINYSR_LAUNCH_CONFIGS, one for each GPU, named like the bundled ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Implementation

BUNDLED = Path(__file__).parent / "configs"
USER_FOLDER = "TINYSR_LAUNCH_CONFIGS"
FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """A configuration and where it came from: a file's path, "heuristic" or "given"."""

    config: Any
    source: str


_given: ContextVar[Mapping[str, Any] | None] = ContextVar("given", default=None)
_lock = threading.Lock()
_chosen: dict[tuple[str, str, str], str] = {}


@contextlib.contextmanager
def given(**configs: Any) -> Iterator[None]:
    """Operators called inside by this thread use these configurations, by operator name: tests and tuning."""
    token = _given.set({**(_given.get() or {}), **configs})
    try:
        yield
    finally:
        _given.reset(token)


def choose(op: str, implementation: Implementation, gpu: Gpu, arguments: Mapping[str, Any]) -> Choice:
    """The configuration for this call of `op` on this GPU. Nothing is measured here."""
    named = (_given.get() or {}).get(op)
    if named is not None:
        return Choice(named, "given")
    bucket = implementation.bucket(**arguments)
    choice = _from_files(op, implementation, gpu.name, bucket)
    if choice is None:
        choice = Choice(implementation.heuristic(gpu, **arguments), "heuristic")
    with _lock:
        _chosen[op, bucket, gpu.name] = choice.source
    return choice


def chosen() -> Mapping[str, int]:
    """How many different (operation, bucket, GPU) this process has met, by the source of their configuration."""
    with _lock:
        return dict(Counter(_chosen.values()))


def file_name(gpu: str) -> str:
    """The name of the file for a GPU; the file itself carries the exact name, which decides."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def source_hash(implementation: Implementation) -> str:
    """Identifies the kernels' source: every character of the modules that hold them and plan their launches."""
    names = (implementation.plan.__module__, *implementation.modules)
    text = "".join(inspect.getsource(sys.modules[name]) for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_files(op: str, implementation: Implementation, gpu: str, bucket: str) -> Choice | None:
    folder = os.environ.get(USER_FOLDER)
    for path in (*((Path(folder) / file_name(gpu),) if folder else ()), BUNDLED / file_name(gpu)):
        entry = _entry(path, gpu, op, implementation, bucket)
        if entry is not None:
            return Choice(entry, str(path))
    return None


def _entry(path: Path, gpu: str, op: str, implementation: Implementation, bucket: str) -> Any:
    """The file's configuration for the bucket, or None where the file does not count or has none."""
    content = _read(path)
    if content.get("format") != FORMAT or content.get("gpu") != gpu or content.get("triton") != _triton():
        return None
    if content.get("sources", {}).get(op) != source_hash(implementation):
        return None
    fields = content.get("entries", {}).get(op, {}).get(bucket)
    expected = {f.name: f.type for f in dataclasses.fields(implementation.config)}
    if not isinstance(fields, dict) or set(fields) != set(expected):
        return None
    if any(type(fields[name]).__name__ != str(expected[name]) for name in expected):
        return None
    return implementation.config(**fields)


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    """The file's content, read once; nothing for one that is absent or is not such a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@functools.cache
def _triton() -> str:
    """Triton's version without the patch level."""
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return "none"
