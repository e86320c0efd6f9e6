"""Decode a film: frames in display order, and gaps for corrupt frames."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.video.opening import MAX_FRAME_PIXELS, main_video, pyav
from tinysr_kernels.files.video.survey import frame_rate
from tinysr_kernels.runtime.notices import notice


@dataclass(frozen=True)
class MissingFrame:
    """A frame that could not be decoded. pts: when it should have been shown, in the stream's time base."""

    pts: int


@dataclass
class VideoReader:
    """An opened film: its video stream, the decoder, and counts of decoded and missing frames."""

    container: Any
    video: Any
    decoder: Any
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
    _repaired: bool = False

    @property
    def frame_interval(self) -> int:
        """The nominal interval between frames in units of the time base, at least 1."""
        return max(1, round(1 / (frame_rate(self.video) * self.video.time_base)))

    def _monotonic(self, pts: int | None) -> int:
        """A strictly increasing timestamp; faulty files repeat or omit some."""
        if pts is None:
            pts = 0 if self._last is None else self._last + self.frame_interval
        if self._last is not None and pts <= self._last:
            if not self._repaired:
                notice("timestamps that were not increasing were repaired")
            self._repaired = True
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
            frames = self.decoder.decode(packet)
        except pyav().error.FFmpegError:
            self._losses += 1
            if pts is not None:
                self._corrupt.add(pts)
            return
        yield from self._with_gaps(frames)

    def events(self) -> Iterator[Any]:
        """Yield decoded frames and MissingFrame objects in display order, with strictly increasing timestamps.

        With `strict`, raises InputError at the first corrupt frame. A file that cannot be read to its end ends early:
        survey.py has said so.
        """
        packets = self.container.demux(self.video)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, pyav().error.FFmpegError):
                break
            if packet.size:
                yield from self._decode(packet)
        yield from self._decode(None)
        yield from self._gaps_before(None)


def video_reader(container: Any, source: Path, strict: bool) -> VideoReader:
    """Choose the stream and the decoder of an opened film. Raises InputError for a file without a film."""
    video = main_video(container)
    if video is None:
        raise InputError(f"{source}: the file has no video stream that can be decoded")
    decoder = _alpha_decoder(video) or video.codec_context
    # Report corrupt data instead of concealing it, and at the packet that contains it: frame threading would delay it.
    decoder.options = {"err_detect": "explode", "max_pixels": str(MAX_FRAME_PIXELS)}
    decoder.thread_type = "SLICE"
    return VideoReader(container, video, decoder, source, strict)


def _alpha_decoder(video: Any) -> Any | None:
    """The decoder of VP8 and VP9 with transparency, which FFmpeg's own decoders ignore; None for other streams."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(video.codec_context.codec.canonical_name)
    modes = {key.lower(): value for key, value in video.metadata.items()}
    if name is None or modes.get("alpha_mode") != "1":
        return None
    try:
        return pyav().CodecContext.create(name, "r")
    except ValueError:
        notice(f"the transparency was dropped: this PyAV has no decoder {name}")
        return None
