"""The tuner's own files, odd or hostile: nothing is lost by writing over them, nothing of them stops a run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from autotune.__main__ import main
from autotune.device import builder as builder_module
from autotune.items import log as log_module
from autotune.items.log import Log, is_measurement, read_records
from autotune.search import store
from autotune.search.store import export, merge
from benchmarks.static import static
from tests import ROOT
from tests.autotune.simulated import FACTS, ITEMS, OP, Simulated
from tests.autotune.test_store import CONFIG, OTHER, entries, new_entry
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.json_file import BadFile

ITEM = ITEMS[0]
HASHES = config_file.hashes_of(Simulated)


def sealed(bucket: str, **changes: Any) -> dict[str, Any]:
    """An entry that says of itself that it is as it was measured."""
    raw = {"config": vars(CONFIG), "time_us": 5.0, "incumbent_us": 8.0, "candidates": 4, **changes}
    text = json.dumps([OP, bucket, *HASHES.values(), raw], sort_keys=True)
    return {**raw, "seal": hashlib.sha256(text.encode()).hexdigest()[:16]}


def test_no_written_file_is_unreadable(file: Path) -> None:
    """Infinite numbers, numbers of thousands of digits and halves of characters can be read; not all can be written."""
    merge(file, FACTS, [new_entry()])
    content = json.loads(file.read_text())
    content["driver"] = 1e308 * 10
    content["operations"][OP]["entries"] |= {
        "infinite": sealed("infinite", time_us=1e308 * 10),
        "half \ud800": sealed("half \ud800"),
        "deep": sealed("deep", environment={"a": {"b": [1, 2]}}),
    }
    file.write_text(json.dumps(content).replace("Infinity", "1e999"))
    merge(file, FACTS, [new_entry(OTHER, bucket="new")])
    assert set(entries(file)) == {ITEM.bucket, "half \ud800", "deep", "new"}
    assert entries(file)[ITEM.bucket]["environment"]["driver"] is None
    merge(file, FACTS, [])
    assert set(entries(file)) == {ITEM.bucket, "half \ud800", "deep", "new"}
    assert set(export(file, FACTS, {OP: Simulated})["operations"][OP]["entries"]) >= {ITEM.bucket, "new"}


@pytest.mark.parametrize("kind", ["valid", "another file", "nothing", "itself", "folder"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(file: Path, tmp_path: Path, kind: str) -> None:
    """Also as root: a link to a system's file must not rename that."""
    target = tmp_path / "elsewhere.json"
    if kind == "valid":
        merge(target, FACTS, [new_entry(bucket="earlier")])
    elif kind == "another file":
        target.write_text("a letter")
    elif kind == "folder":
        target.mkdir()
    before = target.read_bytes() if target.is_file() else None
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(file if kind == "itself" else target)
    merge(file, FACTS, [new_entry()])
    assert set(entries(file)) == {ITEM.bucket, *(["earlier"] if kind == "valid" else [])}
    assert not file.is_symlink()
    assert (target.read_bytes() if target.is_file() else None) == before
    assert target.exists() == (kind in ("valid", "another file", "folder"))


def test_no_earlier_file_is_lost(file: Path) -> None:
    """Each invalid one is kept under a name of its own."""
    file.parent.mkdir()
    for text in ("one", "two", "three"):
        file.write_text(text)
        merge(file, FACTS, [new_entry()])
    kept = [file.with_name(f"{file.name}.old{n}").read_text() for n in ("", ".2", ".3")]
    assert kept == ["one", "two", "three"]


def test_a_leftover_of_a_killed_process_is_not_followed(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir()
    (tmp_path / "precious").write_text("precious")
    Path(f"{file}.part").symlink_to(tmp_path / "precious")
    merge(file, FACTS, [new_entry()])
    assert (tmp_path / "precious").read_text() == "precious"
    assert set(entries(file)) == {ITEM.bucket}


def test_a_held_lock_is_not_waited_for_without_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.05)
    merge(file, FACTS, [new_entry()])
    hold = f"lock = filelock.FileLock({str(file) + '.lock'!r}); lock.acquire()"
    code = f"import filelock; {hold}; print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(OSError, match="lock"):
            merge(file, FACTS, [new_entry(bucket="new")])
        other.communicate(b"\n")
    merge(file, FACTS, [new_entry(bucket="new")])
    assert set(entries(file)) == {ITEM.bucket, "new"}


def test_a_file_that_would_be_too_large_to_read_is_not_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(file, FACTS, [new_entry()])
    before = file.read_bytes()
    monkeypatch.setattr(config_file, "LARGEST", len(before) + 10)
    with pytest.raises(ValueError, match="move it away"):
        merge(file, FACTS, [new_entry(bucket="new")])
    assert file.read_bytes() == before


def test_modules_import_without_fcntl() -> None:
    """Windows has none: whoever uses it says so with `try`, or imports it where it is used."""
    files = [*(ROOT / "autotune").rglob("*.py"), *(ROOT / "tinysr_kernels").rglob("*.py")]
    lines = {path.name: path.read_text(encoding="utf-8").splitlines() for path in files}
    assert [name for name, text in lines.items() if "import fcntl" in text] == []
    assert FileLock.__module__.startswith("filelock")


