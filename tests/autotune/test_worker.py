"""A crash, a hang or a lost CUDA context in a worker process is returned as a failure, and the next call works."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import pytest
from torch import Tensor

from autotune.device.worker import Worker, WorkerStartError, run_all
from autotune.items.results import Failure
from autotune.items.work import Item
from tests.first_use.test_correctness import sepconv_call

HERE = "tests.autotune.faulty:Faulty"
SOON = 120
"""Seconds after which a waiting test has failed, on a busy machine too."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker(HERE, 10)
    yield one
    one.stop()


def test_the_object_is_kept_between_calls(worker: Worker) -> None:
    worker.stop()
    assert worker.call("add", 1, seconds=SOON) == 11
    assert worker.call("fail", "value", seconds=SOON) == Failure("error", "ValueError: invalid argument")
    assert worker.call("add", 1, seconds=SOON) == 12


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("signal", Failure("crash", "signal SIGSEGV: last line of stderr")),
        ("exit", Failure("crash", "exit code 3: last line of stderr")),
        ("hang", Failure("timeout", "no result in time")),
        ("sticky", Failure("error", "an illegal memory access was encountered")),
    ],
)
def test_a_failure_ends_only_the_worker_process(worker: Worker, kind: str, failure: Failure) -> None:
    assert worker.call("fail", kind, seconds=1 if kind == "hang" else SOON) == failure
    assert worker.call("add", 1, seconds=SOON) == 11  # a new process, a new object


def test_run_all(worker: Worker) -> None:
    """Results are in the order of the tasks; a crash affects no other task."""
    other = Worker(HERE, 100)
    try:
        tasks = [("value",), ("signal",), ("value",), ("exit",), ("value",)]
        found = run_all([worker, other], "fail", tasks, seconds=SOON)
    finally:
        other.stop()
    assert [failure.kind for failure in found] == ["error", "crash", "error", "crash", "error"]


def test_items_can_be_sent_to_workers() -> None:
    """Pickled meta tensors keep shape, strides and identity."""
    item = Item(sepconv_call(), 1)
    arrived = pickle.loads(bytes(ForkingPickler.dumps(item)))
    assert arrived.key == item.key
    assert arrived.call.arguments["x"] is arrived.call.arguments["residual"]
    for name, value in item.call.arguments.items():
        if isinstance(value, Tensor):
            found = arrived.call.arguments[name]
            assert (found.shape, found.stride(), found.dtype, found.device) == (
                value.shape,
                value.stride(),
                value.dtype,
                value.device,
            )


def test_start_errors_are_reported() -> None:
    with pytest.raises(WorkerStartError, match=r"did not start: .*no_such_thing"):
        Worker("tests.autotune.faulty:no_such_thing").call("add", 1, seconds=SOON)


def test_a_worker_exits_with_its_parent(tmp_path) -> None:
    """No process is left when the tuner is killed during a call."""
    note = tmp_path / "pid"
    child = os.fork()
    if child == 0:
        try:
            one = Worker(HERE)
            one.begin("fail", ("hang",), 600)
            note.write_text(str(one._process.pid))
            time.sleep(600)
        finally:
            os._exit(1)  # never continue into the remaining tests
    for _ in range(10 * SOON):
        if note.exists() and note.read_text():
            break
        time.sleep(0.1)
    worker = int(note.read_text())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(10 * SOON):
        if not _runs(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
