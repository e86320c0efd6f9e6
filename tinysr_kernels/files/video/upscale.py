"""Upscale videos: frame by frame, with original timestamps, audio and subtitles. Outputs are written atomically.

The video stream is re-encoded (H.264 with libx264 if available, else MPEG-4; VP9 in WebM). Audio and subtitle streams
are copied without re-encoding. A corrupt frame is replaced by the previous one and counted. Rotation is applied to the
pixels. Color matrix, range, primaries, transfer function and sample aspect ratio are preserved.

Decoding overlaps with upscaling; encoding and all writing happen in one background thread.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tinysr_kernels.errors import InputError, NonFiniteOutput, TinySRError
from tinysr_kernels.files.picture_io import temporary_path
from tinysr_kernels.files.video.opening import PlainFile, opened, pyav
from tinysr_kernels.files.video.reading import Converter, MissingFrame, VideoReader, frame_format, video_reader
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.streaming import Background

Stream = Callable[[Iterable[np.ndarray]], Iterator[Any]]
"""Frames to upscaled frames in order; an exception may take the place of a frame."""

_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
VIDEO_SUFFIXES = tuple(_CONTAINERS)
"""What films are written as; they hold exact timestamps and the codecs used here."""

Progress = Callable[[int, int | None], None]
"""Is called with the number of frames written and, if the file states it, that of all frames."""

_MPEG4_TICKS = 65535  # the finest time base that MPEG-4 can represent
_ENCODER_QUEUE = 2  # upscaled frames that wait for the encoder


@dataclass(frozen=True)
class VideoReport:
    """What was written. repeated: frames that replace a corrupt or failed one. Sizes are (width, height) in pixels."""

    frames: int
    repeated: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    audio_streams: int


def _codec(suffix: str, codec: str | None, crf: int) -> tuple[str, dict[str, str]]:
    available = pyav().codecs_available
    names = [codec] if codec else ["libvpx-vp9"] if suffix == ".webm" else ["libx264", "mpeg4"]
    name = next((name for name in names if name in available), None)
    if name is None:
        raise InputError(f"this PyAV has no encoder {' or '.join(names)}; choose another container")
    options = {
        "libx264": {"crf": str(crf), "preset": "medium"},
        "libvpx-vp9": {"crf": str(min(crf + 8, 63)), "b": "0", "row-mt": "1", "cpu-used": "2"},
    }
    return name, options.get(name, {})


class _Writer:
    """The output container: the encoded video stream, the copied streams, and the order of frames and repeats.

    All calls that write to the container go through `background`, in order.
    """

    def __init__(
        self,
        output: Any,
        background: Background,
        reader: VideoReader,
        frame: Any,
        upscale: int,
        suffix: str,
        codec: str | None,
        crf: int,
    ):
        self.reader = reader
        self.output = output
        self.background = background
        self.format = frame_format(frame, reader.video.codec_context)
        # One per thread: a converter is not thread-safe.
        self.decoding, self.encoding = Converter(self.format), Converter(self.format)
        width, height = frame.width, frame.height
        self.input_size = (height, width) if self.format.rotation % 180 else (width, height)
        self.size = (self.input_size[0] * upscale, self.input_size[1] * upscale)
        name, options = _codec(suffix, codec, crf)
        rate = reader.frame_rate
        self.stream = output.add_stream(name, rate=rate, options=options)
        self._configure(name, rate)
        self.copies: dict[int, Any] = {}
        for source in reader.copied:
            self._copy(source)
        output.metadata.update(reader.container.metadata)
        if hasattr(output, "set_chapters") and hasattr(reader.container, "chapters"):
            output.set_chapters(reader.container.chapters())
        # Frames sent to the network and gaps to fill, in order: (whether a frame, pts, duration).
        self.times: deque[tuple[bool, int, int]] = deque()
        self.progress: Progress | None = None
        self.written = 0
        self.repeated = 0
        self.failed = 0

    def _configure(self, name: str, rate: Fraction) -> None:
        context, source = self.stream.codec_context, self.reader.video.codec_context
        self.stream.width, self.stream.height = self.size
        context.pix_fmt = "yuv420p" if self.size[0] % 2 == 0 and self.size[1] % 2 == 0 else "yuv444p"
        self.time_base = Fraction(self.reader.video.time_base)
        if name == "mpeg4":
            self.time_base = max(self.time_base, Fraction(1, _MPEG4_TICKS)).limit_denominator(_MPEG4_TICKS)
            context.bit_rate = min(int(self.size[0] * self.size[1] * rate / 4), 400_000_000)
        context.time_base = self.time_base
        ratio = source.sample_aspect_ratio
        if ratio:
            context.sample_aspect_ratio = 1 / ratio if self.format.rotation % 180 else ratio
        context.colorspace = self.format.tag
        context.color_range = 2 if self.format.full_range else 1
        context.color_primaries, context.color_trc = self.format.primaries, self.format.transfer

    def _copy(self, source: Any) -> None:
        av = pyav()
        codec = getattr(source.codec_context, "codec", None)
        name = getattr(codec, "canonical_name", None) or source.codec_context.name
        try:
            if name not in self.output.supported_codecs:
                raise ValueError(f"{self.output.format.name} does not support {name}")
            target = self.output.add_stream_from_template(source)
        except (ValueError, av.error.FFmpegError) as error:
            if source.type == "audio":
                raise InputError(f"the audio cannot be copied: {error}; write .mkv instead") from error
            notice(f"{source.type} stream dropped: {error}")
            return
        target.metadata.update(source.metadata)
        self.copies[source.index] = target

    def frames(self, events: Iterable[Any]) -> Iterator[np.ndarray]:
        """Yield frames uint8 [H,W,3] for the network; copy packets of other streams; record timestamps and gaps."""
        for event in events:
            if isinstance(event, MissingFrame):
                self.times.append((False, event.pts, 0))
            elif isinstance(event, pyav().VideoFrame):
                self.times.append((True, event.pts, event.duration or 0))
                yield self.decoding.to_rgb(event)
            elif event.stream.index in self.copies:
                event.stream = self.copies[event.stream.index]
                self.background.call(self.output.mux, event)

    def write(self, pixels: np.ndarray, pts: int, duration: int) -> None:
        """Encode one upscaled frame uint8 [H,W,3] in the background. pts, duration: in the input's time base."""
        if pixels.shape != (self.size[1], self.size[0], 3):
            raise TinySRError(
                f"expected a frame of shape {(self.size[1], self.size[0], 3)} from the network, found {pixels.shape}"
            )
        self.background.call(self._encode, pixels, pts, duration)
        self.written += 1
        if self.progress is not None:
            self.progress(self.written, self.reader.video.frames or None)

    def _encode(self, pixels: np.ndarray, pts: int, duration: int) -> None:
        frame = self.encoding.to_yuv(pixels, self.stream.codec_context.pix_fmt)
        source = self.reader.video.time_base
        frame.time_base = self.time_base
        frame.pts = pts if source == self.time_base else round(pts * source / self.time_base)
        if duration:
            frame.duration = round(duration * source / self.time_base)
        self.output.mux(self.stream.encode(frame))

    def finish(self) -> None:
        """Flush the encoder after all frames."""
        self.background.call(lambda: self.output.mux(self.stream.encode(None)))

    def mark_failed(self) -> None:
        """Turn the next frame, which could not be upscaled, into a gap."""
        index = next(i for i, (is_frame, _, _) in enumerate(self.times) if is_frame)
        _, pts, duration = self.times[index]
        self.times[index] = (False, pts, duration)
        self.failed += 1

    def fill_gaps(self, pixels: np.ndarray) -> None:
        """Write `pixels` for each gap before the next frame."""
        while self.times and not self.times[0][0]:
            _, pts, duration = self.times.popleft()
            self.write(pixels, pts, duration)
            self.repeated += 1


