"""`autotune predict`: what is tried, what is chosen, and the file that it writes. The predictions are made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from autotune.__main__ import main
from autotune.commands import predict as command
from autotune.items.work import Target
from autotune.search import predicted
from autotune.search.predicted import LEAST_GAIN, Search, machine_of, search
from benchmarks.predict import store
from benchmarks.predict.cycles.machines import MACHINES
from benchmarks.predict.model import Prediction
from benchmarks.predict.store import Job
from benchmarks.static.plan import parse_gpu
from tinysr_kernels.launch import configs, hardware
from tinysr_kernels.launch.device import GPUS

DEMO = Target(family="tinysr-unet")
FIT = Prediction(1.0, {"issue": 1.0}, "issue", 32, 0, 0, 1, 1.0, 1.0, 1.0, 0.0, 1.0, 0, 0)


@pytest.fixture(scope="module")
def found() -> list[Search]:
    """Of the checkpoint in the package, whose incumbents have up to eight warps."""

    def lenient(jobs: Iterable[Job]) -> dict[str, Prediction | str]:
        return {job.key: dataclasses.replace(FIT, us=10.0 * job.program.variant.warps) for job in jobs}

    return search([DEMO], GPUS[90], lenient, limit=3, rounds=1)


def test_the_fastest_predicted_configuration_is_chosen(found: list[Search]) -> None:
    assert len(found) > 20
    costs = [one.item.calls * one.incumbent_us for one in found]
    assert costs == sorted(costs, reverse=True)
    better = [one for one in found if one.best is not one.found.incumbent]
    assert better
    for one in found:
        least = min(one.us.values())
        assert one.best_us == (least if least < (1 - LEAST_GAIN) * one.incumbent_us else one.incumbent_us)
        assert len(one.us) <= 1 + 3 + 3
        assert not any(candidate.library for candidate in one.tried[1:])


def test_neighbors_differ_in_one_field(found: list[Search]) -> None:
    one = max(found, key=lambda one: len(one.found.all))
    fastest = min(one.tried, key=lambda candidate: one.us[candidate.key])
    assert one.neighbors()
    for candidate in one.neighbors():
        assert candidate.key not in one.us
        assert sum(candidate.fields[name] != value for name, value in fastest.fields.items()) == 1


def test_a_gap_for_every_launch(found: list[Search]) -> None:
    one = next(one for one in found if one.found.incumbent.plan.kernels == 3)
    warps = sum(launch.num_warps for launch in one.found.incumbent.plan.launches)  # type: ignore[union-attr]
    assert one.incumbent_us == pytest.approx(10.0 * warps + 3 * 1e6 * MACHINES[90].gap)


def test_what_cannot_be_predicted_or_launched_is_no_choice() -> None:
    big = dataclasses.replace(FIT, shared_bytes=GPUS[90].shared_limit + 1)
    spilling = dataclasses.replace(FIT, spilled=8)
    assert [predicted._usable_us(one, GPUS[90]) for one in (FIT, big, spilling, "RuntimeError: no")] == [1.0] + [
        float("inf")
    ] * 3
    with pytest.raises(ValueError, match="cannot be predicted"):
        search([DEMO], GPUS[90], lambda jobs: {job.key: spilling for job in jobs})


def test_the_written_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, found: list[Search]) -> None:
    monkeypatch.setattr(configs, "PREDICTED", tmp_path)
    monkeypatch.setattr(command, "CACHE", tmp_path / "cache" / "predicted.json")
    monkeypatch.setattr(command, "search", lambda *_, **__: found)
    assert main(["predict", "--family", "tinysr-unet", "--write", "--json", str(tmp_path / "rows.json")]) == 0
    path = tmp_path / "NVIDIA H200.json"
    try:
        chosen = [one for one in found if one.best is not one.found.incumbent]
        for one in chosen:
            choice = one.item.call.choose(GPUS[90])
            assert (choice.config, choice.source) == (one.best.config, f"{path} (predicted)")
            assert choice.entry is not None
            assert choice.entry.time_us == pytest.approx(one.best_us, abs=1e-4)
    finally:
        configs.forget()
    rows = json.loads((tmp_path / "rows.json").read_text())["items"]
    assert len(rows) == len(found)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(chosen) + 2
    assert lines[-1] == f"written to {path}"
    assert "predicted" in lines[-2]


def test_predictions_are_kept_for_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those made before the last round, and of an earlier run."""
    seen: list[dict[str, Prediction]] = []

    def predict_all(jobs: Iterable[Job], stored, workers, keep) -> dict[str, Prediction | str]:  # type: ignore[no-untyped-def]
        seen.append(dict(stored))
        keep({f"key {len(seen)}": FIT})
        return dict(stored)

    def twice(_targets, _gpu, predict, **_: object) -> list[Search]:  # type: ignore[no-untyped-def]
        for _ in range(2):
            predict([])
        return []

    monkeypatch.setattr(command, "CACHE", tmp_path / "cache" / "predicted.json")
    monkeypatch.setattr(store, "predict_all", predict_all)
    monkeypatch.setattr(command, "search", twice)
    for _ in range(2):
        assert main(["predict", "--ckpt", "demo"]) == 0
    assert [sorted(one) for one in seen] == [[], ["key 1"], ["key 1", "key 2"], ["key 1", "key 2", "key 3"]]


def test_machines_of_other_cards() -> None:
    """Scaled from the fitted one: an H100 has the H200's SMs with less memory bandwidth, an L4 is a smaller AD102."""
    assert machine_of(GPUS[90]) is MACHINES[90]
    h100 = machine_of(parse_gpu("H100"))
    assert (h100.clock, h100.l2_rate, h100.starts) == pytest.approx(
        (MACHINES[90].clock, MACHINES[90].l2_rate, MACHINES[90].starts)
    )
    assert h100.memory == pytest.approx(MACHINES[90].memory * 3.35 / 4.8)
    l4 = machine_of(parse_gpu("L4"))
    assert l4.card is hardware.card("L4")
    assert l4.starts == pytest.approx(MACHINES[89].starts * 58 / 128)
    with pytest.raises(ValueError, match=r"NVIDIA B200: times can be predicted for .*H200"):
        machine_of(GPUS[100])
    assert main(["predict", "--gpu", "100", "--ckpt", "demo"]) == 2
