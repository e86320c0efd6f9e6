"""Enlarge a stream of frames as they arrive, as from a camera or a renderer, and keep the last one.

python examples/stream.py [--frames N] [-o OUTPUT] [--model CKPT]
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import tinysr_kernels

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 96, 64


def camera(frames: int) -> Iterator[np.ndarray]:
    """Stands for a camera: uint8 frames `[64,96,3]`, a window that moves over a photograph and back."""
    with Image.open(ROOT / "docs/photos/rocket.jpg") as image:
        photograph = np.asarray(image.convert("RGB"))
    room = photograph.shape[1] - WIDTH
    for index in range(frames):
        x = abs((index + room) % (2 * room) - room)
        yield photograph[:HEIGHT, x : x + WIDTH]


def main() -> None:
    """Run the stream; a frame that fails is counted, and the stream goes on."""
    parser = argparse.ArgumentParser(description="Enlarge a stream of frames four times.")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/stream.png"))
    parser.add_argument("--model", default="demo", help='a file or folder, or "demo" (default)')
    arguments = parser.parse_args()

    model = tinysr_kernels.compile(arguments.model)
    model.warmup([(HEIGHT, WIDTH)])  # compile kernels and capture CUDA graphs before the first frame arrives
    last, failed, start = None, 0, time.perf_counter()
    # A live source that must not lag behind takes buffers=1; more buffers overlap copies and computing on a GPU.
    for result in model.stream(camera(arguments.frames), on_error="yield"):
        if isinstance(result, Exception):
            failed += 1
        else:
            last = result
    seconds = time.perf_counter() - start
    print(f"{arguments.frames - failed} frames in {seconds:.2f} s, {failed} failed, on {model.info()['device']}")
    if last is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(last).save(arguments.output)
        print(f"{arguments.output}: the last frame, {last.shape[1]}x{last.shape[0]}")


if __name__ == "__main__":
    main()
