"""From whatever names a checkpoint to a `Checkpoint`: find the parts and give them to the family they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinysr_kernels.checkpoint.detect import (
    EMBEDDINGS,
    FOLDED,
    LORA,
    OTHER,
    OWN,
    Folder,
    Roles,
    class_beside,
    narrow,
    scan,
)
from tinysr_kernels.checkpoint.folded import OwnMetadata, read_metadata
from tinysr_kernels.checkpoint.known import hint
from tinysr_kernels.checkpoint.own.manifest import check_manifest
from tinysr_kernels.checkpoint.plain import check_number, is_a, kind_of, plain_mapping
from tinysr_kernels.checkpoint.read.paths import Released
from tinysr_kernels.checkpoint.read.shards import read_weights
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import check_finite
from tinysr_kernels.checkpoint.sources import (
    FoundPart,
    as_path,
    embedding_files,
    find_part,
    folder_part,
    is_called,
    is_folder,
    is_path,
    module_part,
    snapshot,
)
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Checkpoint, Family, Found
from tinysr_kernels.families.config import checked_config, config_from_values
from tinysr_kernels.nets.fold import placed_dtype

DEMO = "demo"
EMBEDDINGS_FILE = "embeddings.safetensors"
"""What is looked for beside a single file."""
Families = Mapping[str, Family[Any]]


def roles_of(families: Families) -> Roles:
    """What files may be: the parts of these families, each family's first before any other.

    Of the others those with a configuration of their own come first: their keys say more.
    """
    firsts = [family.parts[0] for family in families.values()]
    others = [part for family in families.values() for part in family.parts[1:]]
    others.sort(key=lambda part: part.class_name is None)
    names = [family.embedding_names for family in families.values() if family.embedding_names]
    return Roles(tuple(dict.fromkeys([*firsts, *others])), tuple(names))


class Loader:
    """Loads checkpoints of these families; `families.load` says what it accepts."""

    def __init__(
        self,
        families: Families,
        prompt: str | None = None,
        lora_alpha: float | None = None,
        lora_weights: tuple[float, ...] | None = None,
    ) -> None:
        self.families = families
        self.prompt = prompt
        self.lora_alpha = lora_alpha
        self.lora_weights = lora_weights
        self.roles = roles_of(families)

    def load(self, ckpt: Any, embeddings: Any) -> Checkpoint:
        """See `families.load`."""
        if is_a(ckpt, nn.Module):
            return self._module(ckpt, embeddings)
        if is_a(ckpt, Mapping):
            return self._dict(plain_mapping(ckpt, "the dict of parts"), embeddings)
        if is_a(ckpt, str) and str.__str__(ckpt) == DEMO:
            return self._demo(embeddings)
        if not is_path(ckpt):
            raise CheckpointError(f"expected a path, {DEMO!r}, a dict of parts or a module, found {kind_of(ckpt)}")
        path = as_path(ckpt)
        return self._folder(path, embeddings) if is_folder(path) else self._file(path, embeddings)

    # ------------------------------------------------------------------------------------------ files
    def _demo(self, embeddings: Any) -> Checkpoint:
        resource = files("tinysr_kernels.checkpoint").joinpath("demo.safetensors")
        if not resource.is_file():
            raise CheckpointError("demo.safetensors: expected in the package, found none; install tinysr-kernels again")
        with as_file(resource) as path:
            return self._file(path, embeddings)

    def _file(self, path: Path, embeddings: Any) -> Checkpoint:
        file = read_weights(path)
        role = self.roles.of(file, class_beside(path))
        family = self._family(role, file)
        if role == FOLDED:
            return self._folded(file, embeddings)
        if family is not None and len(family.parts) == 1:
            beside = path.parent / EMBEDDINGS_FILE
            found = [read_weights(beside)] if beside.is_file() and beside != path else []
            class_name = family.parts[0].class_name
            part = find_part(path, role, path.name, self.roles, class_name) if class_name else FoundPart(file)
            return self._single(family, part, embeddings, Found(file.where, {}, beside=found))
        if role == OTHER:
            content = listed([*file.tensors, *(f"{k} ({v})" for k, v in file.others.items())], 4)
            raise CheckpointError(f"{path}: {self._expected()}; found {content or 'nothing'}{_hint(file)}")
        dicts = [_dict_example(family) for family in self.families.values() if _has_part(family, role)]
        raise CheckpointError(
            f"{path}: {self.roles.description(role)} is only one part of a checkpoint; "
            f"{' or '.join(['pass the folder that holds all parts', *dicts])}{_hint(file)}"
        )

    def _family(self, role: str, file: TensorFile) -> Family[Any] | None:
        """The family that a file of this role shows; CheckpointError where the file's own metadata name none."""
        if role in (FOLDED, OWN):
            return self._own(file)[0]
        return next((family for family in self.families.values() if family.parts[0].role == role), None)

    def _own(self, file: TensorFile) -> tuple[Family[Any], Any, OwnMetadata]:
        """Family, configuration and metadata of a file of this project's."""
        own = read_metadata(file.metadata, file.where)
        if own.family not in self.families:
            raise CheckpointError(
                f"{file.where}: metadata family: expected one of {tuple(self.families)}, found {quoted(own.family)}"
            )
        family = self.families[own.family]
        try:
            config = config_from_values(family.config_class, own.config)
        except ValueError as error:
            raise CheckpointError(f"{file.where}: metadata config: {error}") from error
        if not own.folded and not family.own_format:
            known = tuple(name for name, one in self.families.items() if one.own_format)
            raise CheckpointError(f"{file.where}: metadata family: expected one of {known}, found {own.family!r}")
        return family, config, own

    def _folded(self, file: TensorFile, embeddings: Any) -> Checkpoint:
        """A folded file as it is, every tensor as its metadata list it; what they mean is left to the network."""
        family, config, own = self._own(file)
        check_number(len(file.only_tensors()), file.where)
        self._check_lora(family, folded=True)
        notices = []
        for what, given in (("embeddings", embeddings), ("prompt", self.prompt)):
            if given is not None and not (family.per_image and is_called(given)):
                raise CheckpointError(
                    f"{file.where}: the file is folded, and what its network is conditioned on with it; leave the "
                    f"{what} out, or fold the checkpoint again with it"
                )
        if own.tensors is not None:
            check_manifest(own.tensors, file.tensors, file.where)
        else:
            notices.append(
                f"{file.where}: folded by a version that listed no tensors, so whether all are there and undamaged "
                "cannot be checked; `tinysr convert` it once"
            )
        _check_dtypes(file, str(own.folded_dtype))
        for name, tensor in Released(file.tensors).items():
            check_finite(tensor, f"{file.where}: {quoted(name)}")
        return Checkpoint(
            family.name,
            config,
            Released(file.tensors),
            folded=True,
            folded_dtype=own.folded_dtype,
            notices=notices,
            source=file.where,
            file=file.path,
            metadata=dict(file.metadata),
        )

    def _single(self, family: Family[Any], part: FoundPart, embeddings: Any, found: Found) -> Checkpoint:
        """A file that is a whole checkpoint."""
        if family.own_format:  # also of a file that has the keys alone, to say what its metadata lack
            part.own = self._own(part.file)[1]
        found.parts = {family.parts[0].role: part}
        return self._read(family, found, embeddings)

    def _read(self, family: Family[Any], found: Found, embeddings: Any) -> Checkpoint:
        found.per_image, found.prompt = is_called(embeddings), self.prompt
        for what, given, taken in (
            ("embeddings of each image", found.per_image, family.per_image),
            ("embeddings", embeddings is not None, family.takes_embeddings),
            ("prompt", self.prompt is not None, family.takes_prompt),
        ):
            if given and not taken:
                raise CheckpointError(f"{found.source}: {family.name} takes no {what}; leave that argument out")
        if not found.per_image:
            found.named = embedding_files(embeddings, self.roles)
        found.lora_alpha, found.lora_weights = self.lora_alpha, self.lora_weights
        self._check_lora(family)
        lora = [] if found.lora is None else [found.lora]
        for file in [*(part.file for part in found.parts.values()), *lora, *found.named, *found.beside]:
            check_number(len(file.tensors), file.where)
        checkpoint = family.read(found)
        checkpoint.config = checked_config(family.config_class, checkpoint.config, f"{found.source}: configuration")
        return checkpoint

    def _check_lora(self, family: Family[Any], folded: bool = False) -> None:
        """CheckpointError where what was asked about LoRA means nothing to the checkpoint."""
        why = f"this checkpoint is {family.name}" + (", folded with its LoRA already" if folded else "")
        if self.lora_alpha is not None and (folded or not family.takes_lora_alpha):
            able = listed(name for name, one in self.families.items() if one.takes_lora_alpha)
            raise CheckpointError(f"lora_alpha is for unfolded checkpoints of {able}; {why}; leave it out")
        expected = () if folded else family.adapters
        if self.lora_weights is not None and len(self.lora_weights) != len(expected):
            able = listed(f"{name} ({', '.join(one.adapters)})" for name, one in self.families.items() if one.adapters)
            raise CheckpointError(
                f"lora_weights are for unfolded checkpoints of {able}; found {len(self.lora_weights)} weights, and "
                f"{why}; leave them out"
            )

    # ----------------------------------------------------------------------------------------- folders
    def _folder(self, path: Path, embeddings: Any) -> Checkpoint:
        folder = scan(path, self.roles)
        for known in self.roles.parts:
            if known.class_name:
                narrow(folder, known.role, known.class_name)
        role, file = self._main(folder)
        family = self._family(role, file)
        assert family is not None  # a main role is a family's
        if role == FOLDED:
            checkpoint = self._folded(file, embeddings)
            checkpoint.source = str(path)
            return checkpoint
        if len(family.parts) == 1:
            near = [f for f in folder.of(EMBEDDINGS) if f.path.parent == file.path.parent]
            part = folder_part(folder, role, family.parts[0].class_name)
            return self._single(family, part, embeddings, Found(str(path), {}, beside=near, notices=folder.notices))
        family.select(folder, file)
        parts = {part.role: folder_part(folder, part.role, part.class_name) for part in family.parts}
        lora = folder.maybe(LORA) if family.takes_lora else None
        found = Found(str(path), parts, lora, beside=folder.of(EMBEDDINGS), notices=folder.notices)
        found.configs, found.models = folder.configs, folder.models
        return self._read(family, found, embeddings)

    def _main(self, folder: Folder) -> tuple[str, TensorFile]:
        """The one file that shows which family's checkpoint a folder holds; CheckpointError for none or several."""
        mains = dict.fromkeys([FOLDED, OWN, *(family.parts[0].role for family in self.families.values())])
        found = [(role, file) for role in mains for file in folder.of(role)]
        if not found:
            others = listed(f"{f.path.name} ({role})" for role, part in folder.files.items() for f in part)
            raise CheckpointError(
                f"{folder.path}: {self._expected()}; looked in it and its sub-folders, found "
                f"{others or 'no files of tensors'}{self._hints(folder)}"
            )
        if len(found) > 1:
            raise CheckpointError(
                f"{folder.path}: found several checkpoints: {listed(f'{f.where} ({role})' for role, f in found)}; name "
                "one, or pass the parts as a dict of paths"
            )
        return found[0]

    def _hints(self, folder: Folder) -> str:
        """What is missing to the parts of checkpoints that a folder without a whole one holds."""
        hints = "".join(dict.fromkeys(_hint(file) for files in folder.files.values() for file in files))
        made: dict[str, list[str]] = {}
        for family in self.families.values():
            found = [part.description for part in family.parts[1:] if folder.of(part.role)]
            if found:
                absent = [part.description for part in family.parts if not folder.of(part.role)]
                ways = made.setdefault(" and ".join(found), [])
                ways.append(f"of {family.name} together with {' and '.join(absent)}")
        for parts, ways in made.items():
            hints += f"; {parts} make a checkpoint {', or '.join(ways)}"
        return hints

    def _expected(self) -> str:
        return f"expected {', '.join(family.summary for family in self.families.values())} or a folded file"

    # ----------------------------------------------------------------------------------- dicts and modules
    def _dict(self, parts: dict[Any, Any], embeddings: Any) -> Checkpoint:
        names = {name for name in parts if parts[name] is not None}
        if parts and all(is_a(value, Tensor) for value in parts.values()):
            raise CheckpointError(
                "expected a dict of parts, found a state dict; pass it as one part, or the module itself"
            )
        several = [family for family in self.families.values() if len(family.parts) > 1]
        for family in several:
            chosen = _chosen(family, names)
            if chosen is None:
                continue
            made = {
                part.role: find_part(parts[name], part.role, name, self.roles, part.class_name)
                for part, name in zip(family.parts, chosen, strict=True)
            }
            found = Found(" and ".join(part.file.where for part in made.values()), made)
            if "lora" in names:
                found.lora = find_part(parts["lora"], LORA, "lora", self.roles).file
            found.beside = embedding_files(parts.get("embeddings"), self.roles)
            return self._read(family, found, embeddings)
        raise CheckpointError(
            f"expected the parts {', or '.join(map(_dict_text, several))}; found {listed(names) or 'none'}"
        )

    def _module(self, module: nn.Module, embeddings: Any) -> Checkpoint:
        label = f"module {kind_of(module)}"
        whole = module_part(module, label)
        role = self.roles.of(whole.file)
        family = self._family(role, whole.file)
        if family is None:
            kinds = (" and ".join(part.description for part in family.parts) for family in self.families.values())
            raise CheckpointError(
                f"{label}: expected a module with the tensors of {', or of '.join(kinds)}; found "
                f"{listed(whole.file.tensors, 4) or 'no tensors'}"
            )
        snapshot(whole.file)
        return self._read(family, Found(label, family.split(whole, module, label)), embeddings)


