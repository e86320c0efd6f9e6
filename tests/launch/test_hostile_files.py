"""A hostile or stale file never stops inference: bad entries are ignored, with one notice per file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.files import BUCKET, CALL, H200, HASHES, MEASURED, choose, content, entry, notices, operation, write
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.sepconv import Config

SEALED: dict[str, dict[str, Any]] = {
    "negative": {"config": {**MEASURED, "block_m": -16}},
    "three": {"config": {**MEASURED, "block_m": 48}},
    "far too large": {"config": {**MEASURED, "block_n": 1 << 16}},
    "zero": {"config": {**MEASURED, "block_k": 0}},
    "too large for the call": {"config": {**MEASURED, "block_n": 128}},
    "1e999 candidates": {"candidates": 1e308 * 10},
    "1e999 us": {"time_us": 1e308 * 10},
    "a number of 400 digits": {"time_us": 10**400},
    "a boolean": {"time_us": True},
    "another form": {"config": {**MEASURED, "form": "x" * 5000}},
    "a list": {"config": [1]},
}


@pytest.mark.parametrize("name", SEALED)
def test_entries_with_a_valid_seal_are_not_trusted(folders: tuple[Path, Path], name: str) -> None:
    path = write(folders[0], content(entry(**SEALED[name])))
    with notices() as messages:
        choice = choose()
    assert choice == configs.Choice(CALL.heuristic(H200), "heuristic")
    assert len(messages) == 1
    assert messages[0].startswith(path)
    assert len(messages[0]) < 600


def test_1e999_as_a_file_says_it(folders: tuple[Path, Path]) -> None:
    """Read as infinite; int() of it would be an OverflowError."""
    text = json.dumps(content()).replace('"candidates": 40', '"candidates": 1e999')
    write(folders[0], text.encode())
    with notices() as messages:
        assert choose().source == "heuristic"
    assert "was changed after it was measured" in messages[0]


def test_one_notice_counts_all_entries(folders: tuple[Path, Path]) -> None:
    """Five hundred bad ones, each bad in its own way, beside a good one, which is used."""
    bad = {f"bucket {n}": {**entry(), "time_us": n + 100} for n in range(500)}
    everything = operation(entries={BUCKET: entry(), **bad}) | {"no such operator": {"entries": {"a": 1, "b": 2}}}
    path = write(folders[0], content(operations=everything))
    with notices() as messages:
        assert choose().config == Config(**MEASURED)
        for rows in range(1, 20):
            REGISTRY["layer_norm"](torch.empty(rows, 64), 1e-6).choose(H200)
    assert len(messages) == 1
    assert messages[0].startswith(f"{path}: 502 of 503 entries ignored (sepconv bucket 0: was changed after it")
    assert "; and 498 more)" in messages[0]
    assert messages[0].endswith("`python -m autotune run` measures anew")
    assert len(messages[0]) < 1000


def test_entries_that_calls_cannot_use_are_said_once(folders: tuple[Path, Path]) -> None:
    """Each call would have its own message."""
    hostile = {**MEASURED, "block_n": 128}
    entries = {}
    for pixels in (16, 32, 64):
        call = REGISTRY["sepconv"](
            torch.empty(1, 64, pixels, pixels, dtype=torch.float16, device="meta"), CALL.depthwise, CALL.pointwise
        )
        raw = {"config": hostile, "time_us": 1.0, "incumbent_us": 2.0, "candidates": 3}
        seal = config_file.seal("sepconv", call.bucket(), HASHES, raw)
        entries[call.bucket()] = {**raw, "seal": seal}
    write(folders[0], content(operations=operation(entries=entries)))
    with notices() as messages:
        for pixels in (16, 32, 64):
            x = torch.empty(1, 64, pixels, pixels, dtype=torch.float16, device="meta")
            assert REGISTRY["sepconv"](x, CALL.depthwise, CALL.pointwise).choose(H200).source == "heuristic"
    assert len(messages) == 1
    assert "entries that calls cannot use are ignored, such as sepconv" in messages[0]


def test_differences_of_entries_are_said_once(folders: tuple[Path, Path]) -> None:
    hundred = {}
    for n in range(100):
        raw = {"config": MEASURED, "time_us": 1, "incumbent_us": 2, "candidates": 3, "environment": {"torch": f"1.{n}"}}
        hundred[f"b{n}"] = {**raw, "seal": config_file.seal("sepconv", f"b{n}", HASHES, raw)}
    write(folders[0], content(operations=operation(entries={BUCKET: entry(), **hundred})))
    with notices() as messages:
        assert choose().config == Config(**MEASURED)
    assert len(messages) == 1
    assert "and 97 more; used all the same" in messages[0]


@pytest.mark.parametrize(
    "text", ['{"schema": 1, "schema": 1}', "{" * 50_000, '{"a":' * 40 + "1" + "}" * 40, "\ufeff{}", "[1e999]"]
)
def test_odd_text(folders: tuple[Path, Path], text: str) -> None:
    write(folders[0], text.encode())
    with notices() as messages:
        assert choose().source == "heuristic"
        assert not configs.pdl(H200)
    assert len(messages) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "link", "folder"])
def test_what_is_no_file(folders: tuple[Path, Path], kind: str, tmp_path: Path) -> None:
    """Links are followed, as users who keep their settings elsewhere expect."""
    path, target = folders[0] / configs.file_name(H200.name), tmp_path / "target"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else target)
    if kind == "link":
        target.write_text(json.dumps(content()), encoding="utf-8")
    with notices() as messages:
        assert choose().source == (str(path) if kind == "link" else "heuristic")
    assert len(messages) == (0 if kind in ("link", "dangling") else 1)


def test_a_folder_variable_that_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(configs.USER_FOLDER, str(tmp_path / "file"))
    configs.forget()
    with notices() as messages:
        assert choose().source == "heuristic"
        REGISTRY["layer_norm"](torch.empty(3, 64), 1e-6).choose(H200)
    assert messages == [f"TINYSR_CONFIG_DIR must name a folder, found the file {tmp_path / 'file'}; ignored"]
    configs.forget()


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes elsewhere only")
@pytest.mark.parametrize("name", ["us\udcffer", "a\nb\x1b[31m", "a b"])
def test_odd_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The file is found; a notice shows its name in one line, without what a terminal obeys."""
    folder = tmp_path / name
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system refuses the name")
    monkeypatch.setenv(configs.USER_FOLDER, str(folder))
    write(folder, content())
    assert choose().config == Config(**MEASURED)
    write(folder, b"{")
    with notices() as messages:
        assert choose().source == "heuristic"
    assert len(messages) == 1
    assert messages[0].isprintable()
    configs.forget()


@pytest.mark.parametrize("value", ["", "x" * 5000, "relative/folder", "~"])
def test_odd_values_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(configs.USER_FOLDER, value)
    configs.forget()
    with notices() as messages:
        assert choose().source == "heuristic"
    assert configs.user_folder() == (tmp_path / value if value else tmp_path / "xdg" / "tinysr-kernels")
    assert len(messages) == (1 if len(value) == 5000 else 0)
    assert all("File name too long" in message and len(message) < 600 for message in messages)
    configs.forget()


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv(configs.USER_FOLDER, "relative")
    configs.forget()
    assert choose().source == "heuristic"
    monkeypatch.chdir(tmp_path)
    configs.forget()