def _first_frame(events: Iterator[Any]) -> tuple[Any, list[Any]]:
    """The first decoded frame, which determines the format, and all events up to it."""
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, pyav().VideoFrame):
            return event, seen
    return None, seen


def _warn(frame: Any) -> None:
    bits = max((component.bits for component in frame.format.components), default=8)
    if bits > 8:
        notice(f"{bits}-bit video was reduced to 8 bits")
    if frame.interlaced_frame:
        notice("the video is interlaced; deinterlace it first, or the result shows combing artifacts")


def _convert(
    reader: VideoReader,
    target: Path,
    part: Path,
    stream: Stream,
    upscale: int,
    codec: str | None,
    crf: int,
    progress: Progress | None,
) -> _Writer:
    av = pyav()
    suffix = target.suffix.lower()
    events = reader.events()
    first, seen = _first_frame(events)
    if first is None:
        raise InputError(f"{reader.source}: no frame can be decoded")
    _warn(first)
    with (
        open(part, "xb") as file,
        av.open(PlainFile(file), "w", format=_CONTAINERS[suffix]) as output,
        Background(_ENCODER_QUEUE) as background,
    ):
        writer = _Writer(output, background, reader, first, upscale, suffix, codec, crf)
        writer.progress = progress
        results = stream(writer.frames(itertools.chain(seen, events)))
        try:
            _write_all(writer, results)
        finally:
            if isinstance(results, Generator):
                results.close()
        writer.finish()
    return writer


