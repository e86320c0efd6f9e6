"""Frames of a film on their way: decoded, through the network, encoded in segments.

One thread decodes and calls the network, one encodes, and one ends segments, so that the encoder's look-ahead, which is
flushed at the end of each, stops nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinysr_kernels.errors import NonFiniteOutput, TinySRError
from tinysr_kernels.files.video import segments
from tinysr_kernels.files.video.color import Converter
from tinysr_kernels.files.video.encoding import Plan, open_encoder
from tinysr_kernels.files.video.reading import MissingFrame, VideoReader
from tinysr_kernels.files.video.segments import PacketHead, Record, WorkFolder, write_packet
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.streaming import Background

Stream = Callable[[Iterable[np.ndarray]], Iterator[Any]]
"""Frames to upscaled frames in order; an exception may take the place of a frame."""

Progress = Callable[[int, int | None], None]
"""Is called with the number of frames done and that of all frames; None if it is unknown."""

_ENCODER_QUEUE = 2  # upscaled frames that wait for the encoder


class NetworkChanged(Exception):
    """The network's result for a frame differs from that of the interrupted run."""


class _SegmentEncoder:
    """Encodes one segment into its file. All calls come from one thread at a time."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan = plan
        self.context = open_encoder(plan)
        self.file = open(path, "wb")  # noqa: SIM115  closed by finish or discard
        self.last: int | None = None
        self.durations: dict[int, int] = {}

    def encode(self, converter: Converter, pixels: np.ndarray, pts: int, duration: int) -> None:
        """Encode uint8 or uint16 [H,W,C] shown at pts for duration (0: unknown), in the encoder's time base."""
        frame = converter.to_yuv(pixels, self.plan.pixel_format)
        frame.time_base = self.plan.time_base
        frame.pts = pts if self.last is None else max(pts, self.last + 1)  # a coarser time base may round two to one
        self.last = frame.pts
        self.durations[frame.pts] = duration
        self._write(self.context.encode(frame))

    def finish(self, folder: WorkFolder, record: dict[str, Any], pixels: np.ndarray) -> None:
        """Flush the encoder and declare the segment complete. pixels: of the last good frame."""
        self._write(self.context.encode(None))
        self.file.flush()
        os.fsync(self.file.fileno())
        size = self.file.tell()
        self.file.close()
        folder.commit(Record(**record, digest=segments.digest(pixels), bytes=size))

    def _write(self, packets: list[Any]) -> None:
        for packet in packets:
            data = bytes(packet)
            extra = bytes(packet.get_sidedata("matroska_block_additional"))
            duration = self.durations.pop(packet.pts, 0)
            head = PacketHead(packet.pts, duration, packet.is_keyframe, len(data), len(extra))
            write_packet(self.file, head, data, extra)


