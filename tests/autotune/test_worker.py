"""A crash, a hang or a broken context in a worker's process is an answer, and the next call works again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from autotune.device.worker import NotStarted, Worker, run_all
from autotune.items.answers import Failure

HERE = "tests.autotune.faulty:Clumsy"
SOON = 120  # seconds after which a test that waits has failed, on a busy machine too


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker(HERE, 10)
    yield one
    one.stop()


def test_the_object_stays(worker: Worker) -> None:
    worker.stop()
    assert worker.call("add", 1, seconds=SOON) == 11
    assert worker.call("fail", "value", seconds=SOON) == Failure("error", "ValueError: this one is no good")
    assert worker.call("add", 1, seconds=SOON) == 12


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("signal", Failure("crash", "signal SIGSEGV: on the way out")),
        ("exit", Failure("crash", "exit code 3: on the way out")),
        ("hang", Failure("timeout", "no answer in time")),
        ("broken", Failure("error", "an illegal memory access was encountered")),
    ],
)
def test_a_failure_ends_the_process_alone(worker: Worker, kind: str, failure: Failure) -> None:
    assert worker.call("fail", kind, seconds=1 if kind == "hang" else SOON) == failure
    assert worker.call("add", 1, seconds=SOON) == 11  # a new process, a new object


def test_many_at_a_time(worker: Worker) -> None:
    """Results in the order of the tasks; one that crashes takes no other with it."""
    other = Worker(HERE, 100)
    try:
        tasks = [("value",), ("signal",), ("value",), ("exit",), ("value",)]
        found = run_all([worker, other], "fail", tasks, seconds=SOON)
    finally:
        other.stop()
    assert [failure.kind for failure in found] == ["error", "crash", "error", "crash", "error"]


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(NotStarted, match=r"did not start: .*no_such_thing"):
        Worker("tests.autotune.faulty:no_such_thing").call("add", 1, seconds=SOON)


def test_a_worker_ends_with_its_parent(tmp_path) -> None:
    """No process stays behind when the tuner is killed in the middle of a call."""
    note = tmp_path / "pid"
    child = os.fork()
    if child == 0:
        try:
            one = Worker(HERE)
            one.begin("fail", ("hang",), 600)
            note.write_text(str(one._process.pid))
            time.sleep(600)
        finally:
            os._exit(1)  # never on into the rest of the tests
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
