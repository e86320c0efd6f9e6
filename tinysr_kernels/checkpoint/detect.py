"""What a file is, by its content, and which files a folder holds; names count for nothing here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tinysr_kernels.checkpoint.folded import is_own
from tinysr_kernels.checkpoint.lora import is_lora_name
from tinysr_kernels.checkpoint.read.paths import read_json, regular_file
from tinysr_kernels.checkpoint.read.shards import INDEX, VARIANT, is_index, read_weights, shard_paths
from tinysr_kernels.checkpoint.read.tensor_file import SUFFIXES, TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.errors import CheckpointError

MAX_DEPTH = 8
MAX_ENTRIES = 20_000
CONFIG_LIMIT = 2**20
FOLDED, OWN, LORA, EMBEDDINGS, OTHER = "folded", "own", "lora", "embeddings", "other"
"""Roles of files that belong to no family: see `DESCRIPTIONS`."""
DESCRIPTIONS = {
    FOLDED: "a folded file of tinysr-kernels",
    OWN: "an unfolded file of tinysr-kernels",
    LORA: "a LoRA (keys *.lora_A.weight, *.lora_B.weight)",
    EMBEDDINGS: "embeddings",
    OTHER: "nothing known",
}
_EMBEDDING_NAME = re.compile(r"embed|temb|pool", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One part of a family's checkpoint: a file, or some of a module's tensors.

    role: what it is called in messages and in `Folder.files`; equal roles of two families are equal parts.
    description: for messages, with the keys that show it. keys: found in the name of a tensor, it makes a file this
    part. names: what a dict of parts may call it, by default its role. class_name: `_class_name` of the config.json
    that belongs to it; None for a part without one. lora: whether the keys of LoRA show it too, which otherwise make a
    file one that any family may take.
    """

    role: str
    description: str
    keys: re.Pattern[str]
    names: tuple[str, ...] = ()
    class_name: str | None = None
    lora: bool = False

    @property
    def called(self) -> tuple[str, ...]:
        """The names that a dict of parts may give it."""
        return self.names or (self.role,)

    def fits(self, file: TensorFile) -> bool:
        """Whether the keys of a file show it."""
        return any(self.keys.search(name) and (self.lora or not is_lora_name(name)) for name in file.tensors)


@dataclass(frozen=True)
class Roles:
    """What a file may be: the parts in the order in which they are tried, and the names of embeddings."""

    parts: tuple[Part, ...] = ()
    embedding_names: tuple[re.Pattern[str], ...] = ()
    """A file whose every tensor has a name that one of these finds holds embeddings."""

    def of(self, file: TensorFile, class_name: str | None = None) -> str:
        """The role that a file's keys and metadata give it.

        class_name: of the configuration beside it, which decides between parts whose keys it has alike.
        """
        if is_own(file.metadata):
            return FOLDED if file.metadata.get("folded") == "1" else OWN
        names = list(file.tensors)
        if names and all(is_lora_name(name) for name in names):
            return next((part.role for part in self.parts if part.lora and part.fits(file)), LORA)
        if names and all(any(known.search(name) for known in self.embedding_names) for name in names):
            return EMBEDDINGS
        stated = [part for part in self.parts if class_name and part.class_name == class_name]
        for part in (*stated, *self.parts):
            if part.fits(file):
                return part.role
        if any(is_lora_name(name) for name in names):
            return LORA
        return EMBEDDINGS if _are_embeddings(file) else OTHER

    def may_be(self, file: TensorFile, role: str) -> bool:
        """Whether a file has the keys of a role, although by itself it may be taken for another."""
        return any(part.role == role and part.fits(file) for part in self.parts)

    def description(self, role: str) -> str:
        """What a role is, for messages."""
        return next((part.description for part in self.parts if part.role == role), "") or DESCRIPTIONS[role]


def _are_embeddings(file: TensorFile) -> bool:
    if not file.tensors or any(tensor.ndim > 3 for tensor in file.tensors.values()):
        return False
    return len(file.tensors) <= 8 and all(
        _EMBEDDING_NAME.search(name) or (len(file.tensors) == 1 and "." not in name) for name in file.tensors
    )


@dataclass
class Folder:
    """What a folder holds: its files of tensors by role, and the JSON files that carry a `_class_name`.

    models: each config.json of transformers' kind, with `architectures` instead.
    """

    path: Path
    roles: Roles
    files: dict[str, list[TensorFile]] = field(default_factory=dict)
    configs: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    models: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def of(self, role: str) -> list[TensorFile]:
        """The files of one role."""
        return self.files.get(role, [])

    def one(self, role: str) -> TensorFile:
        """The only file of a role; CheckpointError, with what was looked for and found, for none or several."""
        found = self.of(role)
        if len(found) > 1:
            raise CheckpointError(
                f"{self.path}: found several candidates for {self.roles.description(role)}: "
                f"{listed(f.where for f in found)}; pass the parts as a dict of paths"
            )
        if not found:
            others = listed(f"{Path(f.where).name} ({role})" for role, files in self.files.items() for f in files)
            raise CheckpointError(
                f"{self.path}: looked for {self.roles.description(role)} in {', '.join(SUFFIXES)} and *.index.json "
                f"files, found {others or 'no files of tensors'}"
            )
        return found[0]

    def maybe(self, role: str) -> TensorFile | None:
        """The only file of a role, None if there is none; CheckpointError for several."""
        return self.one(role) if self.of(role) else None


