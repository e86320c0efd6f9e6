"""The file of verdicts: what it must agree with, what a damaged one does, and folders that cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.first_use.test_correctness import norm_call
from tinysr_kernels.first_use import verdicts
from tinysr_kernels.first_use.items import item_of
from tinysr_kernels.first_use.verdicts import UNCHECKED, Verdict, environment, path_of, read, verdict, write
from tinysr_kernels.launch.device import GPUS

ITEM = item_of(norm_call(), GPUS[90])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(verdicts.FOLDER, str(tmp_path / "cache"))
    return environment(GPUS[90])


def test_verdicts_are_kept_and_merged(here: dict[str, Any]) -> None:
    assert read(here) == {}
    assert write(here, {"a": verdict(ITEM, "passed")}) == ""
    assert write(here, {"b": verdict(ITEM, "wrong", "relative error 1"), "c": verdict(ITEM, UNCHECKED)}) == ""
    assert read(here) == {"a": verdict(ITEM, "passed"), "b": verdict(ITEM, "wrong", "relative error 1")}
    assert write(here, {"a": verdict(ITEM, "hung")}) == ""
    assert read(here)["a"].kind == "hung"


@pytest.mark.parametrize("fact", list(environment(GPUS[90])))
def test_another_environment_has_other_verdicts(here: dict[str, Any], fact: str) -> None:
    """Driver, torch, Triton, GPU, this package: whatever changes."""
    write(here, {"a": verdict(ITEM, "passed")})
    other = {**here, fact: "another"}
    assert read(other) == {}
    # Not even a file that was given the other's name.
    path_of(here).rename(path_of(other))
    assert read(other) == {}


def test_verdicts_on_other_kernels_are_dropped(here: dict[str, Any]) -> None:
    old = Verdict("layer_norm", "float16", "another source", "wrong", "long ago")
    gone = Verdict("no_such_operator", "float16", ITEM.kernels, "passed")
    write(here, {"old": old, "gone": gone})
    assert read(here) == {}
    write(here, {"a": verdict(ITEM, "passed")})
    assert "long ago" not in path_of(here).read_text()


DAMAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "half": b'{"schema": 1, "environment": {',
    "a list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "large": b" " * (verdicts.LARGEST + 1),
    "another schema": b'{"schema": 2}',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_and_replaced(here: dict[str, Any], damage: str) -> None:
    path = path_of(here)
    path.parent.mkdir(parents=True)
    path.write_bytes(DAMAGE[damage])
    assert read(here) == {}
    assert write(here, {"a": verdict(ITEM, "passed")}) == ""
    assert read(here) == {"a": verdict(ITEM, "passed")}


@pytest.mark.parametrize(
    "change", [{"kind": "fine"}, {"kind": UNCHECKED}, {"reason": 3}, {"reason": "x" * 301}, {"more": ""}, {"op": None}]
)
def test_a_damaged_verdict_is_ignored_alone(here: dict[str, Any], change: dict[str, Any]) -> None:
    write(here, {"a": verdict(ITEM, "passed"), "b": verdict(ITEM, "passed")})
    content = json.loads(path_of(here).read_text())
    content["verdicts"]["a"] |= change
    path_of(here).write_text(json.dumps(content))
    assert list(read(here)) == ["b"]


def test_the_file_stays_small(here: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "MOST", 3)
    for i in range(5):
        write(here, {f"key{i}": verdict(ITEM, "wrong", "x" * 1000)})
    assert list(read(here)) == ["key2", "key3", "key4"]
    assert len(path_of(here).read_bytes()) < 3000


def test_a_folder_that_cannot_be_made(here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(verdicts.FOLDER, str(tmp_path / "file" / "below"))
    assert write(here, {"a": verdict(ITEM, "passed")}) != ""
    assert read(here) == {}


def test_a_folder_in_the_files_place(here: dict[str, Any]) -> None:
    path_of(here).mkdir(parents=True)
    assert write(here, {"a": verdict(ITEM, "passed")}) != ""
    assert read(here) == {}


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(verdicts.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "tinysr-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert verdicts.folder() == Path(os.path.expanduser("~/.cache/tinysr-kernels"))
