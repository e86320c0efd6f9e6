"""Whole files damaged: other kinds of files in their place, odd neighbors, odd names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

_NAMES = (b"caf\xe9", b"\x1b[2J", b"a\nb", b"\xe2\x80\xaegnp", b"x" * 200, b".hidden", b"-rf", b"~", b"a b")


def is_plain(path: Path) -> bool:
    """Whether it is a file and no link: writing to a link may change what lies outside of the case's folder."""
    return path.is_file() and not path.is_symlink()


def _free(path: Path) -> Path:
    """A path under which nothing lies any more."""
    path.unlink(missing_ok=True)
    return path


def replace(random: Random, path: Path) -> None:
    """Put something else in a file's place, move or copy it, or put something beside it."""
    random.choice(
        (
            _empty,
            _folder,
            _pipe,
            _loop,
            _dangling,
            _device,
            _rename,
            _suffix,
            _copy,
            _swap,
            _links,
            _deep,
            _large,
            _junk,
        )
    )(random, path)


def _empty(_: Random, path: Path) -> None:
    path.write_bytes(b"")


def _folder(_: Random, path: Path) -> None:
    _free(path).mkdir()


def _pipe(_: Random, path: Path) -> None:
    os.mkfifo(_free(path))


def _loop(random: Random, path: Path) -> None:
    loop = random.choice((path, path.parent / "loop", path.parent / "loop.safetensors", path.parent / "a.json"))
    _free(loop).symlink_to(loop.name)


def _dangling(_: Random, path: Path) -> None:
    _free(path).symlink_to("missing")


def _device(random: Random, path: Path) -> None:
    _free(path).symlink_to(random.choice(("/dev/full", "/dev/null", "/dev/stdin", "/etc", ".", "..")))


def _rename(random: Random, path: Path) -> None:
    path.rename(path.with_name(os.fsdecode(random.choice(_NAMES)) + path.suffix))


def _suffix(random: Random, path: Path) -> None:
    path.rename(path.with_suffix(random.choice((".safetensors", ".bin", ".pt", ".json", ".txt", ".index.json", ""))))


def _copy(random: Random, path: Path) -> None:
    name = random.choice(("copy", "model", "embeddings", "temb")) + path.suffix
    if name != path.name:
        shutil.copy(path, _free(path.with_name(name)))


def _swap(random: Random, path: Path) -> None:
    root = next(parent for parent in path.parents if parent.name == "checkpoint")
    other = random.choice([one for one in sorted(root.rglob("*")) if is_plain(one)])
    kept = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(kept)


def _links(_: Random, path: Path) -> None:
    """A network: every folder links to every other."""
    made = [path.parent / f"folder{i}" for i in range(20)]
    for folder in made:
        folder.mkdir()
    for folder in made:
        for other in (*made, path.parent):
            (folder / other.name).symlink_to(other, target_is_directory=True)


def _deep(_: Random, path: Path) -> None:
    deep = path.parent.joinpath(*["deep"] * 100)
    deep.mkdir(parents=True)
    shutil.copy(path, deep)


def _large(random: Random, path: Path) -> None:
    large = random.choice((path, _free(path.with_name("large.json")), _free(path.with_name("large.bin"))))
    with open(large, "ab") as file:
        file.truncate(40 << 20)


def _junk(_: Random, path: Path) -> None:
    for i in range(300):
        (path.parent / f"{i}.png").touch()
    _free(path.parent / "notes.json").write_text("[1, 2")