def scan(root: Path, roles: Roles) -> Folder:
    """Look through a folder and its sub-folders.

    Raises CheckpointError for a file of tensors that is damaged or refused (leaving one out, a LoRA perhaps, would
    change the result in silence), and for a folder too large to be a checkpoint's.
    """
    folder = Folder(root, roles)
    paths = sorted(_walk(root))
    shards: set[Path] = set()
    for path in paths:
        if is_index(path):
            shards.update(shard_paths(path))
    weights = [p for p in paths if p not in shards and _holds_tensors(p) and not _whole_pipeline(p, folder.notices)]
    known = [(p, values) for p in paths if (values := _config(p)) is not None]
    folder.configs = [(p, values) for p, values in known if isinstance(values.get("_class_name"), str)]
    folder.models = [(p, values) for p, values in known if isinstance(values.get("architectures"), list)]
    classes = {path.parent: values["_class_name"] for path, values in folder.configs if path.name == "config.json"}
    for path in _without_twins(weights, folder.notices):
        file = read_weights(path)
        folder.files.setdefault(roles.of(file, classes.get(file.path.parent)), []).append(file)
    return folder


def _holds_tensors(path: Path) -> bool:
    return is_index(path) or path.suffix in SUFFIXES


def _walk(root: Path) -> Iterable[Path]:
    """Regular files below root that may matter, hidden ones left out; a folder reached twice is entered once."""
    found: list[Path] = []
    pending, seen, entries = [(root, 0)], set(), 0
    while pending:
        folder, depth = pending.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entered:
                children = list(islice(entered, MAX_ENTRIES + 1))
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be listed: {error}") from error
        entries += len(children)
        if entries > MAX_ENTRIES:
            raise CheckpointError(
                f"{root}: expected a checkpoint's folder, found more than {MAX_ENTRIES} entries; name the folder itself"
            )
        for child in children:
            if child.name.startswith("."):
                continue
            if _is_folder(child):
                if depth < MAX_DEPTH:
                    pending.append((Path(child.path), depth + 1))
            elif child.name.endswith((*SUFFIXES, ".json")):
                found.append(Path(child.path))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link in a circle is none, and reading it as a file says what is wrong."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _config(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file that describes a model; other JSON files are ignored, but a config.json is read."""
    if path.suffix != ".json" or is_index(path):
        return None
    if path.name != "config.json" and regular_file(path) > CONFIG_LIMIT:
        return None
    try:
        values = read_json(path)
    except CheckpointError:
        if path.name == "config.json":
            raise
        return None
    return values if "_class_name" in values or "architectures" in values else None


def _whole_pipeline(path: Path, notices: list[str]) -> bool:
    """Whether a file holds a whole pipeline once more, in the layout from before diffusers: a .ckpt beside its index.

    It is not even opened, for as a pickle it may hold more than tensors.
    """
    if path.suffix != ".ckpt" or not (path.parent / "model_index.json").is_file():
        return False
    notices.append(f"{path}: ignored, taken for a copy of the modules that model_index.json beside it lists")
    return True


def _without_twins(paths: list[Path], notices: list[str]) -> list[Path]:
    """Of one folder's files that hold the same weights by convention, the best.

    diffusers writes `name.safetensors`, `name.bin`, `name.fp16.safetensors` and their indices for the same weights. No
    variant goes before a variant, which may be less exact, then safetensors before a pickle, then one file before many.
    """
    best: dict[tuple[Path, str], Path] = {}
    for path in sorted(paths, key=_rank):
        key = (path.parent, _stem(path)[0])
        if key in best:
            notices.append(f"{path}: ignored, taken for a copy of {best[key].name}")
        else:
            best[key] = path
    return sorted(best.values())


def _stem(path: Path) -> tuple[str, bool]:
    """The name without what tells copies apart, and whether it is a variant's; the whole name of other files."""
    index = INDEX.search(path.name)
    name = path.name[: index.start()] if index else path.name
    for suffix in (".safetensors", ".bin"):
        if name.endswith(suffix):
            stem = re.sub(rf"\.({VARIANT})$", "", name.removesuffix(suffix))
            return stem, stem != name.removesuffix(suffix) or bool(index and index[2])
    return path.name, False


def _rank(path: Path) -> tuple[bool, bool, bool, Path]:
    return _stem(path)[1], ".safetensors" not in path.name, is_index(path), path


def class_beside(weights: Path) -> str | None:
    """`_class_name` of the config.json beside a file of weights; None without one."""
    path = weights.parent / "config.json"
    values = _config(path) if os.path.lexists(path) else None
    name = values.get("_class_name") if values else None
    return name if isinstance(name, str) else None


def config_for(folder: Folder, weights: TensorFile, class_name: str) -> tuple[dict[str, Any], str]:
    """The configuration of a part, and its path: in the weights' own folder, else the only one of its class.

    Raises CheckpointError for none, several, or another class.
    """
    here = [(p, v) for p, v in folder.configs if p.parent == weights.path.parent]
    for candidates in (here, folder.configs):
        fitting = [(p, v) for p, v in candidates if v["_class_name"] == class_name]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{weights.where}: expected one configuration of {class_name}, found {listed(p for p, _ in fitting)}"
            )
        if fitting:
            return fitting[0][1], str(fitting[0][0])
        if candidates is here:
            for path, values in here:
                if path.name == "config.json":
                    raise CheckpointError(
                        f"{path}: _class_name: expected {class_name!r}, found {quoted(values['_class_name'])}"
                    )
    raise CheckpointError(
        f"{weights.where}: looked for config.json with _class_name {class_name!r} beside it"
        f"{'' if folder.path == weights.path.parent else f' and below {folder.path}'}, found none"
    )


def narrow(folder: Folder, role: str, class_name: str) -> None:
    """Of several candidates for a role keep those beside a configuration of the right class, if there are any."""
    beside = {path.parent for path, values in folder.configs if values["_class_name"] == class_name}
    fitting = [file for file in folder.of(role) if file.path.parent in beside]
    if len(folder.of(role)) > 1 and fitting:
        folder.files[role] = fitting
