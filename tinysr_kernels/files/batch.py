"""Many files, one after another: each is done whole, skipped or failed by name, and none stops the rest.

A run can be broken off at any moment (Ctrl-C, SIGTERM, a lost machine): finished results are complete files, the
current one leaves nothing behind, and `skip_existing` goes on where it stopped.

With several workers, pictures are read and written by as many threads while the network computes for others, and
pictures of one shape that wait for it become one batch.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files.encode import Encoding, has_alpha, unfit
from tinysr_kernels.files.jobs import Job
from tinysr_kernels.files.picture_io import read_picture, upscale_picture, write_picture
from tinysr_kernels.files.video import upscale_video
from tinysr_kernels.runtime.images.arrays import DEVICE_PIXELS, Enlarge
from tinysr_kernels.runtime.micro_batch import Gatherer, Room
from tinysr_kernels.runtime.notices import collected, held, notice
from tinysr_kernels.runtime.streaming import OnError, in_order
from tinysr_kernels.runtime.tiled_inference import BATCH_PIXELS

GPU_WORKERS = 8
"""Pictures under way at once when the network runs on a GPU: reading and writing take longer than the network."""


class Model(Protocol):
    """What a run needs of a compiled model."""

    upscale: int
    device: torch.device

    @property
    def enlarge(self) -> Enlarge:
        """RGB [N,3,H,W] in [0,1] -> [N,3,s*H,s*W], same dtype and device; see images.py."""

    def stream(self, frames: Iterable[np.ndarray], *, on_error: OnError = "raise") -> Iterator[Any]:
        """Frames uint8 [H,W,3] -> enlarged frames, in order, or an error in place of one."""


@dataclass(frozen=True)
class Settings:
    """encoding: of pictures. frame: of files with several. max_pixels: None lets the free memory decide.

    skip_existing: leave results alone that are there. strict: stop at the first failure, also of a video's frame.
    crf: quality of H.264 video, 0 (lossless) to 51. workers: pictures under way at once; None takes GPU_WORKERS, at
    most one a processor, for a model on a GPU and 1 elsewhere. With strict it is 1.
    """

    encoding: Encoding = field(default_factory=Encoding)
    frame: int | None = None
    max_pixels: int | None = None
    skip_existing: bool = False
    strict: bool = False
    crf: int = 18
    workers: int | None = None


@dataclass
class Result:
    """One line of the report. status: done, skipped (exists), failed or interrupted; sizes are (width, height)."""

    input: str
    output: str | None = None
    status: str = "failed"
    seconds: float = 0.0
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    mode: str | None = None
    frames: int | None = None
    notices: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass
class _Means:
    """What the pictures of a run are enlarged with. room: low-resolution pixels under way, None without a limit."""

    model: Model
    settings: Settings
    enlarge: Enlarge
    room: Room | None = None

    def place(self, pixels: int) -> AbstractContextManager[None]:
        """Inside, so many pixels are under way."""
        return nullcontext() if self.room is None else self.room.taken(pixels)


def _picture(job: Job, means: _Means, result: Result) -> None:
    assert job.output is not None
    assert job.reserve is not None
    settings, scale = means.settings, means.model.upscale
    picture = read_picture(job.source, frame=settings.frame, max_pixels=settings.max_pixels, upscale=scale)
    result.input_size, result.mode = picture.size, picture.mode
    size = (picture.size[0] * scale, picture.size[1] * scale)
    with means.place(picture.size[0] * picture.size[1]):
        image, metadata = upscale_picture(picture, means.enlarge, scale, device=means.model.device)
        output = job.output
        reason = unfit(output.suffix, size, has_alpha(image))
        if reason and job.reserve != output:
            notice(f"{reason}: written as {job.reserve.name}")
            output = job.reserve
        output.parent.mkdir(parents=True, exist_ok=True)
        write_picture(output, image, metadata, settings.encoding)
    result.output, result.output_size = str(output), size


def _video(job: Job, model: Model, settings: Settings, result: Result) -> None:
    assert job.output is not None
    job.output.parent.mkdir(parents=True, exist_ok=True)
    stream = partial(model.stream, on_error="raise" if settings.strict else "yield")
    report = upscale_video(job.source, job.output, stream, model.upscale, strict=settings.strict, crf=settings.crf)
    result.input_size, result.output_size = report.input_size, report.output_size
    result.mode, result.frames, result.output = "video", report.frames, str(job.output)


def _exists(job: Job) -> Path | None:
    return next((path for path in (job.output, job.reserve) if path is not None and path.exists()), None)


def pending(job: Job, settings: Settings) -> bool:
    """Whether a job needs the model: it has no problem known beforehand, and no result to be left alone."""
    return not job.problem and not (settings.skip_existing and _exists(job))


def _run_one(job: Job, means: _Means | None, settings: Settings, result: Result) -> None:
    """Do one job and fill the result in; only interruptions come through."""
    try:
        if job.problem:
            raise InputError(f"{job.source}: {job.problem}")
        existing = _exists(job) if settings.skip_existing else None
        if existing is not None:
            result.status, result.output = "skipped", str(existing)
            return
        assert means is not None
        if job.video:
            _video(job, means.model, settings, result)
        else:
            _picture(job, means, result)
        result.status = "done"
    except (TinySRError, OSError) as error:
        message = str(error)
        if not message.startswith(str(job.source)):
            message = f"{job.source}: {message}"
        result.error = {"type": type(error).__name__, "message": message}
    except Exception as error:  # noqa: BLE001  one file must not stop the others, whatever is wrong with it
        message = f"{job.source}: unexpected {type(error).__name__}: {error}"
        result.error = {"type": type(error).__name__, "message": message}


def _result(job: Job) -> Result:
    return Result(str(job.source), str(job.output) if job.output else None)


def _timed(
    job: Job, means: _Means | None, settings: Settings, notices: AbstractContextManager[list[str]], result: Result
) -> Result:
    """One job with its notices and seconds, written into the result, which is returned."""
    started = time.perf_counter()
    with notices as messages:
        try:
            _run_one(job, means, settings, result)
        except BaseException:
            result.status = "interrupted"
            raise
        finally:
            result.seconds = round(time.perf_counter() - started, 3)
            result.notices = list(messages)
            if result.status in ("failed", "interrupted"):
                result.output = None
    return result


def _one_by_one(jobs: Iterable[Job], means: _Means | None, settings: Settings) -> Iterator[Result]:
    for job in jobs:
        result = _result(job)
        try:
            _timed(job, means, settings, collected(), result)
        except BaseException:
            yield result
            raise
        yield result


def _side_by_side(jobs: Sequence[Job], model: Model, settings: Settings, workers: int) -> Iterator[Result]:
    """Pictures by several threads, results in the order of the jobs."""
    gatherer = Gatherer(model.enlarge, BATCH_PIXELS)
    means = _Means(model, settings, gatherer, Room(DEVICE_PIXELS))

    def work(job: Job) -> Result:
        return _timed(job, means, settings, held(), _result(job))

    finished = 0
    try:
        with closing(in_order(work, jobs, workers=workers, ahead=2 * workers, stop=gatherer.stop)) as results:
            for result in results:
                assert isinstance(result, Result)
                finished += 1
                with collected():  # whoever follows the log gets them; the result has them already
                    for message in result.notices:
                        notice(message)
                yield result
    except (KeyboardInterrupt, SystemExit):
        if finished < len(jobs):
            broken = _result(jobs[finished])
            broken.status, broken.output = "interrupted", None
            yield broken
        raise


def _workers(model: Model | None, settings: Settings) -> int:
    if settings.strict or model is None:
        return 1
    if settings.workers is not None:
        return settings.workers
    return min(GPU_WORKERS, os.cpu_count() or 1) if model.device.type == "cuda" else 1


def _results(jobs: Sequence[Job], model: Model | None, settings: Settings) -> Generator[Result, None, None]:
    workers = _workers(model, settings)
    means = None if model is None else _Means(model, settings, model.enlarge)
    # Videos run alone: they fill the device by themselves.
    for video, group in itertools.groupby(jobs, key=lambda job: job.video):
        if video or workers == 1 or model is None:
            yield from _one_by_one(group, means, settings)
        else:
            yield from _side_by_side(list(group), model, settings, workers)


def run(
    jobs: Sequence[Job],
    model: Model | None,
    settings: Settings | None = None,
    *,
    report: TextIO | None = None,
    on_result: Callable[[Result], Any] | None = None,
) -> list[Result]:
    """Enlarge every job; results are given in the order of the jobs.

    model: may be None where no job is `pending`.
    report: a text stream that gets one line of JSON for each job as soon as it ends. on_result: called likewise.
    Returns the results; with `strict` they end with the first failure. KeyboardInterrupt and SystemExit come through
    after the current file is discarded and reported as interrupted.
    """
    settings = settings or Settings()
    results: list[Result] = []
    with closing(_results(jobs, model, settings)) as source:
        for result in source:
            results.append(result)
            if report is not None:
                report.write(result.as_json() + "\n")
                report.flush()
            if on_result is not None and result.status != "interrupted":
                on_result(result)
            if settings.strict and result.status == "failed":
                break
    return results
