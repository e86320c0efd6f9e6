"""Files are complete or absent whatever interrupts the write; only abandoned temporary files are removed."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests import ROOT
from tests.runtime.sample_images import noise, put
from tinysr_kernels import atomic
from tinysr_kernels.atomic import is_temporary, remove_abandoned, replacing, write_bytes
from tinysr_kernels.files.picture_io import write_image

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX locks, links and permissions")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def python(script: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143), MemoryError()])
@pytest.mark.parametrize("where", ["encode", "write", "fsync", "check", "replace"])
def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch, error, where):
    target = put(tmp_path, "a.png", b"as it was")

    def fail(*_arguments, **_options):
        raise error

    def write_half():
        with replacing(target) as temporary:
            temporary.write_bytes(b"half of it")
            fail()

    writes = {"write": write_half, "check": partial(write_bytes, target, b"new", check=fail)}
    with monkeypatch.context() as patch:
        if where == "encode":
            patch.setattr(Image.Image, "save", fail)
        elif where in ("replace", "fsync"):
            patch.setattr(atomic.os, where, fail)
        with pytest.raises(type(error)):
            writes.get(where, partial(write_image, target, noise(4, 4)))()
    assert target.read_bytes() == b"as it was"
    assert names(tmp_path) == ["a.png"]


def test_the_file_is_flushed_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("folder" if is_folder else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def recorded_replace(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(atomic.os, "fsync", recorded_fsync)
    monkeypatch.setattr(atomic.os, "replace", recorded_replace)
    write_bytes(tmp_path / "a.png", b"12345")
    assert steps == ["file of 5", "rename", "folder"][: None if os.name != "nt" else 2]


@posix
def test_permissions_and_links(tmp_path):
    mask = os.umask(0o022)
    try:
        write_bytes(tmp_path / "a.png", b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o644
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    write_bytes(tmp_path / "link.png", b"y")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "a.png").read_bytes() == b"y"
    write_bytes(tmp_path / "link.png", b"z", follow_link=False)
    assert not (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "a.png").read_bytes() == b"y"


@posix
@pytest.mark.parametrize("links", [True, False])
def test_without_overwriting_an_existing_file_or_link_stays(tmp_path, monkeypatch, links):
    def no_links(_source, _target):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(atomic.os, "link", no_links)
    write_bytes(tmp_path / "a.png", b"x", overwrite=False)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    for name in ("a.png", "dangling.png"):
        with pytest.raises(FileExistsError):
            write_bytes(tmp_path / name, b"y", overwrite=False, follow_link=False)
    assert (tmp_path / "a.png").read_bytes() == b"x"
    assert names(tmp_path) == ["a.png", "dangling.png"]


def test_any_name_that_a_folder_can_hold_can_be_written(tmp_path):
    for name in ("x" * 251 + ".png", "ä" * 125 + ".png"):
        write_bytes(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"


@posix
def test_only_abandoned_temporary_files_are_removed(tmp_path):
    kept = [".tinysr-0123.part", ".tinysr-0123456789abcdef.part.png", "a.part", ".a.png.01234567.part"]
    for name in kept:
        put(tmp_path, name, b"x")
    with replacing(tmp_path / "a.png") as live:
        abandoned = put(tmp_path, ".tinysr-0123456789abcdef.part", b"x")
        (tmp_path / ".tinysr-00000000000000aa.part").mkdir()
        (tmp_path / ".tinysr-00000000000000bb.part").symlink_to(tmp_path / "a.part")
        os.mkfifo(tmp_path / ".tinysr-00000000000000cc.part")
        assert remove_abandoned(tmp_path) == 1
        assert live.exists()
        assert not abandoned.exists()
        live.write_bytes(b"whole")
    odd = [".tinysr-00000000000000aa.part", ".tinysr-00000000000000bb.part", ".tinysr-00000000000000cc.part"]
    assert names(tmp_path) == sorted([*kept, *odd, "a.png"])
    assert remove_abandoned(tmp_path / "missing") == 0


@posix
def test_a_temporary_file_taken_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, taken = atomic.lock, []

    def slow_lock(descriptor, **options):
        if not taken:
            taken.append(1)
            assert remove_abandoned(tmp_path) == 1
        return lock(descriptor, **options)

    monkeypatch.setattr(atomic, "lock", slow_lock)
    write_bytes(tmp_path / "a.png", b"whole")
    assert (tmp_path / "a.png").read_bytes() == b"whole"
    assert names(tmp_path) == ["a.png"]


@posix
def test_another_process_keeps_its_temporary_file_until_it_dies(tmp_path):
    process = python(f"""
import time
from functools import partial
from pathlib import Path
from tinysr_kernels.atomic import replacing
with replacing(Path({str(tmp_path / "a.png")!r})) as part:
    part.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(600)
""")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"ready"
    assert remove_abandoned(tmp_path) == 0
    (part,) = names(tmp_path)
    assert is_temporary(part)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert names(tmp_path) == [part]
    assert remove_abandoned(tmp_path) == 1
    assert names(tmp_path) == []


@posix
def test_twenty_kills_leave_only_whole_files(tmp_path):
    """A process replaces one file over and over and is killed at a random moment."""
    sizes = (10, 3_000_000)
    for seed in range(20):
        process = python(f"""
from pathlib import Path
from tinysr_kernels.atomic import write_bytes
print("ready", flush=True)
for i in range(10**9):
    write_bytes(Path({str(tmp_path)!r}) / f"{{i % 5}}.png", b"x" * {sizes}[i % 2])
""")
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready"
        time.sleep(random.Random(seed).uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        left = [path for path in tmp_path.iterdir() if not is_temporary(path.name)]
        assert all(path.stat().st_size in sizes for path in left)
    remove_abandoned(tmp_path)
    assert not any(is_temporary(name) for name in names(tmp_path))
    assert len(names(tmp_path)) >= 1
