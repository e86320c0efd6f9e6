"""Upscale films: frame by frame, with original timestamps, audio, subtitles and metadata. Outputs appear whole.

Decoding overlaps with upscaling; encoding happens in one background thread, and a second one ends each segment
(segments.py). When all segments are complete they are joined with the input's other streams (muxing.py). An interrupted
film goes on at its last complete segment, with the bytes that it would have had in one run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinysr_kernels._version import __version__
from tinysr_kernels.atomic import Check, replacing
from tinysr_kernels.errors import InputError, OutOfMemory, TinySRError
from tinysr_kernels.files.video import segments
from tinysr_kernels.files.video.color import frame_format, warn_of_color
from tinysr_kernels.files.video.encoding import CONTAINERS, Plan, make_plan, open_encoder
from tinysr_kernels.files.video.muxing import check_film, check_output, write_film
from tinysr_kernels.files.video.opening import opened, pyav
from tinysr_kernels.files.video.reading import VideoReader, video_reader
from tinysr_kernels.files.video.segments import WorkFolder
from tinysr_kernels.files.video.survey import Survey, frame_rate, survey_film
from tinysr_kernels.files.video.work import NetworkChanged, Progress, Stream, run_work
from tinysr_kernels.runtime.device.host_memory import check_size
from tinysr_kernels.runtime.notices import notice


@dataclass(frozen=True)
class VideoReport:
    """What was written. repeated: frames that replace a corrupt or failed one. Sizes are (width, height) in pixels."""

    frames: int
    repeated: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    audio_streams: int


def _first_frame(events: Iterator[Any]) -> tuple[Any, list[Any]]:
    """The first decoded frame, which determines the format, and all events up to it."""
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, pyav().VideoFrame):
            return event, seen
    return None, seen


def upscale_video(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    stream: Stream,
    upscale: int | Callable[[int, int], tuple[int, int]],
    *,
    strict: bool = False,
    crf: int = 18,
    codec: str | None = None,
    strip: bool = False,
    progress: Progress | None = None,
    overwrite: bool = True,
    follow_link: bool = True,
    check: Check | None = None,
) -> VideoReport:
    """Upscale a film and return what was written.

    stream: maps an iterator of frames uint8 [H,W,3] to one of frames [s*H,s*W,3] in order; uint16 for films of more
    than 8 bits, 4 channels for films with transparency, where the target can hold them. For a NonFiniteOutput in
    place of a frame the previous frame is repeated; any other error is raised. upscale: the factor s, or a function
    from the (width, height) of frames to that of results. target: .mp4, .m4v, .mov, .mkv or .webm. strict: raise
    InputError for a corrupt frame instead of repeating the previous one, and for a film that is cut off. crf: quality,
    0 (best) to 51. codec: name of the encoder; None chooses by container. strip: drop tags, such as the location, and
    covers. progress: is called after each frame, see Progress. overwrite, follow_link,
    check: what may be replaced, see atomic.replacing.

    Raises InputError if the source cannot be read or the target's format cannot be written, OutOfMemory if a frame does
    not fit, TinySRError if frames are missing from the result, OSError. After an interruption or one of the last two,
    complete segments stay in a hidden folder beside the target, and the same call goes on from there.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() not in CONTAINERS:
        raise InputError(f"cannot write {target.suffix or target.name} as video; choose one of {' '.join(CONTAINERS)}")
    survey = survey_film(source)
    if survey.cut_off is not None:
        if strict:
            raise InputError(f"{source}: the film is cut off: {survey.cut_off}; without --strict what is there is kept")
        notice(f"the film is cut off: {survey.cut_off}; what is there was kept")
    target = Path(os.path.realpath(target)) if follow_link else target
    replace = partial(replacing, target, overwrite=overwrite, follow_link=follow_link, check=check)
    film = _Film(source, target, replace, upscale, strict, crf, codec, strip, survey)
    try:
        try:
            return film.upscale(stream, progress)
        except NetworkChanged:
            return film.upscale(stream, progress, restart=True)
    except pyav().error.FFmpegError as error:
        reason = f"{error.strerror}; {error.log[2] if error.log else 'a damaged time'}"
        raise TinySRError(f"{source}: {target.suffix} cannot hold the film ({reason}); try .mkv or .mp4") from error


