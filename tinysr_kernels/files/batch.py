"""Process many files: each one is done, skipped or failed, and a failure never stops the others.

A run may be interrupted at any time (Ctrl-C, SIGTERM, power loss): finished results are complete files, the current one
leaves no partial file, and `skip_existing` resumes the run.

With several workers, threads read and write images while the network runs on others, and images of equal shape that
wait for the network are batched.
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
from tinysr_kernels.files.encode import Encoding, has_alpha, unsupported_reason
from tinysr_kernels.files.jobs import Job
from tinysr_kernels.files.picture_io import read_image, upscale_image_file, write_image
from tinysr_kernels.files.video import upscale_video
from tinysr_kernels.runtime.images.arrays import DEVICE_PIXELS, Enlarge
from tinysr_kernels.runtime.images.scaling import NATIVE, Target
from tinysr_kernels.runtime.limits import BATCH_PIXELS
from tinysr_kernels.runtime.micro_batch import Budget, MicroBatcher
from tinysr_kernels.runtime.notices import collect_notices, defer_notices, notice
from tinysr_kernels.runtime.streaming import OnError, in_order

GPU_WORKERS = 8
"""Images in flight when the network runs on a GPU: reading and writing take longer than the network."""


OnProgress = Callable[[Job, int, int], Any]


class Model(Protocol):
    """The interface of a compiled model that a run uses."""

    upscale: int
    device: torch.device

    @property
    def enlarge(self) -> Enlarge:
        """RGB [N,3,H,W] in [0,1] -> [N,3,s*H,s*W], same dtype and device; see runtime/images/arrays.py.

        Only for a run with `on_progress` it needs the parameter `progress`.
        """

    def stream(
        self,
        frames: Iterable[np.ndarray],
        *,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        longest: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[Any]:
        """Frames uint8 [H,W,3] -> upscaled frames in order; with "yield" an error takes the place of a failed frame.

        scale, size, longest: given only where results have another size than the network's.
        """


@dataclass(frozen=True)
class Settings:
    """Options of a run.

    encoding: of images. frame: index in files with several frames. max_pixels: limit on the pixels of an input; None
    derives it from the free memory. allow_truncated: decode damaged images as far as they go. skip_existing: do not
    process inputs whose result exists. strict: stop at the first failure, including a failed video frame. crf: H.264
    quality, 0 (lossless) to 51. target: the size of the results, if not the network's factor. workers: images in
    flight; None means GPU_WORKERS for a model on a GPU, at most one per CPU core, else 1. With strict it is 1.
    """

    encoding: Encoding = field(default_factory=Encoding)
    frame: int | None = None
    max_pixels: int | None = None
    allow_truncated: bool = False
    skip_existing: bool = False
    strict: bool = False
    crf: int = 18
    target: Target = NATIVE
    workers: int | None = None


@dataclass
class Result:
    """One line of the report.

    status: done, skipped (the result exists), failed or interrupted. seconds: wall-clock time. Sizes are (width,
    height) in pixels. mode: Pillow's mode of the input, or "video". error: `type` and `message` of a failure.
    """

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
        """The result as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass
class _Context:
    """What the jobs of a run share. budget: limits the low-resolution pixels in flight; None for no limit.

    on_progress: see `run`.
    """

    model: Model
    settings: Settings
    enlarge: Enlarge
    budget: Budget | None = None
    on_progress: OnProgress | None = None

    def reserve(self, pixels: int) -> AbstractContextManager[None]:
        """Count the pixels as in flight inside the block; wait until the budget allows it."""
        return nullcontext() if self.budget is None else self.budget.reserve(pixels)


def _upscale_image(job: Job, context: _Context, result: Result) -> None:
    assert job.output is not None
    assert job.fallback is not None
    settings, scale = context.settings, context.model.upscale
    loaded = read_image(
        job.source,
        frame=settings.frame,
        max_pixels=settings.max_pixels,
        upscale=scale,
        allow_truncated=settings.allow_truncated,
    )
    result.input_size, result.mode = loaded.size, loaded.mode
    size = settings.target.output(*loaded.size, scale)
    progress = None if context.on_progress is None else partial(context.on_progress, job)
    with context.reserve(loaded.size[0] * loaded.size[1]):
        image, metadata = upscale_image_file(
            loaded, context.enlarge, scale, device=context.model.device, target=settings.target, progress=progress
        )
        output = job.output
        reason = unsupported_reason(output.suffix, size, has_alpha(image), metadata.label)
        if reason and job.fallback != output:
            notice(f"{reason}: written as {job.fallback.name}")
            output = job.fallback
        output.parent.mkdir(parents=True, exist_ok=True)
        write_image(output, image, metadata, settings.encoding)
    result.output, result.output_size = str(output), size


def _upscale_video(job: Job, model: Model, settings: Settings, result: Result) -> None:
    assert job.output is not None
    job.output.parent.mkdir(parents=True, exist_ok=True)
    on_error: OnError = "raise" if settings.strict else "yield"
    stream = partial(model.stream, **settings.target.options(), on_error=on_error)
    size = partial(settings.target.output, upscale=model.upscale)
    report = upscale_video(job.source, job.output, stream, size, strict=settings.strict, crf=settings.crf)
    result.input_size, result.output_size = report.input_size, report.output_size
    result.mode, result.frames, result.output = "video", report.frames, str(job.output)


