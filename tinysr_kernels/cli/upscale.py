"""`tinysr upscale`: upscale image and video files, folders and globs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tinysr_kernels.cli.terminal import DTYPES, integer_between, number, say, width_height
from tinysr_kernels.errors import InputError

if TYPE_CHECKING:  # imported lazily, so that --help does not wait for torch
    from tinysr_kernels.files.batch import Model, Result, Settings
    from tinysr_kernels.files.jobs import Job

_IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "avif")


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser(
        "upscale",
        help="upscale images and videos",
        description="Upscale images and videos: files, folders and globs.",
        epilog="One input and an OUTPUT with an image or video suffix: that file is written. Otherwise OUTPUT is a "
        "folder. Results keep the name of their input and, if it can be written, its format.",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder or a quoted glob")
    parser.add_argument("-o", "--output", required=True, help="a file or a folder, created if needed")
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="CKPT", help='a file or folder, or "demo"')
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if present)")
    model.add_argument("--dtype", choices=DTYPES, help="default: half precision on cuda, float32 on cpu")
    model.add_argument(
        "--quantize", choices=("fp8",), help="TinySR's transformer in FP8: faster, slightly less accurate"
    )
    model.add_argument("--color-fix", choices=("adain", "wavelet", "none"), help="default: that of the model family")
    model.add_argument("--tile", type=integer_between(1), metavar="N", help="tile size in input pixels")
    formats = parser.add_argument_group("input and output")
    sizes = parser.add_argument_group("size of the results", "at most one; default: the network's own factor, 4")
    sizes.add_argument("--scale", type=number, metavar="X", help="a factor, above 0 and at most 8, such as 1.5")
    sizes.add_argument("--size", type=width_height, metavar="WxH", help="width and height in pixels, as in 1920x1080")
    sizes.add_argument("--longest", type=integer_between(1), metavar="N", help="the longer side in pixels")
    formats.add_argument("-r", "--recursive", action="store_true", help="process subfolders and mirror them")
    formats.add_argument("--frame", type=integer_between(0), metavar="N", help="frame of a multi-frame image, from 0")
    formats.add_argument(
        "--max-pixels",
        type=integer_between(1),
        metavar="N",
        help="refuse larger inputs (default: limited by free memory)",
    )
    formats.add_argument(
        "--allow-truncated", action="store_true", help="decode damaged and cut-off images as far as they go"
    )
    formats.add_argument("--format", choices=_IMAGE_FORMATS, help="format of all images in the output folder")
    formats.add_argument(
        "--quality", type=integer_between(1, 100), default=95, metavar="N", help="of JPEG, WebP and AVIF (default: 95)"
    )
    formats.add_argument("--lossless", action="store_true", help="write lossless WebP")
    formats.add_argument(
        "--crf",
        type=integer_between(0, 51),
        default=18,
        metavar="N",
        help="video quality: 0 (best) to 51 (default: 18)",
    )
    formats.add_argument(
        "--strip-metadata",
        action="store_true",
        help="drop EXIF, XMP, IPTC, texts, comments and resolution; color stays",
    )
    control = parser.add_argument_group("run control")
    control.add_argument(
        "--skip-existing", action="store_true", help="skip inputs whose result exists, to resume a run"
    )
    control.add_argument("--strict", action="store_true", help="stop at the first failure")
    control.add_argument("--report", metavar="FILE", help="write one line of JSON per input")
    control.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(command=run)


def _compile(arguments: argparse.Namespace) -> Model:
    import tinysr_kernels
    from tinysr_kernels.runtime.notices import collect_notices

    with collect_notices() as notices:
        model = tinysr_kernels.compile(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            color_fix=arguments.color_fix,
            tile=arguments.tile,
        )
    if not arguments.quiet:
        for message in notices:
            say(f"tinysr: {arguments.model}: {message}")
    return model


def _settings(arguments: argparse.Namespace) -> Settings:
    from tinysr_kernels.files.batch import Settings
    from tinysr_kernels.files.encode import Encoding
    from tinysr_kernels.runtime.images.scaling import Target

    return Settings(
        encoding=Encoding(arguments.quality, arguments.lossless, arguments.strip_metadata),
        frame=arguments.frame,
        max_pixels=arguments.max_pixels,
        allow_truncated=arguments.allow_truncated,
        skip_existing=arguments.skip_existing,
        strict=arguments.strict,
        crf=arguments.crf,
        target=Target(arguments.scale, arguments.size, arguments.longest),
    )


def _open_report(path: str, jobs: Sequence[Job]) -> Any:
    if any(os.path.exists(path) and os.path.samefile(path, job.source) for job in jobs if job.source.exists()):
        raise InputError(f"the report {path} is one of the inputs; choose another name")
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"the report {path} cannot be written: {error.strerror or error}") from error


def run(arguments: argparse.Namespace) -> int:
    """Upscale the inputs and print a summary; the exit code is 1 if any of them failed."""
    from PIL import Image
    from tqdm import tqdm

    from tinysr_kernels.files import batch
    from tinysr_kernels.files.jobs import plan_jobs
    from tinysr_kernels.runtime.images.bounds import pillow_limit

    # Sizes are checked against the free memory; Pillow's fixed limit would refuse large photos.
    Image.MAX_IMAGE_PIXELS = pillow_limit(arguments.max_pixels)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    suffix = f".{arguments.format}" if arguments.format else None
    jobs = plan_jobs(arguments.inputs, arguments.output, recursive=arguments.recursive, suffix=suffix)
    settings = _settings(arguments)
    with ExitStack() as stack:
        report = stack.enter_context(_open_report(arguments.report, jobs)) if arguments.report else None
        # Loading the model is slow: skip it if all inputs are done or invalid.
        model = _compile(arguments) if any(batch.needs_model(job, settings) for job in jobs) else None
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

        def tiles(_job: Job, done: int, total: int) -> None:
            if total > 1:
                bar.set_postfix_str(f"tile {done}/{total}" if done < total else "")

        results = batch.run(jobs, model, settings, report=report, on_result=show, on_progress=None if hidden else tiles)
    return _print_summary(results, len(jobs), arguments.quiet)


def _print_summary(results: Sequence[Result], planned: int, quiet: bool) -> int:
    counts = {status: sum(result.status == status for result in results) for status in ("done", "skipped", "failed")}
    if not quiet and (planned > 1 or counts["failed"]):
        remaining = planned - len(results)
        parts = [f"{counts['done']} done"]
        parts += [f"{counts['skipped']} skipped (exists)"] if counts["skipped"] else []
        parts += [f"{counts['failed']} failed"] if counts["failed"] else []
        parts += [f"{remaining} not started"] if remaining else []
        say(f"tinysr: {', '.join(parts)}")
    return 1 if counts["failed"] else 0
