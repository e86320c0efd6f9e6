"""Plan a run: find the input files and choose all output names before the first image is upscaled.

Naming. One input file and an output with an image or video suffix: the result is that file. Otherwise the output is a
folder. Each result keeps its input's name, with subfolders mirrored. It keeps the input's format if that can be
written, else it is PNG; `suffix` forces one format for all images. If several results would share a name, each gets
its old suffix appended to the stem (a.jpg and a.png -> a_jpg.png and a_png.png), and remaining duplicates are
numbered. Every image also has a PNG fallback name, used if the chosen format cannot store the result. A result never
overwrites an input.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.encode import FORMATS, writable

# Containers that store exact timestamps and the codecs used here.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"crx ")
_OTHER_SUFFIXES = (".gif", ".heic", ".heif", ".jxl", ".jp2", ".ppm", ".tga", ".ico", ".psd", ".svg", ".pdf", ".avi")


@dataclass(frozen=True)
class Job:
    """One input file and its output path.

    relative: path of the input below the input folder; the output mirrors it. fallback: the PNG to write instead if the
    output's format cannot store the result; equal to output for PNG and video. problem: why the job cannot run; then
    output and fallback are None.
    """

    source: Path
    relative: Path
    output: Path | None = None
    fallback: Path | None = None
    video: bool = False
    problem: str | None = None


def is_video(head: bytes) -> bool:
    """Whether the first 64 bytes of a file are those of a video: MP4, MOV, Matroska, WebM, AVI, FLV, Ogg or MPEG."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in _IMAGE_BRANDS
    return (
        head[:4] in (b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS", b"\0\0\1\xba", b"\0\0\1\xb3")
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (head[:1] == b"\0" and head[4:8] in (b"moov", b"mdat", b"wide"))
        or (head[:1] == b"G" and head[1:2] in (b"\x40", b"\x41") and b"\0" in head)
    )


def _file_key(path: Path) -> object:
    """A key that is equal for two paths to the same file, also through links and on case-insensitive file systems."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.normcase(os.path.realpath(path))
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.normcase(os.path.realpath(path))


def _in_folder(folder: Path, recursive: bool, exclude: Path | None) -> Iterator[Job]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Job(folder, Path(folder.name), problem=f"the folder cannot be read: {error.strerror or error}")
        return
    for entry in entries:
        path = folder / entry.name
        if not entry.is_dir():
            yield Job(path, Path(entry.name))
        elif exclude is not None and _file_key(path) == _file_key(exclude):
            continue
        elif not recursive:
            yield Job(path, Path(entry.name), problem="a subfolder; use --recursive to include it")
        elif entry.is_symlink():
            yield Job(path, Path(entry.name), problem="a link to a folder; not followed, because links can form cycles")
        else:
            for job in _in_folder(path, recursive, exclude):
                yield replace(job, relative=Path(entry.name) / job.relative)


def _in_pattern(pattern: str) -> Iterator[Job]:
    """The files that match a glob; subfolders below its fixed part are mirrored."""
    fixed = Path(pattern)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    found = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    if not found:
        yield Job(Path(pattern), Path("pattern"), problem="no file matches")
    for path in found:
        if not path.is_dir():
            yield Job(path, path.relative_to(fixed))


def find_inputs(inputs: Iterable[str | os.PathLike[str]], recursive: bool, exclude: Path | None) -> list[Job]:
    """Jobs without outputs for all files that the inputs (files, folders, quoted globs) name, without duplicates.

    recursive: whether to enter subfolders. exclude: a folder to skip, the output folder.
    """
    jobs: list[Job] = []
    for item in inputs:
        text = os.fspath(item)
        path = Path(text)
        if path.is_dir():
            inside = list(_in_folder(path, recursive, exclude))
            jobs += inside or [Job(path, Path(path.name), problem="the folder is empty")]
        elif path.exists() or not glob.has_magic(text):
            jobs.append(Job(path, Path(path.name), problem=None if path.exists() else "no such file"))
        else:
            jobs += _in_pattern(text)
    seen: set[object] = set()
    unique = []
    for job in jobs:
        identity = _file_key(job.source)
        if identity not in seen:
            seen.add(identity)
            unique.append(job)
    return unique


def _sniff(job: Job) -> Job:
    if job.problem:
        return job
    if not job.source.is_file():
        return replace(job, problem="not a regular file")
    try:
        with open(job.source, "rb") as file:
            head = file.read(64)
    except OSError as error:
        return replace(job, problem=f"cannot be read: {error.strerror or error}")
    return replace(job, video=is_video(head))


def _suffix(job: Job, wanted: str | None) -> str:
    own = job.source.suffix
    if job.video:
        return own if own.lower() in VIDEO_SUFFIXES else ".mkv"
    if wanted:
        return wanted
    return own if writable(own) else ".png"


def _key(path: Path) -> str:
    return str(path).casefold()  # many file systems ignore case


def _unique(path: Path, taken: set[str]) -> Path:
    number, candidate = 1, path
    while _key(candidate) in taken:
        number += 1
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
    taken.add(_key(candidate))
    return candidate


def _with_old_suffix(job: Job, suffix: str) -> Path:
    old = job.source.suffix.removeprefix(".")
    return job.relative.with_name(f"{job.relative.stem}_{old}{suffix}" if old else f"{job.relative.stem}{suffix}")


def _name_outputs(jobs: Sequence[Job], folder: Path, wanted: str | None) -> list[Job]:
    runnable = [job for job in jobs if not job.problem]
    plain = {job.source: job.relative.with_name(job.relative.stem + _suffix(job, wanted)) for job in runnable}
    shared = Counter(_key(path) for path in plain.values())
    taken: set[str] = set()
    outputs: dict[Path, Path] = {}
    for unshared in (True, False):  # unshared names first, so that the order of the inputs does not change them
        for job in runnable:
            path = plain[job.source]
            if (shared[_key(path)] == 1) == unshared:
                outputs[job.source] = _unique(path if unshared else _with_old_suffix(job, path.suffix), taken)
    named = []
    for job in jobs:
        if job.problem:
            named.append(job)
            continue
        output = outputs[job.source]
        fallback = output
        if not job.video and output.suffix.lower() != ".png":
            fallback = output.with_suffix(".png")
            fallback = _unique(_with_old_suffix(job, ".png") if _key(fallback) in taken else fallback, taken)
        named.append(replace(job, output=folder / output, fallback=folder / fallback))
    return named


def _single(job: Job, output: Path) -> Job:
    if job.problem:
        return job
    suffix = output.suffix.lower()
    if job.video != (suffix in VIDEO_SUFFIXES):
        kind, known = ("a video", VIDEO_SUFFIXES) if job.video else ("an image", tuple(filter(writable, FORMATS)))
        return replace(job, problem=f"{kind} cannot be written to {output.name}; choose one of {' '.join(known)}")
    return replace(job, output=output, fallback=output if job.video else output.with_suffix(".png"))


def _guard_inputs(jobs: Sequence[Job]) -> list[Job]:
    """Mark the jobs that would overwrite an input as problems; drop fallbacks that would."""
    inputs = {_file_key(job.source) for job in jobs if not job.problem}
    guarded = []
    for job in jobs:
        if job.output is not None and _file_key(job.output) in inputs:
            job = replace(job, output=None, fallback=None, problem=f"{job.output} is an input and is never overwritten")
        elif job.output is not None and job.fallback is not None and _file_key(job.fallback) in inputs:
            job = replace(job, fallback=job.output)
        guarded.append(job)
    return guarded


def plan_jobs(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    recursive: bool = False,
    suffix: str | None = None,
) -> list[Job]:
    """The jobs of a run in order, including inputs that cannot be processed (Job.problem). Creates no file or folder.

    inputs: files, folders, globs. output: a file or a folder, see above. suffix: format of all images, such as ".png".
    Raises InputError if there are no inputs, if several inputs are to go into one file, and if the output's format
    cannot be written.
    """
    if suffix is not None and not writable(suffix):
        raise InputError(f"cannot write {suffix}; choose one of {' '.join(filter(writable, FORMATS))}")
    if not inputs:
        raise InputError("no inputs")
    target = Path(output)
    end = target.suffix.lower()
    as_folder = target.is_dir() or os.fspath(output).endswith(("/", os.sep))
    named_file = not as_folder and (end in FORMATS or end in VIDEO_SUFFIXES)
    if not as_folder and end in _OTHER_SUFFIXES:
        raise InputError(f"cannot write {end}; choose one of {' '.join([*filter(writable, FORMATS), *VIDEO_SUFFIXES])}")
    if target.exists() and not as_folder and not named_file:
        raise InputError(f"{target} is a file; the output must be a folder, or end in an image or video suffix")
    jobs = [_sniff(job) for job in find_inputs(inputs, recursive, None if named_file else target)]
    if named_file:
        if len(jobs) != 1 or Path(inputs[0]).is_dir():
            raise InputError(f"cannot write {len(jobs)} inputs to one file {target}; use a folder as the output")
        if suffix is not None and end != suffix:
            raise InputError(f"--format {suffix[1:]} contradicts the output {target.name}")
        jobs = [_single(jobs[0], target)]
    else:
        jobs = _name_outputs(jobs, target, suffix)
    return _guard_inputs(jobs)
