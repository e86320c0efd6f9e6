"""`tinysr upscale`: upscale image and video files, folders and globs."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from tinysr_kernels.cli.terminal import BACKENDS, DTYPES, integer_between, is_terminal, number, put, say, width_height
from tinysr_kernels.errors import InputError

if TYPE_CHECKING:  # imported lazily, so that --help does not wait for torch
    from tinysr_kernels.files.batch import Model, Result, Settings
    from tinysr_kernels.files.jobs import Job, Plan

_IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "avif")


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser(
        "upscale",
        help="upscale images and videos",
        description="Upscale images and videos: files, folders and globs.",
        epilog="Without an OUTPUT: photo.jpg becomes photo_x4.jpg beside it, numbered if that is there. One input and "
        "an OUTPUT with an image or video suffix: that file is written. Otherwise OUTPUT is a folder. Results keep the "
        "name of their input and, if it can be written, its format.",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder or a quoted glob")
    parser.add_argument("-o", "--output", help="a file or a folder, created if needed (default: beside the input)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="CKPT", help='a file or folder (default: "demo", the one in the package)')
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if present)")
    model.add_argument("--dtype", choices=DTYPES, help="default: half precision on cuda, float32 on cpu")
    model.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="kernels, PyTorch's libraries, or the reference (default: the first on a GPU that can, else the second; "
        "the last on cpu)",
    )
    model.add_argument(
        "--quantize", choices=("fp8",), help="TinySR's transformer in FP8: faster, slightly less accurate"
    )
    model.add_argument("--color-fix", choices=("adain", "wavelet", "none"), help="default: that of the model family")
    model.add_argument("--prompt", metavar="TEXT", help="embedded by the checkpoint's text encoder (OSEDiff and kin)")
    model.add_argument("--embeddings", metavar="FILE", help="an embedding in place of the checkpoint's")
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
    control.add_argument("--report", metavar="FILE", help="append one line of JSON per input; - for stdout")
    control.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(command=run)


def _name_end(arguments: argparse.Namespace) -> str:
    """What ends the name of a result beside its input."""
    if arguments.size is not None:
        width, height = arguments.size
        return f"_{width}x{height}"
    if arguments.longest is not None:
        return f"_{arguments.longest}"
    return f"_x{arguments.scale or 4:g}"


def _compile(arguments: argparse.Namespace) -> Model:
    import tinysr_kernels
    from tinysr_kernels.runtime.notices import collect_notices

    with collect_notices() as notices:
        model = tinysr_kernels.compile(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            backend=arguments.backend,
            quantize=arguments.quantize,
            color_fix=arguments.color_fix,
            tile=arguments.tile,
            prompt=arguments.prompt,
            embeddings=arguments.embeddings,
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


class Progress:
    """Tells a person what happens: a bar of files, one of a film's frames, messages, and finished paths on stdout."""

    def __init__(self, total: int, quiet: bool, print_paths: bool) -> None:
        from tqdm import tqdm

        self.quiet, self.print_paths = quiet, print_paths
        self.not_written = 0
        self.hidden = quiet or not is_terminal(sys.stderr)
        self._files = tqdm(total=total, unit="file", disable=self.hidden)
        self._frames: Any = None

    def frames(self, done: int, total: int | None) -> None:
        """Show how far a film is: its frames, their rate and the time left."""
        from tqdm import tqdm

        if self.hidden:
            return
        if self._frames is None:
            # A film that goes on where it was says nothing about the rate before.
            self._frames = tqdm(total=total, initial=done - 1, unit="frame", leave=False, position=1)
        self._frames.update(done - self._frames.n)

    def tiles(self, _job: Job, done: int, total: int) -> None:
        """Show how far a large image is."""
        if total > 1:
            self._files.set_postfix_str(f"tile {done}/{total}" if done < total else "")

    def result(self, result: Result) -> None:
        """Show a result."""
        self._close_frames()
        if not self.quiet:
            for message in result.notices:
                say(f"tinysr: {result.input}: {message}")
            if result.status == "done" and self.print_paths:
                put(result.output)
        if result.error is not None and result.error["type"] == "DiskFull":
            self.not_written += 1  # said once, with the first
        elif result.error is not None:
            say(f"tinysr: error: {result.error['message']}")
        self._files.update()

    def _close_frames(self) -> None:
        if self._frames is not None:
            self._frames.close()
            self._frames = None

    def close(self) -> None:
        """Remove the bars."""
        self._close_frames()
        self._files.close()


def run(arguments: argparse.Namespace) -> int:
    """Upscale the inputs and print a summary; the exit code is 1 if any of them failed."""
    from PIL import Image

    from tinysr_kernels.cli.report import STDOUT, open_report
    from tinysr_kernels.files import batch
    from tinysr_kernels.files.jobs import plan_jobs
    from tinysr_kernels.runtime.images.bounds import pillow_limit

    warnings.filterwarnings("ignore", module=r"PIL\.")
    if arguments.output is None and arguments.skip_existing:
        raise InputError("--skip-existing looks for results in an output: name one with -o")
    if arguments.model is None:
        arguments.model = "demo"
        if not arguments.quiet:
            say('tinysr: using the small model in the package ("demo"); --model names another')
    suffix = f".{arguments.format}" if arguments.format else None
    with ExitStack() as stack:
        # Sizes are checked against the free memory; Pillow's fixed limit would refuse large photos.
        stack.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = pillow_limit(arguments.max_pixels)
        plan = plan_jobs(
            arguments.inputs, arguments.output, recursive=arguments.recursive, suffix=suffix, end=_name_end(arguments)
        )
        settings = _settings(arguments)
        report = None
        if arguments.report is not None:
            report = stack.enter_context(closing(open_report(arguments.report, plan)))
            report.begin(arguments.argv, arguments.model)
        # Loading the model is slow: skip it if all inputs are done or invalid.
        model = _compile(arguments) if batch.needs_model(plan, settings) else None
        progress = stack.enter_context(
            closing(Progress(len(plan), arguments.quiet, print_paths=arguments.report != STDOUT))
        )
        results = batch.run(
            plan,
            model,
            settings,
            report=report,
            on_result=progress.result,
            on_frames=progress.frames,
            on_progress=None if progress.hidden else progress.tiles,
        )
        if report is not None:
            report.end(results, plan)
    if progress.not_written:
        say(f"tinysr: error: the disk is full: {progress.not_written} more inputs were not tried")
    return _print_summary(results, plan, arguments.quiet)


def _print_summary(results: Sequence[Result], plan: Plan, quiet: bool) -> int:
    counts = Counter(result.status for result in results)
    if not quiet and (len(plan) != 1 or counts["failed"] or counts["skipped"] or plan.ignored):
        remaining = len(plan) - len(results)
        parts = [f"{counts['done']} done"]
        parts += [f"{counts['skipped']} skipped (exists)"] if counts["skipped"] else []
        parts += [f"{counts['failed']} failed"] if counts["failed"] else []
        parts += [f"{remaining} not started"] if remaining else []
        say(f"tinysr: {', '.join(parts)}")
        if plan.ignored:
            say(f"tinysr: ignored: {', '.join(f'{count} {reason}' for reason, count in plan.ignored.items())}")
    return 1 if counts["failed"] else 0