def _write_all(writer: _Writer, results: Iterator[Any]) -> None:
    """Write all results, and repeated frames for gaps and for frames that are not finite in any dtype."""
    pixels: np.ndarray | None = None
    error: NonFiniteOutput | None = None
    for result in results:
        if isinstance(result, NonFiniteOutput):
            error = result
            writer.mark_failed()
            continue
        if isinstance(result, Exception):
            raise result
        # Gaps before the first good frame repeat that one; later gaps repeat the previous frame.
        writer.fill_gaps(result if pixels is None else pixels)
        pixels = result
        _, pts, duration = writer.times.popleft()
        writer.write(result, pts, duration)
    if pixels is not None:
        writer.fill_gaps(pixels)
    elif error is not None:
        raise error


def _check_frame_count(part: Path, reader: VideoReader, writer: _Writer) -> None:
    """Raise TinySRError unless the finished file holds one frame per frame of the input."""
    with opened(part) as check:
        stored = sum(1 for packet in check.demux(check.streams.video[0]) if packet.size)
    expected = reader.decoded + reader.missing
    if not expected == writer.written == stored:
        raise TinySRError(
            f"{reader.source}: expected {expected} frames, found {writer.written} encoded and {stored} stored"
        )


def upscale_video(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    stream: Stream,
    upscale: int,
    *,
    strict: bool = False,
    crf: int = 18,
    codec: str | None = None,
    strip: bool = False,
    progress: Progress | None = None,
) -> VideoReport:
    """Upscale a video file and return what was written.

    stream: maps an iterator of frames uint8 [H,W,3] to one of frames [s*H,s*W,3] in order. For a NonFiniteOutput in
    place of a frame the previous frame is repeated; any other error is raised. upscale: the factor s. target: .mp4,
    .m4v, .mov, .mkv or .webm. strict: raise InputError for a corrupt frame instead of repeating the previous one. crf:
    quality, 0 (best) to 51. codec: name of the encoder; None chooses by container. strip: drop metadata. progress: see
    Progress. Raises InputError if the source cannot be read or the target's format cannot be written, TinySRError if
    frames are missing from the result.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() not in _CONTAINERS:
        raise InputError(f"cannot write {target.suffix or target.name} as video; choose one of {' '.join(_CONTAINERS)}")
    with opened(source) as container:
        reader = video_reader(container, source, strict)
        return _upscale(reader, Path(os.path.realpath(target)), stream, upscale, codec, crf, progress)


def _upscale(
    reader: VideoReader,
    target: Path,
    stream: Stream,
    upscale: int,
    codec: str | None,
    crf: int,
    progress: Progress | None,
) -> VideoReport:
    part = temporary_path(target)
    try:
        writer = _convert(reader, target, part, stream, upscale, codec, crf, progress)
        _check_frame_count(part, reader, writer)
        os.replace(part, target)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, pyav().error.FFmpegError):
            raise TinySRError(f"{reader.source}: the video cannot be written: {error}") from error
        raise
    if writer.repeated > writer.failed:
        notice(f"{writer.repeated - writer.failed} corrupt frames were replaced by the previous frame")
    if writer.failed:
        notice(f"{writer.failed} frames were not finite in any dtype and were replaced by the previous frame")
    audio = sum(1 for stream_ in writer.copies.values() if stream_.type == "audio")
    return VideoReport(writer.written, writer.repeated, writer.input_size, writer.size, audio)
