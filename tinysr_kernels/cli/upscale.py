"""`tinysr upscale`: enlarge files, folders, globs and videos."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tinysr_kernels.cli.terminal import DTYPES, integer_between, say
from tinysr_kernels.errors import InputError

if TYPE_CHECKING:  # torch and the image libraries load when a command needs them, so that --help is instant
    from tinysr_kernels.files.batch import Model, Result, Settings
    from tinysr_kernels.files.jobs import Job

_IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "avif")


def add_parser(commands: Any) -> None:
    """Add the sub-command to the subparsers of `argparse`."""
    parser = commands.add_parser(
        "upscale",
        help="enlarge pictures and videos",
        description="Enlarge pictures and videos: files, folders and globs.",
        epilog="One input and an OUTPUT with a picture's or video's suffix writes that file; otherwise OUTPUT is a "
        "folder. Results keep their input's name and, where it can be written, its format.",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder or a quoted glob")
    parser.add_argument("-o", "--output", required=True, help="a file or a folder, created if needed")
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="CKPT", help='a file or folder, or "demo"')
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if present)")
    model.add_argument("--dtype", choices=DTYPES, help="default: half precision on cuda, float32 on cpu")
    model.add_argument(
        "--quantize", choices=("fp8",), help="TinySR's transformer in 8 bits: faster, a little less exact"
    )
    model.add_argument("--color-fix", choices=("adain", "wavelet", "none"), help="default: the family's own")
    model.add_argument("--scale", type=integer_between(1), default=4, metavar="N", help="factor (default 4)")
    model.add_argument("--tile", type=integer_between(1), metavar="N", help="side of a tile in input pixels")
    pictures = parser.add_argument_group("what is read and written")
    pictures.add_argument("-r", "--recursive", action="store_true", help="enter sub-folders and mirror them")
    pictures.add_argument("--frame", type=integer_between(0), metavar="N", help="of a file with several frames, from 0")
    pictures.add_argument(
        "--max-pixels", type=integer_between(1), metavar="N", help="refuse larger inputs (default: by memory)"
    )
    pictures.add_argument("--format", choices=_IMAGE_FORMATS, help="of all pictures in the output folder")
    pictures.add_argument(
        "--quality", type=integer_between(1, 100), default=95, metavar="N", help="JPEG, WebP, AVIF (95)"
    )
    pictures.add_argument("--lossless", action="store_true", help="WebP without loss")
    pictures.add_argument(
        "--crf", type=integer_between(0, 51), default=18, metavar="N", help="video: 0 best to 51 (18)"
    )
    pictures.add_argument("--strip-metadata", action="store_true", help="leave EXIF, XMP and resolution out")
    course = parser.add_argument_group("course of the run")
    course.add_argument("--skip-existing", action="store_true", help="leave results alone that are there: resume")
    course.add_argument("--strict", action="store_true", help="stop at the first failure")
    course.add_argument("--report", metavar="FILE", help="one line of JSON for each input")
    course.add_argument("-q", "--quiet", action="store_true", help="no progress and no notices, errors only")
    parser.set_defaults(command=run)


def _compile(arguments: argparse.Namespace) -> Model:
    import tinysr_kernels
    from tinysr_kernels.runtime.notices import collected

    with collected() as notices:
        model = tinysr_kernels.compile(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            color_fix=arguments.color_fix,
            upscale=arguments.scale,
            tile=arguments.tile,
        )
    if not arguments.quiet:
        for message in notices:
            say(f"tinysr: {arguments.model}: {message}")
    return model


def _settings(arguments: argparse.Namespace) -> Settings:
    from tinysr_kernels.files.batch import Settings
    from tinysr_kernels.files.encode import Encoding

    return Settings(
        encoding=Encoding(arguments.quality, arguments.lossless, arguments.strip_metadata),
        frame=arguments.frame,
        max_pixels=arguments.max_pixels,
        skip_existing=arguments.skip_existing,
        strict=arguments.strict,
        crf=arguments.crf,
    )


def _open_report(path: str, jobs: Sequence[Job]) -> Any:
    if any(os.path.exists(path) and os.path.samefile(path, job.source) for job in jobs if job.source.exists()):
        raise InputError(f"the report {path} is one of the inputs")
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"the report cannot be written: {error}") from error


def run(arguments: argparse.Namespace) -> int:
    """Enlarge the inputs; 1 where one failed."""
    from PIL import Image
    from tqdm import tqdm

    from tinysr_kernels.files import batch
    from tinysr_kernels.files.jobs import plan_jobs

    # Sizes are checked against the memory that is free; Pillow's own fixed limit would refuse large photographs.
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")
    suffix = f".{arguments.format}" if arguments.format else None
    jobs = plan_jobs(arguments.inputs, arguments.output, recursive=arguments.recursive, suffix=suffix)
    settings = _settings(arguments)
    with ExitStack() as stack:
        report = stack.enter_context(_open_report(arguments.report, jobs)) if arguments.report else None
        # The model is loaded for a reason only: not to say that a name is wrong or that all is done already.
        model = _compile(arguments) if any(batch.pending(job, settings) for job in jobs) else None
        hidden = arguments.quiet or not sys.stderr.isatty()
        bar = stack.enter_context(tqdm(total=len(jobs), unit="file", disable=hidden))

        def show(result: Result) -> None:
            if not arguments.quiet:
                for message in result.notices:
                    say(f"tinysr: {result.input}: {message}")
                if result.status == "done":
                    tqdm.write(str(result.output), file=sys.stdout)
            if result.error is not None:
                say(f"tinysr: error: {result.error['message']}")
            bar.update()

        results = batch.run(jobs, model, settings, report=report, on_result=show)
    return _sum_up(results, len(jobs), arguments.quiet)


def _sum_up(results: Sequence[Result], planned: int, quiet: bool) -> int:
    counts = {status: sum(result.status == status for result in results) for status in ("done", "skipped", "failed")}
    if not quiet and (planned > 1 or counts["failed"]):
        left = planned - len(results)
        words = [f"{counts['done']} done"]
        words += [f"{counts['skipped']} there already"] if counts["skipped"] else []
        words += [f"{counts['failed']} failed"] if counts["failed"] else []
        words += [f"{left} not tried"] if left else []
        say(f"tinysr: {', '.join(words)}")
    return 1 if counts["failed"] else 0
