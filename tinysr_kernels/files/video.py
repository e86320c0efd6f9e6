"""Videos: frames enlarged one by one, their timestamps, all audio and subtitles kept, written whole or not at all.

The picture is encoded anew (H.264 through libx264 where present, else MPEG-4; VP9 in WebM); audio and subtitles are
copied as they are. A corrupt frame is replaced by the one before it and counted. Rotation is applied to the
pixels; matrix, range, primaries, transfer curve and the shape of pixels are kept.

Frames are read while others are enlarged, and encoded in a thread of their own, which alone writes the output.
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
from tinysr_kernels.files.picture_io import temporary_beside
from tinysr_kernels.files.video_in import Converter, Film, Missing, look_of, open_film, pyav
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.streaming import Background

Stream = Callable[[Iterable[np.ndarray]], Iterator[Any]]
"""Frames to enlarged frames, in order; an error may stand in place of a frame."""

_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
_MPEG4_TICKS = 65535  # the finest time base MPEG-4 can state
_WAITING = 2  # enlarged frames that wait for the encoder


@dataclass(frozen=True)
class VideoReport:
    """What was written. frames: all of them; repeated: those that stand for a corrupt or failed one; sizes (w, h)."""

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
    """The output container: one encoded video stream, the copied streams, the order of frames and repeats.

    What goes into the container goes through `later`, in order.
    """

    def __init__(
        self,
        output: Any,
        later: Background,
        film: Film,
        frame: Any,
        upscale: int,
        suffix: str,
        codec: str | None,
        crf: int,
    ):
        self.film = film
        self.output = output
        self.later = later
        self.look = look_of(frame, film.video.codec_context)
        # One for each thread: a converter serves one frame at a time.
        self.reading, self.writing = Converter(self.look), Converter(self.look)
        width, height = frame.width, frame.height
        self.input_size = (height, width) if self.look.turn % 180 else (width, height)
        self.size = (self.input_size[0] * upscale, self.input_size[1] * upscale)
        name, options = _codec(suffix, codec, crf)
        rate = film.video.average_rate or film.video.guessed_rate or Fraction(25)
        self.stream = output.add_stream(name, rate=rate, options=options)
        self._configure(name, rate)
        self.copies: dict[int, Any] = {}
        for source in film.copied:
            self._copy(source)
        output.metadata.update(film.container.metadata)
        if hasattr(output, "set_chapters") and hasattr(film.container, "chapters"):
            output.set_chapters(film.container.chapters())
        # What has gone into the network and what is to be repeated, in order: (whether a frame, time, duration).
        self.times: deque[tuple[bool, int, int]] = deque()
        self.written = 0
        self.repeated = 0
        self.lost = 0

    def _configure(self, name: str, rate: Fraction) -> None:
        context, source = self.stream.codec_context, self.film.video.codec_context
        self.stream.width, self.stream.height = self.size
        context.pix_fmt = "yuv420p" if self.size[0] % 2 == 0 and self.size[1] % 2 == 0 else "yuv444p"
        self.time_base = Fraction(self.film.video.time_base)
        if name == "mpeg4":
            self.time_base = max(self.time_base, Fraction(1, _MPEG4_TICKS)).limit_denominator(_MPEG4_TICKS)
            context.bit_rate = min(int(self.size[0] * self.size[1] * rate / 4), 400_000_000)
        context.time_base = self.time_base
        ratio = source.sample_aspect_ratio
        if ratio:
            context.sample_aspect_ratio = 1 / ratio if self.look.turn % 180 else ratio
        context.colorspace = self.look.tag
        context.color_range = 2 if self.look.full_range else 1
        context.color_primaries, context.color_trc = self.look.primaries, self.look.transfer

    def _copy(self, source: Any) -> None:
        av = pyav()
        codec = getattr(source.codec_context, "codec", None)
        name = getattr(codec, "canonical_name", None) or source.codec_context.name
        try:
            if name not in self.output.supported_codecs:
                raise ValueError(f"{self.output.format.name} holds no {name}")
            target = self.output.add_stream_from_template(source)
        except (ValueError, av.error.FFmpegError) as error:
            if source.type == "audio":
                raise InputError(f"the audio cannot be kept: {error}; write .mkv instead") from error
            notice(f"{source.type} was left out: {error}")
            return
        target.metadata.update(source.metadata)
        self.copies[source.index] = target

    def frames(self, events: Iterable[Any]) -> Iterator[np.ndarray]:
        """uint8 [H,W,3] for the network; copies the packets that come between, notes times and gaps."""
        for event in events:
            if isinstance(event, Missing):
                self.times.append((False, event.pts, 0))
            elif isinstance(event, pyav().VideoFrame):
                self.times.append((True, event.pts, event.duration or 0))
                yield self.reading.to_rgb(event)
            elif event.stream.index in self.copies:
                event.stream = self.copies[event.stream.index]
                self.later.call(self.output.mux, event)

    def write(self, pixels: np.ndarray, pts: int, duration: int) -> None:
        """Encode one enlarged frame, in the background, at a time in the input's time base."""
        if pixels.shape != (self.size[1], self.size[0], 3):
            raise TinySRError(f"the network gave {pixels.shape} where {(self.size[1], self.size[0], 3)} was due")
        self.later.call(self._encode, pixels, pts, duration)
        self.written += 1

    def _encode(self, pixels: np.ndarray, pts: int, duration: int) -> None:
        frame = self.writing.to_yuv(pixels, self.stream.codec_context.pix_fmt)
        source = self.film.video.time_base
        frame.time_base = self.time_base
        frame.pts = pts if source == self.time_base else round(pts * source / self.time_base)
        if duration:
            frame.duration = round(duration * source / self.time_base)
        self.output.mux(self.stream.encode(frame))

    def finish(self) -> None:
        """Encode what the encoder still holds, after everything else."""
        self.later.call(lambda: self.output.mux(self.stream.encode(None)))

    def lose(self) -> None:
        """The next frame could not be enlarged: it becomes a gap."""
        index = next(i for i, (whole, _, _) in enumerate(self.times) if whole)
        _, pts, duration = self.times[index]
        self.times[index] = (False, pts, duration)
        self.lost += 1

    def gaps(self, pixels: np.ndarray) -> None:
        """Write `pixels` for every gap that comes next."""
        while self.times and not self.times[0][0]:
            _, pts, duration = self.times.popleft()
            self.write(pixels, pts, duration)
            self.repeated += 1


