"""`benchmarks correctness` with verdicts that are made up, and what `benchmarks all` compiles and takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.commands import compilations, correctness, everything
from benchmarks.commands.compilations import Count, count, variants_of
from benchmarks.commands.correctness import Subject
from benchmarks.measure.results import read
from benchmarks.measure.session import Session, session
from benchmarks.subjects.families import SUBJECTS
from tests.first_use.test_correctness import norm_call
from tinysr_kernels.families import FAMILIES
from tinysr_kernels.first_use import supervise
from tinysr_kernels.first_use.items import Item
from tinysr_kernels.first_use.supervise import Bounds, Outcome
from tinysr_kernels.first_use.verdicts import verdict
from tinysr_kernels.launch.device import GPUS

DEMO, DIT = Subject("tinysr-unet", "demo", "float16"), Subject("tinysr-dit", "separable", "float16")


class Children:
    """Finds an operator faulty, and does not get to items of another."""

    def __init__(self, faulty: str = "", unreached: str = "") -> None:
        self.faulty, self.unreached, self.items = faulty, unreached, list[Item]()

    def run(self, items: Sequence[Item], device: torch.device, bounds: Bounds) -> Outcome:
        self.items += items
        reached = [item for item in items if item.op != self.unreached]
        kinds = [(item, "wrong" if item.op == self.faulty else "passed") for item in reached]
        obstacle = "it took too long" if len(reached) < len(items) else ""
        return Outcome({i.key: verdict(i, kind, "error 1") for i, kind in kinds}, obstacle=obstacle)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of a GPU, of which two are left."""
    monkeypatch.setattr(Session, "cuda", property(lambda self: True))
    monkeypatch.setattr(correctness, "subjects", lambda: [[DEMO], [DEMO, DIT]])
    monkeypatch.setattr("shutil.which", lambda name: None)


def run(path: Path, monkeypatch: pytest.MonkeyPatch, children: Children) -> Any:
    monkeypatch.setattr(supervise, "run", children.run)
    with session("correctness", argparse.Namespace(json=path, budget=1e9, cpu=True)) as made:
        correctness.measure(made)
    return read(path)


@pytest.mark.usefixtures("on_a_gpu")
def test_every_launch_of_every_network_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children()
    found = run(tmp_path / "c.json", monkeypatch, children)
    assert found.complete
    assert [(one.key, one.error) for one in found.records] == [(DEMO.key, ""), (DIT.key, "")]
    assert all(one.values["launches"] == one.values["passed"] > 20 for one in found.records)
    keys = [item.key for item in children.items]
    assert len(set(keys)) == len(keys)
    assert {item.op for item in children.items} >= {"sepconv", "group_norm", "linear", "attention"}


@pytest.mark.usefixtures("on_a_gpu")
def test_failures_and_time_that_ran_out_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run checks again what failed or was not reached."""
    found = run(tmp_path / "c.json", monkeypatch, Children("sepconv", unreached="attention"))
    assert not found.complete
    demo, dit = found.records
    assert demo.values["wrong"] > 5
    assert "sepconv (float16" in demo.error
    assert dit.values["unchecked"] >= 1
    assert any("wrong" in line for line in correctness.table(found))
    again = run(tmp_path / "c.json", monkeypatch, Children())
    assert again.complete
    assert all(not one.error for one in again.records)


@pytest.mark.usefixtures("on_a_gpu")
def test_only_time_that_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path / "c.json", monkeypatch, Children(unreached="attention"))
    assert "unchecked: it took too long" in found.records[1].error


def test_on_a_cpu_a_few_small_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children = Children()
    found = run(tmp_path / "c.json", monkeypatch, children)
    assert [one.key for one in found.records] == ["kernels small"]
    assert 3 <= len(children.items) <= 12
    assert len({item.op for item in children.items}) == len(children.items)


def test_subjects_are_every_network_the_released_ones_first() -> None:
    groups = correctness.subjects()
    every = [one for group in groups for one in group]
    assert len(set(every)) == len(every)
    assert {(one.family, one.dtype) for one in groups[0]} == {(name, FAMILIES[name].dtype) for name in SUBJECTS}
    assert {one.dtype for one in every} == {"float16", "bfloat16", "float32"}


def test_compilations_are_counted_once() -> None:
    half, wide = variants_of([norm_call(), norm_call()]), variants_of([norm_call(torch.float32)])
    assert len(half) == len(wide) == 1
    other = variants_of([norm_call()], GPUS[80])
    counts = count([("a", half), ("b", half | wide), ("c", half), ("d", other)])
    assert counts == [Count("a", 1, 1), Count("b", 2, 1), Count("c", 1, 0), Count("d", 1, 1)]
    assert "all" in compilations.table(counts)[-1]


@pytest.mark.long
def test_compiling_leaves_time_to_measure() -> None:
    """At most half of any stage's time, if eight processes compile."""
    shares = {stage.command: stage.share for stage in everything.STAGES}
    counts = count(compilations.stages())
    assert {one.stage for one in counts} < set(shares)
    for one in counts:
        share = 1.0 if one.stage == "correctness" else 0.5  # that one does little else
        assert one.seconds < share * shares[one.stage] * everything.BUDGET, one


class Clock:
    """Time that passes when something runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("over", [-20.0, 0.0, everything.GRACE])
def test_all_ends_within_nine_minutes(over: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether stages end early, in time, or only when they are interrupted."""
    clock = Clock()
    monkeypatch.setattr(everything, "time", clock)
    given: list[float] = []

    def run(command: list[str], seconds: float) -> int:
        given.append(seconds)
        clock.now += max(seconds + over, 1.0)
        return 0

    everything.everything(tmp_path, everything.BUDGET, run=run)
    assert len(given) == len(everything.STAGES)
    assert min(given) > 15
    assert clock.now <= 540
    assert clock.now >= everything.BUDGET - 20


def test_shares_add_up() -> None:
    assert sum(stage.share for stage in everything.STAGES) == pytest.approx(1)


def test_counting_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stages() -> Iterator[tuple[str, Any]]:
        yield "correctness", {1, 2}

    monkeypatch.setattr(compilations, "stages", stages)
    monkeypatch.setattr(everything, "everything", lambda *_, **__: pytest.fail("something ran"))
    assert everything.main(argparse.Namespace(count=True)) == 0
    assert "computed, not measured" in capsys.readouterr().out
