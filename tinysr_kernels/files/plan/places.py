"""Where a result is written in the end: never over an input, never over a file that nobody named.

A path is named if the user wrote it, or if it is the output folder with the input's own name. Every other name (another
suffix, the PNG fallback, a number) replaces a file only if that is recorded as an earlier result of the same input;
otherwise the result gets the next free number. A symbolic link in an output folder is replaced, never followed; a path
that the user wrote is followed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from tinysr_kernels import atomic
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.jobs import Job, Plan
from tinysr_kernels.files.plan.identity import Originals
from tinysr_kernels.files.plan.outputs import name_key, numbered
from tinysr_kernels.files.plan.records import Records, Source
from tinysr_kernels.runtime.notices import notice


class DiskFull(OSError):
    """The disk was full at an earlier result, and still is: the network need not run."""


def _is_named(job: Job, path: Path) -> bool:
    return path == job.output and (job.folder is None or path.name == job.source.name)


class Places:
    """Chooses and writes the final paths of a run. Safe for several threads and several runs."""

    def __init__(self, plan: Plan) -> None:
        self._originals: Originals = plan.originals
        self._records: Records = plan.records
        planned: Iterable[Path | None] = (path for job in plan for path in (job.output, job.fallback))
        self._reserved = {name_key(path) for path in planned if path is not None}
        self._full: dict[Path, int] = {}

    def candidates(self, job: Job, planned: Path) -> Iterator[tuple[Path, bool]]:
        """Paths for a result, best first, and whether an existing file may be replaced there."""
        if _is_named(job, planned):
            yield planned, True
            return
        for path in numbered(planned):
            if (path != planned and name_key(path) in self._reserved) or self._originals.hold(path, follow_link=False):
                continue
            if not os.path.lexists(path):
                yield path, False
            elif self._records.made_from(path, job.source):
                yield path, True

    def prepare(self, job: Job, path: Path) -> None:
        """Make the folder of a result.

        Raises InputError if a link leads out of the output folder, DiskFull, OSError.
        """
        parent = path.parent
        if job.folder is not None:
            inside, real = os.path.realpath(job.folder), os.path.realpath(parent)
            if os.path.commonpath([inside, real]) != inside:
                raise InputError(f"{parent} leads out of the output folder through a link; remove the link")
        parent.mkdir(parents=True, exist_ok=True)
        needed = self._full.get(parent)
        if needed is not None:
            if not atomic.has_room(parent, needed):
                raise DiskFull(f"the disk of {parent} is full")
            self._full.pop(parent, None)

    def write(self, job: Job, planned: Path, data: bytes, source: Source | None) -> Path:
        """Write a result -> the path chosen, with a notice if it is not the planned one. Raises InputError, OSError.

        source: the input as it was read; None if it could not be described.
        """
        for path, overwrite in self.candidates(job, planned):
            try:
                self._write_at(path, overwrite, job, data, source)
            except FileExistsError:
                if overwrite:
                    raise
                # Another run was faster: with this input's result, or with another one's.
                if not self._records.made_from(path, job.source):
                    continue
                self._write_at(path, True, job, data, source)
            if path != planned:
                notice(f"{planned.name} is another file, which was kept: written as {path.name}")
            return path
        raise AssertionError("numbers do not end")

    def _write_at(self, path: Path, overwrite: bool, job: Job, data: bytes, source: Source | None) -> None:
        self.prepare(job, path)  # the folder may have gone while the network ran
        follow = self.follows(job, path)
        recorded = None if follow else source  # a path that the user wrote needs no record
        check = partial(self._just_before, overwrite=overwrite, job=job, size=len(data), source=recorded)
        try:
            atomic.write_bytes(path, data, overwrite=overwrite, follow_link=follow, check=check)
        except OSError as error:
            if error.errno in atomic.DISK_FULL:
                self._full[path.parent] = len(data)
            raise

    def follows(self, job: Job, path: Path) -> bool:
        """Whether a symbolic link at the path is followed: the user wrote this path."""
        return job.folder is None and path == job.output

    def check(self, path: Path, *, job: Job) -> None:
        """Raise InputError if the path is an input now; to be asked just before a result is renamed to it."""
        self._originals.check(path, follow_link=self.follows(job, path))

    def _just_before(self, path: Path, *, overwrite: bool, job: Job, size: int, source: Source | None) -> None:
        self.check(path, job=job)
        if not overwrite and os.path.lexists(path):  # its record stays
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if source is not None:
            self.record(path, size, source)

    def record(self, path: Path, size: int, source: Source) -> None:
        """Record which input a result is made from; a notice if that fails."""
        try:
            self._records.add(path, size, source)
        except OSError as error:
            notice(f"not recorded which input {path.name} was made from: {error.strerror or error}")

    def existing(self, job: Job) -> tuple[Path, bool] | None:
        """The result that an input has from an earlier run, and whether it is known to be made from it; else None."""
        if job.output is None or job.fallback is None:
            return None
        for planned in dict.fromkeys((job.output, job.fallback)):
            for path in numbered(planned):
                if not os.path.lexists(path):
                    break
                if self._records.made_from(path, job.source):
                    return path, True
                if _is_named(job, path):
                    break
        unknown = _is_named(job, job.output) and self._records.of_result(job.output) is None
        if unknown and os.path.isfile(job.output):
            return job.output, job.folder is None
        return None