def _hint(file: TensorFile) -> str:
    """What a file that is not taken is known to be."""
    return hint([*file.tensors, *file.others])


def _check_dtypes(file: TensorFile, dtype: str) -> None:
    """Every tensor of a folded file has the dtype in which `save` writes it; e4m3 where a scale lies beside."""
    for name, tensor in file.tensors.items():
        plain = placed_dtype(name, tensor, getattr(torch, dtype))
        expected = torch.float8_e4m3fn if f"{name}_scale" in file.tensors else plain
        if tensor.dtype != expected:
            raise CheckpointError(
                f"{file.where}: {quoted(name)}: expected {expected} in a file folded for {dtype}, found {tensor.dtype}"
            )


def _chosen(family: Family[Any], names: set[str]) -> list[str] | None:
    """What a dict with these keys calls each part of the family; None where it is no dict of the family's parts."""
    chosen = [sorted(names.intersection(part.called)) for part in family.parts]
    if any(len(one) != 1 for one in chosen):
        return None
    return [one[0] for one in chosen] if names <= {*(one[0] for one in chosen), *_extras(family)} else None


def _extras(family: Family[Any]) -> list[str]:
    """Keys that a dict of the family's parts may have besides."""
    return [name for name, taken in (("lora", family.takes_lora), ("embeddings", family.takes_embeddings)) if taken]


def _has_part(family: Family[Any], role: str) -> bool:
    """Whether a file of this role may be one of several that make a checkpoint of the family."""
    extras = {LORA: family.takes_lora, EMBEDDINGS: family.takes_embeddings}
    return len(family.parts) > 1 and (extras.get(role, False) or any(part.role == role for part in family.parts))


def _dict_example(family: Family[Any]) -> str:
    """`{"transformer": ..., "vae": ..., "lora": ..., "embeddings": ...}`"""
    names = [*(part.called[0] for part in family.parts), *_extras(family)]
    return "{" + ", ".join(f'"{name}": ...' for name in names) + "}"


def _dict_text(family: Family[Any]) -> str:
    """`"transformer" and "vae" (and "lora", "embeddings")`"""
    parts = [" (or ".join(f'"{name}"' for name in p.called) + ")" * (len(p.called) - 1) for p in family.parts]
    extras = ", ".join(f'"{name}"' for name in _extras(family))
    return " and ".join(parts) + (f" (and {extras})" if extras else "")
