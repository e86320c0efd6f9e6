"""`tinysr doctor`: its lines, its exit code, and what it makes of machines that lack something."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

import tinysr_kernels
from tinysr_kernels.cli import doctor
from tinysr_kernels.cli.doctor import FAILED, MISSING, OK, WARNING, Finding
from tinysr_kernels.cli.main import main
from tinysr_kernels.first_use import machine
from tinysr_kernels.first_use.self_check import Findings
from tinysr_kernels.first_use.verdicts import Verdict
from tinysr_kernels.launch import configs, device


@pytest.fixture(autouse=True)
def _small_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SIDE", 24)


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def states(findings: Any) -> dict[str, str]:
    return {one.name: one.state for one in findings}


def test_on_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """It works: the demo's picture comes out right. Nothing private is printed, nothing in color."""
    assert main(["doctor", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {OK, WARNING, MISSING, "->"}
    for name in ("torch", "Triton", "C compiler", "Python.h", "backend", "demo: picture", "demo: numbers"):
        assert any(line[9:].startswith(name) for line in lines), name
    home = os.path.expanduser("~")
    assert not any(f"{home}/" in line for line in lines)


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_model", lambda *_: iter([Finding(FAILED, "demo: picture", "black", "report it")]))
    assert main(["doctor", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is False
    assert found["findings"][-1] == {
        "state": "failed",
        "name": "demo: picture",
        "fact": "black",
        "remedy": "report it",
    }


class Wrong:
    """A model whose pictures are negatives, or have NaN."""

    def __init__(self, model: Any, nan: bool = False) -> None:
        self.model, self.nan = model, nan

    def __call__(self, picture: Any) -> Any:
        out = 1 - self.model(picture)
        if self.nan:
            out[0, 0, 0] = float("nan")
        return out


@pytest.mark.parametrize("nan", [False, True])
def test_a_wrong_picture_is_a_failure(nan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tinysr_kernels.compile

    def compile(checkpoint: Any, **options: Any) -> Any:
        model = real(checkpoint, **options)
        return model if options.get("dtype") == "float64" else Wrong(model, nan)

    monkeypatch.setattr(tinysr_kernels, "compile", compile)
    found = states(doctor._model("demo", CPU, "no GPU"))
    assert found == {"demo: picture": FAILED, "demo: numbers": FAILED}


def test_a_model_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise tinysr_kernels.DeviceError("the GPU is gone; restart")

    monkeypatch.setattr(tinysr_kernels, "compile", fail)
    (found,) = doctor._model("demo", CPU, "no GPU")
    assert (found.state, found.fact) == (FAILED, "DeviceError: the GPU is gone; restart")


def test_a_checkpoint_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "/no/such/checkpoint", "--device", "cpu"]) == 2
    assert "/no/such/checkpoint" in capsys.readouterr().err


def test_what_kernels_need_and_lack(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Beside a GPU it fails, elsewhere it is missing; a folder for verdicts is a convenience."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tinysr_kernels.versions.installed", lambda package: "none")
    monkeypatch.setattr(machine, "c_compiler", lambda: "")
    monkeypatch.setattr(machine, "python_headers", lambda: "")
    monkeypatch.setattr(machine, "ptxas", lambda: "")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TINYSR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found = list(doctor._needs(CPU, MISSING))
    assert states(found) == {
        **dict.fromkeys(("Triton", "C compiler", "Python.h", "ptxas", "Triton's cache"), MISSING),
        "verdicts": WARNING,
    }
    assert all(one.remedy for one in found)
    monkeypatch.setattr(device, "gpu_at", lambda device: _H200)
    gpu = states(doctor._needs(GPU, FAILED))
    assert gpu["C compiler"] == gpu["Triton"] == gpu["Triton's cache"] == FAILED
    assert gpu["configurations"] == OK


_H200 = device.GPUS[90]


def test_another_triton_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "triton_of_torch", lambda: "1.0.0")
    found = next(doctor._needs(CPU, MISSING))
    assert (found.state, found.remedy) == (WARNING, "pip install triton==1.0.0")


def test_a_configuration_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(device, "gpu_at", lambda device: _H200)
    monkeypatch.setenv(configs.USER_FOLDER, str(tmp_path))
    assert "heuristics" in doctor._configurations(GPU).fact
    (tmp_path / "NVIDIA H200.json").write_text("{}")
    assert doctor._configurations(GPU).fact == str(tmp_path / "NVIDIA H200.json")


@pytest.mark.parametrize(
    ("facts", "driver", "hidden", "state"),
    [
        ({"gpu 0": "H200, sm_90", "cuda": "13.0", "driver": "580.1"}, True, None, OK),
        ({"gpu": "none usable by torch", "cuda": "none (CPU build)"}, False, None, MISSING),
        ({"gpu": "none usable by torch", "cuda": "none (CPU build)"}, True, None, FAILED),
        ({"gpu": "none usable by torch", "cuda": "13.0"}, True, None, FAILED),
        ({"gpu": "none usable by torch", "cuda": "13.0"}, True, "", OK),
        ({"gpu": "none usable by torch", "cuda": "13.0"}, True, "-1", OK),
    ],
)
def test_gpus(
    facts: dict[str, Any], driver: bool, hidden: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is there and does not work is a failure; no GPU, or one that is hidden on purpose, is none."""
    monkeypatch.setattr(machine, "has_nvidia_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = list(doctor._gpus(facts))
    assert found[0].state == state
    assert bool(found[0].remedy) == (state == FAILED)


def test_verdicts_on_kernels() -> None:
    passed, wrong = Verdict("linear", "v", "k", "passed"), Verdict("sepconv", "float16", "k", "wrong", "error 1")
    found = list(doctor._kernels(Findings((passed, wrong, wrong)), "demo"))
    assert [one.state for one in found] == [FAILED, WARNING]
    assert "sepconv (float16) wrong: error 1" in found[0].fact
    assert "1 of 3" in found[1].fact
    assert states(doctor._kernels(Findings((passed,)), "demo")) == {"demo: kernels": OK}
    assert states(doctor._kernels(Findings((), general="no compiler"), "demo")) == {"demo: kernels": FAILED}
    assert states(doctor._kernels(Findings((passed,), obstacle="no time"), "demo")) == {"demo: kernels": WARNING}


def test_graphs() -> None:
    assert doctor._graphs({"graph_captures": 1, "graph_fallbacks": 0}, "demo").state == OK
    assert doctor._graphs({"graph_captures": 0, "graph_fallbacks": 1}, "demo").state == WARNING
    assert doctor._graphs({"graph_captures": 0, "graph_fallbacks": 0}, "demo").state == WARNING
