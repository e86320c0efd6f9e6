"""Which files and entries are valid, and the notices about those that are not."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.launch.files import (
    BUCKET,
    DEVICE,
    H200,
    HASHES,
    MEASURED,
    OPERATOR,
    choose,
    content,
    entry,
    notices,
    operation,
    without,
    write,
)
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.conv.sepconv import Config

MARCH = {**MEASURED, "form": "march", "rows": 2, "block_k": 16, "num_stages": 1}
HARD: dict[str, tuple[dict, str]] = {
    "schema": ({"schema": 2}, "has schema 2, expected 1"),
    "schema of another type": ({"schema": True}, "has schema True"),
    "no schema": ({"schema": None}, "does not say its schema"),
    "name": ({"device": {**DEVICE, "name": "NVIDIA H200 NVL"}}, "has name NVIDIA H200 NVL"),
    "no name": ({"device": without(DEVICE, "name")}, "does not say its name"),
    "capability": ({"device": {**DEVICE, "capability": [9, 1]}}, r"has capability \[9, 1\]"),
    "multiprocessors": ({"device": {**DEVICE, "multiprocessors": 131}}, "has multiprocessors 131, expected 132"),
    "no device": ({"device": []}, "does not say its capability"),
    "triton": ({"triton": "3.0.1"}, "measured with Triton 3.0.1, here"),
    "no triton": ({"triton": None}, "measured with Triton unknown"),
    "kernels": ({"operations": operation(kernel_hash="0")}, "sepconv: measured with another kernel source"),
    "no kernels": ({"operations": operation(kernel_hash=None)}, "another kernel source"),
    "space": ({"operations": operation(space_hash="0")}, "sepconv: measured with another search space"),
    "entry": ({"operations": operation(entries={BUCKET: [1]})}, "is no JSON object"),
    "null": ({"operations": operation(entries={BUCKET: None})}, "is no JSON object"),
    "seal": ({"operations": operation(entries={BUCKET: {**entry(), "time_us": 1.0}})}, "was changed after"),
    "no seal": ({"operations": operation(entries={BUCKET: without(entry(), "seal")})}, "was changed after"),
    "more": ({"operations": operation(entries={BUCKET: entry({**MEASURED, "more": 1})})}, "configuration is none"),
    "fewer": ({"operations": operation(entries={BUCKET: entry({"form": "tile"})})}, "configuration is none"),
    "text": (
        {"operations": operation(entries={BUCKET: entry({**MEASURED, "num_warps": "4"})})},
        "configuration is none",
    ),
    "time": ({"operations": operation(entries={BUCKET: entry(time_us=-1)})}, "configuration is none"),
    "refused": (
        {"operations": operation(entries={BUCKET: entry(MARCH)})},
        "march needs block_k of at least 64 channels",
    ),
    "older entry": (
        {"operations": operation(entries={BUCKET: entry(environment={"triton": "3.0.0"})})},
        "measured with Triton 3.0.0, here",
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_mismatches_are_rejected_with_one_notice(folders: tuple[Path, Path], name: str) -> None:
    changes, pattern = HARD[name]
    path = write(folders[0], content(**changes))
    with notices() as messages:
        assert choose().source == "heuristic"
        with configs._lock:
            configs._warm.clear()
        assert choose().source == "heuristic"
    assert len(messages) == 1
    assert messages[0].startswith(path)
    assert re.search(pattern, messages[0])


SOFT: dict[str, tuple[dict, str]] = {
    "torch": ({"torch": "2.0.0"}, "measured with torch 2.0.0, here"),
    "no torch": ({"torch": None}, "measured with torch unknown, here"),
    "triton": ({"triton": config_file.installed("triton") + ".9"}, "measured with triton"),
}


@pytest.mark.parametrize("name", SOFT)
def test_soft_mismatches_are_used_with_one_notice(folders: tuple[Path, Path], name: str) -> None:
    changes, pattern = SOFT[name]
    path = write(folders[0], content(**changes))
    with notices() as messages:
        assert choose().source == path
        with configs._lock:
            configs._warm.clear()
        choose()
    assert len(messages) == 1
    assert pattern in messages[0]


def test_values_unknown_on_this_machine_are_not_compared() -> None:
    here = config_file.facts(H200)
    assert config_file.differences(content(torch=here.torch + "+cu130"), here) == []
    here = dataclasses.replace(here, driver="570.20", memory_mib=143771, power_limit_w=500)
    messages = config_file.differences(content(), here)
    assert messages == ["driver 570.10, here 570.20", "power_limit_w 700, here 500"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not JSON"),
        (b"[]", "is no JSON object"),
        (b"{", "is not JSON"),
        (b"null", "is no JSON object"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"schema": NaN}', "NaN is no number"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", ""),
    ],
    ids=["empty", "list", "torn", "null", "bytes", "nan", "deep", "huge"],
)
def test_invalid_files(folders: tuple[Path, Path], data: bytes, reason: str) -> None:
    write(folders[0], data)
    with notices() as messages:
        assert choose().source == "heuristic"
        assert choose().source == "heuristic"
    assert len(messages) == 1
    assert reason in messages[0]


def test_a_folder_with_the_name_of_the_file(folders: tuple[Path, Path]) -> None:
    (folders[0] / configs.file_name(H200.name)).mkdir()
    with notices() as messages:
        assert choose().source == "heuristic"
    assert "is no regular file" in messages[0]


@pytest.mark.parametrize("where", ["below a file", "no folder"])
def test_missing_folders(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No notice."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(configs.USER_FOLDER, str(tmp_path / ("file/x" if where == "below a file" else "none")))
    monkeypatch.setenv(configs.NEAREST, "1")
    configs.forget()
    with notices() as messages:
        assert choose().source == "heuristic"
    assert messages == []
    configs.forget()


def test_an_unreadable_file(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One notice; the heuristic is used."""
    path = write(folders[0], content())
    real = os.open

    def refuse(name: Any, *rest: Any, **options: Any) -> Any:
        if str(name) == path:
            raise PermissionError(13, "Permission denied", path)
        return real(name, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with notices() as messages:
        assert choose().source == "heuristic"
    assert messages == [f"{path} cannot be read: Permission denied; ignored"]


def paths_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value of a JSON object."""
    yield path
    for name in value if isinstance(value, dict) else ():
        yield from paths_in(value[name], (*path, name))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
CONTENT = content()
SOFT_PATHS = {("torch",), ("driver",), ("device", "memory_mib"), ("device", "power_limit_w")}


def changed(path: tuple, change: Callable[[dict, str], None]) -> Any:
    data = copy.deepcopy({"all": CONTENT})
    inside: Any = data
    for name in ("all", *path)[:-1]:
        inside = inside[name]
    change(inside, ("all", *path)[-1])
    return data.get("all")


@given(path=st.sampled_from(list(paths_in(CONTENT))), value=JSON, how=st.sampled_from(["replace", "remove", "rename"]))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupt_values_are_never_used(folders: tuple[Path, Path], path: tuple, value: Any, how: str) -> None:
    """Any value replaced, removed or renamed: rejected with a notice unless it is soft; never an exception."""

    def damage(table: dict, name: str) -> None:
        old = table.pop(name)
        if how == "rename":
            table[name + "x"] = old
        elif how == "replace":
            table[name] = value

    data = changed(path, damage)
    file = write(folders[0], data)
    with notices() as messages:
        choice = choose()
    if path in SOFT_PATHS or data == CONTENT:
        assert choice.source == file
    else:
        assert choice.source == "heuristic"
        assert len(messages) == (0 if data == {} or _has_no_entries(data) else 1)


def _has_no_entries(data: Any) -> bool:
    """Whether the file is valid and holds no entry at all, so that nothing in it is ignored."""
    if not isinstance(data, dict) or config_file.conflicts(data, config_file.facts(H200)):
        return False
    found = config_file.entries(data, config_file.facts(H200), REGISTRY)
    return not found.valid and not found.invalid


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupt_bytes_are_never_used(folders: tuple[Path, Path], data: st.DataObject) -> None:
    """Truncated, overwritten or inserted bytes: the measured configuration or the heuristic, never anything else."""
    text = json.dumps(CONTENT).encode()
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(start + 20, len(text))))
    text = text[:start] + data.draw(st.binary(max_size=20)) + text[end:]
    if data.draw(st.booleans()):
        text = text[:end]
    write(folders[0], text)
    with notices():
        choice = choose()
    assert choice.source == "heuristic" or choice.config == Config(**MEASURED)


def test_hashes_depend_on_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another module has another hash; entries of an operator whose source cannot be read are rejected."""

    def variant(**attributes: Any) -> type[Operator]:
        return type("Variant", (OPERATOR,), {"__slots__": (), "__module__": OPERATOR.__module__, **attributes})

    other = variant(__module__="tinysr_kernels.ops.norm.layer_norm")
    assert config_file.kernel_hash(variant()) == config_file.kernel_hash(OPERATOR)
    assert config_file.kernel_hash(other) != config_file.kernel_hash(OPERATOR)
    assert config_file.space_hash(other) == config_file.space_hash(OPERATOR)
    assert config_file.space_hash(variant(space=REGISTRY["linear"].space)) != HASHES["space_hash"]
    built_in = variant(space=len)
    assert config_file.space_hash(built_in) == ""
    unreadable = content(operations=operation(space_hash=""))
    assert config_file.entry(unreadable, config_file.facts(H200), built_in, BUCKET)[0] is None


def test_hashes_include_every_module_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in the kernels, the statistics or the device functions changes the hash."""
    before = config_file.kernel_hash(REGISTRY["sepconv_moments"])
    read = inspect.getsource
    for name in ("conv.kernels.sepconv", "conv.sepconv", "norm.kernels.channel_moments", "device_functions"):
        changed = sys.modules[f"tinysr_kernels.ops.{name}"]
        with monkeypatch.context() as patch:
            patch.setattr(inspect, "getsource", lambda one, changed=changed: read(one) + "#" * (one is changed))
            config_file.kernel_hash.cache_clear()
            assert config_file.kernel_hash(REGISTRY["sepconv_moments"]) != before, name
    config_file.kernel_hash.cache_clear()
