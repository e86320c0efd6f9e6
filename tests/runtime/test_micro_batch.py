"""Requests of several threads in one batch: each gets its own result, error and notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.sample_images import nearest
from tinysr_kernels.runtime.micro_batch import Budget, MicroBatcher, Stopped
from tinysr_kernels.runtime.notices import collect_notices, notice

SOON = 120  # seconds after which a test that waits has failed, on a busy machine too


def run_threads(enlarge: Callable[..., Tensor], images: list[Tensor]) -> list[Any]:
    """The result or error of each image, requested by as many threads at once."""
    found: list[Any] = [None] * len(images)

    def work(i: int) -> None:
        try:
            found[i] = enlarge(images[i])
        except Exception as error:  # noqa: BLE001
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    return found


class Slow:
    """A network whose first call waits until `count` further requests are queued."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.shapes: list[tuple[int, ...]] = []
        self.batcher: MicroBatcher | None = None

    def __call__(self, rgb: Tensor) -> Tensor:
        self.shapes.append(tuple(rgb.shape))
        end = time.monotonic() + SOON
        while len(self.shapes) == 1 and time.monotonic() < end:
            assert self.batcher is not None
            if len(self.batcher._waiting) == self.count:
                break
            time.sleep(0.001)
        if (rgb[:, 0, 0, 0] == 1).any():
            raise ValueError("white")
        notice(f"{len(rgb)} at once")
        return nearest(rgb)


def run_batched(images: list[Tensor], max_pixels: int = 1 << 20) -> tuple[list[Any], Slow]:
    network = Slow(len(images) - 1)
    network.batcher = MicroBatcher(network, max_pixels, max_in_flight=1)
    return run_threads(network.batcher, images), network


def test_requests_of_equal_shape_become_batches_of_power_of_two_sizes() -> None:
    images = [torch.rand(1, 3, 4, 5) * 0.9 for _ in range(8)]
    found, network = run_batched(images)
    assert [shape[0] for shape in network.shapes] == [1, 4, 2, 1]
    for image, large in zip(images, found, strict=True):
        assert torch.equal(large, nearest(image))


def test_shapes_and_dtypes_are_not_mixed_and_batches_are_bounded() -> None:
    images = [torch.rand(1, 3, 4, 5) * 0.9 for _ in range(3)] + [torch.rand(1, 3, 5, 4) * 0.9 for _ in range(3)]
    images += [image.double() for image in images]
    found, network = run_batched(images, max_pixels=2 * 4 * 5)
    assert max(shape[0] for shape in network.shapes) == 2
    assert len(network.shapes) < len(images)
    for image, large in zip(images, found, strict=True):
        assert torch.equal(large, nearest(image))


def test_an_error_is_raised_only_for_the_image_that_causes_it() -> None:
    images = [torch.rand(1, 3, 4, 5) * 0.9 for _ in range(5)]
    images[3][0, 0, 0, 0] = 1
    found, _ = run_batched(images)
    assert [isinstance(each, ValueError) for each in found] == [False, False, False, True, False]


def test_every_thread_gets_the_notices_of_its_batch() -> None:
    messages: list[list[str]] = []
    network = Slow(4)
    network.batcher = MicroBatcher(network, 1 << 20, max_in_flight=1)

    def request(image: Tensor) -> Tensor:
        assert network.batcher is not None
        with collect_notices() as own:
            result = network.batcher(image)
        messages.append(list(own))
        return result

    run_threads(request, [torch.rand(1, 3, 2, 2) * 0.9 for _ in range(5)])
    assert sorted(messages) == [["1 at once"], *[["4 at once"]] * 4]


def test_out_receives_the_result() -> None:
    batcher = MicroBatcher(nearest, 1 << 20)
    assert not batcher.takes_bytes
    image, out = torch.rand(1, 3, 2, 2), torch.empty(1, 3, 8, 8)
    assert batcher(image, out=out) is out
    assert torch.equal(out, nearest(image))


def test_nothing_is_computed_after_a_stop() -> None:
    calls: list[int] = []
    batcher = MicroBatcher(lambda rgb: calls.append(1) or rgb, 1 << 20)
    batcher.stop()
    with pytest.raises(Stopped):
        batcher(torch.rand(1, 3, 2, 2))
    assert calls == []


def test_a_budget_is_shared_and_larger_amounts_run_alone() -> None:
    budget, lock, now = Budget(10), threading.Lock(), [0]
    most: list[int] = []

    def take(amount: int) -> None:
        with budget.reserve(amount):
            with lock:
                now[0] += amount
                most.append(now[0])
            time.sleep(0.005)
            with lock:
                now[0] -= amount

    threads = [threading.Thread(target=take, args=(amount,)) for amount in (3, 4, 5, 6, 25, 2, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert now == [0]
    assert max(each for each in most if each != 25) <= 10
    assert 25 in most
