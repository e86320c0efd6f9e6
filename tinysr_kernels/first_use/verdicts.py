"""What the self-check found on this machine, kept in a file of the user's cache folder.

    {"schema": 1, "environment": {"gpu", "capability", "multiprocessors", "driver", "torch", "triton", ...},
     "verdicts": {KEY: {"op", "variant", "kernels", "kind", "reason"}}}

The folder is $TINYSR_CACHE_DIR, else tinysr-kernels/ of the XDG cache home. The file's name holds the GPU's name and a
hash of the environment: another driver, torch or Triton has another file, and nothing that it says is believed here.
Whatever a file holds, no call fails for it; damaged ones are replaced. Processes that write at the same time may lose
each other's verdicts, which are then found again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysr_kernels._version import __version__
from tinysr_kernels.atomic import write_bytes
from tinysr_kernels.errors import shorten
from tinysr_kernels.first_use.items import Item
from tinysr_kernels.first_use.machine import driver_version
from tinysr_kernels.launch.config_file import hashes_of
from tinysr_kernels.launch.configs import file_name
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.json_file import read_json
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.versions import installed

SCHEMA = 1
FOLDER = "TINYSR_CACHE_DIR"
LARGEST = 4 << 20
"""Bytes of a file."""
MOST = 4096
"""Verdicts in a file; the oldest go first."""

PASSED, WRONG, CRASHED, HUNG, FAILED, UNCHECKED = "passed", "wrong", "crashed", "hung", "failed", "unchecked"
KINDS = (PASSED, WRONG, CRASHED, HUNG, FAILED)
"""Kinds that are kept. `failed`: the kernels do not compile or launch. `unchecked`: nothing was found out."""
UNTRUSTED = (WRONG, CRASHED, HUNG)
"""Kinds that condemn an operator at all sizes, since only some are checked; `failed` bars the one variant."""
REASON = 300
"""Characters of a reason."""


@dataclass(frozen=True)
class Verdict:
    """What was found of an item: one of the kinds, and the reason unless it passed."""

    op: str
    variant: str
    kernels: str
    kind: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.op} ({self.variant}) {self.kind}" + (f": {self.reason}" if self.reason else "")


def verdict(item: Item, kind: str, reason: object = "") -> Verdict:
    """The verdict on an item."""
    return Verdict(item.op, item.variant, item.kernels, kind, shorten(reason, REASON))


def folder() -> Path:
    """The folder of what can be found again; a relative XDG_CACHE_HOME is ignored, as its specification says."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache")) / "tinysr-kernels"


def environment(gpu: Gpu) -> dict[str, Any]:
    """All that verdicts depend on besides the kernels' source."""
    return {
        "gpu": gpu.name,
        "capability": list(gpu.capability),
        "multiprocessors": gpu.multiprocessors,
        "driver": driver_version(),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "ptxas": os.environ.get("TRITON_PTXAS_PATH", ""),
        "tinysr-kernels": __version__,
    }


def path_of(here: Mapping[str, Any]) -> Path:
    """The file of an environment, whether or not it is there."""
    digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
    return folder() / "self-check" / f"{file_name(here['gpu']).removesuffix('.json')} {digest}.json"


def read(here: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdicts kept for this environment, by key; empty where there are none, or none that can be read."""
    try:
        content = read_json(path_of(here), LARGEST)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or content.get("environment") != dict(here):
        return {}
    found = content.get("verdicts")
    parsed = {key: _parsed(raw) for key, raw in found.items()} if isinstance(found, dict) else {}
    return {key: one for key, one in parsed.items() if one is not None}


def _parsed(raw: object) -> Verdict | None:
    """One verdict of a file; None for anything else, and for one on kernels that are not these."""
    if not isinstance(raw, dict) or set(raw) != {"op", "variant", "kernels", "kind", "reason"}:
        return None
    if not all(isinstance(value, str) and len(value) <= REASON for value in raw.values()):
        return None
    operator = REGISTRY.get(raw["op"])
    known = operator is not None and raw["kind"] in KINDS and raw["kernels"] == hashes_of(operator)["kernel_hash"]
    return Verdict(**raw) if known else None


def write(here: Mapping[str, Any], found: Mapping[str, Verdict]) -> str:
    """Add verdicts to the environment's file -> why that failed, or nothing."""
    kept = {**read(here), **{key: one for key, one in found.items() if one.kind in KINDS}}
    newest = dict(list(kept.items())[-MOST:])
    content = {"schema": SCHEMA, "environment": here, "verdicts": {key: vars(one) for key, one in newest.items()}}
    path = path_of(here)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        return str(error.strerror or error)
    return ""
