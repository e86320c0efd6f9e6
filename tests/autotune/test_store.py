"""A device's configuration file and the log: merged, sealed, and robust against corruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.items import log as log_module
from autotune.items.log import Log, append, read_records
from autotune.search.store import NewEntry, export, merge, seal_of
from tests.autotune.simulated import FACTS, ITEMS, OP, Config, Simulated
from tinysr_kernels.launch import config_file
from tinysr_kernels.launch.device import GPUS

CONFIG = Config("tile", 16, 16, 2, 1)
OTHER = Config("tile", 64, 32, 8, 2)
ITEM = ITEMS[0]


class Second(Simulated):
    """Another operator with the same kernels."""

    __slots__ = ()
    name = "second"


def of_other_source(operator: type[Simulated]) -> type[Simulated]:
    """The operator as if it were defined in another module."""
    return type("Changed", (operator,), {"__slots__": (), "__module__": "tinysr_kernels.ops.device_functions"})


def new_entry(config: Config = CONFIG, time_us: float = 5.0, **changes: Any) -> NewEntry:
    return NewEntry(**{"operator": Simulated, "bucket": ITEM.bucket, "config": config, "time_us": time_us,
                        "incumbent_us": 8.0, "candidates": 40, **changes})  # fmt: skip


def entries(file: Path) -> dict:
    return config_file.read(file)[0]["operations"][OP]["entries"]


def test_a_written_entry_is_used(file: Path) -> None:
    merge(file, FACTS, [new_entry()])
    choice = ITEM.call.choose(GPUS[90])
    assert choice.config == CONFIG
    assert choice.source == str(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["schema"] == 1
    assert content["device"] == {
        "name": "NVIDIA H200",
        "capability": [9, 0],
        "multiprocessors": 132,
        "memory_mib": 143771,
        "power_limit_w": 700,
    }
    assert (content["driver"], content["triton"], content["torch"]) == (FACTS.driver, FACTS.triton, FACTS.torch)
    operation = content["operations"][OP]
    assert {name: operation[name] for name in config_file.WHAT} == config_file.hashes_of(Simulated)
    raw = operation["entries"][ITEM.bucket]
    assert raw["config"] == dataclasses.asdict(CONFIG)
    assert (raw["time_us"], raw["incumbent_us"], raw["candidates"]) == (5.0, 8.0, 40)
    assert seal_of(file, OP, ITEM.bucket) == raw["seal"]
    assert seal_of(file, OP, "another") is None


def test_other_buckets_and_operators_stay(file: Path) -> None:
    merge(file, FACTS, [new_entry(), new_entry(bucket="another")])
    merge(file, FACTS, [NewEntry(Second, "b", CONFIG, 1.0, 2.0, 3)])
    merge(file, FACTS, [new_entry(OTHER, bucket="third")])
    assert set(entries(file)) == {ITEM.bucket, "another", "third"}
    assert set(config_file.read(file)[0]["operations"]) == {OP, "second"}


def test_a_new_entry_replaces_the_one_it_was_measured_against(file: Path) -> None:
    """Even if its time is longer: it was faster when both were measured side by side."""
    merge(file, FACTS, [new_entry(CONFIG, 5.0)])
    merge(file, FACTS, [new_entry(OTHER, 6.0, replaces=seal_of(file, OP, ITEM.bucket))])
    assert entries(file)[ITEM.bucket]["config"] == dataclasses.asdict(OTHER)


@pytest.mark.parametrize(("time_us", "stays"), [(6.0, CONFIG), (4.0, OTHER)])
def test_of_two_concurrent_entries_the_faster_stays(file: Path, time_us: float, stays: Config) -> None:
    merge(file, FACTS, [new_entry(CONFIG, 5.0)])
    merge(file, FACTS, [new_entry(OTHER, time_us, replaces=None)])
    assert entries(file)[ITEM.bucket]["config"] == dataclasses.asdict(stays)


def test_entries_of_other_versions_keep_their_environment(file: Path) -> None:
    """They stay with the versions they were measured with, and are used if these are compatible."""
    old = dataclasses.replace(FACTS, driver="550.1", torch="2.11.0")
    merge(file, old, [new_entry()])
    merge(file, FACTS, [new_entry(bucket="new")])
    both = entries(file)
    assert both[ITEM.bucket]["environment"] == {"driver": "550.1", "triton": FACTS.triton, "torch": "2.11.0"}
    assert "environment" not in both["new"]
    content, _ = config_file.read(file)
    entry, why = config_file.entry(content, FACTS, Simulated, ITEM.bucket)
    assert entry is not None, why
    assert config_file.differences(content, FACTS, entry) == [
        f"driver 550.1, here {FACTS.driver}",
        f"torch 2.11.0, here {FACTS.torch}",
    ]
    merge(file, dataclasses.replace(FACTS, driver="590.1"), [new_entry(bucket="newest")])
    assert entries(file)[ITEM.bucket]["environment"]["driver"] == "550.1"
    assert entries(file)["new"]["environment"]["driver"] == FACTS.driver


def test_entries_of_other_kernel_source_are_replaced(file: Path) -> None:
    merge(file, FACTS, [new_entry(bucket="old", operator=of_other_source(Simulated))])
    merge(file, FACTS, [NewEntry(Second, "b", CONFIG, 1.0, 2.0, 3)])
    assert set(entries(file)) == {"old"}
    merge(file, FACTS, [new_entry()])
    assert set(entries(file)) == {ITEM.bucket}


@pytest.mark.parametrize("text", ["", "{", '{"schema": 2}', '{"schema": 1, "device": {"name": "NVIDIA A30"}}'])
def test_an_invalid_file_is_renamed(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    merge(file, FACTS, [new_entry()])
    assert set(entries(file)) == {ITEM.bucket}
    assert Path(f"{file}.old").read_text() == text


def test_corrupt_entries_are_dropped(file: Path) -> None:
    merge(file, FACTS, [new_entry(), new_entry(bucket="damaged"), new_entry(bucket="none")])
    content = json.loads(file.read_text())
    content["operations"][OP]["entries"]["damaged"]["time_us"] = 0.1
    content["operations"][OP]["entries"]["none"] = 3
    content["operations"]["nothing"] = {"entries": {"x": {}}}
    content["operations"]["list"] = []
    file.write_text(json.dumps(content))
    merge(file, FACTS, [new_entry(bucket="new")])
    assert set(entries(file)) == {ITEM.bucket, "new"}
    assert set(config_file.read(file)[0]["operations"]) == {OP}


def test_export_contains_the_valid_entries(file: Path) -> None:
    merge(file, FACTS, [new_entry(), NewEntry(of_other_source(Second), "b", CONFIG, 1.0, 2.0, 3)])
    made = export(file, FACTS, {OP: Simulated, "second": Second})
    assert set(made["operations"]) == {OP}
    assert made["device"]["name"] == "NVIDIA H200"
    assert export(file, dataclasses.replace(FACTS, gpu=GPUS[80]), {OP: Simulated}) == {}
    assert export(file.with_name("none"), FACTS, {OP: Simulated}) == {}
    for damage in ([], {OP: []}, {OP: {"entries": 1}}):
        file.write_text(json.dumps({**made, "operations": damage}))
        assert export(file, FACTS, {OP: Simulated})["operations"] == {}


KEY = ("sample", "item", "{}")


def test_the_log_returns_each_measurement_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    first = Log(path)
    assert first.next(KEY, "s") is None
    for us in (1.0, 2.0):
        first.add(KEY, "s", us=us, clock=0, disturbed="", retried=[], seconds=0.1)
    first.add(KEY, "another stamp", us=3.0)
    second = Log(path)
    assert [r["us"] for _ in range(2) if (r := second.next(KEY, "s"))] == [1.0, 2.0]
    assert second.next(KEY, "s") is None
    assert Log().next(KEY, "s") is None


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corruption_of_the_log_loses_only_the_corrupt_lines(tmp_path: Path, data: st.DataObject) -> None:
    """Every complete line is read and no other; a line appended later is complete."""
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    records = [{"what": "sample", "subject": "i", "config": "{}", "stamp": "s", "us": float(i)} for i in range(8)]
    for record in records:
        append(path, record)
    text = path.read_bytes()
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(start + 90, len(text))))
    damaged = text[:start] + data.draw(st.binary(max_size=20)) + (b"" if data.draw(st.booleans()) else text[end:])
    path.write_bytes(damaged)
    read = list(read_records(path))
    assert all(record in records for record in read)
    untouched = text[:start].count(b"\n")
    assert read[:untouched] == records[:untouched]
    append(path, records[0])
    assert [*read_records(path)][-1] == records[0]
    assert len([*read_records(path)]) >= untouched + 1


@pytest.mark.parametrize("line", [b"", b"\n", b"00000000 {}\n", b"zzzzzzzz {}\n", b"\xff\n", b"1 2 3\n"])
def test_invalid_lines(line: bytes) -> None:
    assert log_module._parse(line) is None


def test_a_line_needs_its_key() -> None:
    assert log_module._parse(log_module._line({"what": "sample", "stamp": "s"})) is None
    assert log_module._parse(log_module._line({"what": 1, "subject": "", "config": "", "stamp": ""})) is None
