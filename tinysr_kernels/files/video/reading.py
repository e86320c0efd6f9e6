"""Read a video: packets of streams to copy, decoded frames in display order, and gaps for corrupt frames.

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
from tinysr_kernels.files.video.opening import main_video, pyav
from tinysr_kernels.runtime.notices import notice

# ITU-T H.273 matrix coefficients -> swscale's matrices. Players assume one of the first two for untagged videos,
# depending on the frame size.
_BT709, _BT601 = 1, 5
_MATRIX = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_SD_HEIGHT = 576
# swscale flags as numbers, because PyAV names them only since 17.1: BICUBIC, FULL_CHR_H_INT, FULL_CHR_H_INP,
# ACCURATE_RND.
_SCALING = 0x4 | 0x2000 | 0x4000 | 0x40000


@dataclass(frozen=True)
class MissingFrame:
    """A frame that could not be decoded. pts: when it should have been shown, in the stream's time base."""

    pts: int


@dataclass(frozen=True)
class FrameFormat:
    """Color tags and orientation of a video's frames. Tags are H.273 code points (2: unspecified).

    matrix: the conversion matrix in swscale's numbering. tag: the matrix to write to the output: the input's, or the
    assumed one if the input has none. rotation: degrees counterclockwise, a multiple of 90. rgb: stored as RGB.
    """

    matrix: int
    tag: int
    primaries: int
    transfer: int
    full_range: bool
    rotation: int
    rgb: bool


def frame_format(frame: Any, context: Any) -> FrameFormat:
    """Read a frame's color tags and rotation. An untagged matrix is chosen by frame size, as players do."""
    rgb = bool(frame.format.is_rgb)
    tagged = int(frame.colorspace)
    fallback = _BT709 if rgb or frame.height > _SD_HEIGHT or frame.width > 1280 else _BT601
    return FrameFormat(
        matrix=fallback if rgb else _MATRIX.get(tagged, fallback),
        tag=tagged if tagged in _MATRIX and not rgb else fallback,
        primaries=int(context.color_primaries),
        transfer=int(context.color_trc),
        full_range=int(frame.color_range) == 2,
        rotation=round(frame.rotation / 90) % 4 * 90,
        rgb=rgb,
    )