@dataclass(frozen=True)
class _Film:
    """An input, an output, how the one written becomes it, and the settings between them."""

    source: Path
    target: Path
    replace: Callable[[], AbstractContextManager[Path]]
    factor: int | Callable[[int, int], tuple[int, int]]
    strict: bool
    crf: int
    codec: str | None
    strip: bool
    survey: Survey

    @property
    def suffix(self) -> str:
        return self.target.suffix.lower()

    def upscale(self, stream: Stream, progress: Progress | None, restart: bool = False) -> VideoReport:
        """Do the work, from the last complete segment unless `restart`."""
        with opened(self.source) as container:
            reader = video_reader(container, self.source, self.strict)
            events = reader.events()
            first, seen = _first_frame(events)
            if first is None:
                raise InputError(f"{self.source}: no frame can be decoded")
            plan = self._plan(reader, first)
            check_output(self.source, plan, self.suffix, self.strip)
            folder = segments.claim(self.target, self._identity(plan))
            if restart:
                folder.restart()
            keep = True
            try:
                work = run_work(reader, itertools.chain(seen, events), plan, folder, stream, self._report(progress))
                audio = self._join(reader, plan, folder, work.done)
                keep = False
            except (TinySRError, pyav().error.FFmpegError) as error:  # would happen again, unless memory was short
                keep = isinstance(error, OutOfMemory)
                raise
            finally:
                folder.close(keep=keep)
        corrupt = work.repeated - work.failed
        if corrupt:
            notice(f"{corrupt} corrupt frames were replaced by the previous frame")
        if work.failed:
            notice(f"{work.failed} frames were not finite in any dtype and were replaced by the previous frame")
        return VideoReport(work.done, work.repeated, plan.format.size, plan.size, audio)

    def _report(self, progress: Progress | None) -> Callable[[int], None]:
        if progress is None:
            return lambda done: None
        return lambda done: progress(done, max(self.survey.frames, done))

    def _plan(self, reader: VideoReader, first: Any) -> Plan:
        form = frame_format(first, reader.video.codec_context)
        width, height = form.size
        factor = self.factor
        size = factor(width, height) if callable(factor) else (width * factor, height * factor)
        check_size(width, height, max(1, -(-size[0] // width)), name=str(self.source))
        warn_of_color(form, first)
        if first.interlaced_frame:
            notice("the video is interlaced; deinterlace it first, or the result shows combing artifacts")
        return make_plan(
            form,
            reader.video.codec_context,
            suffix=self.suffix,
            size=size,
            time_base=reader.video.time_base,
            rate=frame_rate(reader.video),
            codec=self.codec,
            crf=self.crf,
        )

    def _identity(self, plan: Plan) -> dict[str, Any]:
        """What the segments depend on, apart from the network, whose results are compared."""
        av = pyav()
        extradata = open_encoder(plan).extradata or b""
        return {
            "source": segments.fingerprint(self.source),
            "plan": plan.as_dict(),
            "strict": self.strict,
            "extradata": extradata.hex(),
            "software": [__version__, av.__version__, str(av.library_versions)],
        }

    def _join(self, reader: VideoReader, plan: Plan, folder: WorkFolder, frames: int) -> int:
        interval = max(1, round(reader.frame_interval * reader.video.time_base / plan.time_base))
        with self.replace() as part:
            audio = write_film(part, self.source, plan, folder, self.suffix, interval, self.strip)
            check_film(part, self.source, plan, frames, self.suffix, self.strip)
        return audio
