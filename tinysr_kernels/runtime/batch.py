"""Many files, one after another: each is done whole, skipped or failed by name, and none stops the rest.

A run can be broken off at any moment (Ctrl-C, SIGTERM, a lost machine): finished results are complete files, the
current one leaves nothing behind, and `skip_existing` goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from torch import Tensor

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.runtime.encode import Encoding, has_alpha, unfit
from tinysr_kernels.runtime.files import read_picture, upscale_picture, write_picture
from tinysr_kernels.runtime.notices import collected, notice
from tinysr_kernels.runtime.plan import Job
from tinysr_kernels.runtime.video import upscale_video


class Model(Protocol):
    """What a run needs of a compiled model."""

    upscale: int
    device: torch.device

    def enlarge(self, rgb: Tensor) -> Tensor:
        """RGB [N,3,H,W] in [0,1] -> [N,3,s*H,s*W], same dtype and device."""

    def stream(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Frames uint8 [H,W,3] -> enlarged frames, in order."""


@dataclass(frozen=True)
class Settings:
    """encoding: of pictures. frame: of files with several. max_pixels: None lets the free memory decide.

    skip_existing: leave results alone that are there. strict: stop at the first failure, also of a video's frame.
    crf: quality of H.264 video, 0 (lossless) to 51.
    """

    encoding: Encoding = field(default_factory=Encoding)
    frame: int | None = None
    max_pixels: int | None = None
    skip_existing: bool = False
    strict: bool = False
    crf: int = 18


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


def _picture(job: Job, model: Model, settings: Settings, result: Result) -> None:
    assert job.output is not None
    assert job.reserve is not None
    picture = read_picture(job.source, frame=settings.frame, max_pixels=settings.max_pixels, upscale=model.upscale)
    result.input_size, result.mode = picture.size, picture.mode
    size = (picture.size[0] * model.upscale, picture.size[1] * model.upscale)
    image, metadata = upscale_picture(picture, model.enlarge, model.upscale, device=model.device)
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
    report = upscale_video(
        job.source, job.output, model.stream, model.upscale, strict=settings.strict, crf=settings.crf
    )
    result.input_size, result.output_size = report.input_size, report.output_size
    result.mode, result.frames, result.output = "video", report.frames, str(job.output)


def _exists(job: Job) -> Path | None:
    return next((path for path in (job.output, job.reserve) if path is not None and path.exists()), None)


def pending(job: Job, settings: Settings) -> bool:
    """Whether a job needs the model: it has no problem known beforehand, and no result to be left alone."""
    return not job.problem and not (settings.skip_existing and _exists(job))


def _run_one(job: Job, model: Model | None, settings: Settings, result: Result) -> None:
    """Do one job and fill the result in; only interruptions come through."""
    try:
        if job.problem:
            raise InputError(f"{job.source}: {job.problem}")
        existing = _exists(job) if settings.skip_existing else None
        if existing is not None:
            result.status, result.output = "skipped", str(existing)
            return
        assert model is not None
        (_video if job.video else _picture)(job, model, settings, result)
        result.status = "done"
    except (TinySRError, OSError) as error:
        message = str(error)
        if not message.startswith(str(job.source)):
            message = f"{job.source}: {message}"
        result.error = {"type": type(error).__name__, "message": message}
    except Exception as error:  # noqa: BLE001  one file must not stop the others, whatever is wrong with it
        message = f"{job.source}: unexpected {type(error).__name__}: {error}"
        result.error = {"type": type(error).__name__, "message": message}


def run(
    jobs: Sequence[Job],
    model: Model | None,
    settings: Settings | None = None,
    *,
    report: TextIO | None = None,
    on_result: Callable[[Result], Any] | None = None,
) -> list[Result]:
    """Enlarge every job in order.

    model: may be None where no job is `pending`.
    report: a text stream that gets one line of JSON for each job as soon as it ends. on_result: called likewise.
    Returns the results; with `strict` they end with the first failure. KeyboardInterrupt and SystemExit come through
    after the current file is discarded and reported as interrupted.
    """
    settings = settings or Settings()
    results = []
    for job in jobs:
        result = Result(str(job.source), str(job.output) if job.output else None)
        started = time.perf_counter()
        with collected() as notices:
            try:
                _run_one(job, model, settings, result)
            except BaseException:
                result.status = "interrupted"
                raise
            finally:
                result.seconds = round(time.perf_counter() - started, 3)
                result.notices = list(notices)
                if result.status in ("failed", "interrupted"):
                    result.output = None
                results.append(result)
                if report is not None:
                    report.write(result.as_json() + "\n")
                    report.flush()
        if on_result is not None:
            on_result(result)
        if settings.strict and result.status == "failed":
            break
    return results
