"""Random folders and command lines of `tinysr upscale`, in this process, with a network that repeats pixels.

After each run: the exit code is a documented one and fits the report; no input and no file that nobody named has
changed; nothing is left under a temporary name; every input is accounted for; all that was printed is printable.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import stat
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import tinysr_kernels
from tests.files.video.films import make
from tests.runtime.sample_images import FakeModel, noise, sample_image
from tinysr_kernels.atomic import is_temporary
from tinysr_kernels.cli.main import main
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.files.plan.records import FILE_NAME

STEMS = ("a", "b", "A", "photo 1", "ünï", "日本", "x.y", "IMG.2024", "-q", "--report", "[1]", "a_png", "a_2", "*")
ODD_STEMS = ("\x1b[31m", "new\nline", "\u202egnp", os.fsdecode(b"\xff\xfe"), "x" * 250, "ä" * 125, " ", "'\"", "\\")
SUFFIXES = (".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", ".PNG", ".jpeg", "")
FORMS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".bmp": "BMP", ".gif": "GIF"}
ORDINARY = (".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", "a.xmp", "a.json", "notes.txt", ".hidden.png", "empty")
CODES = {0: "accepted", 1: "failed", 2: "refused"}

_FILM: list[bytes] = []


def setup() -> None:
    """Make a film once; it takes longer than a case."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "film.mp4")
        _FILM.append((Path(folder) / "film.mp4").read_bytes())


def image_bytes(rng: random.Random, suffix: str) -> bytes:
    """A small image, now and then in another format than its suffix says, or transparent, or of 16 bits."""
    form = FORMS.get(suffix.lower(), rng.choice(["PNG", "JPEG", "WEBP"]))
    if rng.random() < 0.1:
        form = "PNG"
    alpha = form in ("PNG", "WEBP") and rng.random() < 0.4
    stream = io.BytesIO()
    sample_image("RGBA" if alpha else "RGB", rng.randint(1, 4), rng.randint(1, 4), seed=rng.randint(0, 99)).save(
        stream, form
    )
    return stream.getvalue()


def content(rng: random.Random, suffix: str) -> bytes:
    """An image mostly, else a broken one, a text, noise, nothing."""
    kind = rng.random()
    if kind < 0.96:
        return image_bytes(rng, suffix)
    if kind < 0.98:
        data = image_bytes(rng, suffix)
        return data[: rng.randint(0, len(data))]
    return rng.choice([b"", b"remember the milk\n", noise(4, 4, seed=rng.randint(0, 9)).tobytes(), b"\x89PNG"])


def name(rng: random.Random, suffix: str) -> str:
    stem = rng.choice(ODD_STEMS if rng.random() < 0.15 else STEMS)
    return stem[: 255 - len(suffix) - len(os.fsencode(stem)) + len(stem)] + suffix


def fill(rng: random.Random, folder: Path, depth: int = 0) -> None:
    """Files, links, special files and subfolders."""
    folder.mkdir(exist_ok=True)
    for _ in range(rng.randint(0, 5)):
        suffix = rng.choice(SUFFIXES)
        path = folder / name(rng, suffix)
        with contextlib.suppress(OSError):
            place(rng, path, suffix)
    if rng.random() < 0.5:
        (folder / rng.choice(ORDINARY)).write_bytes(b"" if rng.random() < 0.3 else b"\0\5\x16\7 of the system")
    if rng.random() < 0.04:
        (folder / f"film{rng.choice(['.mp4', '.mkv', '', '.avi'])}").write_bytes(_FILM[0])
    if rng.random() < 0.1:
        (folder / f".tinysr-{rng.getrandbits(64):016x}.part").write_bytes(b"half")
    if depth < 2 and rng.random() < 0.4:
        with contextlib.suppress(FileExistsError):
            fill(rng, folder / rng.choice(["sub", "x.png", "@eaDir", ".thumbnails", "A"]), depth + 1)


def place(rng: random.Random, path: Path, suffix: str) -> None:
    """Put a file at a path, or a link, or something that is neither."""
    kind = rng.random()
    others = sorted(each for each in path.parent.iterdir() if not each.is_dir())
    if os.path.lexists(path):
        return
    if kind < 0.88:
        path.write_bytes(content(rng, suffix))
    elif kind < 0.92 and others:
        os.link(rng.choice(others), path)
    elif kind < 0.97:
        targets = [*others, path, Path("nowhere"), Path(os.devnull), path.parent]
        path.symlink_to(os.path.relpath(rng.choice(targets), path.parent))
    elif kind < 0.985:
        os.mkfifo(path)
    else:
        path.write_bytes(content(rng, suffix))


