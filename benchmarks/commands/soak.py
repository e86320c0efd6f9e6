"""`python -m benchmarks soak`: many images of mixed sizes through one compiled model, by several threads at once.

Images repeat in random order. Each result must be bitwise equal to the result of that image alone, and memory must not
grow after the first rounds. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure.results import Record, Results
from benchmarks.measure.session import Session, session
from benchmarks.measure.session import add_arguments as add_common
from tinysr_kernels.runtime.compiled import CompiledSR

SUMMARY = "1000 images of mixed sizes through one model by eight threads: equal bits, constant memory."
IMAGES, THREADS, ROUNDS = 1000, 8, 10
UNIT = 48
"""Pixels of the shortest side on a GPU."""
DIFFERENT = 40
"""Number of different images (size, alpha, content): far more than the model's graphs and buffers hold."""
WARM = 4
"""Rounds after which all buffers, graphs and cached plans exist."""
SETTLED = 200
"""Minimum number of images in these rounds for a check of memory growth."""
GROWTH = 1.02
"""Maximum ratio of memory at the end to memory after these rounds."""
GRAPHS = 4
Image = NDArray[np.uint8]


def mixed_images(unit: int, seed: int = 0) -> list[Image]:
    """Images [H,W,C] with sides from `unit` to four times as much, one in four gray and one in eight with alpha."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(DIFFERENT):
        h, w = draw.integers(unit, 4 * unit + 1, 2)
        channels = 1 if i % 4 == 3 else 4 if i % 8 == 1 else 3
        shape = (h, w) if channels == 1 else (h, w, channels)
        found.append(draw.integers(0, 256, shape, dtype=np.uint8))
    return found


def held_mib(made: Session) -> float:
    """MiB of GPU memory reserved by the process, or the peak of its resident memory on a CPU; NaN on Windows there."""
    if made.cuda:
        return torch.cuda.memory_reserved(made.device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    # macOS counts bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def soak(made: Session, model: CompiledSR, images: int, threads: int, unit: int) -> None:
    """Run in rounds, one record each; raises Late when the time is over."""
    inputs = mixed_images(unit)
    alone = [model(image) for image in inputs]
    order = random.Random(1)

    def differs(i: int) -> bool:
        return not np.array_equal(model(inputs[i]), alone[i])

    with ThreadPoolExecutor(threads) as pool:
        for number in range(1, ROUNDS + 1):
            made.need(1)
            chosen = [
                order.randrange(DIFFERENT) for _ in range(images * number // ROUNDS - images * (number - 1) // ROUNDS)
            ]
            started = time.perf_counter()
            different = sum(pool.map(differs, chosen))
            seconds = time.perf_counter() - started
            values = {"images": len(chosen), "different": different, "seconds": seconds, "held_mib": held_mib(made)}
            labels = {"threads": str(threads), "round": str(number)}
            made.sink.add(Record(f"round {number}", labels, values={k: float(v) for k, v in values.items()}))


def faults(results: Results) -> Iterator[str]:
    """What failed."""
    rounds = [one for one in results.records if not one.error]
    different = sum(one.values["different"] for one in rounds)
    if different:
        yield f"{different:.0f} images differ from their result alone"
    if len(rounds) > WARM and sum(one.values["images"] for one in rounds[:WARM]) >= SETTLED:
        warm, last = rounds[WARM - 1].values["held_mib"], rounds[-1].values["held_mib"]
        if last > GROWTH * warm:
            yield f"{last:.0f} MiB are held at the end, {warm:.0f} after round {WARM}"
    yield from (f"{one.key}: {one.error}" for one in results.records if one.error)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_common(parser)
    parser.add_argument("--ckpt", default="demo", help="a checkpoint (demo)")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"in all (default {IMAGES})")
    parser.add_argument("--threads", type=int, default=THREADS, metavar="N", help=f"at once (default {THREADS})")


def main(options: argparse.Namespace) -> int:
    """Run, print one line per round, report failures."""
    import tinysr_kernels

    with session("soak", options) as made, made.guarded("soak", {}):
        unit = UNIT if made.cuda else 12
        model = tinysr_kernels.compile(options.ckpt, device=made.device, max_graph_shapes=GRAPHS, tile=3 * unit)
        soak(made, model, options.images, options.threads, unit)
    for one in made.sink.results.records:
        v = one.values
        if v:
            print(f"{one.key}: {v['images']:.0f} images, {v['different']:.0f} different, {v['held_mib']:.0f} MiB held")
    wrong = list(faults(made.sink.results))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0
