"""Work in a process of its own, so that a crash, a hang or a broken CUDA context ends that process and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from autotune.items.answers import Failure

START_SECONDS = 120.0
"""For a fresh process to import torch and Triton on a slow disk."""
ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a task may raise without ending its process; whatever else is raised ends it, which is a crash."""


class NotStarted(RuntimeError):
    """A worker's process could not make its object, for a reason that has nothing to do with a candidate."""


class Broken(Exception):
    """Raised by a task after which its process is of no more use: its message becomes the failure's."""


class Worker:
    """One process that holds an object and calls its methods. It starts on first need, and again after a failure.

    factory: "module:name" of what makes the object, in the new process, from `arguments`.
    """

    def __init__(self, factory: str, *arguments: Any) -> None:
        self._factory = factory
        self._arguments = arguments
        self._process: Any = None
        self._connection: Connection | None = None
        self._errors: Any = None
        self._deadline = 0.0
        self.busy = False

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """The method's result, or a Failure: of the kinds "error", "crash" and "timeout"."""
        self.begin(method, arguments, seconds)
        while True:
            wait(self.handles(), timeout=max(self.left(), 0))
            ended, result = self.poll()
            if ended:
                return result

    def begin(self, method: str, arguments: Sequence[Any], seconds: float) -> None:
        """Start a call; it must end within so many seconds, not counting the start of the process."""
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._connection is not None
        with contextlib.suppress(OSError):  # it died while idle: poll() says how
            self._connection.send((method, arguments))
        self._deadline = time.monotonic() + seconds
        self.busy = True

    def poll(self) -> tuple[bool, Any]:
        """Whether the call has ended, and with what."""
        assert self._connection is not None
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll():
                kind, value = self._connection.recv()
                self.busy = False
                if kind == "broken":
                    self.stop()
                return True, value if kind == "result" else Failure("error", value)
        if not self._process.is_alive():
            return True, self._end("crash", _how_it_ended(self._process.exitcode) + self._last_words())
        if self.left() <= 0:
            return True, self._end("timeout", "no answer in time")
        return False, None

    def left(self) -> float:
        """Seconds until the call counts as hung."""
        return self._deadline - time.monotonic()

    def handles(self) -> list[Any]:
        """What becomes ready when the call ends."""
        return [self._connection, self._process.sentinel]

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.busy = False
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _end(self, kind: str, detail: str) -> Failure:
        self.stop()
        return Failure(kind, detail)

    def _start(self) -> None:
        self.stop()
        # Not forked: a copy of a process that has threads or CUDA is in no defined state.
        context = multiprocessing.get_context("spawn")
        file, name = tempfile.mkstemp(prefix="autotune-", suffix=".log")
        self._errors = os.fdopen(file, "rb")
        self._connection, other = context.Pipe()
        arguments = (other, name, os.getpid(), self._factory, self._arguments)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        # The first message says that the object is made; the process removes the file's name when it has it open.
        if not wait(self.handles(), timeout=START_SECONDS):
            self.stop()
            raise NotStarted(f"a worker did not start within {START_SECONDS:.0f} s")
        try:
            self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            words = self._last_words()
            self.stop()
            raise NotStarted(f"a worker did not start{words}") from error

    def _last_words(self) -> str:
        """The last line that the process wrote to its error stream."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""


def run_all(
    workers: Sequence[Worker],
    method: str,
    tasks: Iterable[Sequence[Any]],
    seconds: float,
    done: Callable[[int, Any], None] = lambda place, result: None,
) -> list[Any]:
    """The results of one method for many arguments, in their order, as many at a time as there are workers.

    done: called with each result and its place in this order, as soon as it is there.
    """
    waiting = list(enumerate(tasks))[::-1]
    results: list[Any] = [None] * len(waiting)
    running: dict[int, Worker] = {}
    while waiting or running:
        for worker in workers:
            if waiting and not worker.busy:
                place, arguments = waiting.pop()
                worker.begin(method, arguments, seconds)
                running[place] = worker
        left = min(worker.left() for worker in running.values())
        wait([handle for worker in running.values() for handle in worker.handles()], timeout=max(left, 0))
        for place, worker in list(running.items()):
            ended, result = worker.poll()
            if ended:
                results[place] = result
                del running[place]
                done(place, result)
    return results


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(connection: Connection, errors: str, parent: int, factory: str, arguments: tuple[Any, ...]) -> None:
    """The worker's process: make the object, then answer until the other side is gone."""
    file = os.open(errors, os.O_WRONLY)
    os.unlink(errors)
    os.dup2(file, 2)
    # Interrupting the tuner is the tuner's affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    module, _, name = factory.partition(":")
    made = getattr(importlib.import_module(module), name)(*arguments)
    connection.send(("ready", None))
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        connection.send(_answer(getattr(made, method), given))


def _answer(method: Callable[..., Any], arguments: Sequence[Any]) -> tuple[str, Any]:
    try:
        return "result", method(*arguments)
    except Broken as error:
        return "broken", str(error)
    except ERRORS as error:
        return "error", f"{type(error).__name__}: {error}"


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, even from within a call that never returns."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
