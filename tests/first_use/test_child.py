"""The child of the self-check: its verdicts on kernels that are right, wrong, incomplete, erratic, or do not launch."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.first_use.test_correctness import norm_call
from tests.launch.test_guard import FakeTriton, compilation_error
from tinysr_kernels.first_use import child, supervise
from tinysr_kernels.first_use.items import item_of
from tinysr_kernels.first_use.supervise import Bounds
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY

CPU = torch.device("cpu")
CALLS = {
    "layer_norm": norm_call(),
    "tanh_scaled": REGISTRY["tanh_scaled"](torch.empty(1, 4, 2, 4, dtype=torch.float16, device="meta"), 3.0),
    "clamp_image": REGISTRY["clamp_image"](torch.empty(1, 3, 4, 4, dtype=torch.float16, device="meta")),
}
ITEMS = {op: item_of(call, GPUS[90]) for op, call in CALLS.items()}


class Said(child.Channel):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def say(self, **message: Any) -> None:
        self.messages.append(json.loads(json.dumps(message)))


def check() -> list[dict[str, Any]]:
    """What the child says of the layer norm."""
    item, channel = ITEMS["layer_norm"], Said()
    child._check(channel, item.key, item.call, CPU)
    assert channel.messages[0] == {"begin": item.key}
    return channel.messages[1:]


def verdict() -> tuple[str, str]:
    """The kind and the reason, of kernels that were run."""
    run, found = check()
    assert run == {"run": ITEMS["layer_norm"].key}
    assert found["verdict"] == ITEMS["layer_norm"].key
    return found["kind"], found["reason"]


def test_right_kernels_pass() -> None:
    assert verdict() == ("passed", "")


def out_of(launch: Launch) -> torch.Tensor:
    return launch.arguments["out"]


COUNT = itertools.count(1)
FAULTS: dict[str, tuple[Callable[[Launch], Any], str]] = {
    "wrong": (lambda launch: out_of(launch).mul_(1.05), "relative error"),
    "NaN": (lambda launch: out_of(launch).view(-1)[3].fill_(float("nan")), "relative error nan"),
    "one element": (lambda launch: out_of(launch).view(-1)[7].add_(1), "relative error"),
    "erratic": (lambda launch: out_of(launch).view(-1)[7].add_(1e-3 * next(COUNT)), "second run differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_kernels(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, words = FAULTS[fault]
    real = Launch.run

    def run(self: Launch, pdl: bool = False) -> None:
        real(self, pdl)
        spoil(self)

    monkeypatch.setattr(Launch, "run", run)
    kind, reason = verdict()
    assert kind == "wrong"
    assert words in reason


def test_kernels_that_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", lambda self, pdl=False: None)
    kind, reason = verdict()
    assert kind == "wrong"
    assert "relative error nan" in reason


def fails(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    fake = FakeTriton(error)
    monkeypatch.setattr(Launch, "run", lambda self, pdl=False: fake.run(self, pdl))


def test_kernels_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, compilation_error)
    kind, reason = verdict()
    assert (kind, "CompilationError" in reason) == ("failed", True)


def test_an_error_that_nobody_foresaw_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, lambda: AttributeError("'Options' has no attribute 'new'"))
    assert verdict()[0] == "failed"


def test_a_lack_of_memory_says_nothing_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert verdict()[0] == "unchecked"


def test_a_missing_compiler_ends_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, lambda: RuntimeError("Failed to find C compiler. Please specify via CC"))
    item, channel = ITEMS["layer_norm"], Said()
    with pytest.raises(SystemExit):
        child._check(channel, item.key, item.call, CPU)
    assert "Failed to find C compiler" in channel.messages[-1]["general"]
    assert "apt-get install gcc" in channel.messages[-1]["general"]


def test_a_reference_that_fails_says_nothing_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> Any:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(REGISTRY["layer_norm"], "reference", fail)
    (found,) = check()
    assert found["kind"] == "unchecked"
    assert "CUDNN" in found["reason"]


def test_a_request_that_makes_no_call() -> None:
    channel = Said()
    child._check(channel, "key", {"op": "no_such_operator", "arguments": {}}, CPU)
    assert channel.messages[-1]["kind"] == "unchecked"


SABOTAGED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tinysr_kernels.first_use import child
from tinysr_kernels.launch.plan import Launch
real = Launch.run
def run(self, pdl=False):
    print("noise on stdout")
    if self.kernel.function.__name__ == "scale":
        os.kill(os.getpid(), signal.SIGSEGV)
    real(self, pdl)
    if self.kernel.function.__name__ == "clamp":
        self.arguments["out"].mul_(0.9)
Launch.run = run
child.main()
"""


def test_real_processes(tmp_path: Path) -> None:
    """Three operators, of which one crashes its process and one is wrong: two processes, three verdicts."""
    script = tmp_path / "sabotaged.py"
    script.write_text(SABOTAGED.format(root=str(ROOT)))
    items = [ITEMS["layer_norm"], ITEMS["tanh_scaled"], ITEMS["clamp_image"]]
    found = supervise.run(items, CPU, Bounds(300, 300, 600), [sys.executable, str(script)])
    assert [found.verdicts[item.key].kind for item in items] == ["passed", "crashed", "wrong"], found
    assert "SIGSEGV" in found.verdicts[ITEMS["tanh_scaled"].key].reason


@pytest.mark.long
def test_the_real_command() -> None:
    found = supervise.run(list(ITEMS.values()), CPU, Bounds(300, 300, 600))
    assert {one.kind for one in found.verdicts.values()} == {"passed"}, found


@pytest.mark.long
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """When the end of stdin says so, even while kernels hang."""
    import subprocess

    script = tmp_path / "hanging.py"
    hanging = SABOTAGED.replace("os.kill(os.getpid(), signal.SIGSEGV)", "import time; time.sleep(600)")
    script.write_text(hanging.format(root=str(ROOT)))
    request = supervise._request([ITEMS["tanh_scaled"]], CPU)
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    process.stdin.flush()
    while b'"run"' not in process.stdout.readline():
        pass
    process.stdin.close()
    assert process.wait(120) == 1
