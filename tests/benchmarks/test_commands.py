"""The benchmark commands on a CPU: reduced sizes, labeled as such, complete files, errors that lose no results."""

from __future__ import annotations

import argparse
import importlib
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from benchmarks.__main__ import COMMANDS, main
from benchmarks.commands import ceilings, cpu, e2e, everything, micro, quality, soak
from benchmarks.measure.results import Record, Results, read
from benchmarks.measure.session import Late, Session, session
from benchmarks.measure.timing import BelowFloor, Work
from benchmarks.reports import plots, report
from benchmarks.static.network_calls import CALLS
from benchmarks.subjects import peers
from benchmarks.subjects.eager import base_of, eager, has_eager, in_own_dtype
from benchmarks.subjects.families import SUBJECTS
from benchmarks.subjects.models import image, model
from benchmarks.subjects.networks import VARIANTS
from tinysr_kernels.first_use.inputs import random_call
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import GPUS, assume, gpu_at
from tinysr_kernels.ops import REGISTRY

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.timing.READING_MS", 0.0)


def options(path: Path | None = None, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(json=path, budget=1e9, cpu=True, **more)


def test_every_command_has_its_parts() -> None:
    for name in COMMANDS.values():
        command = importlib.import_module(f"benchmarks.{name}")
        assert command.SUMMARY.endswith(".")
        assert callable(command.add_arguments)
        assert callable(command.main)


@pytest.mark.parametrize("family", SUBJECTS)
def test_reference_and_compiled_model_are_the_same_network(family: Any) -> None:
    made = model(family, VARIANTS[family][0], reduced=True)
    lr = image(32, 32).float() / 255
    expected = made.reference()(lr)
    found = made.compiled(graphs=0).enlarge(lr)
    assert expected.std() > 0.02  # not everything is clamped
    assert (found - expected).abs().max() < cpu.EQUAL


def test_unmerged_lora_adds_two_gemms_per_layer() -> None:
    network = model("tinysr-dit", reduced=True).reference().parts["transformer"]
    before = network(torch.ones(1, 16, 16, 16))
    peers.unmerge(network)
    layers = [m for m in network.modules() if isinstance(m, peers.Unmerged)]
    assert len(layers) == 6 * len(network.transformer_blocks)
    for layer in layers:
        torch.nn.init.zeros_(layer.up.weight)
    torch.testing.assert_close(network(torch.ones(1, 16, 16, 16)), before)


def test_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SAMPLES", 2)
    assert ceilings.main(options(tmp_path / "c.json")) == 0
    found = read(tmp_path / "c.json")
    assert found.complete
    assert found.reduced
    assert found.device == "CPU"
    rate = found.find("matrix float32")
    assert rate is not None
    assert rate.values["tflops"] == pytest.approx(2 * 1024**3 / rate.values["p50_us"] / 1e6)


@pytest.mark.parametrize("op", ["layer_norm", "group_norm", "upsample_conv"])
def test_micro(op: str, tmp_path: Path) -> None:
    with session("micro", options(tmp_path / "m.json")) as made:
        micro.measure(made, ("ours", "eager"), (op,))
    found = read(tmp_path / "m.json")
    assert {one.labels["peer"] for one in found.records} == {"ours", "eager"}
    for one in found.records:
        assert not one.error
        assert one.values["gbs"] == pytest.approx(one.values["bytes"] / one.values["p50_us"] / 1e3)
    assert len(micro.table(found)) == 1 + len(found.records) // 2


@pytest.mark.parametrize("op", sorted(filter(has_eager, REGISTRY)))
def test_every_operator_has_an_eager_form(op: str) -> None:
    """With outputs of the same shape, except for statistics."""
    calls = sorted(CALLS[op](torch.float32), key=lambda call: call.cost().bytes)
    if not calls:
        pytest.skip("no network calls it")
    call = random_call(calls[0], CPU, 0)
    function, arguments = eager(call)
    with in_own_dtype():
        result = function(**arguments)
    expected = call.reference()
    first, wanted = (one[0] if isinstance(one, tuple) else one for one in (result, expected))
    assert first.shape == wanted.shape
    assert base_of(op) in REGISTRY


def test_in_own_dtype_applies_only_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((1, 4), 3.0, dtype=torch.float16)
    reference = REGISTRY["layer_norm"](x, 1e-5).reference
    seen: list[torch.dtype] = []
    real = torch.nn.functional.layer_norm

    def spy(a: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        seen.append(a.dtype)
        return real(a, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", spy)
    with in_own_dtype():
        reference()
    reference()
    assert seen == [torch.float16, torch.float32]


def test_an_error_is_recorded_and_a_sample_below_the_floor_aborts(tmp_path: Path) -> None:
    with session("e2e", options(tmp_path / "e.json")) as made:
        with made.guarded("a", {"x": "y"}):
            raise ValueError("broken")
        with made.guarded("b", {}):
            made.need(2e9)
            pytest.fail("there was no time for this")
    found = read(tmp_path / "e.json")
    assert [one.error for one in found.records] == [
        "ValueError: broken",
        "Late: no time left, 2000000000 s are needed",
    ]
    assert not found.complete  # because time ran out
    with pytest.raises(BelowFloor), session("e2e", options(tmp_path / "f.json")) as made, made.guarded("a", {}):
        made.stopwatch.sample(Work(lambda: None, floor_us=1e9))
    assert "aborted" in read(tmp_path / "f.json").notes[0]


def test_the_time_limit() -> None:
    with pytest.raises(Late), peers.limited(0.05):
        time.sleep(600)
    with peers.limited(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)  # the timer is canceled


def test_e2e_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e, "NAMES", e2e.NAMES[:1])
    assert e2e.main(options(tmp_path / "e2e.json", family=["tinysr-dit"], compile=False)) == 0
    found = read(tmp_path / "e2e.json")
    assert [one.key for one in found.records if one.error] == []
    peers_found = {one.labels["peer"] for one in found.records if "peer" in one.labels}
    assert peers_found == {"ours", "ours, fp8", "eager", "eager, LoRA unmerged", "eager, channels_last", "TSD-SR"}
    assert list(plots.shares(found).popitem()[1])[:3] == ["encoder", "transformer", "decoder"]
    assert report.main(argparse.Namespace(folder=tmp_path, out=None)) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "CPU, reduced sizes: says nothing about a GPU" in text
    assert "![ladder.png](ladder.png)" in text
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    done = [one for one in found.records if one.key.endswith("done")]
    before = {one.key: one for one in found.records}
    found.complete = False
    with session("e2e", options()) as made:
        made.sink.results.records = list(found.records)
        e2e.measure(made, ("tinysr-dit",), compile_too=False)
    assert {one.key: one for one in made.sink.results.records} == before  # nothing is measured again
    assert len(done) == 6


def test_e2e_with_pdl_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed with both settings on capability 9.0; not timed on 8.0 and on a CPU."""
    turns: list[dict[str, bool]] = []
    monkeypatch.setattr(e2e, "interleaved", lambda *args: turns.append({k: make() for k, make in args[3].items()}))
    monkeypatch.setattr(e2e.peers, "ours_on_device", lambda ours, x: ours)
    model = SimpleNamespace(compiled=lambda dtype: configs.pdl(gpu_at(torch.device("cpu"))))
    for cuda, arch in ((True, 90), (True, 80), (False, 90)):
        made = SimpleNamespace(cuda=cuda, device=torch.device("cpu"))
        with assume(GPUS[arch]):
            e2e.early(e2e.Subject(made, model, None, "float16"))  # type: ignore[arg-type]
    assert turns == [{"ours, with PDL": True, "ours, without PDL": False}]


def test_quality_of_each_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "images_of", _small_images)
    assert quality.main(options(tmp_path / "q.json", ckpt="demo", photographs=None)) == 0
    found = read(tmp_path / "q.json")
    base, half = found.find("float32 reference"), found.find("float16 reference")
    assert base is not None
    assert half is not None
    assert base.values["psnr_to_float32"] == quality.IDENTICAL > half.values["psnr_to_float32"] > 45
    assert "tinysr-dit" in next(one.error for one in found.records if one.labels["quantize"] == "fp8")


def _small_images(made: Session, photographs: int | None) -> Any:
    small = image(16, 16)[0].permute(1, 2, 0).contiguous()
    return [("a", small.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy(), small.numpy())]


def test_cpu_checks_speed_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cpu.Case("tinysr-unet", "demo", 0.01)
    records = cpu.measure(case, model("tinysr-unet", "demo"), rounds=1, side=16)
    results = _results("cpu", records)
    assert list(cpu.faults(results)) == []
    assert "tinysr-unet demo" in cpu.table(results)[1]
    records[-1].values |= {"speedup": 0.9, "bar": 1.0, "difference": 2e-4}
    assert len(list(cpu.faults(results))) == 2


def _results(command: str, records: list[Record]) -> Results:
    return Results(1, command, "CPU", True, {}, "now", records=records)


def test_all_resumes(tmp_path: Path) -> None:
    ran: list[tuple[str, float]] = []

    def run(command: list[str], seconds: float) -> int:
        name = command[3]
        ran.append((name, seconds))
        if name == "e2e" and len(ran) < 5:
            raise KeyboardInterrupt
        with session(name, options(Path(command[5]))) as made:
            made.sink.add(Record("a", {}, values={"x": 1.0}))
        return 1 if name == "correctness" else 0

    first = everything.everything(tmp_path, 500, run=run)
    assert first == {"ceilings": "done", "correctness": "exit code 1", "e2e": "interrupted"}
    assert [seconds for _, seconds in ran] == pytest.approx([20, 500 * 0.16 / 0.96, 500 * 0.42 / 0.8], rel=0.02)
    ran += [("", 0)] * 2
    second = everything.everything(tmp_path, 500, run=run)
    assert second["ceilings"] == "finished before"
    assert [name for name, _ in ran[5:]] == ["e2e", "micro", "quality", "soak"]
    assert set(second.values()) == {"finished before", "done"}


def test_a_hanging_stage_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(everything, "GRACE", 0.5)
    started = time.monotonic()
    code = everything.run_stage([sys.executable, "-c", "import time; time.sleep(600)"], 0.2)
    assert code != 0
    assert time.monotonic() - started < 300


def test_a_soak_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "DIFFERENT", 4)
    arguments = options(tmp_path / "soak.json", ckpt="demo", images=12, threads=3)
    assert soak.main(arguments) == 0
    found = read(tmp_path / "soak.json")
    assert found.complete
    assert len(found.records) == soak.ROUNDS
    assert sum(one.values["images"] for one in found.records) == 12
    assert all(one.values["different"] == 0 and one.values["held_mib"] > 100 for one in found.records)
    assert "0 different" in capsys.readouterr().out
    assert report.main(argparse.Namespace(folder=tmp_path, out=None)) == 0
    assert "| round 10 | 2 | 0 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert list(soak.faults(found)) == []
    for one in found.records:
        one.values |= {"images": 100.0, "held_mib": 500.0}
    assert list(soak.faults(found)) == []
    found.records[3].values["different"] = 2.0
    found.records[-1].values["held_mib"] *= 1.1
    assert [line.split(",")[0] for line in soak.faults(found)] == ["2 images differ from their result alone", ANY]


def test_a_soak_detects_different_outputs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Nondeterministic:
        """A model whose output differs at every call."""

        calls = 0

        def __call__(self, image: Any) -> Any:
            self.calls += 1
            return image.astype(int) + self.calls

    monkeypatch.setattr("tinysr_kernels.compile", lambda *_, **__: Nondeterministic())
    assert soak.main(options(ckpt="demo", images=20, threads=2)) == 1
    assert "20 images differ from their result alone" in capsys.readouterr().err


def test_images_of_a_soak_are_mixed() -> None:
    images = soak.mixed_images(12)
    assert len({one.shape[:2] for one in images}) > 20
    assert {one.ndim for one in images} == {2, 3}
    assert {one.shape[2] for one in images if one.ndim == 3} == {3, 4}


def test_the_report_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no result file" in capsys.readouterr().err


def test_sessions_on_a_cpu_print_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with session("micro", options()) as made:
        assert isinstance(made, Session)
    assert "say nothing about a GPU" in capsys.readouterr().err
