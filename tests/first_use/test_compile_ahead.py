"""Kernels compiled ahead by worker processes: a launch finds them on disk, and no worker can do harm."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tinysr_kernels
from tests.standin import child
from tinysr_kernels.first_use import children, compile_ahead
from tinysr_kernels.first_use.compile_ahead import Prepared
from tinysr_kernels.ops import REGISTRY

KERNELS = 3
CUDA = torch.device("cuda", 0)


def ahead(cache: Path, *arguments: str) -> Any:
    return child.run("tests.first_use.ahead", *arguments, cache=cache)


def test_launches_compile_nothing(tmp_path: Path) -> None:
    """The keys of the cache are those of the launch, alignment included."""
    found = ahead(tmp_path)
    assert found["first"] == found["again"] == [KERNELS, KERNELS]
    assert found["notices"] == [f"compiling {KERNELS} kernels for this GPU, once"]
    assert found["hits"] == [True] * KERNELS
    assert found["launches"] == KERNELS + 1


@pytest.mark.long
def test_workers_that_end_at_once(tmp_path: Path) -> None:
    """Nothing is compiled ahead; the launches compile as they would without."""
    found = ahead(tmp_path, "broken")
    assert found["first"] == found["again"] == [KERNELS, 0]
    assert found["hits"] == [False] * KERNELS
    assert found["launches"] == KERNELS + 1


@pytest.mark.long
def test_two_processes_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(ahead, [tmp_path, tmp_path]):
            assert found["first"] == [KERNELS, KERNELS]
            assert found["hits"] == [True] * KERNELS


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the workers were given, which compile nothing."""
    monkeypatch.setattr(compile_ahead, "WORKER", "tests.first_use.fake_worker")
    monkeypatch.setattr(compile_ahead, "_processors", lambda: 2)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


def _run(*words: str) -> float:
    started = time.monotonic()
    compile_ahead._run_workers(90, [json.dumps(word) for word in words])
    return time.monotonic() - started


def test_each_kernel_goes_to_one_worker(seen: Path) -> None:
    words = [f"kernel {i}" for i in range(20)]
    before = threading.active_count()
    _run(*words)
    assert sorted(seen.read_text().splitlines()) == sorted(words)
    assert threading.active_count() == before


def test_a_worker_that_dies(seen: Path) -> None:
    """The others take over, but for the kernel that it died of."""
    _run("die", *"abcdefgh")
    assert sorted(seen.read_text().splitlines()) == list("abcdefgh")


def test_all_workers_die(seen: Path) -> None:
    _run("die", "die", *"abcd")
    assert not seen.exists()


def test_what_a_worker_prints_beside_its_answers(seen: Path) -> None:
    """As a sitecustomize may: it is no answer, and the worker is not ended before its last one."""
    _run(*("print" if i % 2 else f"kernel {i}" for i in range(8)))
    assert len(seen.read_text().splitlines()) == 8


def test_a_worker_that_hangs(seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "STALL", 1.0)
    assert _run("hang", *"abcd") < 60
    assert sorted(seen.read_text().splitlines()) == list("abcd")


def test_workers_end_with_an_interrupt(seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes to the waiting thread."""
    started: list[Any] = []
    start = compile_ahead._start_worker
    monkeypatch.setattr(compile_ahead, "_start_worker", lambda: started.append(start()) or started[-1])

    class Queue:
        def get(self, timeout: float) -> str:
            raise KeyboardInterrupt

        def put(self, _: str) -> None:
            pass

        def __class_getitem__(cls, _: Any) -> Any:
            return cls

    monkeypatch.setattr(compile_ahead.queue, "SimpleQueue", Queue)
    with pytest.raises(KeyboardInterrupt):
        _run("hang", "hang")
    assert len(started) == 2
    assert all(worker.returncode is not None for worker in started)


@pytest.mark.parametrize(
    ("executable", "can"),
    [
        ("/usr/bin/python3.11", True),
        (r"C:\Python\python.exe", True),
        ("/usr/bin/blender", False),
        ("", False),
        (None, False),
    ],
)
def test_embedded_interpreters_are_not_started(executable: Any, can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.executable` would be the program around it."""
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(os.path, "basename", lambda path: path.replace("\\", "/").rpartition("/")[2])
    assert (children.obstacle() == "") == can


@pytest.mark.parametrize("why", ["a CPU", "the interpreter", "the switch", "a failure"])
def test_nothing_happens(why: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Without a GPU, and where Triton cannot be asked, as with a cache folder that cannot be written."""
    asked = []

    def refuse(_: Any) -> Prepared:
        asked.append(why)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compile_ahead, "compile_launches", refuse)
    monkeypatch.setattr(compile_ahead, "launches_of", lambda *_: [])
    monkeypatch.setattr(compile_ahead, "interpreting", lambda: why == "the interpreter")
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.inference_mode())
    if why == "the switch":
        monkeypatch.setenv(compile_ahead.SWITCH, "0")
    device = torch.device("cpu") if why == "a CPU" else CUDA
    with caplog.at_level(logging.WARNING):
        call = REGISTRY["tanh_scaled"](torch.empty(1, 1, 1, 1, device="meta"), 3.0)
        assert compile_ahead.compile_ahead([call], device) == Prepared()
    assert asked == (["a failure"] if why == "a failure" else [])
    assert not caplog.records


def test_models_compile_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` those of a 128x128 image, and of tiles that were asked for; `warmup` those of its shapes."""
    from tinysr_kernels.runtime import compiled

    shapes: list[list[tuple[int, ...]]] = []

    def note(calls: Any, device: torch.device) -> Prepared:
        shapes.append([tuple(call.first.shape) for call in calls if call.name == "input_conv"])
        return Prepared(7, 5)

    monkeypatch.setattr(compiled, "compile_ahead", note)
    model = tinysr_kernels.compile("demo", device="cpu", backend="triton", tile=48)
    assert (1, 3, 128, 128) in shapes[0]
    assert (1, 3, 48, 48) in shapes[0]
    assert model.info()["kernels_planned"] == 7
    assert model.info()["kernels_compiled"] == 5
    monkeypatch.setattr(
        model, "_runner", type("Runner", (), {"limits": model._runner.limits, "__call__": lambda *_, **__: None})()
    )
    model.warmup([(24, 32), (3, 16, 16)])
    assert shapes[1] == [(1, 3, 24, 32), (3, 3, 16, 16)]
    tinysr_kernels.compile("demo", device="cpu", backend="reference")
    assert len(shapes) == 2
