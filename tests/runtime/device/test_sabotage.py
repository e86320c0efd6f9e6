"""The fake GPU is strict enough: the engine, broken in each of these ways, does not get through one use of it."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.runtime.device.fake_cuda import Fault, Machine, captured, fake_cuda
from tinysr_kernels.runtime.device import cuda, staging
from tinysr_kernels.runtime.device.cuda import CudaEngine

GPU = torch.device("cuda", 0)

OWN = "torch.empty_like(t) if self.holds(t) else t for t in rest"
COPIED = "tuple(torch.empty_like(t).copy_(t) for t in inputs)"
KEEPER = "if self._pool_keeper is None:"
UNKEPT = "self._pool = self._pool or torch.cuda.graph_pool_handle()\n                if False:"
GIVEN_BACK = "        self._pool, self._pool_keeper = None, None\n        torch.cuda.empty_cache()"
RESULTS = "for result, static in zip(results, graph.outputs, strict=True):\n"

SABOTAGES = {
    "the side stream does not wait for the caller": ("            stream.wait_stream(caller)\n", ""),
    "the caller does not wait for the side stream": ("caller.wait_stream(stream)", "pass"),
    "results in memory of the side stream": ("            with torch.cuda.stream(caller):", "            if True:"),
    "results handed over as they are": (OWN, "t for t in rest"),
    "record_stream for results": (OWN, "t.record_stream(caller) or t for t in rest"),
    "new memory is written while the caller may use it": ("            self._stream.wait_stream(caller)\n", ""),
    "results of a replay are the graph's own": (
        "return tuple(results)\n\n    def drop",
        "return graph.outputs\n\n    def drop",
    ),
    "results of a replay are copied on the caller's stream": (f"            {RESULTS}    ", f"        {RESULTS}"),
    "no warm-up": ("            step(*dense)\n", ""),
    "the warm-up drops the caller's inputs": (f"dense = {COPIED}", f"dense = inputs = {COPIED}"),
    "captures in the global mode": ('capture_error_mode="thread_local"', 'capture_error_mode="global"'),
    "nothing keeps the pool": (KEEPER, UNKEPT),
    "the pool is used after it was given back": (GIVEN_BACK, "        self._pool_keeper.graph.reset()"),
    "captures go on after a failed one": ("self.can_capture = not", "_ = not"),
    "the stream of a failed capture is kept": (
        "                self._replace_stream()\n                #",
        "                #",
    ),
    "a new stream does not wait for the old one": ("        self._stream.wait_stream(old)\n", ""),
    "graphs are dropped while they run": ("        self._stream.synchronize()\n        for", "        for"),
    "the caller's stream is taken for ours": ("if caller == self._stream:", "if False:"),
    "downloads do not wait": ("        torch.cuda.current_stream(self.device).synchronize()\n", ""),
    "copies of the current device": ("torch.cuda.current_stream(self.device)", "torch.cuda.current_stream()"),
    "slices are read before they are full": (
        "            slot.copied.synchronize()\n            into",
        "            into",
    ),
    "slices ask the current device's stream": ("slot.copied.record(stream)", "slot.copied.record()"),
    "slices do not wait for each other, up": ("under_way.popleft().copied.synchronize()", "break"),
    "slices do not wait for each other, down": ("                    arrive()\n", "                    break\n"),
    "there are no slices": ("range(0, len(of), SLICE)", "range(0, len(of), 1 << 30)"),
    "no copies without pinned memory": ("except RuntimeError as error", "except MemoryError as error"),
    "a forked process goes on": ("if os.getpid() != self._process:", "if False:"),
    "a capture on another GPU goes on": (
        "            capturing = torch.cuda.is_current_stream_capturing()",
        "            capturing = False",
    ),
    "a capture of the caller goes on": ("        if capturing:", "        if False:"),
}


def broken(old: str, new: str) -> type[CudaEngine]:
    """The engine with a text of its sources replaced."""
    modules = {}
    for module in (staging, cuda):
        text = Path(module.__file__).read_text(encoding="utf-8")
        modules[module] = types.ModuleType(f"broken_{module.__name__.rpartition('.')[2]}")
        sys.modules[modules[module].__name__] = modules[module]  # dataclasses look there
        exec(compile(text.replace(old, new), module.__file__, "exec"), modules[module].__dict__)  # noqa: S102
    modules[cuda].Staging = modules[staging].Staging
    modules[staging].SLICE, modules[staging].IN_FLIGHT = 64, 128
    return modules[cuda].CudaEngine


def step(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x * 2)
    return y, y.isfinite().all()


def other_threads_work_goes_on(machine: Machine) -> None:
    """What another thread of the program may do at any time, also during a capture, unless its mode is global."""
    capture = machine.captures_under_way[-1] if machine.captures_under_way else None
    if capture is not None and capture.mode == "global":
        machine.note("a capture fails because another thread allocates or waits")


def use(engine: CudaEngine, machine: Machine) -> None:
    """Everything that the runtime does with an engine, on a stream and a current device of the caller's."""
    host, other = torch.rand(2, 3, 4, 5), torch.rand(1, 3, 4, 5)
    expected, fitting = torch.tanh(host * 2), torch.tanh(other * 2)
    machine.gets_stuck = True
    second, third = torch.cuda.Stream(GPU), torch.cuda.Stream(GPU)
    with torch.cuda.stream(second):
        z = engine.upload(host)
    with torch.cuda.stream(third):
        w = engine.upload(host)

    def watched(x: Tensor) -> tuple[Tensor, Tensor]:
        other_threads_work_goes_on(machine)
        return step(x)

    def synchronizing(x: Tensor) -> tuple[Tensor]:
        return (x * float(x.sum()) if machine.capture() is not None else x * 2,)

    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream(GPU)), engine.copies(), torch.cuda.device(1):
        x = engine.upload(host)
        assert torch.equal(x.data_, host)
        x, y = x * 1, engine.upload(other)
        graphs = [engine.capture(watched, (x * 1,)), engine.capture(watched, (y * 1,))]
        for _ in range(2):
            results = [engine.launch(step, (x * 1,)), engine.replay(graphs[0], (x * 1,), None)]
            assert torch.equal(engine.replay(graphs[1], (y,), None)[0].cpu(), fitting)
            for found, finite in results:
                found += 1
                for memory in (None, torch.empty_like(host)):
                    back, flag = engine.download((found, finite), memory)
                    assert torch.equal(back, expected + 1)
                    assert bool(flag)
            del results, found, finite
            sums = [engine.launch(step, (x * 1,))[0] + 1, engine.replay(graphs[0], (x * 1,), None)[0] + 1]
            with torch.cuda.stream(second):
                sums.append(engine.replay(graphs[0], (z,), None)[0] + 1)
            sums.append(engine.replay(graphs[0], (x * 1,), None)[0] + 1)
            assert all(torch.equal(each.data_, expected + 1) for each in sums)
            del sums
        engine.replay(graphs[0], (x,), None)
        engine.drop([graphs.pop(0)])
        engine.replay(graphs[0], (y,), None)
        engine.drop([graphs.pop()])
        engine.trim()
        graph = engine.capture(step, (x,))
        engine.drop([graph])
        graph = engine.capture(step, (x,))
        with torch.cuda.stream(second):
            engine.replay(graph, (z,), None)
        with pytest.raises(RuntimeError):
            engine.capture(synchronizing, (x,))
        with torch.cuda.stream(third):
            engine.replay(graph, (w,), None)
        engine.replay(graph, (x,), None)
        torch.cuda.current_stream(GPU).synchronize()
        used = machine.used[GPU]
        for _ in range(2):
            assert torch.equal(engine.replay(graph, (x,), None)[0].cpu(), expected)
            assert torch.equal(engine.launch(step, (x * 1,))[0].cpu(), expected)
        assert machine.used[GPU] == used
        assert not engine.can_capture
        ours = engine._stream
        theirs = next(stream for stream in (torch.cuda.Stream(GPU, priority=-1) for _ in range(32)) if stream == ours)
    theirs.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(theirs):
        x = engine.upload(host)
        assert torch.equal(engine.launch(step, (x,))[0].cpu(), expected)
        assert engine._stream != theirs
        assert machine.memory.most_pinned <= 128
        pinned = torch.empty_like(host, pin_memory=True)
        engine.download((x * 1,), pinned)
        assert torch.equal(pinned.clone(), host)
        machine.pinned = False
        assert torch.equal(engine.download((engine.upload(host),))[0], host)
        torch.cuda.synchronize()
        for index in range(2):
            own = torch.cuda.Stream(torch.device("cuda", index))
            with captured(torch.cuda.CUDAGraph(), own), pytest.raises(cuda.InputError):
                engine.check()
        engine._process = -1
        with pytest.raises(cuda.DeviceError):
            engine.check()


def test_the_engine_gets_through() -> None:
    with fake_cuda() as machine:
        use(broken("", "")(GPU), machine)


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_broken_engine_does_not(name: str) -> None:
    old, new = SABOTAGES[name]
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (cuda, staging)]
    assert sum(text.count(old) for text in sources) >= 1
    with fake_cuda(faults=True) as machine:
        try:
            use(broken(old, new)(GPU), machine)
        except (Exception, Fault, pytest.fail.Exception):  # noqa: BLE001  however it is found
            return
        assert machine.faults