SAMPLE = {"us": 1.0, "clock": 0, "disturbed": "", "retried": []}
ODD: list[tuple[str, dict[str, Any]]] = [
    ("sample", {**SAMPLE, "us": "1"}),
    ("sample", {**SAMPLE, "us": 0}),
    ("sample", {**SAMPLE, "us": 1e308 * 10}),
    ("sample", {**SAMPLE, "us": None}),
    ("sample", {**SAMPLE, "retried": 3}),
    ("sample", {**SAMPLE, "retried": [[1.0]]}),
    ("sample", {**SAMPLE, "seconds": "0.1"}),
    ("sample", {**SAMPLE, "seconds": -1}),
    ("sample", {**SAMPLE, "seconds": True}),
    ("sample", {"failure": ["error"]}),
    ("sample", {"failure": [1, 2]}),
    ("model", {**SAMPLE, "disturbed": None}),
    ("check 0", {"failure": "wrong"}),
    ("build", {"resources": [[1]], "faults": []}),
    ("build", {"resources": [[1, 2]], "faults": [3]}),
    ("build", {"resources": 5, "faults": []}),
    ("build", {}),
]


def lines(path: Path, *records: dict[str, Any]) -> None:
    """Write records with the checksums that they should have."""
    texts = [json.dumps(record, sort_keys=True) for record in records]
    path.write_text("".join(f"{zlib.crc32(text.encode()):08x} {text}\n" for text in texts))


@pytest.mark.parametrize(("what", "values"), ODD, ids=str)
def test_records_that_are_no_measurement_are_skipped(tmp_path: Path, what: str, values: dict[str, Any]) -> None:
    key = (what, "item", "{}")
    good: dict[str, Any] = {"sample": SAMPLE, "model": SAMPLE, "build": {"resources": [[1, 2]], "faults": []}}.get(
        what, {}
    )
    head = {"what": what, "subject": "item", "config": "{}", "stamp": "s", "seconds": 0.5}
    lines(tmp_path / "log", {**head, **values}, {**head, **good})
    assert is_measurement({**head, **good})
    log = Log(tmp_path / "log")
    assert log.next(key, "s") == {**head, **good}
    assert log.next(key, "s") is None


def test_a_log_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadFile, match="is no regular file; move it away"):
        Log(tmp_path)
    path = tmp_path / "log"
    lines(path, {"what": "sample"})
    monkeypatch.setattr(log_module, "LARGEST", 10)
    with pytest.raises(BadFile, match="delete it to start anew"):
        Log(path)


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LONGEST", 1000)
    path = tmp_path / "log"
    log_module.append(path, {"what": "a", "subject": "", "config": "", "stamp": ""})
    path.write_bytes(path.read_bytes() + b"x" * 100_000)
    log_module.append(path, {"what": "b", "subject": "", "config": "", "stamp": ""})
    assert [record["what"] for record in read_records(path)] == ["a", "b"]


def test_odd_records_of_compilations_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "RESULTS", tmp_path)
    cache = tmp_path / "cache"
    for digest, code in {"a": [1, 2, 3], "b": "does not compile", "c": [1, 2], "d": [1, 2, -3], "e": None}.items():
        builder_module.append_cache(cache, digest, code)  # type: ignore[arg-type]
    assert builder_module.read_cache(cache) == {"a": (1, 2, 3), "b": "does not compile"}


@pytest.mark.parametrize("text", ["", "{}", "[3]", '[{"op": "x"}]', "[" * 5000])
def test_damaged_reports_of_compilations_are_not_used(tmp_path: Path, capsys, text: str) -> None:
    path = tmp_path / "static.json"
    path.write_text(text)
    assert static.read_reports(path) == {}
    assert "`make tables` writes it anew; nothing of it is used" in capsys.readouterr().err
    with pytest.raises(BadFile, match=r"static\.json is"):
        static.stored_reports(path)


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes elsewhere only")
def test_show_says_what_it_ignores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a line, whatever the file and its name hold, and whatever the terminal's encoding lacks."""
    folder = tmp_path / "us\udcffer"
    monkeypatch.setenv(configs.USER_FOLDER, str(folder))
    file = configs.user_file("NVIDIA H200")
    merge(file, FACTS, [new_entry(), new_entry(bucket="bad \x1b[31m")])
    content = json.loads(file.read_text())
    content["operations"][OP]["entries"]["bad \x1b[31m"]["time_us"] = 0.5
    file.write_text(json.dumps(content))
    configs.forget()
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["show", "--ckpt", "demo", "--gpu", "90"]) == 0
    stream.flush()
    out = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "us\\udcffer/NVIDIA H200.json: 1 entries, 1 others ignored (simulated 'bad \\x1b[31m': was changed" in out
    assert "\x1b" not in out


def test_commands_end_with_one_line(file: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the cache of compilations is a folder."""
    from autotune.commands import check

    monkeypatch.setattr(check, "CACHE", tmp_path)
    assert main(["check", "--ckpt", "demo", "--limit", "1"]) == 2
    assert capsys.readouterr().err == f"autotune: {tmp_path} is no regular file; move it away\n"
