"""Files that are complete or absent: written under a temporary name, flushed to the disk, then renamed.

A temporary file is locked while its run lives. The lock ends with the process, however that ends, on whatever machine
or in whatever container it ran, so that a later run removes what an interrupted one has left, and only that.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open: that does for a lock
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.tinysr-[0-9a-f]{16}\.part")
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)

DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
"""Errors of a full disk and of an exhausted quota."""

Check = Callable[[Path], None]
"""Is called with the final path just before the rename and raises to prevent it."""


def is_temporary(name: str) -> bool:
    """Whether a file name is one of this module's temporary names."""
    return _TEMPORARY.fullmatch(name) is not None


def temporary_path(path: Path) -> Path:
    """An unused hidden name in the folder of `path`, so that a rename to `path` is atomic. Its length is fixed."""
    return path.with_name(f".tinysr-{secrets.token_hex(8)}.part")


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process until it is closed -> whether that succeeded.

    wait: until another process releases it; else the answer is False at once. False also where files cannot be locked.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _create(target: Path) -> tuple[Path, int]:
    """Create and lock an empty temporary file beside the target."""
    while True:
        path = temporary_path(target)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        lock(descriptor)
        # Before it was locked, another run may have taken it for abandoned.
        if _is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a rename to the disk. Not every system can; the file is complete either way."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(temporary, target)  # unlike a rename, it fails if there is a file
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(target):  # FAT and some network file systems
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        else:
            temporary.unlink()
            return
    os.replace(temporary, target)


@contextmanager
def replacing(
    path: Path, *, overwrite: bool = True, follow_link: bool = True, check: Check | None = None
) -> Iterator[Path]:
    """Yield an empty temporary file beside `path` for the block to fill; it becomes `path` when the block ends.

    If the block raises, the temporary file is removed and `path` stays as it was. overwrite: whether an existing file
    is replaced; else FileExistsError. follow_link: whether a symbolic link stays and the file it leads to is replaced;
    else the link is replaced. Raises OSError, and what `check` raises.
    """
    target = Path(os.path.realpath(path)) if follow_link else path
    temporary, descriptor = _create(target)
    try:
        yield temporary
        os.fsync(descriptor)
        if check is not None:
            check(target)
        if fcntl is None:
            os.close(descriptor)  # Windows cannot rename an open file
            descriptor = -1
        _rename(temporary, target, overwrite)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        if descriptor != -1:
            os.close(descriptor)
    sync_folder(target.parent)


def write_bytes(
    path: Path,
    data: bytes | memoryview,
    *,
    overwrite: bool = True,
    follow_link: bool = True,
    check: Check | None = None,
) -> None:
    """Write a file that is complete or absent, also after an interruption; see `replacing`. Raises OSError."""
    with (
        replacing(path, overwrite=overwrite, follow_link=follow_link, check=check) as temporary,
        open(temporary, "wb") as file,
    ):
        file.write(data)


def has_room(folder: Path, size: int) -> bool:
    """Whether a file of `size` bytes can be written to a folder now: the disk and the user's quota have room."""
    try:
        path, descriptor = _create(folder / "probe")
    except OSError as error:
        return error.errno not in DISK_FULL
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, max(size, 1))
        return True
    except OSError as error:
        return error.errno not in DISK_FULL
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def remove_abandoned(folder: Path) -> int:
    """Remove the temporary files in a folder that no living run has locked -> how many. Never raises OSError."""
    removed = 0
    try:
        names = [name for name in os.listdir(folder) if is_temporary(name)]
    except OSError:
        return 0
    for name in names:
        with suppress(OSError):
            removed += _remove_abandoned(folder / name)
    return removed


def _remove_abandoned(path: Path) -> bool:
    if not stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode):
        return False
    if fcntl is None:
        path.unlink()
        return True
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        abandoned = lock(descriptor)
        if abandoned:
            path.unlink()
        return abandoned
    finally:
        os.close(descriptor)
