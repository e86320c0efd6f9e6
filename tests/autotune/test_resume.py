"""A killed run resumes where it stopped, and concurrent runs lose nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from autotune.items import log
from autotune.items.log import read_records
from autotune.items.work import Item
from autotune.search import store, tuning
from autotune.search.store import NewEntry, merge
from autotune.search.tuning import Outcome, tune
from tests.autotune.simulated import (
    FACTS,
    ITEMS,
    OP,
    TARGET,
    Config,
    Odds,
    Simulated,
    SimulatedDevice,
    candidates_of,
)
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.device import GPUS

# Failures that do not depend on the clock, because a resumed run starts a new clock.
ODDS = Odds(throttle_every=math.inf)
SEED = 11
BUDGET = 60.0


@pytest.fixture(autouse=True)
def _candidates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda item, gpu, incumbent: candidates_of(item.key))


def run(
    file: Path, samples: Path, items: Sequence[Item] = ITEMS, seed: int = SEED, budget: float = BUDGET
) -> tuple[Outcome, SimulatedDevice]:
    """A run on a device whose call counts match the log."""
    configs.forget()
    device = SimulatedDevice(seed, ODDS)
    for record in read_records(samples) if samples.exists() else ():
        if record["what"] == "sample":
            device.calls[record["subject"], record["config"]] += 1
    device.calls.update({"samples": 0, "checks": 0, "builds": 0, "models": 0})
    return tune([TARGET], items, device, file, budget=budget, samples=samples), device


def in_child(action: Callable[[], object]) -> int:
    """Run in a child process; its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)  # never continue into the remaining tests
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(module: Any, name: str, at: int, half: bool = False) -> Callable[..., Any]:
    """`os.<name>` that kills the process at the at-th call: before it, or after writing half of the data."""
    real, calls = getattr(os, name), iter(range(1, 1 << 30))

    def deadly(*arguments: Any) -> Any:
        if next(calls) != at:
            return real(*arguments)
        if half:
            real(arguments[0], arguments[1][: len(arguments[1]) // 2])
        return os.kill(os.getpid(), signal.SIGKILL)

    return deadly


class Os:
    """The module os with one function replaced."""

    def __init__(self, **changes: Any) -> None:
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def killed_run(file: Path, samples: Path, monkeypatch: pytest.MonkeyPatch, at: int, half: bool) -> None:
    """A run that is killed at the at-th line of the log."""

    def action() -> None:
        monkeypatch.setattr(log, "os", Os(write=killing(log, "write", at, half)))
        run(file, samples)

    assert in_child(action) == -signal.SIGKILL


def champions(outcome: Outcome) -> list[Config]:
    return [race.champion.config for race in outcome.races]


def lines(samples: Path) -> list[dict]:
    return list(read_records(samples))


def calls_to(device: SimulatedDevice) -> int:
    return sum(device.calls[what] for what in ("samples", "checks", "builds", "models"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Config], list[dict], dict]:
    """Champions, log and entries of an uninterrupted run."""
    from tinysr_kernels.ops import REGISTRY

    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, OP, Simulated)
        patch.setenv(configs.USER_FOLDER, str(folder))
        patch.setattr(tuning, "candidates", lambda item, gpu, incumbent: candidates_of(item.key))
        outcome, device = run(folder / "NVIDIA H200.json", folder / "samples")
        assert outcome.accepted
        assert calls_to(device) == len(lines(folder / "samples"))
    entries = config_file.read(folder / "NVIDIA H200.json")[0]["operations"]
    return champions(outcome), lines(folder / "samples"), entries


@pytest.mark.parametrize("half", [False, True], ids=["between-lines", "within-a-line"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_killed_and_resumed(
    part: float, half: bool, file: Path, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, records, entries = uninterrupted
    at = 1 + round(part * (len(records) - 1))
    samples = tmp_path / "samples"
    killed_run(file, samples, monkeypatch, at, half)
    kept = len(lines(samples)) if samples.exists() else 0
    assert kept == at - 1
    assert not file.exists()
    outcome, device = run(file, samples)
    # No step of the killed run is repeated.
    assert calls_to(device) == len(records) - kept
    assert outcome.counts["replayed"] == kept if kept else "replayed" not in outcome.counts
    assert len(lines(samples)) == len(records)
    assert champions(outcome) == expected
    assert outcome.accepted
    assert config_file.read(file)[0]["operations"][OP]["entries"].keys() == entries[OP]["entries"].keys()


def test_killed_repeatedly(file: Path, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, records, _ = uninterrupted
    samples, at = tmp_path / "samples", max(len(records) // 6, 1)
    for _ in range(5):
        killed_run(file, samples, monkeypatch, at, half=True)
    outcome, _ = run(file, samples)
    assert len(lines(samples)) == len(records)
    assert champions(outcome) == expected


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_while_the_file_is_written(
    name: str, file: Path, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is complete, old or new; a leftover temporary file does no harm."""
    expected, records, _ = uninterrupted
    samples = tmp_path / "samples"

    def action() -> None:
        monkeypatch.setattr(store, "os", Os(**{name: killing(store, name, 1)}))
        run(file, samples)

    assert in_child(action) == -signal.SIGKILL
    assert not file.exists()
    outcome, device = run(file, samples)
    assert calls_to(device) == 0
    assert outcome.accepted
    assert champions(outcome) == expected
    assert len(lines(samples)) == len(records)
    assert set(os.listdir(file.parent)) <= {file.name, file.name + ".lock"}


def test_a_larger_budget_resumes(file: Path, tmp_path: Path) -> None:
    """Time spent before counts: the same budget measures nothing more, a larger one resumes where the first ended."""
    samples = tmp_path / "samples"
    run(file, samples)
    file.unlink()  # so that the incumbents are the same as in the first run
    first = len(lines(samples))
    _, device = run(file, samples)
    assert calls_to(device) == 0
    file.unlink()
    outcome, device = run(file, samples, budget=2 * BUDGET)
    assert len(lines(samples)) == first + calls_to(device) > first
    assert outcome.spent > BUDGET


def test_measurements_of_other_versions_are_not_replayed(file: Path, tmp_path: Path) -> None:
    """After a driver change everything is measured again; the old lines of the log are kept."""
    samples = tmp_path / "samples"
    run(file, samples)
    before = len(lines(samples))
    file.unlink()
    device = SimulatedDevice(SEED, ODDS, facts=config_file.Facts(GPUS[90], FACTS.triton, FACTS.torch, "580.1"))
    outcome = tune([TARGET], ITEMS, device, file, budget=10, samples=samples)
    assert "replayed" not in outcome.counts
    assert len(lines(samples)) == before + calls_to(device)


def test_two_concurrent_runs(file: Path, tmp_path: Path) -> None:
    """Two tuners share a file and a log: no entry and no line is lost."""
    samples = tmp_path / "samples"
    children = []
    for i, items in enumerate((ITEMS[:2], ITEMS[1:])):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                outcome, device = run(file, samples, items, seed=SEED + i)
                (tmp_path / f"calls {i}").write_text(json.dumps([calls_to(device), outcome.accepted]))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    results = [json.loads((tmp_path / f"calls {i}").read_text()) for i in range(2)]
    assert [kept for _, kept in results] == [True, True]
    assert len(lines(samples)) == sum(n for n, _ in results)
    assert samples.read_bytes().count(b"\n") == sum(n for n, _ in results)
    content, _ = config_file.read(file)
    assert set(content["operations"][OP]["entries"]) == {item.bucket for item in ITEMS}
    for item in ITEMS:
        assert item.call.choose(GPUS[90]).source == str(file)


def test_concurrent_writers(file: Path) -> None:
    """No entry is lost."""

    def write(writer: int) -> None:
        for i in range(15):
            merge(file, FACTS, [NewEntry(Simulated, f"{writer} {i}", CONFIG, 1.0, 2.0, 3)])

    children = []
    for writer in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                write(writer)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    content, obstacle = config_file.read(file)
    assert not obstacle
    assert len(content["operations"][OP]["entries"]) == 4 * 15


CONFIG = Config("tile", 16, 16, 2, 1)
