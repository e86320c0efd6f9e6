"""Films: small ones in many containers, damaged in their bytes, their sizes, their order or their end, through the
whole way from a file to a file with a network that repeats pixels.

Accepted, or InputError, OutOfMemory or TinySRError (an encoder that refuses), as `upscale_video` documents. No other
exception, no crash of FFmpeg's C code, bounded time and memory, and nothing left beside the result.
"""

from __future__ import annotations

import logging
import random
import struct
import tempfile
from pathlib import Path

import av

from tests.files.video.films import make, repeat
from tests.files.video.test_metadata import rich
from tests.runtime.sample_images import SCALE
from tinysr_kernels.errors import TinySRError
from tinysr_kernels.files.video import probe_video, upscale_video

MEMORY = 2 << 30

_KINDS = [
    *((".mp4", "libx264", 1), (".mkv", "libx264", 1), (".mov", "png", 0), (".avi", "mpeg4", 0), (".wmv", "wmv2", 0)),
    *((".ts", "libx264", 0), (".flv", "flv", 0), (".webm", "libvpx-vp9", 0), (".3gp", "mpeg4", 0), (".nut", "ffv1", 0)),
    *((".ogv", "libvpx", 0), (".264", "libx264", 0), (".265", "libx265", 0), (".ivf", "libvpx-vp9", 0)),
    *((".y4m", "rawvideo", 0), (".mkv", "ffv1", 0), (".mov", "mjpeg", 1)),
]
_FORMATS = {"png": "rgb24", "mjpeg": "yuvj420p"}
_films: list[tuple[str, bytes]] = []


def setup() -> None:
    """Make the films that the cases damage."""
    logging.disable(logging.CRITICAL)
    av.logging.set_level(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffix, codec, sounds in _KINDS:
            if codec in av.codecs_available:
                path = folder / f"a{suffix}"
                size = (96, 72) if codec == "libx265" else (48, 36)  # see encoding.py
                make(path, codec=codec, audio=sounds, count=5, size=size, pixel_format=_FORMATS.get(codec, "yuv420p"))
                _films.append((suffix, path.read_bytes()))
        rich(folder / "rich.mkv")
        _films.append((".mkv", (folder / "rich.mkv").read_bytes()))


def _damaged(data: bytes, random_: random.Random) -> bytes:
    kind = random_.randrange(7)
    content = bytearray(data)
    # Headers are a small part of a film and decide more than the rest.
    span = len(content) if random_.random() < 0.5 else min(len(content), 600)
    if kind == 0:
        for _ in range(random_.choice([1, 3, 30])):
            content[random_.randrange(span)] = random_.randrange(256)
    elif kind == 1:
        del content[random_.randrange(1, len(content)) :]
    elif kind == 2:  # sizes and counts
        at = random_.randrange(max(1, span - 8))
        number = random_.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, random_.randrange(1 << 32)])
        content[at : at + 4] = struct.pack(random_.choice("<>") + "I", number)
    elif kind == 3:
        start = random_.randrange(len(content))
        del content[start : start + random_.randrange(1, 200)]
    elif kind == 4:
        start, length = random_.randrange(len(content)), random_.randrange(1, 2000)
        content[start:start] = content[start : start + length] * random_.choice([1, 2, 20])
    elif kind == 5:
        for _ in range(random_.randrange(1, 4)):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    else:  # the end of the file, where indexes are
        at = random_.randrange(max(0, len(content) - 1500), len(content))
        content[at] = random_.randrange(256)
    return bytes(content)


def case(seed: int, folder: Path) -> str:
    """One damaged film to one of the containers."""
    random_ = random.Random(seed)
    suffix, data = random_.choice(_films)
    content = data if random_.random() < 0.05 else _damaged(data, random_)
    source = folder / f"a{suffix}"
    source.write_bytes(content)
    target = folder / f"b{random_.choice(['.mkv', '.mkv', '.mp4', '.mov', '.webm'])}"
    probe_video(source)
    try:
        upscale_video(source, target, repeat, SCALE, strict=random_.random() < 0.2)
    except TinySRError as error:
        assert sorted(path.name for path in folder.iterdir()) == [source.name]
        return type(error).__name__ if len(str(error)) < 2000 else "long"
    assert sorted(path.name for path in folder.iterdir()) == [source.name, target.name]
    return "accepted"
