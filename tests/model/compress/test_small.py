"""The small run, a few steps of every stage: the written student computes what was trained, and a run is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tinysr_kernels
from model.compress.small import run
from model.compress.small.preset import SMALL, trial
from model.compress.small.report import Outcome
from model.compress.small.student import Student
from model.demo import photos
from model.reference.pipelines import tinysr
from tests import ROOT

PRESET = replace(trial(), methods=("learned", "random"))


def crop(name: str) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (12, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, dict[str, Student]]:
    """A finished run, and the students as they were in memory."""
    out = tmp_path_factory.mktemp("small")
    students: dict[str, Student] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "photograph", crop)
        kept = run.export

        def export(student: Student, teacher: object, folder: Path) -> None:
            students[folder.name] = student
            kept(student, teacher, folder)  # type: ignore[arg-type]

        patch.setattr(run, "export", export)
        outcome = run.small(PRESET, out, lambda line: None, ("coins",))
    return out, outcome, students


@pytest.mark.long
@pytest.mark.parametrize("written", ["student", "student.safetensors"])
@pytest.mark.parametrize("method", ["learned", "random"])
def test_the_compiled_student_is_the_trained_one(
    done: tuple[Path, Outcome, dict[str, Student]], method: str, written: str
) -> None:
    """From either layout: the released one, and the project's own."""
    out, _, students = done
    student = students[method]
    model = tinysr_kernels.compile(out / method / written, device="cpu", color_fix="adain")
    image = torch.rand(1, 3, 40, 56)
    wanted = tinysr(image, student.transformer, student.vae, student.config, "adain")
    found = model(image)
    assert found.shape == (1, 3, 160, 224)
    # Folded in float64, run in float32: the bound that docs/architecture.md states for whole networks.
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.long
def test_four_fifths_of_parameters_and_multiplications_are_gone(
    done: tuple[Path, Outcome, dict[str, Student]],
) -> None:
    out, _, students = done
    assert sum(students["learned"].mask) == SMALL.masks.keep
    figures = json.loads((out / "results.json").read_text())["means"]
    for method in PRESET.methods:
        assert figures[method]["parameters_gone_percent"] >= 80
        assert figures[method]["macs_gone_percent"] >= 80
    text = (out / "RESULTS.md").read_text()
    assert "| student, random mask |" in text
    assert (out / "masks.png").exists()


@pytest.mark.long
def test_a_finished_run_is_not_trained_again(
    done: tuple[Path, Outcome, dict[str, Student]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, outcome, _ = done
    monkeypatch.setattr(photos, "photograph", crop)
    lines: list[str] = []
    again = run.small(PRESET, out, lines.append, ("coins",))
    assert not any("  loss " in line for line in lines)
    assert again.results == outcome.results
    with pytest.raises(ValueError, match=r"run of another preset \(rank differ"):
        run.small(replace(PRESET, rank=8), out, lines.append)


def test_the_committed_run_met_its_bars() -> None:
    """docs/compression/: within half a decibel of the teacher, four fifths gone, baselines beside it."""
    folder = ROOT / "docs" / "compression"
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["means"]
    text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    assert list(rows) == ["teacher", *SMALL.methods]
    for name, row in rows.items():
        assert f"| {row['psnr']:.2f} | {row['below_teacher_db']:+.2f} dB | {row['ssim']:.4f} |" in text
        if name != "teacher":
            assert row["below_teacher_db"] <= 0.5
            assert min(row["parameters_gone_percent"], row["macs_gone_percent"]) >= 80