def _existing_result(job: Job) -> Path | None:
    return next((path for path in (job.output, job.fallback) if path is not None and path.exists()), None)


def needs_model(job: Job, settings: Settings) -> bool:
    """Whether a job will run the network: it has no known problem and no existing result to skip."""
    return not job.problem and not (settings.skip_existing and _existing_result(job))


def _run_one(job: Job, context: _Context | None, settings: Settings, result: Result) -> None:
    """Run one job and fill in its result. Only KeyboardInterrupt and SystemExit propagate."""
    try:
        if job.problem:
            raise InputError(f"{job.source}: {job.problem}")
        existing = _existing_result(job) if settings.skip_existing else None
        if existing is not None:
            result.status, result.output = "skipped", str(existing)
            return
        assert context is not None
        if job.video:
            _upscale_video(job, context.model, settings, result)
        else:
            _upscale_image(job, context, result)
        result.status = "done"
    except (TinySRError, OSError) as error:
        message = str(error)
        if not message.startswith(str(job.source)):
            message = f"{job.source}: {message}"
        result.error = {"type": type(error).__name__, "message": message}
    except Exception as error:  # noqa: BLE001  one file must never stop the others
        message = f"{job.source}: unexpected {type(error).__name__}: {error}"
        result.error = {"type": type(error).__name__, "message": message}


def _result(job: Job) -> Result:
    return Result(str(job.source), str(job.output) if job.output else None)


def _timed(
    job: Job, context: _Context | None, settings: Settings, notices: AbstractContextManager[list[str]], result: Result
) -> Result:
    """Run one job and return its result with notices and wall-clock time."""
    started = time.perf_counter()
    with notices as messages:
        try:
            _run_one(job, context, settings, result)
        except BaseException:
            result.status = "interrupted"
            raise
        finally:
            result.seconds = round(time.perf_counter() - started, 3)
            result.notices = list(messages)
            if result.status in ("failed", "interrupted"):
                result.output = None
    return result


def _run_sequential(jobs: Iterable[Job], context: _Context | None, settings: Settings) -> Iterator[Result]:
    for job in jobs:
        result = _result(job)
        try:
            _timed(job, context, settings, collect_notices(), result)
        except BaseException:
            yield result
            raise
        yield result


def _run_parallel(
    jobs: Sequence[Job], model: Model, settings: Settings, workers: int, on_progress: OnProgress | None
) -> Iterator[Result]:
    """Process images in several threads; results come in the order of the jobs."""
    batcher = MicroBatcher(model.enlarge, BATCH_PIXELS)
    context = _Context(model, settings, batcher, Budget(DEVICE_PIXELS), on_progress)

    def work(job: Job) -> Result:
        return _timed(job, context, settings, defer_notices(), _result(job))

    finished = 0
    try:
        with closing(in_order(work, jobs, workers=workers, ahead=2 * workers, stop=batcher.stop)) as results:
            for result in results:
                assert isinstance(result, Result)
                finished += 1
                with collect_notices():  # pass them to other log handlers; the result has them already
                    for message in result.notices:
                        notice(message)
                yield result
    except (KeyboardInterrupt, SystemExit):
        if finished < len(jobs):
            interrupted = _result(jobs[finished])
            interrupted.status, interrupted.output = "interrupted", None
            yield interrupted
        raise


def _workers(model: Model | None, settings: Settings) -> int:
    if settings.strict or model is None:
        return 1
    if settings.workers is not None:
        return settings.workers
    return min(GPU_WORKERS, os.cpu_count() or 1) if model.device.type == "cuda" else 1


def _results(
    jobs: Sequence[Job], model: Model | None, settings: Settings, on_progress: OnProgress | None
) -> Generator[Result, None, None]:
    workers = _workers(model, settings)
    context = None if model is None else _Context(model, settings, model.enlarge, on_progress=on_progress)
    # Videos run one at a time: each one saturates the device.
    for video, group in itertools.groupby(jobs, key=lambda job: job.video):
        if video or workers == 1 or model is None:
            yield from _run_sequential(group, context, settings)
        else:
            yield from _run_parallel(list(group), model, settings, workers, on_progress)


def run(
    jobs: Sequence[Job],
    model: Model | None,
    settings: Settings | None = None,
    *,
    report: TextIO | None = None,
    on_result: Callable[[Result], Any] | None = None,
    on_progress: OnProgress | None = None,
) -> list[Result]:
    """Run all jobs and return their results in the order of the jobs; with `strict` up to the first failure.

    model: may be None if no job `needs_model`. report: a text stream that receives one line of JSON per job as soon as
    the job ends. on_result: is called with each result at the same time, except for interrupted ones.
    on_progress: is called with (job, done, total) after every tile of an image, by the thread that computes it.
    KeyboardInterrupt and SystemExit propagate after the current file is discarded and reported as interrupted.
    """
    settings = settings or Settings()
    results: list[Result] = []
    with closing(_results(jobs, model, settings, on_progress)) as source:
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
