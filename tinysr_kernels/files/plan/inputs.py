"""Find the inputs of a run: the files that files, folders and globs name, without what is in ordinary folders anyway.

In folders and globs, files that are neither images nor films, hidden files, sub-folders (unless wanted) and results of
earlier runs are no failures: they are counted and left alone. A file that claims by its suffix to be an image or film
is a failure if it is none, and so is whatever was named itself and cannot be enlarged.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinysr_kernels.atomic import is_temporary
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.plan.globs import expand, fixed_part, has_magic
from tinysr_kernels.files.plan.identity import entry, identities
from tinysr_kernels.files.plan.recognize import Content, claims_to_be, recognize
from tinysr_kernels.files.plan.records import FILE_NAME, Records

HIDDEN = "hidden"
SYSTEM = "system folders"
OTHER = "not images or films"
SUBFOLDER = "subfolders, without --recursive"
LINKED = "links to folders"
RESULT = "results of earlier runs"

_SYSTEM_FOLDERS = frozenset(("@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found"))


@dataclass(frozen=True)
class Input:
    """One file of a run. relative: its path below the folder that was named. named: whether it was named itself.

    video: whether it is a film. suffix: of its content, where that can be written. problem: why it cannot be enlarged.
    """

    source: Path
    relative: Path
    named: bool = False
    video: bool = False
    suffix: str | None = None
    problem: str | None = None


@dataclass
class Inputs:
    """All inputs in order, and how many files were left alone, by reason."""

    found: list[Input] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Search:
    """How folders are searched. output: identities of the folder that results go to; it is left out."""

    recursive: bool
    output: frozenset[object]
    records: Records

    def is_output(self, path: Path) -> bool:
        """Whether a folder is the one that results go to."""
        return bool(self.output) and not self.output.isdisjoint(identities(path))


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"cannot be read: {error.strerror or error}"


def _recognized(item: Input, ignored: Counter[str]) -> Iterator[Input]:
    """The input with what its content is; nothing if it may be ignored."""
    if is_temporary(item.source.name) or item.source.name == FILE_NAME:
        if item.named:
            yield replace(item, problem="a file of this program: an unfinished result, or the record of results")
        else:
            ignored[HIDDEN] += 1
        return
    claim = claims_to_be(item.source)
    try:
        content = recognize(item.source)
    except FileNotFoundError:
        problem = "a link that leads nowhere" if os.path.islink(item.source) else "no such file"
    except InputError as error:
        problem = str(error)
    except OSError as error:
        yield replace(item, problem=_reason(error))  # it may be anything
        return
    else:
        if content.kind is not None or claim is not None or item.named:
            yield _with_content(item, content, claim == "film")
        else:
            ignored[OTHER] += 1
        return
    if claim is not None or item.named:
        yield replace(item, problem=problem)
    else:
        ignored[OTHER] += 1


def _with_content(item: Input, content: Content, claims_film: bool) -> Input:
    """What neither decoder knows is handed to the one that its suffix calls for, which says what is wrong."""
    video = content.kind == "film" or (content.kind is None and claims_film)
    return replace(item, video=video, suffix=content.suffix)


def _in_folder(folder: Path, search: Search, ignored: Counter[str], top: bool = True) -> Iterator[Input]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda each: each.name)
    except OSError as error:
        yield Input(folder, Path(folder.name), problem=f"the folder {_reason(error)}")
        return
    # Results in a folder that was named to be enlarged into another one are meant.
    skip_results = not top or search.is_output(folder)
    for each in entries:
        path, name = folder / each.name, Path(each.name)
        try:
            is_folder = each.is_dir()
        except OSError:
            is_folder = False  # a loop of links; recognize() names the reason
        if each.name.startswith("."):
            ignored[HIDDEN] += 1
        elif not is_folder:
            if skip_results and search.records.of_result(path) is not None:
                ignored[RESULT] += 1
            else:
                yield from _recognized(Input(path, name), ignored)
        elif search.is_output(path):
            continue
        elif each.name.casefold() in _SYSTEM_FOLDERS:
            ignored[SYSTEM] += 1
        elif not search.recursive:
            ignored[SUBFOLDER] += 1
        elif each.is_symlink():
            ignored[LINKED] += 1  # links can form cycles
        else:
            for item in _in_folder(path, search, ignored, top=False):
                yield replace(item, relative=name / item.relative)


def _in_pattern(pattern: str, search: Search, ignored: Counter[str]) -> Iterator[Input]:
    """The files that match a glob; subfolders below its fixed part are mirrored."""
    fixed = os.path.abspath(fixed_part(pattern))
    found = list(expand(pattern))
    if not found:
        yield Input(Path(pattern), Path("pattern"), problem="no file matches")
    for path in found:
        if os.path.isdir(path):
            continue
        if search.records.of_result(path) is not None and search.is_output(path.parent):
            ignored[RESULT] += 1
            continue
        # `..` behind a wildcard may lead out of the fixed part: the output folder is never left.
        relative = Path(os.path.relpath(os.path.abspath(path), fixed))
        yield from _recognized(Input(path, Path(path.name) if ".." in relative.parts else relative), ignored)


def _from(text: str, search: Search, ignored: Counter[str]) -> Iterator[Input]:
    """The inputs that one argument names."""
    path = Path(text)
    if os.path.isdir(path):
        nothing = ignored.copy()
        inside = list(_in_folder(path, search, ignored))
        if not inside and not ignored - nothing:
            yield Input(path, Path(path.name), problem="the folder is empty")
        elif not inside and not (ignored - nothing)[RESULT]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in (ignored - nothing).items())
            yield Input(path, Path(path.name), problem=f"no image or film in the folder ({reasons})")
        yield from inside
    elif os.path.lexists(path) or not has_magic(text):
        yield from _recognized(Input(path, Path(path.name), named=True), ignored)
    else:
        yield from _in_pattern(text, search, ignored)


def find_inputs(arguments: Iterable[str | os.PathLike[str]], search: Search) -> Inputs:
    """All inputs that the arguments (files, folders, quoted globs) name; an entry named twice counts once.

    Links and hard links are entries of their own. Raises InputError for an argument that can name no file.
    """
    result = Inputs()
    seen: set[str] = set()
    for argument in arguments:
        text = os.fspath(argument)
        if not text or "\0" in text:
            raise InputError(f"{text!r} is no name of a file; an empty variable in the command line?")
        for item in _from(text, search, result.ignored):
            key = entry(item.source)
            if key not in seen:
                seen.add(key)
                result.found.append(item)
    return result