@dataclass
class Work:
    """Frames on their way: what was sent to the network, what came back, and the segment that is being encoded."""

    reader: VideoReader
    plan: Plan
    folder: WorkFolder
    encoding: Background
    finishing: Background
    progress: Callable[[int], None]
    # Frames sent to the network and gaps to fill, in order: (whether a frame, number, pts, duration).
    times: deque[tuple[bool, int, int, int]] = field(default_factory=deque)
    done: int = 0
    repeated: int = 0
    failed: int = 0
    anchor: int = -1
    pixels: np.ndarray | None = None
    segment: _SegmentEncoder | None = None

    def __post_init__(self) -> None:
        options = {"deep": self.plan.deep, "alpha": self.plan.alpha}
        self.decoder, self.encoder = Converter(self.plan.source, **options), Converter(self.plan.format, **options)
        self.done = self.start = self.folder.frames
        self.repeated = sum(record.repeated for record in self.folder.records)
        self.failed = sum(record.failed for record in self.folder.records)
        self.anchor = self.folder.records[-1].anchor if self.folder.records else -1
        self.counts = self.repeated, self.failed  # at the start of the segment

    def frames(self, events: Iterable[Any]) -> Iterator[np.ndarray]:
        """Yield frames uint8 or uint16 [H,W,3|4] for the network; record timestamps and gaps.

        Of frames in complete segments, only the last good one is yielded, to know the network again.
        """
        known = self.anchor
        for number, event in enumerate(events):
            if number == known:
                yield self.decoder.to_rgb(event)
            if number < self.start:
                continue
            if isinstance(event, MissingFrame):
                self.times.append((False, number, event.pts, 0))
            else:
                self.times.append((True, number, event.pts, event.duration or 0))
                yield self.decoder.to_rgb(event)

    def write_all(self, results: Iterator[Any]) -> None:
        """Write all results, and repeated frames for gaps and for frames that are not finite in any dtype."""
        error: NonFiniteOutput | None = None
        if self.start:
            self.recognize(next(results, None))
        for result in results:
            if isinstance(result, NonFiniteOutput):
                error = result
                self.mark_failed()
                continue
            if isinstance(result, Exception):
                raise result
            if self.pixels is None:  # gaps before the first good frame repeat that one, later ones the frame before
                self.pixels, self.anchor = result, next(number for good, number, *_ in self.times if good)
            self.fill_gaps(self.pixels)
            _, self.anchor, pts, duration = self.times.popleft()
            self.pixels = result
            self.write(result, pts, duration)
        if self.pixels is not None:
            self.fill_gaps(self.pixels)
        elif error is not None:
            raise error
        self.end_segment()

    def recognize(self, result: Any) -> None:
        """Compare the network's result with that of the interrupted run."""
        if not isinstance(result, np.ndarray):
            raise NetworkChanged
        self.pixels = np.ascontiguousarray(result)
        if segments.digest(self.pixels) != self.folder.records[-1].digest:
            raise NetworkChanged
        notice(f"{self.start} frames were there from an interrupted run")

    def mark_failed(self) -> None:
        """Turn the next frame, which could not be upscaled, into a gap."""
        index = next(i for i, (is_frame, *_) in enumerate(self.times) if is_frame)
        self.times[index] = (False, *self.times[index][1:])
        self.failed += 1

    def fill_gaps(self, pixels: np.ndarray) -> None:
        """Write `pixels` for each gap before the next frame."""
        while self.times and not self.times[0][0]:
            _, _, pts, duration = self.times.popleft()
            self.repeated += 1
            self.write(pixels, pts, duration)

    def write(self, pixels: np.ndarray, pts: int, duration: int) -> None:
        """Encode an upscaled frame in the background. pts, duration: in the input's time base."""
        width, height = self.plan.size
        shape, dtype = (height, width, 4 if self.plan.alpha else 3), np.dtype("uint16" if self.plan.deep else "uint8")
        if pixels.shape != shape or pixels.dtype != dtype:
            raise TinySRError(
                f"expected a frame of shape {shape} and {dtype} from the network, found {pixels.shape}, {pixels.dtype}"
            )
        if self.segment is None:
            self.segment = _SegmentEncoder(self.plan, self.folder.file(self.done // segments.FRAMES))
        ticks = self.reader.video.time_base / self.plan.time_base
        self.encoding.call(self.segment.encode, self.encoder, pixels, round(pts * ticks), round(duration * ticks))
        self.done += 1
        self.progress(self.done)
        if self.done % segments.FRAMES == 0:
            self.end_segment()

    def end_segment(self) -> None:
        """Hand the segment to the thread that ends it; the next one begins at once."""
        if self.segment is None:
            return
        record = {
            "frames": (self.done - 1) % segments.FRAMES + 1,
            "repeated": self.repeated - self.counts[0],
            "failed": self.failed - self.counts[1],
            "anchor": self.anchor,
        }
        finish = self.segment.finish
        self.encoding.call(self.finishing.call, finish, self.folder, record, np.ascontiguousarray(self.pixels))
        self.segment, self.counts = None, (self.repeated, self.failed)


def run_work(
    reader: VideoReader,
    events: Iterable[Any],
    plan: Plan,
    folder: WorkFolder,
    stream: Stream,
    progress: Callable[[int], None],
) -> Work:
    """Upscale and encode all frames that are not in the folder yet; afterwards it holds all segments.

    Raises NetworkChanged if the folder's segments are of another network, TinySRError if frames are missing.
    """
    with Background(1) as finishing, Background(_ENCODER_QUEUE) as encoding:
        work = Work(reader, plan, folder, encoding, finishing, progress)
        results = iter(stream(work.frames(events)))
        try:
            work.write_all(results)
        finally:
            if isinstance(results, Generator):
                results.close()
    expected = reader.decoded + reader.missing
    if work.done != expected:
        raise TinySRError(f"{reader.source}: expected {expected} frames, found {work.done}")
    return work
