"""The reading side of a video: packets to copy, frames in display order, and the gaps where a frame is corrupt.

Needs PyAV (the extra `video`), which is imported on first use only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.notices import notice

# ITU-T H.273 matrix coefficients -> the matrices swscale has; players take what is not tagged for one of the first
# two, by the size of the picture.
_BT709, _BT601 = 1, 5
_MATRIX = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_SD_HEIGHT = 576
# swscale's flags by number, which PyAV names since version 17.1 only: bicubic, full chroma on either side, accurate.
_SCALING = 0x4 | 0x2000 | 0x4000 | 0x40000


def pyav() -> Any:
    """The module av. Raises InputError with the remedy where it is missing."""
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise InputError('video needs PyAV: pip install "tinysr-kernels[video]"') from error
    return av


@dataclass(frozen=True)
class Missing:
    """A frame that could not be decoded, and when it should have been shown (in the stream's time base)."""

    pts: int


@dataclass(frozen=True)
class Look:
    """How the samples of a film are meant, in H.273 numbers (2: not given); turn: degrees, counterclockwise.

    matrix: of the conversion, as swscale numbers it; tag: what the file says, or shall say where it said nothing.
    """

    matrix: int
    tag: int
    primaries: int
    transfer: int
    full_range: bool
    turn: int
    rgb: bool


def look_of(frame: Any, context: Any) -> Look:
    """Read a frame's colour tags; an untagged matrix is settled by the size, as players do."""
    rgb = bool(frame.format.is_rgb)
    tagged = int(frame.colorspace)
    fallback = _BT709 if rgb or frame.height > _SD_HEIGHT or frame.width > 1280 else _BT601
    return Look(
        matrix=fallback if rgb else _MATRIX.get(tagged, fallback),
        tag=tagged if tagged in _MATRIX and not rgb else fallback,
        primaries=int(context.color_primaries),
        transfer=int(context.color_trc),
        full_range=int(frame.color_range) == 2,
        turn=round(frame.rotation / 90) % 4 * 90,
        rgb=rgb,
    )


@dataclass
class Film:
    """An opened input: its one video stream, the streams to copy, and what was met on the way."""

    container: Any
    video: Any
    copied: list[Any]
    source: Path
    strict: bool
    decoded: int = 0
    missing: int = 0
    broken_off: bool = False
    # Times of packets whose frames are still to come (a heap), of packets that raised an error, and how many errors
    # have not been matched with a lost frame yet. An error may cost the frame that was next to be shown, which
    # is another than the spoiled one; the spoiled one may still come, half decoded.
    _due: list[int] = field(default_factory=list)
    _spoiled: set[int] = field(default_factory=set)
    _losses: int = 0
    _last: int | None = None

    @property
    def step(self) -> int:
        """The usual distance of two frames in units of the time base, at least 1."""
        rate = self.video.average_rate or self.video.guessed_rate or Fraction(25)
        return max(1, round(1 / (rate * self.video.time_base)))

    def _time(self, pts: int | None) -> int:
        """A timestamp that rises strictly; broken files repeat or lack some."""
        if pts is None:
            pts = 0 if self._last is None else self._last + self.step
        if self._last is not None and pts <= self._last:
            notice("timestamps that did not rise were repaired")
            pts = self._last + 1
        self._last = pts
        return pts

    def _gap(self, pts: int | None) -> Missing:
        self.missing += 1
        pts = self._time(pts)
        if self.strict:
            seconds = float(pts * self.video.time_base)
            raise InputError(f"{self.source}: corrupt frame at {seconds:.3f} s; without --strict it is repeated")
        return Missing(pts)

    def _lost_before(self, pts: int | None) -> Iterator[Missing]:
        """The gaps before a time (None: before the end). Without an error a packet may rightly give no frame."""
        while self._due and (pts is None or self._due[0] < pts):
            due = heapq.heappop(self._due)
            if self._losses:
                self._losses -= 1
                yield self._gap(due)

    def _in_order(self, frames: list[Any]) -> Iterator[Any]:
        """Decoded frames in the order of the screen, each after the gaps that precede it."""
        for frame in frames:
            pts = frame.pts
            if pts is not None:
                yield from self._lost_before(pts)
                if self._due and self._due[0] == pts:
                    heapq.heappop(self._due)
            if frame.is_corrupt or pts in self._spoiled:
                yield self._gap(pts)
                continue
            frame.pts = self._time(pts)
            self.decoded += 1
            yield frame

    def _decode(self, packet: Any) -> Iterator[Any]:
        """packet: of the video, or None at the end."""
        pts = None
        if packet is not None and not packet.is_discard:
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is not None:
                heapq.heappush(self._due, pts)
        try:
            frames = self.video.codec_context.decode(packet)
        except pyav().error.FFmpegError:
            self._losses += 1
            if pts is not None:
                self._spoiled.add(pts)
            return
        yield from self._in_order(frames)

    def events(self) -> Iterator[Any]:
        """Packets of the copied streams, decoded frames and Missing, as they come; times rise for the last two.

        Raises InputError, when strict, at the first corrupt frame or where the file breaks off.
        """
        av = pyav()
        packets = self.container.demux([self.video, *self.copied])
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.error.FFmpegError as error:
                if self.strict:
                    raise InputError(f"{self.source}: the file breaks off: {error}") from error
                notice(f"the file breaks off; what came before was kept ({error})")
                self.broken_off = True
                break
            if packet.stream.index != self.video.index:
                if packet.dts is not None or packet.pts is not None:  # else it only says that the stream ends
                    yield packet
            elif packet.size:
                yield from self._decode(packet)
        yield from self._decode(None)
        yield from self._lost_before(None)


def open_film(source: Path, strict: bool) -> Film:
    """Open a video by content. Raises InputError for anything that is none."""
    av = pyav()
    try:
        container = av.open(str(source))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{source}: not a video that can be read: {error}") from error
    films = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not films:
        container.close()
        raise InputError(f"{source}: there is no video in this file")
    video = max(films, key=lambda stream: stream.codec_context.width * stream.codec_context.height)
    copied = []
    for stream in container.streams:
        if stream.type in ("audio", "subtitle"):
            copied.append(stream)
        elif stream.index != video.index:
            notice(f"a stream of kind {stream.type} beside the picture was left out")
    # Errors in the data are to be seen, not painted over; and at the packet that has them, so no frame threads.
    video.codec_context.options = {"err_detect": "explode"}
    video.codec_context.thread_type = "SLICE"
    return Film(container, video, copied, source, strict)


def _is_cover(stream: Any) -> bool:
    disposition = getattr(stream, "disposition", 0)
    return "attached_pic" in str(disposition).lower()


class Converter:
    """Frames to RGB and back with one matrix and range, so that a film keeps the meaning of its samples."""

    def __init__(self, look: Look) -> None:
        av = pyav()
        self.look = look
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._range = 2 if look.full_range else 1
        # The matrix on the RGB side has no meaning; but before PyAV 17 the two count only where they differ.
        self._other = _BT601 if look.matrix != _BT601 else _BT709

    def to_rgb(self, frame: Any) -> np.ndarray:
        """A decoded frame -> uint8 [H,W,3], turned upright."""
        if self.look.rgb:
            rgb = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        else:
            rgb = self._reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=self.look.matrix,
                dst_colorspace=self._other,
                src_color_range=self._range,
                dst_color_range=2,
                interpolation=_SCALING,
            ).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, self.look.turn // 90))

    def to_yuv(self, pixels: np.ndarray, pixel_format: str) -> Any:
        """uint8 [H,W,3] -> a frame of the pixel format."""
        frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.colorspace = self.look.matrix  # PyAV 17 does not know BT.2020 by argument, but copies it from here
        return self._reformatter.reformat(
            frame,
            format=pixel_format,
            src_colorspace=self._other,
            dst_colorspace=self.look.matrix,
            src_color_range=2,
            dst_color_range=self._range,
            interpolation=_SCALING,
        )
