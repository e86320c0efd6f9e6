"""Compile the kernels of planned launches before the first one, several at once, into Triton's cache on disk.

Triton compiles a kernel at its first launch, one after the other, half a second each. Here worker processes compile
them; the launch then finds them on disk. The keys there are Triton's own: its binder specializes the planned launches
in this process, which so learns what is missing, and in the workers. Nothing depends on the outcome: what a worker
cannot compile, the first launch compiles, and meets the error. TINYSR_COMPILE_AHEAD=0 switches it off.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import queue
import random
import subprocess
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tinysr_kernels.first_use import children
from tinysr_kernels.first_use.compile_worker import ANSWERS, describe
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import assume, gpu_at
from tinysr_kernels.launch.kernel import Kernel, interpreting
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops.call import Operator

SWITCH = "TINYSR_COMPILE_AHEAD"
WORKER = "tinysr_kernels.first_use.compile_worker"
FEW = 4
"""Kernels that are left to the first launch: a worker needs longer to start than these to compile."""
MOST_WORKERS = 8
"""Each takes about 0.5 GB."""
STALL = 60.0
"""Seconds without a finished kernel after which the workers are ended."""

logger = logging.getLogger("tinysr_kernels")


@dataclass(frozen=True)
class Prepared:
    """Distinct kernels of the planned launches, and how many of them lie in Triton's cache on disk."""

    planned: int = 0
    compiled: int = 0


def compile_ahead(calls: Iterable[Operator], device: torch.device) -> Prepared:
    """Compile the kernels that these calls launch on the device, unless they are on disk already.

    calls: on tensors without data. Other threads keep running; nothing is launched, and no error is raised.
    """
    if device.type != "cuda" or interpreting() or os.environ.get(SWITCH) == "0":
        return Prepared()
    try:
        with torch.cuda.device(device):
            return compile_launches(launches_of(calls, device))
    except Exception as error:  # noqa: BLE001  the first launch meets it again, where it is handled
        logger.debug("kernels are not compiled ahead: %s: %s", type(error).__name__, error)
        return Prepared()


def launches_of(calls: Iterable[Operator], device: torch.device) -> Iterator[tuple[Launch, dict[str, Any]]]:
    """The launches on the device, each with its options as Triton names them."""
    gpu = gpu_at(device)
    pdl = configs.pdl(gpu)
    for call in calls:
        if call.kernels_apply:
            with assume(gpu):
                plan, _ = call.planned()
            for launch in plan.launches:
                if isinstance(launch, Launch):
                    yield launch, launch.options(pdl)


def compile_launches(launches: Iterable[tuple[Launch, dict[str, Any]]]) -> Prepared:
    """Compile for the current GPU of Triton's active driver. Raises what Triton raises before it compiles."""
    from triton.runtime import driver

    cache = _Cache()
    missing = [(launch, options) for launch, options in launches if cache.lacks(launch, options)]
    if len(missing) > FEW and not children.obstacle():
        logger.warning(f"compiling {len(missing)} kernels for this GPU, once")
        lines = [describe(launch, options) for launch, options in missing]
        # Each process in another order: those that start together then find each other's kernels on disk.
        random.Random(os.getpid()).shuffle(lines)
        _run_workers(driver.active.get_current_target().arch, lines)
        found = _Cache()
        missing = [(launch, options) for launch, options in missing if found.lacks(launch, options)]
    return Prepared(cache.planned, cache.planned - len(missing))


class _NotCompiled(Exception):
    """Triton's compiler was about to start."""


class _Cache:
    """Asks Triton's cache on disk for launches, through the binder and the compiler that the launch would go through.

    planned: distinct kernels asked for.
    """

    def __init__(self) -> None:
        self.planned = 0
        self._functions: dict[Kernel, Any] = {}
        self._lacking = False

    def lacks(self, launch: Launch, options: dict[str, Any]) -> bool:
        """Whether the launch needs a kernel that is not on disk, and that no launch asked for before."""
        self._lacking = False
        if launch.kernel not in self._functions:
            self._functions[launch.kernel] = self._asking(launch.kernel)
        self._functions[launch.kernel].run(**launch.arguments, **options, grid=None, warmup=True)
        return self._lacking

    def _asking(self, kernel: Kernel) -> Any:
        """The kernel as Triton's function with caches of its own, where what is not on disk is not compiled."""
        kernel.made.cache_key  # noqa: B018  computed once, for the copy too
        function = copy.copy(kernel.made)

        def create_binder() -> Any:
            made = type(function).create_binder(function)
            compiler = function.compile

            def find(source: Any, **rest: Any) -> Any:
                self.planned += 1
                source.make_ir = _refuse
                try:
                    return compiler(source, **rest)
                except _NotCompiled:
                    self._lacking = True
                    return source  # kept by Triton like a kernel: each variant is asked for once

            function.compile = find
            return made

        function.device_caches = defaultdict(create_binder)
        function._call_hook = lambda *_, **__: None
        return function


def _refuse(*_: Any, **__: Any) -> Any:
    raise _NotCompiled


def _run_workers(arch: int, lines: list[str]) -> None:
    """Have worker processes compile what the lines describe; returns when all are done, or no worker goes on."""
    waiting, answers = deque(lines), queue.SimpleQueue[str]()
    count = min(len(lines), _processors(), MOST_WORKERS)
    workers: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            workers.append(_start_worker())
            threads.append(threading.Thread(target=_feed, args=(workers[-1], arch, waiting, answers), daemon=True))
            threads[-1].start()
        running = count
        while running:
            running -= answers.get(timeout=STALL) == ""
    except queue.Empty:
        logger.debug("the workers that compile kernels ahead are stuck")
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()
        for thread in threads:
            thread.join()


def _start_worker() -> subprocess.Popen[str]:
    """A worker that finds the modules this process finds, and no GPU."""
    return subprocess.Popen(
        children.command(WORKER),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )


def _feed(worker: subprocess.Popen[str], arch: int, waiting: deque[str], answers: queue.SimpleQueue[str]) -> None:
    """Give a worker one line after the other; each of its answers, and "" for its end, goes to `answers`."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with contextlib.suppress(OSError, IndexError):
        print(arch, file=worker.stdin)
        while True:
            print(waiting.popleft(), file=worker.stdin, flush=True)
            answer = next((line for line in worker.stdout if line.startswith(ANSWERS)), "")
            if not answer:
                break
            answers.put(answer)
    answers.put("")
    with contextlib.suppress(OSError):
        worker.stdin.close()


def _processors() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
