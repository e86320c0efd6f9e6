"""The self-check as a user meets it: whatever the kernels do, compile() and a picture come out right, with one notice.

Kernels are stood in for by the references, which is what right kernels compute; a faulty operator computes nonsense, or
ends the test if it is launched. The children are those of `test_supervise.py`, or nothing but a verdict.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tinysr_kernels
from tests.first_use.test_supervise import CHILD
from tinysr_kernels.first_use import self_check, supervise, verdicts
from tinysr_kernels.first_use.items import Item, item_of
from tinysr_kernels.first_use.self_check import SWITCH, check
from tinysr_kernels.first_use.supervise import Bounds, Outcome
from tinysr_kernels.launch import guard
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.ops import Operator
from tinysr_kernels.runtime import compiled

CPU = torch.device("cpu")
SIDE = 8
IMAGE = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The CPU counts as a GPU that nothing is known about."""
    monkeypatch.setenv(verdicts.FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(self_check, "applies", lambda device: True)
    monkeypatch.setattr(compiled, "TRACE_SIDE", SIDE)
    self_check.forget()
    guard.forget()
    yield
    self_check.forget()
    guard.forget()


class Machine:
    """What the kernels of this machine do, and what the self-check finds. launched: operators whose kernels ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, faulty: str = "") -> None:
        self.faulty, self.launched = faulty, set[str]()
        self.checks: list[list[Item]] = []
        self.kind, self.general, self.obstacle = "wrong", "", ""
        machine = self

        def planned(call: Operator) -> Any:
            return SimpleNamespace(run=lambda pdl=False: machine.launch(call)), None

        real = Operator.planned
        monkeypatch.setattr(Operator, "planned", lambda call: (real if call.first.is_meta else planned)(call))
        monkeypatch.setattr(supervise, "run", self.run)
        monkeypatch.setitem(check.__kwdefaults__, "run", self.run)

    def launch(self, call: Operator) -> Any:
        self.launched.add(call.name)
        if call.name != self.faulty:
            return call.reference()
        nonsense = call.reference()
        for one in nonsense if isinstance(nonsense, tuple) else (nonsense,):
            one.fill_(1)
        return nonsense

    def run(self, items: Sequence[Item], device: torch.device) -> Outcome:
        self.checks.append(list(items))
        if self.general or self.obstacle:
            return Outcome({}, self.general, self.obstacle)
        kinds = [(item, self.kind if item.op == self.faulty else "passed") for item in items]
        return Outcome({item.key: verdicts.verdict(item, kind, "because") for item, kind in kinds})


def compiled_demo() -> Any:
    return tinysr_kernels.compile("demo", device="cpu", backend="triton")


@functools.cache
def calls(side: int = SIDE) -> list[Any]:
    """What `compile` hands to the self-check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "TRACE_SIDE", side)
        patch.setattr(self_check, "applies", lambda device: False)
        return [call.operator for call in compiled_demo().launches]


def first_use(side: int = SIDE) -> None:
    """What `compile` does besides loading the demo."""
    self_check.at_compile(calls(side), CPU)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return tinysr_kernels.compile("demo", device="cpu", backend="reference")(IMAGE)


