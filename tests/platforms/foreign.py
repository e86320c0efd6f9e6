"""A script: the package under a system that lacks what only POSIX has, and does not rename or remove open files.

Run by `test_foreign.py`. It imports every module, then does to files what the command and the library do.
"""

import importlib
import os
import pkgutil
import signal
import sys
import types
from pathlib import Path

import av
import filelock
import numpy as np
import PIL.Image
import safetensors.torch
import tifffile
import torch
import tqdm

THIRD_PARTY = (av, filelock, np, PIL, safetensors, tifffile, torch, tqdm)
"""These have their own ways; only what this project does itself is looked at."""
MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline")
OS = """
    sched_getaffinity sched_setaffinity getuid geteuid getgid getegid getpgid setsid killpg fork forkpty chown
    lchown posix_fallocate posix_fadvise fchmod fchown sysconf statvfs fstatvfs uname getloadavg nice mkfifo
    mknod pread pwrite sendfile setpgid getpgrp wait3 wait4 register_at_fork memfd_create openpty ttyname
    getpriority setpriority O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY O_SYNC O_NOCTTY
"""
SIGNALS = """
    SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGPIPE SIGCHLD SIGQUIT SIGWINCH SIGTSTP alarm setitimer
    pthread_kill siginterrupt sigwait
"""


def remove_posix() -> None:
    """What is missing on Windows, and from several other systems; and the locks that Windows has instead."""
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=lambda *_: None, LK_NBLCK=2)  # type: ignore[assignment]
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((os, OS), (signal, SIGNALS)):
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)


def is_open(path: str | os.PathLike[str]) -> bool:
    """Whether this process has the file open, or mapped into its memory."""
    real = os.path.realpath(path)
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{entry}") == real:
                return True
        except OSError:
            continue
    return any(line.endswith(f" {real}\n") for line in open("/proc/self/maps", encoding="utf-8"))


def keep_open_files() -> None:
    """Rename and remove no file that is open."""
    originals = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove")}

    def guarded(name: str):
        def function(path, *others, **options):
            for one in (path, *others):
                if isinstance(one, (str, os.PathLike)) and is_open(one):
                    raise PermissionError(13, f"{name}: the file is open", str(one))
            return originals[name](path, *others, **options)

        return function

    for name in originals:
        setattr(os, name, guarded(name))


def modules() -> list[str]:
    """Every module of the package and of the tools, but those that run when they are imported."""
    found = []
    for package in ("tinysr_kernels", "autotune", "benchmarks"):
        walked = pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
        found += [one.name for one in walked if not one.name.endswith("__main__")]
    return found


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def use_files(folder: Path) -> None:
    """Write, replace, refuse to replace, clean up; a folder of images three times; a film; a checkpoint twice."""
    from tests.files.video.films import make
    from tinysr_kernels import atomic
    from tinysr_kernels import compile as compile_model
    from tinysr_kernels.cli.main import main

    target = folder / "a.bin"
    atomic.write_bytes(target, b"one")
    atomic.write_bytes(target, b"two")
    expect(target.read_bytes() == b"two", "an existing file is replaced")
    try:
        atomic.write_bytes(target, b"three", overwrite=False)
        raise AssertionError("an existing file was replaced")
    except FileExistsError:
        pass
    (folder / f".tinysr-{'0' * 16}.part").write_bytes(b"left by an earlier run")
    expect(atomic.remove_abandoned(folder) == 1, "what an interrupted run left is removed")
    expect(os.listdir(folder) == ["a.bin"], "nothing else is left")

    pictures, results = folder / "pictures", folder / "results"
    pictures.mkdir()
    for color in ("teal", "teal", "olive"):  # made, found complete, replaced
        for name in ("one.png", "two.jpg"):
            PIL.Image.new("RGB", (12, 8), color).save(pictures / name)
        expect(main(["upscale", str(pictures), "-o", str(results), "--model", "demo"]) == 0, f"images, {color}")
    make(folder / "film.mp4", count=3, size=(16, 16), audio=0)
    expect(main(["upscale", str(folder / "film.mp4"), "-o", str(folder / "large.mp4"), "--model", "demo"]) == 0, "film")

    checkpoint = folder / "model.safetensors"
    compile_model("demo").save(checkpoint)
    compile_model("demo").save(checkpoint, replace=True)
    left = [str(path) for path in folder.rglob("*") if path.suffix in (".part", ".segments")]
    expect(not left, f"temporary files are left: {left}")


def run() -> None:
    remove_posix()
    for name in modules():
        importlib.import_module(name)
    keep_open_files()
    host_memory = importlib.import_module("tinysr_kernels.runtime.device.host_memory")
    host_memory.sys = types.SimpleNamespace(platform="win32")  # type: ignore[attr-defined]
    use_files(Path(sys.argv[1]))
    sys.stdout.write("done\n")


if __name__ == "__main__":
    run()
