"""Enlarge a video four times with PyAV; without a video, make a short one from a photograph first.

python examples/video.py [VIDEO] [-o OUTPUT] [--model CKPT]

Needs the extra `video`. `tinysr upscale VIDEO -o OUTPUT --model CKPT` also keeps audio, subtitles and timestamps.
"""

import argparse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

import tinysr_kernels

ROOT = Path(__file__).resolve().parents[1]


def pan(path: Path, *, width: int = 96, height: int = 64, frames: int = 12) -> None:
    """Write a clip in which a window moves over a photograph, one pixel to the right per frame."""
    with Image.open(ROOT / "docs/photos/coffee.jpg") as image:
        photograph = np.asarray(image.convert("RGB"))
    write(path, (photograph[:height, x : x + width] for x in range(frames)), Fraction(12))


def read(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video as uint8 `[H,W,3]`."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def write(path: Path, frames: Iterator[np.ndarray], rate: Fraction) -> int:
    """Encode uint8 frames `[H,W,3]` of one size as H.264 (even sides), and return how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for count, frame in enumerate(frames, start=1):
            if count == 1:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return count


def main() -> None:
    """Decode, enlarge and encode; while one frame is encoded, the model computes the next."""
    parser = argparse.ArgumentParser(description="Enlarge a video four times.")
    parser.add_argument("video", nargs="?", type=Path, help="default: a clip made from docs/photos/coffee.jpg")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/video-x4.mp4"))
    parser.add_argument("--model", default="demo", help='a file or folder, or "demo" (default)')
    arguments = parser.parse_args()

    source = arguments.video
    if source is None:
        source = arguments.output.with_name("video.mp4")
        pan(source)
    with av.open(str(source)) as container:
        rate = container.streams.video[0].average_rate or Fraction(25)

    model = tinysr_kernels.compile(arguments.model)
    count = write(arguments.output, model.stream(read(source)), rate)
    print(f"{arguments.output}: {count} frames")


if __name__ == "__main__":
    main()
