"""Streaming: results, errors and notices in order, several items in flight, no threads left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tinysr_kernels
from tests.runtime.device.recorder import Recorder
from tests.runtime.sample_images import noise
from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.notices import collect_notices, notice
from tinysr_kernels.runtime.streaming import Background, in_order

SOON = 120  # seconds after which a test that waits has failed, on a busy machine too


class Gate:
    """Work that waits until the gate is opened, and counts the calls in flight."""

    def __init__(self, free: bool = True) -> None:
        self.open = threading.Event()
        self.lock = threading.Lock()
        self.begun: list[int] = []
        self.now = self.most = 0
        if free:
            self.open.set()

    def __call__(self, item: int) -> int:
        with self.lock:
            self.begun.append(item)
            self.now += 1
            self.most = max(self.most, self.now)
        assert self.open.wait(SOON)
        time.sleep(0.002 * (item % 3))  # they finish out of order
        with self.lock:
            self.now -= 1
        return item * 10

    def reached(self, count: int) -> bool:
        """Wait until `count` items have started; False after the timeout."""
        end = time.monotonic() + SOON
        while len(self.begun) < count and time.monotonic() < end:
            time.sleep(0.001)
        return len(self.begun) >= count


def test_results_come_in_order() -> None:
    gate = Gate()
    assert list(in_order(gate, range(20), workers=3, ahead=3)) == [10 * i for i in range(20)]
    assert gate.most <= 3
    assert list(in_order(gate, [], workers=3, ahead=3)) == []


def test_next_items_run_while_the_caller_handles_the_previous_result() -> None:
    gate, taken = Gate(), []

    def items() -> Iterator[int]:
        for i in range(10):
            taken.append(i)
            yield i

    results = in_order(gate, items(), workers=3, ahead=3)
    assert next(results) == 0
    assert taken == [0, 1, 2]  # a bounded number, taken by the calling thread
    assert gate.reached(3)
    assert next(results) == 10
    assert taken == [0, 1, 2, 3]
    results.close()


def test_items_are_taken_by_the_calling_thread() -> None:
    threads = set()

    def items() -> Iterator[int]:
        for i in range(3):
            threads.add(threading.get_ident())
            yield i

    working = list(in_order(lambda _: threading.get_ident(), items(), workers=2, ahead=2))
    assert threads == {threading.get_ident()}
    assert threading.get_ident() not in working


def some_fail(item: int) -> int:
    if item in (2, 3):
        raise ValueError(f"frame {item}")
    return item


def test_an_error_is_raised_in_its_turn_and_ends_the_iteration() -> None:
    results = in_order(some_fail, range(6), workers=2, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="frame 2"):
        next(results)
    assert list(results) == []


def test_errors_can_take_the_place_of_results() -> None:
    found = list(in_order(some_fail, range(6), workers=2, ahead=4, on_error="yield"))
    assert [type(each) for each in found] == [int, int, ValueError, ValueError, int, int]
    assert str(found[3]) == "frame 3"


@pytest.mark.parametrize("on_error", ["raise", "yield"])
def test_an_error_of_the_source_comes_after_all_results(on_error: Any) -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise OSError("the file is truncated")

    results = in_order(Gate(), items(), workers=2, ahead=4, on_error=on_error)
    assert [next(results), next(results)] == [0, 10]
    with pytest.raises(OSError, match="is truncated"):
        next(results)


def test_closing_cancels_pending_items_and_waits_for_running_ones() -> None:
    gate, stopped = Gate(free=False), []

    def work(item: int) -> int:
        return gate(item) if item else 0

    results = in_order(work, range(100), workers=1, ahead=5, stop=lambda: stopped.append(1) or gate.open.set())
    assert next(results) == 0
    assert gate.reached(1)
    results.close()
    assert stopped == [1]
    assert gate.now == 0
    assert gate.begun == [1]
    assert not any(thread.name.startswith("tinysr") for thread in threading.enumerate())


def test_notices_come_in_the_turn_of_their_item() -> None:
    def work(item: int) -> int:
        notice(f"about {item}")
        notice(f"about {item}")
        return item

    with collect_notices() as messages:
        results = in_order(work, range(5), workers=3, ahead=3)
        assert messages == []
        assert next(results) == 0
        assert messages == ["about 0"]
        assert list(results) == [1, 2, 3, 4]
    assert messages == [f"about {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "skip"}, "on_error must be"),
        ({"ahead": 0}, "buffers must be"),
        ({"ahead": True}, "buffers must be"),
        ({"workers": 1.5}, "workers must be"),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        in_order(Gate(), [], **{"workers": 1, "ahead": 1, **options})


# Background


def test_background_calls_run_one_after_another_in_another_thread() -> None:
    done: list[tuple[int, int]] = []
    with Background(2) as background:
        for i in range(20):
            background.call(lambda i: done.append((i, threading.get_ident())), i)
    assert [i for i, _ in done] == list(range(20))
    assert len({ident for _, ident in done} - {threading.get_ident()}) == 1


def test_background_calls_wait_in_a_bounded_queue() -> None:
    gate = Gate(free=False)
    with Background(2) as background:
        background.call(gate, 0)
        background.call(gate, 0)
        threading.Thread(target=lambda: (time.sleep(0.05), gate.open.set())).start()
        assert len(background._pending) == 2
        background.call(gate, 0)  # blocks until the first call has passed the gate
        assert gate.open.is_set()


def test_background_errors_are_raised() -> None:
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Background(2) as background:
        background.call(fail)
    done: list[int] = []
    gate = Gate(free=False)

    def block() -> None:
        with Background(3) as background:
            background.call(gate, 0)
            background.call(done.append, 1)
            threading.Thread(target=lambda: (time.sleep(0.02), gate.open.set())).start()
            raise KeyError("the block fails")

    with pytest.raises(KeyError):
        block()
    assert done == []


# The stream of a model


@pytest.fixture(scope="module")
def demo() -> tinysr_kernels.CompiledSR:
    return tinysr_kernels.compile("demo", device="cpu")


def frames(count: int = 4) -> list[np.ndarray]:
    return [noise(8, 12, seed=seed) for seed in range(count)]


def test_a_stream_matches_single_calls(demo: tinysr_kernels.CompiledSR) -> None:
    for inputs in (
        frames(),
        [Image.fromarray(frame) for frame in frames()],
        [torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in frames()],
        [noise(8, 12, 4), noise(6, 7, 3), noise(8, 12, 1), noise(8, 12, 3, "float32")],  # of any kind and size
    ):
        for buffers in (None, 1, 3):
            for frame, large in zip(inputs, demo.stream(iter(inputs), buffers=buffers), strict=True):
                assert np.array_equal(np.asarray(large), np.asarray(demo(frame)))


def test_a_faulty_frame_does_not_affect_others(demo: tinysr_kernels.CompiledSR) -> None:
    inputs: list[Any] = frames(4)
    inputs[1] = np.full((4, 4, 3), np.nan)
    results = demo.stream(inputs)
    assert np.array_equal(next(results), demo(inputs[0]))
    with pytest.raises(InputError, match="NaN"):
        next(results)
    found = list(demo.stream(inputs, on_error="yield"))
    assert isinstance(found[1], InputError)
    for i in (0, 2, 3):
        assert np.array_equal(found[i], demo(inputs[i]))
    with pytest.raises(InputError, match="on_error"):
        demo.stream(inputs, on_error="ignore")


def test_on_a_gpu_copies_of_frames_overlap(monkeypatch: pytest.MonkeyPatch, demo) -> None:
    """A recorder in place of the GPU: three frames are copied concurrently, and each result matches its frame."""
    engine = Recorder(separate=True)
    monkeypatch.setattr("tinysr_kernels.runtime.compiled.engine_for", lambda device: engine)
    model = tinysr_kernels.compile("demo", device="cpu")
    together = threading.Barrier(3, timeout=SOON)
    upload = engine.upload

    def synchronized(image: Tensor) -> Tensor:
        together.wait()  # passes once three frames have got here
        return upload(image)

    monkeypatch.setattr(engine, "upload", synchronized)
    results = list(model.stream(frames(6)))
    for frame, large in zip(frames(6), results, strict=True):
        assert np.array_equal(large, demo(frame))
    assert engine.most_copying == 3
    assert engine.copying == 0
    assert (engine.count("bound"), engine.count("launch"), engine.count("capture"), engine.count("replay")) == (
        1,
        1,
        1,
        5,
    )
