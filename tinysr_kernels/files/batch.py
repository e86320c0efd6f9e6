"""Process many files: each one is done, skipped or failed, and a failure never stops the others.

A run may be interrupted at any time (Ctrl-C, SIGTERM, power loss): finished results are complete files, the current one
leaves no partial file, and `skip_existing` resumes the run. What a killed run has left, the next one removes.

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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tinysr_kernels.atomic import remove_abandoned
from tinysr_kernels.errors import DeviceError, InputError, TinySRError
from tinysr_kernels.files.encode import Encoding, encode, has_alpha, unsupported_reason
from tinysr_kernels.files.jobs import Job, Plan
from tinysr_kernels.files.picture_io import read_image, upscale_image_file
from tinysr_kernels.files.plan.identity import Originals
from tinysr_kernels.files.plan.places import Places
from tinysr_kernels.files.plan.records import Source, source_of
from tinysr_kernels.files.video import upscale_video
from tinysr_kernels.runtime.images.arrays import DEVICE_PIXELS, Enlarge
from tinysr_kernels.runtime.images.scaling import NATIVE, Target
from tinysr_kernels.runtime.micro_batch import Budget, MicroBatcher
from tinysr_kernels.runtime.notices import collect_notices, defer_notices, notice
from tinysr_kernels.runtime.streaming import OnError, in_order
from tinysr_kernels.runtime.tiles.limits import BATCH_PIXELS

GPU_WORKERS = 8
"""Images in flight when the network runs on a GPU: reading and writing take longer than the network."""

OnFrames = Callable[[int, int | None], Any]
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


class Lines(Protocol):
    """What a report is written to, such as a text file."""

    def write(self, text: str, /) -> Any:
        """Write a line with its line end. May raise OSError or ValueError."""

    def flush(self) -> Any:
        """Hand what has been written to the system."""


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
        """The result as one line of ASCII; bytes of names that are not UTF-8 as escaped surrogates."""
        return json.dumps(asdict(self))


@dataclass
class _Context:
    """What the jobs of a run share. budget: limits the low-resolution pixels in flight; None for no limit.

    model: None if no job needs it. on_frames, on_progress: see `run`.
    """

    model: Model | None
    settings: Settings
    places: Places
    on_frames: OnFrames | None = None
    on_progress: OnProgress | None = None
    enlarge: Enlarge | None = None
    budget: Budget | None = None

    def reserve(self, pixels: int) -> AbstractContextManager[None]:
        """Count the pixels as in flight inside the block; wait until the budget allows it."""
        return nullcontext() if self.budget is None else self.budget.reserve(pixels)


def _source(path: Path) -> Source | None:
    """The input before it is read; None if it cannot be, which reading it will explain."""
    try:
        return source_of(path)
    except OSError:
        return None


def _upscale_image(job: Job, model: Model, context: _Context, result: Result) -> None:
    assert job.output is not None
    assert job.fallback is not None
    settings, scale = context.settings, model.upscale
    source = _source(job.source)
    context.places.prepare(job, job.output)
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
            loaded,
            context.enlarge or model.enlarge,
            scale,
            device=model.device,
            target=settings.target,
            progress=progress,
        )
        output = job.output
        reason = unsupported_reason(output.suffix, size, has_alpha(image), metadata.label)
        if reason and job.fallback != output:
            notice(f"{reason}: written as {job.fallback.name}")
            output = job.fallback
        data = encode(image, output.suffix, metadata, settings.encoding)
        written = context.places.write(job, output, data, source)
    result.output, result.output_size = str(written), size


def _upscale_video(job: Job, model: Model, context: _Context, result: Result) -> None:
    assert job.output is not None
    settings, source = context.settings, _source(job.source)
    output, overwrite = next(context.places.candidates(job, job.output))
    context.places.prepare(job, output)
    on_error: OnError = "raise" if settings.strict else "yield"
    report = upscale_video(
        job.source,
        output,
        partial(model.stream, **settings.target.options(), on_error=on_error),
        partial(settings.target.output, upscale=model.upscale),
        strict=settings.strict,
        crf=settings.crf,
        strip=settings.encoding.strip,
        progress=context.on_frames,
        overwrite=overwrite,
        follow_link=context.places.follows(job, output),
        check=partial(context.places.check, job=job),
    )
    if source is not None and not context.places.follows(job, output):
        context.places.record(output, output.stat().st_size, source)
    if output != job.output:
        notice(f"{job.output.name} is another file, which was kept: written as {output.name}")
    result.input_size, result.output_size = report.input_size, report.output_size
    result.mode, result.frames, result.output = "video", report.frames, str(output)


def needs_model(jobs: Sequence[Job], settings: Settings) -> bool:
    """Whether any job will run the network: it has no known problem and no existing result to skip."""
    plan = _plan(jobs)
    places = Places(plan)
    return any(not job.problem and not (settings.skip_existing and places.existing(job)) for job in plan)


def _plan(jobs: Sequence[Job]) -> Plan:
    return jobs if isinstance(jobs, Plan) else Plan(tuple(jobs), originals=Originals(job.source for job in jobs))


def _run_one(job: Job, context: _Context, result: Result) -> None:
    """Run one job and fill in its result. Only KeyboardInterrupt and SystemExit propagate."""
    try:
        if job.problem:
            raise InputError(f"{job.source}: {job.problem}")
        existing = context.places.existing(job) if context.settings.skip_existing else None
        if existing is not None:
            path, known = existing
            if not known:
                notice(f"{path.name} is there, but nothing says that it was made from this input")
            result.status, result.output = "skipped", str(path)
            return
        assert context.model is not None
        if job.video:
            _upscale_video(job, context.model, context, result)
        else:
            _upscale_image(job, context.model, context, result)
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


def _timed(job: Job, context: _Context, notices: AbstractContextManager[list[str]], result: Result) -> Result:
    """Run one job and return its result with notices and wall-clock time."""
    started = time.perf_counter()
    with notices as messages:
        try:
            _run_one(job, context, result)
        except BaseException:
            result.status = "interrupted"
            raise
        finally:
            result.seconds = round(time.perf_counter() - started, 3)
            result.notices = list(messages)
            if result.status in ("failed", "interrupted"):
                result.output = None
    return result


def _run_sequential(jobs: Iterable[Job], context: _Context) -> Iterator[Result]:
    for job in jobs:
        result = _result(job)
        try:
            _timed(job, context, collect_notices(), result)
        except BaseException:
            yield result
            raise
        yield result


def _run_parallel(jobs: Sequence[Job], model: Model, context: _Context, workers: int) -> Iterator[Result]:
    """Process images in several threads; results come in the order of the jobs."""
    batcher = MicroBatcher(model.enlarge, BATCH_PIXELS)
    batched = replace(context, enlarge=batcher, budget=Budget(DEVICE_PIXELS))

    def work(job: Job) -> Result:
        return _timed(job, batched, defer_notices(), _result(job))

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


def _results(plan: Plan, context: _Context) -> Generator[Result, None, None]:
    workers = _workers(context.model, context.settings)
    # Videos run one at a time: each one saturates the device.
    for video, group in itertools.groupby(plan, key=lambda job: job.video):
        if video or workers == 1 or context.model is None:
            yield from _run_sequential(group, context)
        else:
            yield from _run_parallel(list(group), context.model, context, workers)


def _write_report(report: Lines, result: Result) -> bool:
    """Write a line -> whether the report can still be written. It never decides about the work."""
    try:
        report.write(result.as_json() + "\n")
        report.flush()
    except (OSError, ValueError) as error:  # a full disk, a closed stream
        with collect_notices():
            notice(f"the report cannot be written, the run goes on without it: {error}")
        return False
    return True


def _device_is_lost(result: Result) -> bool:
    """Whether the GPU failed: the same would happen to every other input."""
    return result.error is not None and result.error["type"] == DeviceError.__name__


def run(
    jobs: Sequence[Job],
    model: Model | None,
    settings: Settings | None = None,
    *,
    report: Lines | None = None,
    on_result: Callable[[Result], Any] | None = None,
    on_frames: OnFrames | None = None,
    on_progress: OnProgress | None = None,
) -> list[Result]:
    """Run all jobs and return their results in the order of the jobs; up to a failure of the GPU,
    with `strict` up to the first failure.

    jobs: of `plan_jobs`. model: may be None unless `needs_model`. report: a stream that receives one line of JSON
    per job as soon as the job ends; if it cannot be written, a notice says so and the run goes on. on_result: is called
    with each result at the same time, except for interrupted ones. on_frames: is called after each frame of a film with
    the frames done and their total, None if the film does not say. on_progress: is called with (job, done, total) after
    every tile of an image, by the thread that computes it.
    KeyboardInterrupt and SystemExit propagate after the current file is discarded and reported as interrupted.
    """
    settings = settings or Settings()
    plan = _plan(jobs)
    for folder in dict.fromkeys(job.output.parent for job in plan if job.output is not None):
        remove_abandoned(folder)
    results: list[Result] = []
    with closing(_results(plan, _Context(model, settings, Places(plan), on_frames, on_progress))) as source:
        for result in source:
            results.append(result)
            if report is not None and not _write_report(report, result):
                report = None
            if on_result is not None and result.status != "interrupted":
                on_result(result)
            if result.status == "failed" and (settings.strict or _device_is_lost(result)):
                break
    return results
