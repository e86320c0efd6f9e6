"""A run that is killed goes on where it was, whatever it was doing, and two runs at once lose nothing."""

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
from autotune.search.store import Found, merge
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

# Mishaps, but none that depends on the time of day: a resumed run starts with another.
ODDS = Odds(throttle_every=math.inf)
SEED = 11
BUDGET = 60.0


@pytest.fixture(autouse=True)
def _candidates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda item, gpu, incumbent: candidates_of(item.key))


def run(
    file: Path, samples: Path, items: Sequence[Item] = ITEMS, seed: int = SEED, budget: float = BUDGET
) -> tuple[Outcome, SimulatedDevice]:
    """A run on a device that has already been asked what the log says."""
    configs.forget()
    device = SimulatedDevice(seed, ODDS)
    for record in read_records(samples) if samples.exists() else ():
        if record["what"] == "sample":
            device.asked[record["subject"], record["config"]] += 1
    device.asked.update({"samples": 0, "checks": 0, "builds": 0, "wholes": 0})
    return tune([TARGET], items, device, file, budget=budget, samples=samples), device


def in_child(action: Callable[[], object]) -> int:
    """Run in a process of its own; its exit code, or minus the signal that ended it."""
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
            os._exit(code)  # never on into the rest of the tests
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(module: Any, name: str, at: int, half: bool = False) -> Callable[..., Any]:
    """The function `os.name` as the module calls it, but the at-th call kills the process: before, or half done."""
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
    """A run that dies at the at-th line of the log."""

    def action() -> None:
        monkeypatch.setattr(log, "os", Os(write=killing(log, "write", at, half)))
        run(file, samples)

    assert in_child(action) == -signal.SIGKILL


def champions(outcome: Outcome) -> list[Config]:
    return [race.champion.config for race in outcome.races]


def lines(samples: Path) -> list[dict]:
    return list(read_records(samples))


def asked(device: SimulatedDevice) -> int:
    return sum(device.asked[what] for what in ("samples", "checks", "builds", "wholes"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Config], list[dict], dict]:
    """What a run that nobody interrupts ends with: champions, log, entries."""
    from tinysr_kernels.ops import REGISTRY

    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, OP, Simulated)
        patch.setenv(configs.USER_FOLDER, str(folder))
        patch.setattr(tuning, "candidates", lambda item, gpu, incumbent: candidates_of(item.key))
        outcome, device = run(folder / "NVIDIA H200.json", folder / "samples")
        assert outcome.kept
        assert asked(device) == len(lines(folder / "samples"))
    entries = config_file.read(folder / "NVIDIA H200.json")[0]["operations"]
    return champions(outcome), lines(folder / "samples"), entries


@pytest.mark.parametrize("half", [False, True], ids=["between lines", "within a line"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_killed_and_resumed(
    part: float, half: bool, file: Path, tmp_path: Path, whole_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, records, entries = whole_run
    at = 1 + round(part * (len(records) - 1))
    samples = tmp_path / "samples"
    killed_run(file, samples, monkeypatch, at, half)
    kept = len(lines(samples)) if samples.exists() else 0
    assert kept == at - 1
    assert not file.exists()
    outcome, device = run(file, samples)
    # Every step once: what the killed run did is not done again.
    assert asked(device) == len(records) - kept
    assert outcome.counts["recalled"] == kept if kept else "recalled" not in outcome.counts
    assert len(lines(samples)) == len(records)
    assert champions(outcome) == expected
    assert outcome.kept
    assert config_file.read(file)[0]["operations"][OP]["entries"].keys() == entries[OP]["entries"].keys()


def test_killed_again_and_again(file: Path, tmp_path: Path, whole_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, records, _ = whole_run
    samples, at = tmp_path / "samples", max(len(records) // 6, 1)
    for _ in range(5):
        killed_run(file, samples, monkeypatch, at, half=True)
    outcome, _ = run(file, samples)
    assert len(lines(samples)) == len(records)
    assert champions(outcome) == expected


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_while_the_file_is_written(
    name: str, file: Path, tmp_path: Path, whole_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the old one, whole, or the new one; what lies beside it hinders nobody."""
    expected, records, _ = whole_run
    samples = tmp_path / "samples"

    def action() -> None:
        monkeypatch.setattr(store, "os", Os(**{name: killing(store, name, 1)}))
        run(file, samples)

    assert in_child(action) == -signal.SIGKILL
    assert not file.exists()
    outcome, device = run(file, samples)
    assert asked(device) == 0
    assert outcome.kept
    assert champions(outcome) == expected
    assert len(lines(samples)) == len(records)
    assert set(os.listdir(file.parent)) <= {file.name, file.name + ".lock"}


def test_a_larger_budget_goes_on(file: Path, tmp_path: Path) -> None:
    """What was spent counts: the same budget again does nothing new, a larger one starts where the first ended."""
    samples = tmp_path / "samples"
    run(file, samples)
    file.unlink()  # so that the incumbents are those of the first run
    first = len(lines(samples))
    _, device = run(file, samples)
    assert asked(device) == 0
    file.unlink()
    outcome, device = run(file, samples, budget=2 * BUDGET)
    assert len(lines(samples)) == first + asked(device) > first
    assert outcome.spent > BUDGET


def test_measurements_of_other_versions_are_not_recalled(file: Path, tmp_path: Path) -> None:
    """Another driver, another card or other kernels: everything is measured anew, and nothing is thrown away."""
    samples = tmp_path / "samples"
    run(file, samples)
    before = len(lines(samples))
    file.unlink()
    device = SimulatedDevice(SEED, ODDS, facts=config_file.Facts(GPUS[90], FACTS.triton, FACTS.torch, "580.1"))
    outcome = tune([TARGET], ITEMS, device, file, budget=10, samples=samples)
    assert "recalled" not in outcome.counts
    assert len(lines(samples)) == before + asked(device)


def test_two_processes_at_once(file: Path, tmp_path: Path) -> None:
    """Different launches tuned at the same time, one file, one log: all entries and all lines are there."""
    samples = tmp_path / "samples"
    children = []
    for i, items in enumerate((ITEMS[:2], ITEMS[1:])):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                outcome, device = run(file, samples, items, seed=SEED + i)
                (tmp_path / f"asked {i}").write_text(json.dumps([asked(device), outcome.kept]))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    results = [json.loads((tmp_path / f"asked {i}").read_text()) for i in range(2)]
    assert [kept for _, kept in results] == [True, True]
    assert len(lines(samples)) == sum(n for n, _ in results)
    assert samples.read_bytes().count(b"\n") == sum(n for n, _ in results)
    content, _ = config_file.read(file)
    assert set(content["operations"][OP]["entries"]) == {item.bucket for item in ITEMS}
    for item in ITEMS:
        assert item.call.choose(GPUS[90]).source == str(file)


def test_many_writers_at_once(file: Path) -> None:
    """Every entry of every writer survives."""

    def write(writer: int) -> None:
        for i in range(15):
            merge(file, FACTS, [Found(Simulated, f"{writer} {i}", CONFIG, 1.0, 2.0, 3)])

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