def _first_frame(events: Iterator[Any]) -> tuple[Any, list[Any]]:
    """Events up to the first whole frame, which says what the film looks like."""
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, pyav().VideoFrame):
            return event, seen
    return None, seen


def _warn(frame: Any) -> None:
    bits = max((component.bits for component in frame.format.components), default=8)
    if bits > 8:
        notice(f"{bits}-bit video was enlarged in 8 bits")
    if frame.interlaced_frame:
        notice("the video is interlaced; deinterlace it first, or the network sees combs")


def _convert(
    film: Film, target: Path, part: Path, stream: Stream, upscale: int, codec: str | None, crf: int
) -> _Writer:
    av = pyav()
    suffix = target.suffix.lower()
    events = film.events()
    first, seen = _first_frame(events)
    if first is None:
        raise InputError(f"{film.source}: no frame can be decoded")
    _warn(first)
    with av.open(str(part), "w", format=_CONTAINERS[suffix]) as output, Background(_WAITING) as later:
        writer = _Writer(output, later, film, first, upscale, suffix, codec, crf)
        results = stream(writer.frames(itertools.chain(seen, events)))
        try:
            _write_all(writer, results)
        finally:
            if isinstance(results, Generator):
                results.close()
        writer.finish()
    return writer


def _write_all(writer: _Writer, results: Iterator[Any]) -> None:
    """Write every result, and what comes before it, for gaps and for frames that no precision could compute."""
    pixels: np.ndarray | None = None
    error: NonFiniteOutput | None = None
    for result in results:
        if isinstance(result, NonFiniteOutput):
            error = result
            writer.lose()
            continue
        if isinstance(result, Exception):
            raise result
        # Gaps before the first whole frame take that one; later ones the frame before them.
        writer.gaps(result if pixels is None else pixels)
        pixels = result
        _, pts, duration = writer.times.popleft()
        writer.write(result, pts, duration)
    if pixels is not None:
        writer.gaps(pixels)
    elif error is not None:
        raise error


def _assert_count(part: Path, film: Film, writer: _Writer) -> None:
    """Every frame that went in must have come out; counted in the finished file itself."""
    with pyav().open(str(part)) as check:
        stored = sum(1 for packet in check.demux(check.streams.video[0]) if packet.size)
    due = film.decoded + film.missing
    if not due == writer.written == stored:
        raise TinySRError(f"{film.source}: {due} frames were due, {writer.written} encoded, {stored} stored")


def upscale_video(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    stream: Stream,
    upscale: int,
    *,
    strict: bool = False,
    crf: int = 18,
    codec: str | None = None,
) -> VideoReport:
    """Enlarge a video file.

    stream: takes an iterator of frames uint8 [H,W,3] and gives one of [s*H,s*W,3], in order, however it overlaps
    them; a NonFiniteOutput in place of a frame has the one before it repeated, any other error ends the video.
    target: .mp4, .m4v, .mov, .mkv or .webm. strict: a corrupt frame is an InputError instead of a repeat.
    crf: quality, 0 (best) to 51. codec: an encoder's name, else by container.
    Raises InputError for what cannot be read or written so, TinySRError where frames went missing.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() not in _CONTAINERS:
        raise InputError(f"cannot write {target.suffix or target.name} as video; choose one of {' '.join(_CONTAINERS)}")
    av = pyav()
    film = open_film(source, strict)
    target = Path(os.path.realpath(target))
    part = temporary_beside(target)
    try:
        writer = _convert(film, target, part, stream, upscale, codec, crf)
        _assert_count(part, film, writer)
        os.replace(part, target)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, av.error.FFmpegError):
            raise TinySRError(f"{source}: the video cannot be written: {error}") from error
        raise
    finally:
        film.container.close()
    if writer.repeated > writer.lost:
        notice(f"{writer.repeated - writer.lost} corrupt frames were repeated")
    if writer.lost:
        notice(f"{writer.lost} frames could not be enlarged in any precision; those before them were repeated")
    audio = sum(1 for stream_ in writer.copies.values() if stream_.type == "audio")
    return VideoReport(writer.written, writer.repeated, writer.input_size, writer.size, audio)
