"""Which launch configuration a call gets: the user's file, the bundled files for exactly this GPU, the heuristic.

A file is named after the GPU that it was measured on, or predicted for, `NVIDIA H200.json`; a bundled file of measured
configurations takes precedence over one of predicted ones. `config_file.py` says what it holds and when it is valid.
The user's files lie in $TINYSR_CONFIG_DIR, else in tinysr-kernels/ of the XDG configuration home. With
TINYSR_CONFIG_NEAREST=1 the file of the most similar GPU of the same architecture is used if there is none for this one.
Invalid files and entries are ignored, with one notice per file to the logger `tinysr_kernels`: whatever a file holds,
no call fails for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysr_kernels.launch import config_file, limits
from tinysr_kernels.launch.config_file import Entries, Entry
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Tunable

BUNDLED = Path(__file__).parent / "configs"
PREDICTED = BUNDLED / "predicted"
USER_FOLDER = "TINYSR_CONFIG_DIR"
NEAREST = "TINYSR_CONFIG_NEAREST"
WARM_LIMIT = 1 << 14
"""Cached choices; a video of ever new sizes must not fill the memory."""

ANEW = "`python -m autotune run` measures anew"
SHOWN = 3
"""Reasons that a notice names."""

PDL_CAPABILITY = (9, 0)

logger = logging.getLogger("tinysr_kernels")


@dataclass(frozen=True)
class Choice:
    """A configuration, its source (a file's path, "heuristic" or "given"), and the file's entry."""

    config: Any
    source: str
    entry: Entry | None = None


_given: ContextVar[Mapping[str, Any] | None] = ContextVar("given", default=None)
_pdl: ContextVar[bool | None] = ContextVar("pdl", default=None)
_lock = threading.Lock()
_warm: dict[tuple[Any, ...], Choice] = {}
_chosen: dict[tuple[str, str, str], str] = {}
_noticed: set[str] = set()
_entries: dict[tuple[Path, Gpu, bool], Entries | None] = {}


@contextlib.contextmanager
def given(**configs: Any) -> Iterator[None]:
    """Override the configurations of operators called inside by this thread, by operator name: for tests and tuning.

    A dictionary overrides by bucket; buckets that it lacks are chosen as usual.
    """
    token = _given.set({**(_given.get() or {}), **configs})
    try:
        yield
    finally:
        _given.reset(token)


@contextlib.contextmanager
def given_pdl(on: bool) -> Iterator[None]:
    """Override, inside and for this thread, whether launches use programmatic dependent launch: for tuning."""
    token = _pdl.set(on)
    try:
        yield
    finally:
        _pdl.reset(token)


def pdl(gpu: Gpu) -> bool:
    """Whether launches on this GPU use programmatic dependent launch: if a file says that it measured faster."""
    if gpu.capability < PDL_CAPABILITY:
        return False
    override = _pdl.get()
    return _pdl_of_files(gpu) if override is None else override


@functools.cache
def _pdl_of_files(gpu: Gpu) -> bool:
    for path in (user_file(gpu.name), BUNDLED / file_name(gpu.name)):
        content, obstacle = _read(path)
        if content and not obstacle and not config_file.conflicts(content, config_file.facts(gpu)):
            found = config_file.pdl(content)
            if found is not None:
                return found
    return False


def choose(call: Tunable, gpu: Gpu, operators: Mapping[str, type[Tunable]]) -> Choice:
    """The configuration for this call on this GPU. Nothing is measured here.

    Every call of every operator comes through, so a choice is cached by shapes and flags. operators: by name, all that
    a file may have entries of.
    """
    overrides = _given.get()
    if overrides is not None and call.name in overrides:
        config = overrides[call.name]
        if isinstance(config, Mapping):
            config = config.get(call.bucket())
        if config is not None:
            return Choice(config, "given")
    key = (call.name, gpu.name, gpu.multiprocessors, *call.lookup_key())
    choice = _warm.get(key)
    return _first_choice(key, call, gpu, operators) if choice is None else choice


def _first_choice(key: tuple[Any, ...], call: Tunable, gpu: Gpu, operators: Mapping[str, type[Tunable]]) -> Choice:
    """Choose for a key that is not in the cache, and cache it."""
    bucket = call.bucket()
    choice = _from_files(call, gpu, bucket, operators)
    if choice is None:
        choice = Choice(call.heuristic(gpu), "heuristic")
    with _lock:
        if len(_warm) >= WARM_LIMIT:
            _warm.clear()
        _warm[key] = choice
        _chosen[call.name, bucket, gpu.name] = choice.source
    return choice


def chosen() -> Mapping[str, int]:
    """Number of distinct (operator, bucket, GPU) seen by this process, by the source of their configuration."""
    with _lock:
        return dict(Counter(_chosen.values()))


def forget() -> None:
    """Drop all caches: after a file or an environment variable was changed."""
    with _lock:
        _warm.clear()
        _noticed.clear()
        _read.cache_clear()
        _entries.clear()
        _pdl_of_files.cache_clear()


def file_name(gpu: str) -> str:
    """The name of the file for a GPU: its own, but for characters that file systems refuse."""
    return re.sub(r'[/\\:*?"<>|\x00-\x1f]', "-", gpu) + ".json"


def user_folder() -> Path:
    """The folder of the user's files; a relative XDG_CONFIG_HOME is ignored, as its specification says."""
    named = os.environ.get(USER_FOLDER)
    if named:
        with contextlib.suppress(OSError):  # the working directory is gone
            named = os.path.abspath(named)
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.config")) / "tinysr-kernels"


def user_file(gpu: str) -> Path:
    """The user's file for a GPU, whether or not it is there."""
    return user_folder() / file_name(gpu)


def _from_files(call: Tunable, gpu: Gpu, bucket: str, operators: Mapping[str, type[Tunable]]) -> Choice | None:
    if os.path.isfile(user_folder()):
        _notice(f"{USER_FOLDER} must name a folder, found the file {_printable(user_folder())}; ignored")
    for path in (folder / file_name(gpu.name) for folder in (user_folder(), BUNDLED, PREDICTED)):
        entry = _from_file(path, call, gpu, bucket, operators)
        if entry is not None:
            return Choice(entry.config, f"{path} (predicted)" if entry.predicted else str(path), entry)
    if os.environ.get(NEAREST, "0") not in ("", "0"):
        for path in _nearest(gpu):
            entry = _from_file(path, call, gpu, bucket, operators, nearest=True)
            if entry is not None:
                return Choice(entry.config, f"{path} (nearest)", entry)
    return None


def _from_file(
    path: Path, call: Tunable, gpu: Gpu, bucket: str, operators: Mapping[str, type[Tunable]], nearest: bool = False
) -> Entry | None:
    """The file's valid entry for the call, if the call can be launched with it."""
    if (path, gpu, nearest) not in _entries:
        _entries[path, gpu, nearest] = _all_of(path, gpu, operators, nearest)
    entries = _entries[path, gpu, nearest]
    entry = None if entries is None else entries.valid.get((call.name, bucket))
    if entry is None:
        return None
    obstacle = limits.of_call(call, entry.config, gpu)
    if obstacle:
        example = f"such as {call.name} {bucket}: {obstacle}"
        _notice(f"{_printable(path)}: entries that calls cannot use are ignored, {example}; {ANEW}", of=path)
        return None
    return entry


def _all_of(path: Path, gpu: Gpu, operators: Mapping[str, type[Tunable]], nearest: bool) -> Entries | None:
    """The entries of a file, or None. What makes them invalid, or lowers their trust, is logged once."""
    content, obstacle = _read(path)
    if not content and not obstacle:
        return None
    here, name = config_file.facts(gpu), _printable(path)
    obstacle = obstacle or config_file.conflicts(content, here, nearest=nearest)
    if obstacle:
        _notice(f"{name} {obstacle}; ignored")
        return None
    found = config_file.entries(content, here, operators)
    if found.invalid:
        ignored = f"{found.invalid} of {found.invalid + len(found.valid)} entries ignored"
        _notice(f"{name}: {ignored} ({some(found.reasons)}); {ANEW}")
    if found.differences:
        _notice(f"{name}: measured with {some(found.differences)}; used all the same")
    return found


def some(messages: Sequence[str]) -> str:
    """The first messages, and how many more there are."""
    more = f"; and {len(messages) - SHOWN} more" if len(messages) > SHOWN else ""
    return "; ".join(messages[:SHOWN]) + more


def _nearest(gpu: Gpu) -> list[Path]:
    """Files of other devices of the same architecture, the nearest number of multiprocessors first."""
    found = []
    for folder in (user_folder(), BUNDLED):
        for path in _json_files(folder):
            device = _read(path)[0].get("device")
            if (
                isinstance(device, dict)
                and device.get("name") != gpu.name
                and type(device.get("multiprocessors")) is int
            ):
                found.append((abs(device["multiprocessors"] - gpu.multiprocessors), path))
    return [path for _, path in sorted(found, key=lambda pair: pair[0])]


def _json_files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [folder / name for name in sorted(os.listdir(folder)) if name.endswith(".json")]
    return []


def _notice(message: str, of: Path | None = None) -> None:
    """Log a message once; of: or once for this file, whatever the message."""
    key = message if of is None else f"of {of}"
    with _lock:
        if key in _noticed:
            return
        _noticed.add(key)
    logger.warning(message)


def _printable(path: Path) -> str:
    """A path for a message: one line of bounded length, and no character that a terminal obeys or an encoding lacks."""
    text = str(path) if str(path).isprintable() else repr(str(path))
    return text if len(text) <= 400 else f"{text[:200]}...{text[-100:]}"


@functools.cache
def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A file's content, or why it is unusable; cached."""
    return config_file.read(path)