@dataclass
class VideoReader:
    """An opened input: its video stream, the streams to copy, and counts of decoded and missing frames."""

    container: Any
    video: Any
    copied: list[Any]
    source: Path
    strict: bool
    decoded: int = 0
    missing: int = 0
    # _expected: a heap of the pts of packets whose frames have not been returned yet. _corrupt: pts of packets that
    # raised an error. _losses: errors not yet matched with a missing frame. An error may make the decoder drop the next
    # frame to be shown instead of the corrupt one, which may still be returned, partially decoded.
    _expected: list[int] = field(default_factory=list)
    _corrupt: set[int] = field(default_factory=set)
    _losses: int = 0
    _last: int | None = None

    @property
    def frame_rate(self) -> Fraction:
        """Nominal frames per second; 25 if the file does not state it."""
        return self.video.average_rate or self.video.guessed_rate or Fraction(25)

    @property
    def frame_interval(self) -> int:
        """The nominal interval between frames in units of the time base, at least 1."""
        return max(1, round(1 / (self.frame_rate * self.video.time_base)))

    def _monotonic(self, pts: int | None) -> int:
        """A strictly increasing timestamp; faulty files repeat or omit some."""
        if pts is None:
            pts = 0 if self._last is None else self._last + self.frame_interval
        if self._last is not None and pts <= self._last:
            notice("timestamps that were not increasing were repaired")
            pts = self._last + 1
        self._last = pts
        return pts

    def _gap(self, pts: int | None) -> MissingFrame:
        self.missing += 1
        pts = self._monotonic(pts)
        if self.strict:
            seconds = float(pts * self.video.time_base)
            raise InputError(f"{self.source}: corrupt frame at {seconds:.3f} s; without --strict it is replaced")
        return MissingFrame(pts)

    def _gaps_before(self, pts: int | None) -> Iterator[MissingFrame]:
        """The gaps before a pts (None: the end). A packet without a frame is a gap only if an error was raised."""
        while self._expected and (pts is None or self._expected[0] < pts):
            expected = heapq.heappop(self._expected)
            if self._losses:
                self._losses -= 1
                yield self._gap(expected)

    def _with_gaps(self, frames: list[Any]) -> Iterator[Any]:
        """Decoded frames in display order, each after the gaps that precede it."""
        for frame in frames:
            pts = frame.pts
            if pts is not None:
                yield from self._gaps_before(pts)
                if self._expected and self._expected[0] == pts:
                    heapq.heappop(self._expected)
            if frame.is_corrupt or pts in self._corrupt:
                yield self._gap(pts)
                continue
            frame.pts = self._monotonic(pts)
            self.decoded += 1
            yield frame

    def _decode(self, packet: Any) -> Iterator[Any]:
        """Decode a packet of the video stream; None flushes the decoder."""
        pts = None
        if packet is not None and not packet.is_discard:
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is not None:
                heapq.heappush(self._expected, pts)
        try:
            frames = self.video.codec_context.decode(packet)
        except pyav().error.FFmpegError:
            self._losses += 1
            if pts is not None:
                self._corrupt.add(pts)
            return
        yield from self._with_gaps(frames)

    def events(self) -> Iterator[Any]:
        """Yield packets of the copied streams, decoded frames and MissingFrame objects in file order.

        Timestamps of frames and MissingFrame objects are strictly increasing. With `strict`, raises InputError at the
        first corrupt frame or if the file is truncated.
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
                    raise InputError(f"{self.source}: the file is truncated: {error}") from error
                notice(f"the file is truncated; the part before was kept ({error})")
                break
            if packet.stream.index != self.video.index:
                if packet.dts is not None or packet.pts is not None:  # else it is a flush packet
                    yield packet
            elif packet.size:
                yield from self._decode(packet)
        yield from self._decode(None)
        yield from self._gaps_before(None)


def video_reader(container: Any, source: Path, strict: bool) -> VideoReader:
    """Choose the streams of an opened film. Raises InputError for a file without a film."""
    video = main_video(container)
    if video is None:
        raise InputError(f"{source}: the file has no video stream")
    copied = []
    for stream in container.streams:
        if stream.type in ("audio", "subtitle"):
            copied.append(stream)
        elif stream.index != video.index:
            notice(f"an additional {stream.type} stream was dropped")
    # Report corrupt data instead of concealing it, and at the packet that contains it: frame threading would delay it.
    video.codec_context.options = {"err_detect": "explode"}
    video.codec_context.thread_type = "SLICE"
    return VideoReader(container, video, copied, source, strict)


class Converter:
    """Convert frames to RGB and back with the same matrix and range, so that sample values keep their meaning."""

    def __init__(self, frame_format: FrameFormat) -> None:
        av = pyav()
        self.format = frame_format
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._range = 2 if frame_format.full_range else 1
        # The matrix of the RGB side is ignored, but PyAV before 17 applies the two only if they differ.
        self._other = _BT601 if frame_format.matrix != _BT601 else _BT709

    def to_rgb(self, frame: Any) -> np.ndarray:
        """A decoded frame -> uint8 [H,W,3], upright."""
        if self.format.rgb:
            rgb = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        else:
            rgb = self._reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=self.format.matrix,
                dst_colorspace=self._other,
                src_color_range=self._range,
                dst_color_range=2,
                interpolation=_SCALING,
            ).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, self.format.rotation // 90))

    def to_yuv(self, pixels: np.ndarray, pixel_format: str) -> Any:
        """uint8 [H,W,3] -> a frame in the pixel format, such as "yuv420p"."""
        frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.colorspace = self.format.matrix  # PyAV 17 rejects BT.2020 as an argument, but copies it from here
        return self._reformatter.reformat(
            frame,
            format=pixel_format,
            src_colorspace=self._other,
            dst_colorspace=self.format.matrix,
            src_color_range=2,
            dst_color_range=self._range,
            interpolation=_SCALING,
        )
