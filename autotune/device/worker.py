"""Worker processes: a crash, a hang or a corrupted CUDA context ends the worker process and nothing else."""

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

from autotune.items.results import Failure

START_SECONDS = 120.0
"""Timeout for a new process to import torch and Triton from a slow disk."""
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
"""Exceptions that a task may raise without ending its process. Any other exception ends it and counts as a crash."""


class WorkerStartError(RuntimeError):
    """A worker process could not construct its object; no candidate is at fault."""


class StickyError(Exception):
    """Raised by a task after which its process is unusable, as after a sticky CUDA error. Its message is reported."""


class Worker:
    """A process that holds an object and calls its methods. It starts at the first call, and again after a failure.

    factory: "module:name" of a callable that makes the object in the new process, from `arguments`.
    """

    def __init__(self, factory: str, *arguments: Any) -> None:
        self._factory = factory
        self._arguments = arguments
        self._process: Any = None
        self._connection: Connection | None = None
        self._stderr: Any = None
        self._deadline = 0.0
        self.busy = False

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """The method's result, or a Failure of kind "error", "crash" or "timeout" (after `seconds`)."""
        self.begin(method, arguments, seconds)
        while True:
            wait(self.handles(), timeout=max(self.remaining(), 0))
            finished, result = self.poll()
            if finished:
                return result

    def begin(self, method: str, arguments: Sequence[Any], seconds: float) -> None:
        """Start a call. It must finish within `seconds`, which exclude the start of the process."""
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._connection is not None
        with contextlib.suppress(OSError):  # the process died while idle: poll() reports how
            self._connection.send((method, arguments))
        self._deadline = time.monotonic() + seconds
        self.busy = True

    def poll(self) -> tuple[bool, Any]:
        """Whether the call has finished, and its result."""
        assert self._connection is not None
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll():
                kind, value = self._connection.recv()
                self.busy = False
                if kind == "sticky":
                    self.stop()
                return True, value if kind == "result" else Failure("error", value)
        if not self._process.is_alive():
            return True, self._fail("crash", _exit_status(self._process.exitcode) + self._last_stderr_line())
        if self.remaining() <= 0:
            return True, self._fail("timeout", "no result in time")
        return False, None

    def remaining(self) -> float:
        """Seconds until the call times out."""
        return self._deadline - time.monotonic()

    def handles(self) -> list[Any]:
        """Objects to wait for: one of them becomes ready when the call finishes."""
        return [self._connection, self._process.sentinel]

    def stop(self) -> None:
        """Kill the process."""
        self.busy = False
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def _fail(self, kind: str, detail: str) -> Failure:
        self.stop()
        return Failure(kind, detail)

    def _start(self) -> None:
        self.stop()
        # Spawned, because forking a process that has threads or a CUDA context is undefined.
        context = multiprocessing.get_context("spawn")
        file, name = tempfile.mkstemp(prefix="autotune-", suffix=".log")
        self._stderr = os.fdopen(file, "rb")
        self._connection, other = context.Pipe()
        arguments = (other, name, os.getpid(), self._factory, self._arguments)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        # The first message: the object exists. The process has unlinked the stderr file after opening it.
        if not wait(self.handles(), timeout=START_SECONDS):
            self.stop()
            raise WorkerStartError(f"a worker did not start within {START_SECONDS:.0f} s")
        try:
            self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            line = self._last_stderr_line()
            self.stop()
            raise WorkerStartError(f"a worker did not start{line}") from error

    def _last_stderr_line(self) -> str:
        """The last line that the process wrote to stderr, after ": "; "" if there is none."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""


def run_all(
    workers: Sequence[Worker],
    method: str,
    tasks: Iterable[Sequence[Any]],
    seconds: float,
    done: Callable[[int, Any], None] = lambda index, result: None,
) -> list[Any]:
    """Call one method for every task, one task per worker at a time. Results are in the order of the tasks.

    seconds: timeout per task. done: called with index and result of each task when it finishes.
    """
    waiting = list(enumerate(tasks))[::-1]
    results: list[Any] = [None] * len(waiting)
    running: dict[int, Worker] = {}
    while waiting or running:
        for worker in workers:
            if waiting and not worker.busy:
                index, arguments = waiting.pop()
                worker.begin(method, arguments, seconds)
                running[index] = worker
        timeout = min(worker.remaining() for worker in running.values())
        wait([handle for worker in running.values() for handle in worker.handles()], timeout=max(timeout, 0))
        for index, worker in list(running.items()):
            finished, result = worker.poll()
            if finished:
                results[index] = result
                del running[index]
                done(index, result)
    return results


def _exit_status(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(connection: Connection, stderr: str, parent: int, factory: str, arguments: tuple[Any, ...]) -> None:
    """The main loop of a worker process: make the object, then run calls until the parent closes the connection."""
    file = os.open(stderr, os.O_WRONLY)
    os.unlink(stderr)
    os.dup2(file, 2)
    # Ctrl-C is handled by the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    module, _, name = factory.partition(":")
    instance = getattr(importlib.import_module(module), name)(*arguments)
    connection.send(("ready", None))
    while True:
        try:
            method, call_arguments = connection.recv()
        except EOFError:
            return
        connection.send(_run(getattr(instance, method), call_arguments))


def _run(method: Callable[..., Any], arguments: Sequence[Any]) -> tuple[str, Any]:
    try:
        return "result", method(*arguments)
    except StickyError as error:
        return "sticky", str(error)
    except ERRORS as error:
        return "error", f"{type(error).__name__}: {error}"


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process is gone, even during a call that never returns."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
