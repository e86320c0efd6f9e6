"""The command `tinysr`: upscale files, folders and videos; describe and convert checkpoints; describe the machine.

Exit codes: 0 all done; 1 some inputs failed, each named, the others written; 2 wrong usage or a checkpoint that
cannot be used; 130 and 143 after Ctrl-C and SIGTERM, with no partial file left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from tinysr_kernels._version import __version__
from tinysr_kernels.errors import CheckpointError, InputError, TinySRError

if TYPE_CHECKING:  # torch and the image libraries load when a command needs them, so that --help is instant
    from tinysr_kernels.runtime.batch import Model, Result, Settings
    from tinysr_kernels.runtime.plan import Job

_IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "avif")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def _whole(least: int, most: int | None = None) -> Any:
    """An argparse type: a whole number between two bounds."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{value} is outside {least} to {'any' if most is None else most}")
        return value

    return whole_number


def _add_upscale(commands: Any) -> None:
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
    model.add_argument("--dtype", choices=_DTYPES, help="default: half precision on cuda, float32 on cpu")
    model.add_argument(
        "--quantize", choices=("fp8",), help="TinySR's transformer in 8 bits: faster, a little less exact"
    )
    model.add_argument("--color-fix", choices=("adain", "wavelet", "none"), help="default: the family's own")
    model.add_argument("--scale", type=_whole(1), default=4, metavar="N", help="factor (default 4)")
    model.add_argument("--tile", type=_whole(1), metavar="N", help="side of a tile in input pixels")
    pictures = parser.add_argument_group("what is read and written")
    pictures.add_argument("-r", "--recursive", action="store_true", help="enter sub-folders and mirror them")
    pictures.add_argument("--frame", type=_whole(0), metavar="N", help="of a file with several frames, from 0")
    pictures.add_argument("--max-pixels", type=_whole(1), metavar="N", help="refuse larger inputs (default: by memory)")
    pictures.add_argument("--format", choices=_IMAGE_FORMATS, help="of all pictures in the output folder")
    pictures.add_argument("--quality", type=_whole(1, 100), default=95, metavar="N", help="JPEG, WebP, AVIF (95)")
    pictures.add_argument("--lossless", action="store_true", help="WebP without loss")
    pictures.add_argument("--crf", type=_whole(0, 51), default=18, metavar="N", help="video: 0 best to 51 (18)")
    pictures.add_argument("--strip-metadata", action="store_true", help="leave EXIF, XMP and resolution out")
    course = parser.add_argument_group("course of the run")
    course.add_argument("--skip-existing", action="store_true", help="leave results alone that are there: resume")
    course.add_argument("--strict", action="store_true", help="stop at the first failure")
    course.add_argument("--report", metavar="FILE", help="one line of JSON for each input")
    course.add_argument("-q", "--quiet", action="store_true", help="no progress and no notices, errors only")
    parser.set_defaults(command=_upscale)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinysr", description="One-step diffusion super-resolution: pictures and videos, four times larger."
    )
    parser.add_argument("--version", action="version", version=f"tinysr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_upscale(commands)
    info = commands.add_parser("info", help="describe a checkpoint")
    info.add_argument("checkpoint", metavar="CKPT")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(command=_info)
    convert = commands.add_parser("convert", help="fold a checkpoint into one safetensors file")
    convert.add_argument("checkpoint", metavar="CKPT")
    convert.add_argument("out", metavar="OUT", help="the file to write")
    convert.add_argument("--dtype", choices=_DTYPES, help="of the stored weights (default float32)")
    convert.add_argument("--quantize", choices=("fp8",), help="store TinySR's transformer in 8 bits")
    convert.set_defaults(command=_convert)
    env = commands.add_parser("env", help="what a bug report needs to know of this machine")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(command=_env)
    return parser


def _say(message: str) -> None:
    """To stderr, past a progress bar."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr)


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
            _say(f"tinysr: {arguments.model}: {message}")
    return model


def _settings(arguments: argparse.Namespace) -> Settings:
    from tinysr_kernels.runtime.batch import Settings
    from tinysr_kernels.runtime.encode import Encoding

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


def _upscale(arguments: argparse.Namespace) -> int:
    from PIL import Image
    from tqdm import tqdm

    from tinysr_kernels.runtime import batch
    from tinysr_kernels.runtime.plan import plan

    # Sizes are checked against the memory that is free; Pillow's own fixed limit would refuse large photographs.
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")
    suffix = f".{arguments.format}" if arguments.format else None
    jobs = plan(arguments.inputs, arguments.output, recursive=arguments.recursive, suffix=suffix)
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
                    _say(f"tinysr: {result.input}: {message}")
                if result.status == "done":
                    tqdm.write(str(result.output), file=sys.stdout)
            if result.error is not None:
                _say(f"tinysr: error: {result.error['message']}")
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
        _say(f"tinysr: {', '.join(words)}")
    return 1 if counts["failed"] else 0


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        return
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = [f"{name} = {part}" for name, part in value.items()]
        lines = value if isinstance(value, (list, tuple)) else [value]
        for index, line in enumerate(lines or ["none"]):
            print(f"{key if index == 0 else '':<{width}}  {line}")


def _info(arguments: argparse.Namespace) -> int:
    import tinysr_kernels

    _print_facts(tinysr_kernels.describe(arguments.checkpoint), arguments.json)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    if os.path.exists(arguments.out) and os.path.samefile(arguments.out, arguments.checkpoint):
        raise InputError(f"{arguments.out} is the checkpoint itself; choose another name")
    import tinysr_kernels

    model = tinysr_kernels.compile(
        arguments.checkpoint, device="cpu", dtype=arguments.dtype, quantize=arguments.quantize
    )
    try:
        model.save(arguments.out)
    except OSError as error:
        raise CheckpointError(f"{arguments.out} cannot be written: {error}") from error
    print(arguments.out)
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from tinysr_kernels.runtime.environment import environment

    _print_facts(environment(), arguments.json)
    return 0


def _terminate(signum: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (default: the process's) and return its exit code."""
    arguments = _parser().parse_args(argv)
    previous = None
    with suppress(ValueError):  # not the main thread: whoever runs it there minds the signals
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return arguments.command(arguments)
    except TinySRError as error:
        _say(f"tinysr: error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("tinysr: interrupted; finished results are complete, --skip-existing goes on from here")
        return 130
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BrokenPipeError:  # the reader of our output has gone, as in `tinysr info x | head`
        sys.stderr.close()
        return 1
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