def assert_right(picture: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the rounding of the libraries that compute in the place of barred kernels."""
    torch.testing.assert_close(picture, expected, rtol=0, atol=1e-4)


def again() -> None:
    """As a new process would begin."""
    self_check.forget()
    guard.forget()


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_right_kernels_are_used_and_checked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expected: torch.Tensor
) -> None:
    machine = Machine(monkeypatch)
    assert torch.equal(compiled_demo()(IMAGE), expected)
    assert {"sepconv", "group_norm", "clamp_image"} <= machine.launched
    assert len(machine.checks) == 1
    assert len(machine.checks[0]) > 20
    first_use()
    again()
    first_use()  # read from the file
    assert len(machine.checks) == 1
    assert notices(caplog) == []


@pytest.mark.parametrize("kind", ["wrong", "crashed", "hung"])
def test_a_faulty_operator_is_never_launched(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expected: torch.Tensor
) -> None:
    machine = Machine(monkeypatch, "sepconv")
    machine.kind = kind
    for _ in range(2):
        model = compiled_demo()
        assert_right(model(IMAGE), expected)
        assert "sepconv" not in machine.launched
        assert "group_norm" in machine.launched
        (notice,) = notices(caplog)
        assert "sepconv (float32" in notice
        assert f"{kind}: because" in notice
        assert "PyTorch computes these operators instead" in notice
        assert "tinysr doctor" in notice
        caplog.clear()
        model(torch.rand(3, 12, 20))  # at another size, whose variants nobody checked
        assert "sepconv" not in machine.launched
        again()
    assert len(machine.checks) == 1
    # At another size, whose variants nobody checked, it is not launched either.
    compiled_demo()(torch.rand(3, 12, 20))
    assert "sepconv" not in machine.launched


def test_kernels_that_are_not_checked_would_show(monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor) -> None:
    """What TINYSR_SELF_CHECK=0 leaves to the user; without this, the other tests prove nothing."""
    machine = Machine(monkeypatch, "sepconv")
    monkeypatch.setattr(self_check, "applies", lambda device: False)
    assert not torch.allclose(compiled_demo()(IMAGE), expected, atol=0.01)
    assert machine.checks == []


def test_what_does_not_compile_is_barred_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, "sepconv")
    machine.kind = "failed"
    model = compiled_demo()
    model(IMAGE)
    assert "sepconv" not in machine.launched
    model(torch.rand(3, 24, 24))
    assert "sepconv" in machine.launched


def test_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expected: torch.Tensor
) -> None:
    """Nothing is launched, nothing is kept: when it is installed, the next process checks."""
    machine = Machine(monkeypatch)
    machine.general = "Failed to find C compiler. Install one"
    assert_right(compiled_demo()(IMAGE), expected)
    first_use()
    assert machine.launched == set()
    assert len(machine.checks) == 1
    (notice,) = notices(caplog)
    assert "Failed to find C compiler. Install one. PyTorch computes instead" in notice
    machine.general = ""
    again()
    compiled_demo()(IMAGE)
    assert len(machine.checks) == 2
    assert "sepconv" in machine.launched


def test_a_check_that_cannot_be_done_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expected: torch.Tensor
) -> None:
    machine = Machine(monkeypatch)
    machine.obstacle = "no process could be started: too many"
    assert torch.equal(compiled_demo()(IMAGE), expected)
    first_use()
    assert "sepconv" in machine.launched
    assert len(machine.checks) == 1  # not tried again by this process
    (notice,) = notices(caplog)
    assert "too many" in notice


@pytest.mark.parametrize("error", [RuntimeError("a slip"), OSError("no disk"), MemoryError()])
def test_a_check_that_raises_stops_nobody(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine(monkeypatch)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(self_check, "items_of", fail)
    first_use()
    first_use()
    (notice,) = notices(caplog)
    assert "self-check" in notice
    assert type(error).__name__ in notice


def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, expected: torch.Tensor
) -> None:
    machine = Machine(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(verdicts.FOLDER, str(tmp_path / "file"))
    assert torch.equal(compiled_demo()(IMAGE), expected)
    first_use()
    assert len(machine.checks) == 1
    (notice,) = notices(caplog)
    assert verdicts.FOLDER in notice


@pytest.mark.parametrize("what", ["driver", "torch", "triton", "kernels", "damaged", "always"])
def test_what_was_found_before_is_not_believed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After another driver, torch or Triton; with other kernels; from a damaged file; when asked to check always."""
    machine = Machine(monkeypatch)
    first_use()
    again()
    if what == "driver":
        monkeypatch.setattr(verdicts, "driver_version", lambda: "999.1")
    elif what in ("torch", "triton"):
        monkeypatch.setattr(verdicts, "installed", lambda package: "9.9" if package == what else "1.0")
    elif what == "kernels":
        monkeypatch.setattr("tinysr_kernels.first_use.items.hashes_of", lambda op: {"kernel_hash": "x"})
        monkeypatch.setattr(verdicts, "hashes_of", lambda op: {"kernel_hash": "x"})
    elif what == "damaged":
        (path,) = (verdicts.folder() / "self-check").iterdir()
        path.write_text("{")
    else:
        monkeypatch.setenv(SWITCH, "always")
    first_use()
    assert len(machine.checks) == 2
    assert len(machine.checks[1]) == len(machine.checks[0])
    again()
    first_use()
    assert len(machine.checks) == (3 if what == "always" else 2)


def test_always_forgives(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A hang that a busy machine caused: asked again, the operator is launched."""
    machine = Machine(monkeypatch, "sepconv")
    machine.kind = "hung"
    first_use()
    monkeypatch.setenv(SWITCH, "always")
    machine.faulty = ""
    compiled_demo()(IMAGE)
    assert "sepconv" in machine.launched
    monkeypatch.delenv(SWITCH)
    again()
    caplog.clear()
    first_use()
    assert notices(caplog) == []


def test_another_model_has_its_own_launches_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, "sepconv")
    machine.kind = "crashed"
    first_use()
    first_use(2 * SIDE)
    first, second = machine.checks
    assert second
    assert not {item.key for item in first} & {item.key for item in second}
    assert "sepconv" not in {item.op for item in second}  # it need not crash again


def test_an_operator_is_barred_for_models_whose_own_launches_nobody_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, "sepconv")
    machine.kind = "crashed"
    first_use()
    tried = {item.key for item in machine.checks[0]}
    others = [call for call in calls(2 * SIDE) if item_of(call, GPUS[90]).key not in tried]
    again()
    assert not guard.is_barred("sepconv", CPU, "any")
    found = check([call for call in others if call.name == "sepconv"][:1], CPU)
    assert guard.is_barred("sepconv", CPU, "any")
    assert [one.kind for one in found.verdicts] == ["crashed"]
    assert len(machine.checks) == 1


def test_daemonic_processes_check_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Such as a data loader's workers; what others found they heed."""
    machine = Machine(monkeypatch, "sepconv")
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    compiled_demo()(IMAGE)
    assert machine.checks == []
    assert "sepconv" in machine.launched
    monkeypatch.undo()


def test_embedded_pythons(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(monkeypatch)
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    first_use()
    first_use()
    assert machine.checks == []
    (notice,) = notices(caplog)
    assert "embedded in uwsgi" in notice


def test_with_children_that_crash(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, expected: torch.Tensor
) -> None:
    """Real processes in place of `Machine`'s verdicts: sepconv and group_norm end theirs."""
    real: Callable[..., Outcome] = supervise.run
    machine = Machine(monkeypatch, "sepconv")
    script = tmp_path / "child.py"
    crash = 'if item["call"]["op"] in ("sepconv", "group_norm"): os._exit(3)'
    script.write_text(CHILD.format(begin="pass", run=crash, after="pass").replace("{{", "{").replace("}}", "}"))
    start = [sys.executable, "-I", "-S", str(script)]
    run = lambda items, device: real(items, device, Bounds(60, 60, 120), start)  # noqa: E731
    monkeypatch.setitem(check.__kwdefaults__, "run", run)
    assert_right(compiled_demo()(IMAGE), expected)
    assert not {"sepconv", "group_norm"} & machine.launched
    assert "clamp_image" in machine.launched
    (notice,) = notices(caplog)
    assert "crashed: exit code 3" in notice


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(self_check, "interpreting", lambda: False)
    monkeypatch.setattr(guard, "is_off", lambda: False)
    monkeypatch.delenv(SWITCH, raising=False)
    gpu = torch.device("cuda", 0)
    assert self_check.applies(gpu)
    assert not self_check.applies(CPU)
    monkeypatch.setenv(SWITCH, "0")
    assert not self_check.applies(gpu)
    monkeypatch.setenv(SWITCH, "1")
    assert self_check.applies(gpu)
    monkeypatch.setattr(guard, "is_off", lambda: True)  # tests of kernels
    assert not self_check.applies(gpu)
    monkeypatch.setattr(guard, "is_off", lambda: False)
    monkeypatch.setattr(self_check, "interpreting", lambda: True)
    assert not self_check.applies(gpu)
