"""The metadata of this project's own safetensors files, and writing them whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tinysr_kernels.atomic import sync_folder
from tinysr_kernels.checkpoint.own.manifest import manifest
from tinysr_kernels.checkpoint.own.write import write_tensors
from tinysr_kernels.checkpoint.plain import kind_of
from tinysr_kernels.checkpoint.read.header import read_header
from tinysr_kernels.checkpoint.read.paths import MappedFile, parse_json
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError, InputError, shorten

FORMAT = "tinysr_kernels"
VERSION = 1
"""Of an unfolded file."""
FOLDED_VERSION = 2
"""Of a folded one. Those of version 1 lack the list of their tensors; they load as far as they can be checked."""
CONFIG_CHARACTERS = 1 << 16
DTYPES = ("float16", "bfloat16", "float32", "float64")
"""What a file may be folded for."""


@dataclass(frozen=True)
class OwnMetadata:
    """What the metadata of a file of ours says: a family's name and the values of its configuration, both unchecked.

    folded_dtype: the torch name of the dtype it was folded for, such as "float16"; None unless the file is folded.
    tensors: the list of a folded file's tensors (`manifest`); None in one of version 1.
    """

    family: str
    config: dict[str, Any]
    folded: bool
    folded_dtype: str | None
    tensors: str | None


def own_metadata(family: str, config: Any) -> dict[str, str]:
    """The metadata of an unfolded file in our own layout; `config` is the family's, a dataclass of plain values."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "family": family,
        "config": json.dumps(asdict(config), sort_keys=True),
    }


def folded_metadata(
    family: str, config: Any, dtype: str, tensors: Mapping[str, Tensor], quantize: str | None = None
) -> dict[str, str]:
    """The metadata of a folded file; `dtype` is the torch name of what it was folded for, such as "float16".

    quantize: "fp8" for a file with e4m3 weights and their scales, which the tensors' own dtypes say too.
    """
    extra = {} if quantize is None else {"quantize": quantize}
    return {
        **own_metadata(family, config),
        "version": str(FOLDED_VERSION),
        "folded": "1",
        "dtype": dtype,
        "tensors": manifest(tensors),
        **extra,
    }


def _is_folded(metadata: Mapping[str, str]) -> bool:
    return is_own(metadata) and metadata.get("folded") == "1"