@dataclass
class World:
    """What is on the disk: type, link target and content of each entry below a folder."""

    root: Path
    entries: dict[str, tuple[str, bytes | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder, folders, files in os.walk(self.root):
            for each in [*folders, *files]:
                path = os.path.join(folder, each)
                mode = os.lstat(path).st_mode
                if stat.S_ISLNK(mode):
                    entry: tuple[str, bytes | str] = ("link", os.readlink(path))
                elif stat.S_ISREG(mode):
                    entry = ("file", Path(path).read_bytes())
                else:
                    entry = ("folder" if stat.S_ISDIR(mode) else "special", "")
                self.entries[os.path.relpath(path, self.root)] = entry


def some(rng: random.Random, *choices: str, chance: float = 0.2) -> list[str]:
    return list(choices) if rng.random() < chance else []


def files_of(root: Path) -> list[str]:
    return sorted(os.path.relpath(path, root) for path in root.rglob("*") if not path.is_dir())


def command_line(rng: random.Random, root: Path) -> tuple[list[str], list[str], str, str | None]:
    """Arguments, and of them the inputs, the output and the report."""
    files = files_of(root)
    near = [rng.choice(files) for _ in range(2)] if files else []
    sources = ["in", "in", "in/*", "in/**/*.png", "./in", "new/../in", "linked", "in/*/../*", *near, *near]
    if rng.random() < 0.1:
        sources += ["", ".", "missing.png", "nothing*", "out", "x" * 300, os.fsdecode(b"\xff.png")]
    inputs = [rng.choice(sources) for _ in range(1 if rng.random() < 0.6 else rng.randint(1, 3))]
    stem = rng.choice(["big", "photo", "a"])
    outputs = ["out", "out", "out", "out/", "in", "linked", "new/../in", "out/deep/er", "in/out", "v1.5"]
    if inputs[0] in near and len(inputs) == 1:
        outputs += [f"{stem}{suffix}" for suffix in (".png", ".jpg", ".webp")]
    if rng.random() < 0.15:
        outputs = ["", "-", "x.exr", "x.mp4", *near, os.devnull, "in/a.png/x", "new/../in/a.png"]
    output = rng.choice(outputs)
    reports = ["report.jsonl", "report.jsonl", "-"]
    if rng.random() < 0.2:
        reports = ["old report", *near, "in/a.png", "", "out/a.png", "no/report", ".", os.devnull]
    report = rng.choice(reports) if rng.random() < 0.6 else None
    options = [
        *some(rng, "-r", chance=0.4),
        *some(rng, "--skip-existing", chance=0.4),
        *some(rng, "--format", rng.choice(["png", "jpg", "webp", "tiff"]), chance=0.3),
        *some(rng, "--strict", chance=0.05),
        *some(rng, "-q", chance=0.1),
        *some(rng, "--strip-metadata", chance=0.1),
        *some(rng, "--max-pixels", str(rng.randint(1, 20)), chance=0.1),
        *some(rng, "--frame", str(rng.randint(0, 2)), chance=0.1),
        *some(rng, "--quality", str(rng.randint(-1, 101)), chance=0.05),
        *some(rng, "--nonsense\x1b[2J", chance=0.02),
    ]
    argv = ["upscale", "--model", "demo", *options, f"--output={output}"]
    if report is not None:
        argv.append(f"--report={report}")
    return [*argv, "--", *inputs], inputs, output, report


def may_change(root: Path, inputs: list[str], output: str, results: set[str]) -> Callable[[str], bool]:
    """Which existing files a run may replace: the one named, its own results, and in the folder names of inputs."""
    target = Path(os.path.normpath(root / output)) if output else root / "."
    names = {path.name for each in ("in", "linked", ".") for path in (root / each).rglob("*")}
    names |= {Path(each).name for each in inputs}
    named = {os.path.realpath(target), os.path.realpath(root / output)}

    def allowed(relative: str) -> bool:
        path = root / relative
        inside = target in path.parents or Path(os.path.realpath(target)) in path.parents
        return (
            os.path.realpath(path) in named
            or relative in results
            or path.name == FILE_NAME
            or (inside and path.name in names)
            or (inside and is_temporary(path.name))
        )

    return allowed


def originals_of(plan_arguments: tuple[list[str], str, bool, str | None]) -> tuple[set[str], int] | None:
    """The real paths of all inputs, and how many there are; None if the command line is refused."""
    inputs, output, recursive, suffix = plan_arguments
    try:
        plan = plan_jobs(inputs, output, recursive=recursive, suffix=suffix)
    except tinysr_kernels.InputError:
        return None
    paths = {os.path.realpath(job.source) for job in plan} | {os.path.abspath(job.source) for job in plan}
    return paths, len(plan)


def run(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = main(argv)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return code, streams[0].getvalue(), streams[1].getvalue()


def check_report(text: str, code: int, planned: int, argv: list[str]) -> list[dict]:
    """The results of the last run in a report: one for each input, fitting the exit code."""
    assert text.isascii()
    lines = [json.loads(line) for line in text.splitlines()]
    begin = max(i for i, line in enumerate(lines) if "run" in line)
    assert lines[begin]["run"]["arguments"] == argv
    results, summary = lines[begin + 1 : -1], lines[-1]["summary"]
    if "--strict" not in argv:
        assert len(results) == planned, (len(results), planned)
    failed = sum(line["status"] == "failed" for line in results)
    assert (code == 1) == (failed > 0)
    assert summary.get("failed", 0) == failed
    for line in results:
        assert line["status"] in ("done", "skipped", "failed")
        assert (line["error"] is not None) == (line["status"] == "failed")
        if line["status"] == "done" and line["mode"] != "video":
            with Image.open(line["output"]) as image:
                assert list(image.size) == line["output_size"] == [4 * side for side in line["input_size"]]
                image.load()
    return results


def check(
    root: Path, before: World, originals: set[str], allowed: Callable[[str], bool], report: str | None, code: int
) -> set[str]:
    """What changed may change -> the new files."""
    after = World(root)
    report_path = os.path.relpath(os.path.realpath(root / report), root) if report else None
    for relative, entry in before.entries.items():
        now = after.entries.get(relative)
        if now == entry:
            continue
        if relative == report_path:
            assert now is not None
            assert now[1].startswith(entry[1]), f"the report {relative!r} has lost its beginning"
            continue
        if (is_temporary(Path(relative).name) or Path(relative).name == FILE_NAME) and allowed(relative):
            continue  # named as inputs they are refused, but they stay the program's
        assert os.path.realpath(root / relative) not in originals or entry[0] == "link", f"input {relative!r} changed"
        assert str(root / relative) not in originals, f"input {relative!r} changed"
        assert code != 2, f"{relative!r} changed by a refused command"
        assert allowed(relative), f"{relative!r} changed from {entry!r:.80} to {now!r:.80}"
    made = set(after.entries) - set(before.entries)
    assert not [each for each in made if is_temporary(Path(each).name)], made
    assert code != 2 or not made - {report_path}, made
    return {each for each in made if after.entries[each][0] == "file"}


def case(seed: int, folder: Path) -> str:
    """A folder and one to three command lines in it; the outcome of the last one."""
    rng = random.Random(seed)
    root = folder / "root"
    root.mkdir()
    fill(rng, root / "in")
    for each in ("out", "elsewhere"):
        if rng.random() < 0.5:
            fill(rng, root / each)
    (root / "linked").symlink_to("in")
    (root / "old report").write_bytes(b'{"input": "x"}\n' if rng.random() < 0.5 else b"no report")
    for each in ("photo.png", "big_2.png"):
        (root / each).write_bytes(b"somebody's")
    results: set[str] = set()
    outcome = "refused"
    with contextlib.chdir(root), mock.patch.object(tinysr_kernels, "compile", return_value=FakeModel()):
        for _ in range(rng.randint(1, 3)):
            outcome = one(rng, root, results)
    return outcome


def one(rng: random.Random, root: Path, results: set[str]) -> str:
    """One command line and all checks; `results` receives the files that it made."""
    argv, inputs, output, report = command_line(rng, root)
    suffix = f".{argv[argv.index('--format') + 1]}" if "--format" in argv else None
    planned = originals_of((inputs, output, "-r" in argv, suffix))
    before = World(root)
    allowed = may_change(root, inputs, output, results)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        code, out, err = run(argv)
    assert code in CODES, code
    assert all(letter.isprintable() or letter == "\n" for letter in out + err), (out, err)
    assert "Traceback" not in err
    assert (code == 2) == (planned is None) or code == 2, err
    results |= check(root, before, planned[0] if planned else set(), allowed, report, code)
    if code == 2:
        assert err
    elif report not in (None, os.devnull) and planned is not None:
        text = out if report == "-" else (root / report).read_text("ascii")
        check_report(text, code, planned[1], argv)
    return CODES[code]
