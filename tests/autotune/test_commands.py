"""The commands check, show and run from the command line, on a machine without a GPU."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.__main__ import main
from autotune.commands import check, run
from autotune.commands.options import targets
from autotune.device import builder as builder_module
from autotune.device.builder import Builder
from autotune.items.candidates import candidates
from autotune.items.cost_model import Built
from autotune.items.log import read_records
from autotune.items.results import Failure
from autotune.items.work import Item
from autotune.search import tuning
from benchmarks.static import static
from benchmarks.static.machine_code import Variant
from benchmarks.subjects.networks import VARIANTS
from tests import ROOT
from tests.autotune.simulated import CALM, FACTS, ITEMS, OP, SimulatedDevice, candidates_of, norm_item
from tests.autotune.test_store import new_entry
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import GPUS


class FakeBuilder(Builder):
    """Compiles nothing: every third candidate spills, every seventh fails to compile; the first is always clean."""

    compiled_count = 0
    seconds = 0.0

    def __init__(self, gpu: Any, workers: int, kept: Path | None) -> None:
        super().__init__(gpu, 0)

    def build(self, some: Any, on_compiled: Any = None) -> list[Built]:
        FakeBuilder.compiled_count += len(some)
        time.sleep(FakeBuilder.seconds)
        faults = [("spills registers",) if i % 3 == 2 else ("does not compile",) if i % 7 == 6 else () for i in COUNT]
        return [Built((), fault) for _, fault in zip(some, faults, strict=False)]


COUNT = range(2000)


@pytest.fixture
def fake_builder(monkeypatch: pytest.MonkeyPatch) -> type[FakeBuilder]:
    monkeypatch.setattr(check, "Builder", FakeBuilder)
    monkeypatch.setattr(FakeBuilder, "compiled_count", 0)
    return FakeBuilder


def test_check_reports_removed_candidates_and_reasons(fake_builder: type[FakeBuilder], tmp_path: Path, capsys) -> None:
    file = tmp_path / "check.json"
    assert main(["check", "--arch", "sm_90", "--ckpt", "demo", "--limit", "10", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    made = json.loads(file.read_text())
    assert made["gpu"] == "NVIDIA H200"
    assert made["removed"]["spills registers"] == sum(row["removed"]["spills registers"] for row in made["rows"])
    total, left, skipped = (sum(row[name] for row in made["rows"]) for name in ("total", "left", "skipped"))
    assert total == left + skipped + sum(made["removed"].values())
    assert all(row["left"] + row["skipped"] + sum(row["removed"].values()) == row["total"] for row in made["rows"])
    assert skipped > 0
    assert fake_builder.compiled_count == sum(min(10, left_of(row) + row["skipped"]) for row in made["rows"])
    assert f"{total} candidates, {total - left - skipped} removed" in text
    assert f"{skipped} not compiled" in text
    assert f"{made['removed']['spills registers']:>6} spills registers" in text
    assert [row["share"] for row in made["rows"]] == sorted((row["share"] for row in made["rows"]), reverse=True)
    assert sum(row["share"] for row in made["rows"]) == pytest.approx(1, abs=0.01)


def left_of(row: dict[str, Any]) -> int:
    """Candidates of an item that were compiled."""
    return row["left"] + sum(row["removed"].get(fault, 0) for fault in ("spills registers", "does not compile"))


def test_check_stops_in_time(
    fake_builder: type[FakeBuilder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    """Candidates skipped by --seconds are counted; every item's best chunk is compiled before any item's second."""
    monkeypatch.setattr(FakeBuilder, "uncached", lambda self, some: list(some))
    monkeypatch.setattr(FakeBuilder, "seconds", 0.05)
    file = tmp_path / "check.json"
    started = time.monotonic()
    assert main(["check", "--ckpt", "demo", "--seconds", "1", "--json", str(file)]) == 0
    assert time.monotonic() - started < 20
    rows = json.loads(file.read_text())["rows"]
    seen = [left_of(row) for row in rows]
    assert 0 < sum(seen) == fake_builder.compiled_count
    assert max(seen) - min(row["total"] if not row["skipped"] else s for row, s in zip(rows, seen, strict=True)) <= 8
    assert "not compiled (--limit, --seconds)" in capsys.readouterr().out


def test_check_fails_without_candidates(
    fake_builder: type[FakeBuilder], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(
        FakeBuilder, "build", lambda self, some, on_compiled: [Built((), ("spills registers",)) for _ in some]
    )
    assert main(["check", "--ckpt", "demo"]) == 1
    assert "spills registers" in capsys.readouterr().err


def test_check_fails_if_an_incumbent_has_a_fault(
    fake_builder: type[FakeBuilder], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Even though other candidates are left."""
    done: list[int] = []

    def build(self: FakeBuilder, some: Any, on_compiled: Any) -> list[Built]:
        done.append(len(some))
        return [Built((), ("spills registers",)) if len(done) == 1 and i == 0 else Built() for i in range(len(some))]

    monkeypatch.setattr(FakeBuilder, "build", build)
    assert main(["check", "--ckpt", "demo", "--limit", "4"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_compilations_are_shared_isolated_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real compilations: each distinct one once, now and in a later run; an unknown kernel is a failure."""
    pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")
    item = norm_item()
    some = candidates(item, GPUS[90], item.call.heuristic(GPUS[90])).all[:2]
    cache = tmp_path / "cache"
    monkeypatch.setattr(static, "RESULTS", tmp_path)
    builder = Builder(GPUS[90], 1, cache)
    compiled: list[int] = []
    try:
        uncached = len(builder.uncached(some))
        built = builder.build([*some, some[0]], lambda: compiled.append(1))
        assert builder.compiled == len(compiled) == uncached == len(some)
        assert built[0] == built[2]
        for one in built:
            assert one.faults == ()
            assert all(
                16 <= registers <= 255 and shared <= GPUS[90].shared_limit for registers, shared in one.resources
            )
        nonsense = Variant(90, "tinysr_kernels.ops.norm.kernels.layer_norm", "no_such_kernel", (), (), (), 4, 1)
        assert builder.workers[0].call("build", nonsense, seconds=60).kind == "error"
    finally:
        builder.stop()
    later = Builder(GPUS[90], 0, cache)  # without workers nothing can be compiled
    assert later.build(some) == built[:2]
    assert later.compiled == 0


def test_the_cache_of_compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete lines of this version of Triton, and the results of `benchmarks static --keep`."""
    cache, folder = tmp_path / "cache", tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(static, "RESULTS", folder)
    assert builder_module.read_cache(cache) == {}
    builder_module.append_cache(cache, "clean", (32, 1024, 0))
    builder_module.append_cache(cache, "bad", builder_module.COMPILE_ERROR)
    cache.write_bytes(cache.read_bytes() + b"torn")
    whole = static.stored_reports(ROOT / "benchmarks" / "results" / "static-triton-3.7.1.json")[0]
    none = {"registers": None, "spill_bytes": None, "shared_bytes": None}
    reports = [
        {**vars(whole), "digest": "static", "registers": 40, "spill_bytes": 8, "shared_bytes": 512},
        {**vars(whole), "digest": "none", **none},
    ]
    (folder / f"static-triton-{static.installed(None)}.json").write_text(json.dumps(reports))
    found = builder_module.read_cache(cache)
    assert found == {
        "clean": (32, 1024, 0),
        "bad": "does not compile",
        "static": (40, 512, 8),
        "none": "does not compile",
    }
    monkeypatch.setattr(builder_module, "_triton", lambda: "0.0.0")
    assert builder_module.read_cache(cache) == {}


def test_compiler_crashes_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be due to the machine, which lacked memory or time."""
    item = norm_item()
    some = candidates(item, GPUS[90], item.call.heuristic(GPUS[90])).all[:1]

    def crash(workers: Any, method: str, tasks: Any, seconds: float, done: Any) -> None:
        for index, _ in enumerate(tasks):
            done(index, Failure("crash", "signal 9"))

    monkeypatch.setattr(builder_module, "run_all", crash)
    monkeypatch.setattr(static, "RESULTS", tmp_path)
    builder = Builder(GPUS[90], 0, tmp_path / "cache")
    assert builder.build(some)[0].faults == ("crashes the compiler",)
    assert not (tmp_path / "cache").exists()


def test_fault_messages() -> None:
    builder = Builder(GPUS[90], 0)
    assert builder._built([(128, 1024, 0)]) == Built(((128, 1024),))
    assert builder._built([(128, 1024, 8), (32, 1 << 20, 0)]).faults == (
        "spills registers",
        "needs too much shared memory",
    )
    assert builder._built(["crashes the compiler"]) == Built((), ("crashes the compiler",))


def test_show_explains_each_launch(tmp_path: Path, capsys) -> None:
    rows_file = tmp_path / "rows.json"
    assert main(["show", "--ckpt", "demo", "--gpu", "sm_90", "--json", str(rows_file)]) == 0
    text = capsys.readouterr().out
    assert "configurations for NVIDIA H200" in text
    assert "missing" in text
    (rows,) = json.loads(rows_file.read_text()).values()
    assert {row["source"] for row in rows} <= {"heuristic", "no kernel"}
    assert all(row["floor_us"] > 0 and row["us"] is None for row in rows)
    # Unmeasured launches have the cost model's time.
    assert all((row["model_us"] or 0) > row["floor_us"] for row in rows if row["source"] == "heuristic")
    assert "0 of them measured" in text


def test_show_and_export_of_a_measured_entry(
    file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's entry is shown with its times and exported; the exported file is valid as a bundled file."""
    from autotune.items.work import Target, all_items
    from autotune.search.store import merge

    item: Item = all_items([Target(ckpt="demo")], GPUS[90])[0]
    config = list(item.call.space(GPUS[90]))[-1]
    merge(file, FACTS, [new_entry(config, 1.25, bucket=item.bucket, operator=type(item.call))])
    configs.forget()
    out = tmp_path / "contributed"
    out.mkdir()
    assert main(["show", "--ckpt", "demo", "--gpu", "90", "--export", str(out)]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith(f"{item.op} {item.bucket}"))
    assert "1.25" in line
    assert "NVIDIA H200.json" in line
    exported = json.loads((out / "NVIDIA H200.json").read_text())
    assert list(exported["operations"]) == [item.op]
    assert str(tmp_path) not in (out / "NVIDIA H200.json").read_text()
    # It is valid as a bundled file.
    configs.BUNDLED.mkdir()
    (out / "NVIDIA H200.json").rename(configs.BUNDLED / "NVIDIA H200.json")
    file.unlink()
    configs.forget()
    choice = item.call.choose(GPUS[90])
    assert (choice.config, Path(choice.source).parent) == (config, configs.BUNDLED)


def test_nothing_to_export(tmp_path: Path, capsys) -> None:
    assert main(["show", "--ckpt", "demo", "--gpu", "90", "--export", str(tmp_path / "x")]) == 2
    assert "no valid entry" in capsys.readouterr().err


def test_run_needs_a_gpu(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--ckpt", "demo"]) == 2
    assert "tuning needs CUDA device 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--family", "adcsr", "--variant", "dense"], "adcsr comes as released"),
        (["show", "--ckpt", "/no/such/file"], "/no/such/file"),
    ],
)
def test_invalid_requests(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_run_fails_early_if_it_cannot_write(
    simulated_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "folder")
    assert main(["run", "--family", "tinysr-unet", "--report", nowhere]) == 2
    monkeypatch.setenv(configs.USER_FOLDER, nowhere)
    assert main(["run", "--family", "tinysr-unet", "--report", str(tmp_path / "report")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("autotune: ") == 2
    assert "Not a directory" in printed.err
    assert "launches of" not in printed.out


def test_show_needs_no_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(configs.USER_FOLDER, str(tmp_path / "file" / "folder"))
    assert main(["show", "--ckpt", "demo", "--gpu", "90"]) == 0
    assert "missing" in capsys.readouterr().out


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check", interrupt)
    assert main(["check"]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["check", "--arch", "75"], ["check", "--batch", "0"], ["run", "--size", "1"], ["tune"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_targets_are_all_combinations() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    text = "--family adcsr --ckpt demo --size 64x64 --size 128x96 --batch 1 --batch 4 --dtype float16"
    found_targets = targets(parser.parse_args(text.split()))
    assert len(found_targets) == len(set(found_targets)) == 2 * 2 * 2
    assert {t.size for t in found_targets} == {(64, 64), (128, 96)}
    assert {t.family for t in targets(parser.parse_args([]))} == set(VARIANTS)


class FakeDevice(SimulatedDevice):
    """A simulated device in place of a CUDA device."""

    stopped = False
    busy = 30

    def __init__(self, index: int, workers: int) -> None:
        super().__init__(3, CALM)

    def stop(self) -> None:
        FakeDevice.stopped = True


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(run, "CudaDevice", FakeDevice)
    monkeypatch.setattr(run, "all_items", lambda targets, gpu: ITEMS)
    monkeypatch.setattr(tuning, "candidates", lambda item, gpu, incumbent: candidates_of(item.key))


def test_a_run_from_the_command_line(file: Path, tmp_path: Path, capsys, simulated_gpu: None) -> None:
    """Writes the file, the log and the report; a second run has nothing left to measure."""
    folder = tmp_path / "report"
    arguments = ["run", "--family", "tinysr-unet", "--budget", "60", "--report", str(folder)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert f"written to {file}" in printed.out
    assert "us gained" in printed.err
    assert "other processes use the GPU 30 % of the time" in printed.err
    assert FakeDevice.stopped
    assert file.exists()
    samples = run.log_of(file)
    assert samples.name == "NVIDIA H200.samples.jsonl"
    before = len(list(read_records(samples)))
    text = (folder / "report.md").read_text()
    assert "The new configurations are accepted: faster end to end." in text
    assert "| simulated 4096 x 1024 | 3 |" in text
    raw = json.loads((folder / "report.json").read_text())
    assert {launch["op"] for launch in raw["launches"]} == {OP}
    assert all(len(times) >= 3 for launch in raw["launches"] for times in launch["samples_us"].values())
    file.unlink()
    assert main(arguments) == 0
    assert len(list(read_records(samples))) == before
    assert main([*arguments, "--fresh", "--json", str(tmp_path / "run.json")]) == 0
    assert "0 steps replayed" in (folder / "report.md").read_text()
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads((folder / "report.json").read_text())


def test_benchmarks_do_not_import_autotune() -> None:
    """autotune imports benchmarks; the reverse would be a circular import."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not re.search(r"^\s*(?:from|import) autotune\b", path.read_text(encoding="utf-8"), re.MULTILINE), path
