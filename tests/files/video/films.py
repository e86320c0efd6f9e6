"""Films for tests: made here, read back, damaged."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.sample_images import SCALE, FakeModel
from tinysr_kernels.files import video
from tinysr_kernels.files.video.color import Converter, frame_format
from tinysr_kernels.files.video.opening import opened
from tinysr_kernels.files.video.reading import video_reader

av = pytest.importorskip("av")

TIME_BASE = 12800
NAMES = {".mkv": "matroska", ".ts": "mpegts", ".mts": "mpegts", ".wmv": "asf", ".mpg": "mpeg", ".m4v": "mp4"}
NAMES |= {f".{name}": name for name in ("mp4", "mov", "webm", "avi", "flv", "3gp", "mxf", "ivf", "nut")}
NAMES |= {".y4m": "yuv4mpegpipe", ".264": "h264", ".265": "hevc", ".ogv": "ogg", ".m2v": "mpeg2video"}


def frames_of(count: int, width: int, height: int) -> list[np.ndarray]:
    """Smooth color frames that differ from each other after compression."""
    y, x = np.mgrid[0:height, 0:width]
    result = []
    for index in range(count):
        wave = 60 * np.sin(x / 9 + index) + 60 * np.cos(y / 7 - index)
        result.append(np.stack([128 + wave, 128 - wave, np.full_like(wave, 10 * index % 255)], -1).astype(np.uint8))
    return result


def make(
    path: Path,
    *,
    count: int = 12,
    size: tuple[int, int] = (48, 36),
    codec: str = "libx264",
    audio: int = 2,
    matrix: int = 0,
    full_range: bool = False,
    rotation: int = 0,
    pixel_format: str = "yuv420p",
    form: str | None = None,
) -> None:
    """Write a video with variable frame durations and audio tracks of different pitch."""
    with open(path, "wb") as file, av.open(file, "w", format=form or NAMES.get(path.suffix)) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.time_base, context.gop_size = Fraction(1, TIME_BASE), 4
        if matrix:
            context.colorspace = context.color_primaries = matrix
            context.color_trc = 1
        if full_range:
            context.color_range = 2
        if rotation:
            stream.set_display_rotation(rotation)
        tracks = [output.add_stream("aac", rate=44100) for _ in range(audio)]
        for track, language in zip(tracks, ("eng", "fra"), strict=False):
            track.metadata["language"] = language
        time = 0
        for index, pixels in enumerate(frames_of(count, *size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, TIME_BASE)
            time += 512 * (1 + index % 3)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        for number, track in enumerate(tracks):
            for index in range(20):
                wave = 0.2 * np.sin(np.arange(1024) * (number + 1) / 20)
                sound = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
                sound.sample_rate, sound.pts = 44100, 1024 * index
                output.mux(track.encode(sound))
            output.mux(track.encode(None))


def times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.pts * stream.time_base for frame in container.decode(stream)]


def images(path: Path) -> list[np.ndarray]:
    """Frames converted with the matrix and range of the file, which PyAV's own conversion may ignore."""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        return [Converter(frame_format(frame, context)).to_rgb(frame) for frame in container.decode(video=0)]


def audio(path: Path) -> list[list[tuple[bytes, Fraction]]]:
    tracks = []
    with av.open(str(path)) as container:
        count = len(container.streams.audio)
    for number in range(count):
        with av.open(str(path)) as container:
            stream = container.streams.audio[number]
            tracks.append([(bytes(p), p.pts * stream.time_base) for p in container.demux(stream) if p.size])
    return tracks


def enlarge(source: Path, target: Path, **options) -> video.VideoReport:
    return video.upscale_video(source, target, FakeModel().stream, SCALE, **options)


def damage(source: Path, target: Path, broken: set[int]) -> None:
    """Copy a video and corrupt some of its packets."""
    with av.open(str(source)) as first, av.open(str(target), "w") as second:
        streams = {stream.index: second.add_stream_from_template(stream) for stream in first.streams}
        number = 0
        for packet in first.demux():
            if not packet.size:
                continue
            if packet.stream.type == "video":
                if number in broken:
                    data = bytearray(bytes(packet))
                    data[len(data) // 4 :] = bytes(len(data) - len(data) // 4)
                    packet.update(bytes(data))
                number += 1
            packet.stream = streams[packet.stream.index]
            second.mux(packet)


def repeat(frames: Any) -> Iterator[np.ndarray]:
    """A stream that repeats pixels."""
    for frame in frames:
        yield frame.repeat(SCALE, 0).repeat(SCALE, 1)


def decoded(path: Path, pixels: str) -> list[np.ndarray]:
    """All frames as the package reads them, also with alpha, in one of PyAV's pixel formats such as "rgba"."""
    with opened(path) as container:
        reader = video_reader(container, path, False)
        return [frame.reformat(format=pixels).to_ndarray() for frame in reader.events()]


def write_frames(
    path: Path, arrays: list[np.ndarray], codec: str, pixel_format: str, *, pixels: str = "rgba", **context: int
) -> None:
    """Write a film from arrays in one of PyAV's pixel formats. context: fields of the encoder, such as color_trc."""
    with open(path, "wb") as file, av.open(file, "w", format=NAMES[path.suffix]) as output:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = output.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = arrays[0].shape[:2]
        stream.pix_fmt = pixel_format
        if codec.startswith("libvpx") and "yuva" in pixel_format:
            stream.metadata["alpha_mode"] = "1"
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for array in arrays:
            frame = av.VideoFrame.from_ndarray(array, format=pixels).reformat(format=pixel_format)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