def is_own(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata says that it is ours and describes a network."""
    return metadata.get("format") == FORMAT and "family" in metadata


def read_metadata(metadata: Mapping[str, str], where: str) -> OwnMetadata:
    """Read back what `own_metadata` and `folded_metadata` wrote; the family's name and its values are not judged.

    Raises CheckpointError for another format, a version from the future, an unknown dtype, a missing list of tensors, a
    configuration that is too long or no JSON object.
    """
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{where}: metadata format: expected {FORMAT!r}, found {quoted(metadata.get('format'))}")
    folded, dtype, tensors = metadata.get("folded"), metadata.get("dtype"), metadata.get("tensors")
    if folded not in (None, "0", "1"):
        raise CheckpointError(f"{where}: metadata folded: expected '1', found {quoted(folded)}")
    version = _version(metadata.get("version", ""), FOLDED_VERSION if folded == "1" else VERSION, where)
    if "family" not in metadata:
        raise CheckpointError(f"{where}: metadata family: expected the name of a family, found None")
    if "config" not in metadata:
        raise CheckpointError(f"{where}: metadata config: expected the network's configuration, found none")
    if len(metadata["config"]) > CONFIG_CHARACTERS:
        raise CheckpointError(
            f"{where}: metadata config: expected at most {CONFIG_CHARACTERS} characters, "
            f"found {len(metadata['config'])}"
        )
    values = parse_json(metadata["config"].encode("utf-8", "surrogatepass"), f"{where}: metadata config")
    if folded != "1":
        return OwnMetadata(metadata["family"], values, False, None, None)
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: metadata dtype: expected one of {DTYPES}, found {quoted(dtype)}")
    if version > 1 and tensors is None:
        raise CheckpointError(f"{where}: metadata tensors: expected the list of the tensors, found none")
    return OwnMetadata(metadata["family"], values, True, dtype, tensors)


def _version(text: str, newest: int, where: str) -> int:
    """A version from 1 to `newest`; CheckpointError otherwise."""
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise CheckpointError(f"{where}: metadata version: expected a number, found {quoted(text)}")
    if not 1 <= int(text) <= newest:
        remedy = "; install a newer tinysr-kernels" if int(text) > newest else ""
        raise CheckpointError(f"{where}: metadata version: expected {newest}, found {int(text)}{remedy}")
    return int(text)


def check_target(path: Any) -> Path:
    """Where a file of tensors can be written; InputError saying why not.

    A link is refused: writing through it would replace a file that nobody named, and writing in its place the link.
    """
    try:
        text = os.fspath(path)
    except Exception as error:  # an object's own __fspath__ may raise anything
        raise InputError(f"expected the path of a file to write, found {kind_of(path)}") from error
    if not isinstance(text, str) or not text.endswith(".safetensors") or Path(text).suffix != ".safetensors":
        raise InputError(f"{shorten(repr(text))}: expected a file name ending in .safetensors, for it is read by that")
    try:
        obstacle = _obstacle(Path(text))
    except (OSError, ValueError) as error:
        obstacle = f"cannot be written: {shorten(error)}"
    if obstacle:
        raise InputError(f"{shorten(text)} {obstacle}")
    return Path(text)


def _obstacle(target: Path) -> str:
    """Why a file cannot be written there, or nothing."""
    if "\0" in str(target):
        return "cannot be the name of a file"
    if target.is_symlink():
        return "is a link; name the file itself"
    if target.is_dir():
        return "is a folder; name a file in it"
    if target.exists() and not target.is_file():
        return "is a device, pipe or socket; name a file"
    if not target.parent.is_dir():
        return f"cannot be written, there is no folder {shorten(target.parent)}; create it first"
    return ""


def check_replaceable(target: Path, replace: bool, source: Path | None) -> None:
    """InputError unless nothing is at `target`, or with `replace` a folded file of ours other than `source`."""
    if not os.path.lexists(target):
        return
    try:
        folded = _is_folded(read_header(MappedFile(target))[1])
        same = source is not None and os.path.samefile(target, source)
    except (CheckpointError, OSError):
        folded, same = False, False
    if not folded:
        raise InputError(f"{shorten(target)} exists and is no folded file, it is not replaced; choose another name")
    if same:
        raise InputError(f"{shorten(target)} is the checkpoint itself, it is not replaced; choose another name")
    if not replace:
        raise InputError(f"{shorten(target)} exists; choose another name, or ask for it to be replaced (--force)")


def write_folded(
    path: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, replace: bool, source: Path | None
) -> None:
    """`write_safetensors` where `check_replaceable` allows it, which is asked again just before the renaming."""
    write_safetensors(path, tensors, metadata, lambda target: check_replaceable(target, replace, source))


def write_safetensors(
    path: Any,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    check: Callable[[Path], None] = lambda target: None,
) -> None:
    """Write a safetensors file that appears whole or not at all: written beside, synchronized, then renamed.

    Tensors may have any strides, lie on any device and share memory. check: called with the path at the beginning and
    just before a file takes that name. Raises InputError for a path that cannot be one, CheckpointError when writing
    fails, on a full disk for one.
    """
    target = check_target(path)
    check(target)
    beside = target.with_name(f".tinysr-{secrets.token_hex(8)}.tmp")  # hidden, so that no search takes it for a part
    try:
        write_tensors(beside, tensors, metadata)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        check(target)
        os.replace(beside, target)
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{shorten(target)} cannot be written: {shorten(error)}; nothing was left there. Free some space or choose "
            "another folder"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
