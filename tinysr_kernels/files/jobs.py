"""Plan a run: find the input files and choose all output names before the first image is upscaled.

One input file and an output with an image or film suffix: the result is that file. Otherwise the output is a folder,
and results are named as plan/outputs.py describes. Every image also has a PNG fallback name, used if the chosen format
cannot store the result. A result never overwrites an input, and a file that nobody named is never replaced.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.encode import FORMATS, writable
from tinysr_kernels.files.plan.identity import Originals, identities
from tinysr_kernels.files.plan.inputs import Input, Search, find_inputs
from tinysr_kernels.files.plan.outputs import fit, name_beside, name_outputs
from tinysr_kernels.files.plan.recognize import is_video
from tinysr_kernels.files.plan.records import Records
from tinysr_kernels.files.video import VIDEO_SUFFIXES

__all__ = ["VIDEO_SUFFIXES", "Job", "Plan", "is_video", "plan_jobs"]

# `-o result.exr` is a slip, `-o v1.5` and `-o 2026.11.30` are folders.
_LIKE_A_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,11}")


@dataclass(frozen=True)
class Job:
    """One input file and its output path.

    relative: path of the input below the input folder; the output mirrors it. fallback: the PNG to write instead if the
    output's format cannot store the result; equal to output for PNG and films. problem: why the job cannot run; then
    output and fallback are None. folder: the output folder; None if the user named the output file itself.
    """

    source: Path
    relative: Path
    output: Path | None = None
    fallback: Path | None = None
    video: bool = False
    problem: str | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Plan(Sequence[Job]):
    """The jobs of a run in order. ignored: how many files of folders were left alone, by reason.

    originals: the files that the run must not replace. records: what earlier runs have made.
    """

    jobs: tuple[Job, ...]
    ignored: Counter[str] = field(default_factory=Counter)
    originals: Originals = field(default_factory=lambda: Originals(()))
    records: Records = field(default_factory=Records)

    @overload
    def __getitem__(self, index: int) -> Job: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Job]: ...

    def __getitem__(self, index: int | slice) -> Job | Sequence[Job]:
        return self.jobs[index]

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)


def _images() -> str:
    return " ".join(filter(writable, FORMATS))


def _check_parents(target: Path) -> None:
    """Raise InputError if a file stands where a folder would have to be."""
    for parent in target.parents:
        if os.path.lexists(parent):
            if not os.path.isdir(parent):
                raise InputError(f"{target} cannot be written: {parent} is not a folder")
            return


def _target(output: str) -> tuple[Path, bool]:
    """The output path, and whether it names a file instead of a folder. Raises InputError for what is neither."""
    if not output or "\0" in output:
        raise InputError(f"{output!r} is no name of an output; an empty variable in the command line?")
    if output == "-":
        raise InputError("results cannot be written to stdout; name a file or a folder")
    target = Path(output)
    _check_parents(target)
    seps = tuple(filter(None, (os.sep, os.altsep)))
    if os.path.isdir(target):
        return target, False
    if output.endswith(seps) or target.name in ("", ".", ".."):
        if os.path.lexists(target):
            raise InputError(f"{target} is not a folder")
        return target, False
    end = target.suffix.lower()
    named_file = end in VIDEO_SUFFIXES or writable(end)
    if os.path.lexists(target):
        if not named_file:
            raise InputError(f"{target} is a file; the output must be a folder, or end in an image or video suffix")
        if os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode):
            raise InputError(f"{target} is not a regular file")
    elif not named_file and (end in FORMATS or _LIKE_A_SUFFIX.fullmatch(end)):
        known = " ".join([_images(), *VIDEO_SUFFIXES])
        raise InputError(f"cannot write {end}; choose one of {known}, or write {target}{os.sep} for a folder")
    return target, named_file


def _single(item: Input, output: Path) -> Job:
    job = Job(item.source, item.relative, video=item.video, problem=item.problem)
    if job.problem:
        return job
    suffix = output.suffix.lower()
    if job.video != (suffix in VIDEO_SUFFIXES):
        kind, known = ("a video", " ".join(VIDEO_SUFFIXES)) if job.video else ("an image", _images())
        return replace(job, problem=f"{kind} cannot be written to {output.name}; choose one of {known}")
    return replace(job, output=output, fallback=output if job.video else fit(output.with_suffix(".png")))


def _in_folder(items: Sequence[Input], folder: Path, suffix: str | None) -> list[Job]:
    names = iter(name_outputs([item for item in items if not item.problem], suffix))
    jobs = []
    for item in items:
        job = Job(item.source, item.relative, video=item.video, problem=item.problem)
        if not job.problem:
            output, fallback = next(names)
            job = replace(job, output=folder / output, fallback=folder / fallback, folder=folder)
        jobs.append(job)
    return jobs


def _beside(items: Sequence[Input], end: str, suffix: str | None) -> list[Job]:
    """Every result beside its input, under a name that is free."""
    paths = iter(name_beside([item for item in items if not item.problem], end, suffix))
    return [
        Job(item.source, item.relative, video=item.video, problem=item.problem)
        if item.problem
        else _single(item, next(paths))
        for item in items
    ]


def _guarded(job: Job, originals: Originals) -> Job:
    """The job, as a problem if it would overwrite an input; without its fallback if that would."""
    follow = job.folder is None
    if job.output is not None and originals.hold(job.output, follow_link=follow):
        return replace(job, output=None, fallback=None, problem=f"{job.output} is an input and is never overwritten")
    return job


def plan_jobs(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    recursive: bool = False,
    suffix: str | None = None,
    end: str = "_x4",
) -> Plan:
    """The jobs of a run in order, including inputs that cannot be processed (Job.problem). Creates no file or folder.

    inputs: files, folders, globs. output: a file or a folder, see above; None: every result beside its input, its name
    ended by `end`, numbered if that is taken. suffix: format of all images, such as ".png". Raises InputError if there
    are no inputs, if several inputs are to go into one file, if a folder's results are to lie beside it, and if the
    output's format cannot be written.
    """
    if suffix is not None and not writable(suffix):
        raise InputError(f"cannot write {suffix}; choose one of {_images()}")
    if not inputs:
        raise InputError("no inputs")
    records = Records()
    if output is None:
        folder = next((one for one in inputs if os.path.isdir(one)), None)
        if folder is not None:
            raise InputError(f"{os.fspath(folder)} is a folder: name one for its results with -o")
        found = find_inputs(inputs, Search(recursive, frozenset(), records))
        originals = Originals(item.source for item in found.found)
        jobs = _beside(found.found, end, suffix)
        return Plan(tuple(_guarded(job, originals) for job in jobs), found.ignored, originals, records)
    target, named_file = _target(os.fspath(output))
    search = Search(recursive, frozenset() if named_file else identities(target), records)
    found = find_inputs(inputs, search)
    originals = Originals(item.source for item in found.found)
    if named_file:
        if len(found.found) != 1 or os.path.isdir(inputs[0]):
            raise InputError(f"cannot write {len(found.found)} inputs to one file {target}; use a folder as the output")
        if suffix is not None and FORMATS.get(target.suffix.lower()) != FORMATS[suffix]:
            raise InputError(f"--format {suffix[1:]} contradicts the output {target.name}")
        jobs = [_single(found.found[0], target)]
    else:
        jobs = _in_folder(found.found, target, suffix)
    return Plan(tuple(_guarded(job, originals) for job in jobs), found.ignored, originals, records)
