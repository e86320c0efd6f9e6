"""`load`: from whatever names a checkpoint to a `Checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinysr_kernels.checkpoint import adcsr, detect, tinysr, transformer, unet, vae
from tinysr_kernels.checkpoint.detect import DESCRIPTIONS, Folder, narrow, role_of, scan
from tinysr_kernels.checkpoint.folded import load_folded
from tinysr_kernels.checkpoint.read.shards import read_weights
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.result import Checkpoint
from tinysr_kernels.checkpoint.sources import (
    Part,
    as_path,
    candidates,
    combined,
    embedding_files,
    find_part,
    folder_part,
    is_folder,
    is_path,
    mapping_file,
    module_part,
)
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import TinySRConfig, UNetConfig

DEMO = "demo"
TINYSR_PARTS = {"transformer", "vae", "lora", "embeddings"}
ADCSR_PARTS = {"unet", "net_params", "decoder"}
REMEDY = (
    "expected a TinySR folder (transformer, VAE, embeddings), AdcSR's net_params and halfDecoder, a tinysr-unet file "
    "or a folded file"
)


def load(ckpt: Any, *, embeddings: Any = None) -> Checkpoint:
    """Find, read, check and normalise a checkpoint of any family.

    ckpt: one of
        "demo"                      the small checkpoint inside the package;
        a path (str or PathLike)    a folder searched by content, a file, or an index of shards;
        a dict of parts             {"transformer", "vae"[, "lora"][, "embeddings"]} for TinySR,
                                    {"unet" or "net_params", "decoder"} for AdcSR; each a path to a file or folder, an
                                    nn.Module or a dict of tensors (TinySR's need config.json beside the file or a
                                    `config` on the module);
        an nn.Module                of either family, by its keys: TinySR whole, AdcSR (body.1, body.2, decoder), a
                                    pruned UNet (unet., decoder.) whose `config` is a UNetConfig.
    embeddings: overrides the checkpoint's own: a tensor, a path to a file or folder, a dict name -> tensor or path, or
        a sequence of these. Pooled prompt [1,P], temb [1,D], position table [1,T,D] for TinySR; temb [1,E] or
        `<resnet>.time_bias` [C] for tinysr-unet.

    Returns tensors on the CPU in their stored dtype, except what was merged or evaluated (float32 or wider).
    Raises CheckpointError for whatever is missing, damaged, refused, ambiguous or contradictory.
    """
    if isinstance(ckpt, nn.Module):
        return _from_module(ckpt, embeddings)
    if isinstance(ckpt, Mapping):
        return _from_parts(dict(ckpt), embeddings)
    if isinstance(ckpt, str) and ckpt == DEMO:
        return _demo(embeddings)
    if not is_path(ckpt):
        raise CheckpointError(f"expected a path, {DEMO!r}, a dict of parts or a module, found {type(ckpt).__name__}")
    path = as_path(ckpt)
    return _from_folder(path, embeddings) if is_folder(path) else _from_file(path, embeddings)


def _demo(embeddings: Any) -> Checkpoint:
    resource = files("tinysr_kernels.checkpoint").joinpath("demo.safetensors")
    if not resource.is_file():
        raise CheckpointError("demo.safetensors: expected in the package, found none; install tinysr-kernels again")
    with as_file(resource) as path:
        return _from_file(path, embeddings)


def _from_file(path: Path, embeddings: Any) -> Checkpoint:
    file = read_weights(path)
    role = role_of(file)
    if role == "folded":
        return _folded(file, embeddings)
    if role == "unet":
        beside = path.parent / "embeddings.safetensors"
        found = [read_weights(beside)] if beside.is_file() and beside != path else []
        return unet.load_unet(file, combined(embedding_files(embeddings) or found))
    if role == "other":
        content = listed([*file.tensors, *(f"{k} ({v})" for k, v in file.others.items())], 4)
        raise CheckpointError(f"{path}: {REMEDY}; found {content or 'nothing'}")
    if role in ("adcsr", "decoder"):
        remedy = 'pass the folder that holds both files, or {"net_params": ..., "decoder": ...}'
    else:
        remedy = 'pass the folder that holds all parts, or {"transformer": ..., "vae": ..., "embeddings": ...}'
    raise CheckpointError(f"{path}: {DESCRIPTIONS[role]} is only one part of a checkpoint; {remedy}")


def _folded(file: TensorFile, embeddings: Any) -> Checkpoint:
    checkpoint = load_folded(file)
    if embeddings is not None:
        checkpoint.notices.append("the embeddings given are ignored: the file is folded")
    return checkpoint


def _from_folder(path: Path, embeddings: Any) -> Checkpoint:
    folder = scan(path)
    narrow(folder, "transformer", transformer.CLASS_NAME)
    narrow(folder, "vae", vae.CLASS_NAME)
    mains: tuple[detect.Role, ...] = ("folded", "unet", "adcsr", "transformer")
    found = [(role, file) for role in mains for file in folder.of(role)]
    if not found:
        others = listed(f"{f.path.name} ({role})" for role, part in folder.files.items() for f in part)
        raise CheckpointError(
            f"{path}: {REMEDY}; looked in it and its sub-folders, found {others or 'no files of tensors'}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: found several checkpoints: {listed(f'{f.where} ({role})' for role, f in found)}; name one, or "
            "pass the parts as a dict of paths"
        )
    role, file = found[0]
    if role == "folded":
        checkpoint = _folded(file, embeddings)
    elif role == "unet":
        beside = [f for f in folder.of("embeddings") if f.path.parent == file.path.parent]
        checkpoint = unet.load_unet(file, combined(embedding_files(embeddings) or beside))
    elif role == "adcsr":
        _keep_fitting_decoder(folder, file)
        checkpoint = adcsr.normalise(file, folder.one("decoder"), folder.notices)
    else:
        main = folder_part(folder, "transformer", transformer.CLASS_NAME)
        parts = _tinysr_parts(main, folder_part(folder, "vae", vae.CLASS_NAME))
        parts.lora = folder.maybe("lora")
        parts.given, parts.found = candidates(embedding_files(embeddings)), candidates(folder.of("embeddings"))
        checkpoint = tinysr.build(parts, str(path), folder.notices)
    checkpoint.source = str(path)
    return checkpoint


def _keep_fitting_decoder(folder: Folder, net: TensorFile) -> None:
    """Of several decoders (a full VAE may lie about) keep those as wide as the middle that was trained."""
    middle = next(
        (t for name, t in net.tensors.items() if name.removeprefix("module.") == "body.2.resnets.1.conv2.bias"), None
    )
    first = re.compile(r"(^|\.)up_blocks\.0\.resnets\.0\.norm1\.weight$")
    fitting = [
        file
        for file in folder.of("decoder")
        if middle is not None and any(first.search(n) and t.shape == middle.shape for n, t in file.tensors.items())
    ]
    if len(folder.of("decoder")) > 1 and fitting:
        folder.files["decoder"] = fitting


def _tinysr_parts(main: Part, half: Part) -> tinysr.TinySRParts:
    own = next((c for c in (main.own, half.own) if isinstance(c, TinySRConfig)), None)
    return tinysr.TinySRParts(
        main.file, main.config, main.config_where, half.file, half.config, half.config_where, own=own
    )


def _from_parts(parts: dict[Any, Any], embeddings: Any) -> Checkpoint:
    names = {str(name) for name in parts if parts[name] is not None}
    if parts and all(isinstance(value, Tensor) for value in parts.values()):
        raise CheckpointError("expected a dict of parts, found a state dict; pass it as one part, or the module itself")
    if {"transformer", "vae"} <= names <= TINYSR_PARTS:
        main = find_part(parts["transformer"], "transformer", "transformer", transformer.CLASS_NAME)
        built = _tinysr_parts(main, find_part(parts["vae"], "vae", "vae", vae.CLASS_NAME))
        if "lora" in names:
            built.lora = find_part(parts["lora"], "lora", "lora").file
        built.given = candidates(embedding_files(embeddings))
        built.found = candidates(embedding_files(parts.get("embeddings")))
        notices: list[str] = []
        _note_defaults(built, notices)
        return tinysr.build(built, f"{built.transformer.where} and {built.vae.where}", notices)
    if "decoder" in names and len(names) == 2 and names <= ADCSR_PARTS:
        key = "unet" if "unet" in names else "net_params"
        net = find_part(parts[key], "adcsr", key).file
        decoder = find_part(parts["decoder"], "decoder", "decoder").file
        return adcsr.normalise(net, decoder, [])
    raise CheckpointError(
        'expected the parts "transformer" and "vae" (and "lora", "embeddings"), or "unet" (or "net_params") and '
        f'"decoder"; found {listed(names) or "none"}'
    )


def _note_defaults(parts: tinysr.TinySRParts, notices: list[str]) -> None:
    """Modules and dicts of tensors may come without a configuration; what is assumed then is said."""
    if parts.own is None and (parts.vae_config is None or parts.transformer_config is None):
        notices.append(
            "a part has no configuration: head width 64, VAE blocks (1,3,3,3) and (3,3,3,1), scale 1 assumed"
        )


def _from_module(module: nn.Module, embeddings: Any) -> Checkpoint:
    label = f"module {type(module).__name__}"
    part = module_part(module, label)
    names = list(part.file.tensors)
    role = role_of(part.file)
    if role == "adcsr":
        return adcsr.normalise(part.file, part.file, [])
    if role == "unet":
        if not isinstance(part.own, UNetConfig):
            raise CheckpointError(f"{label}: config: expected a UNetConfig, found {quoted(part.own)}")
        return unet.normalise(part.file, part.own, combined(embedding_files(embeddings)))
    blocks = _prefix(names, r"^(.*?)transformer_blocks\.[0-9]+\.")
    halves = _prefix(names, r"^(.*?)(?:encoder|decoder)\.layers\.[0-9]+\.")
    if blocks is None or halves is None:
        raise CheckpointError(
            f"{label}: expected the keys of a whole TinySR (transformer_blocks.*, encoder.layers.*, decoder.layers.*), "
            f"of AdcSR (body.1.*) or of a pruned UNet (unet.*, decoder.*), found {listed(names, 4) or 'no tensors'}"
        )
    notices: list[str] = []
    main = _sub_part(part, module, blocks, [n for n in names if not _is_half(n, halves)], label)
    built = _tinysr_parts(main, _sub_part(part, module, halves, [n for n in names if _is_half(n, halves)], label))
    built.given = candidates(embedding_files(embeddings))
    _note_defaults(built, notices)
    return tinysr.build(built, label, notices)


def _prefix(names: list[str], pattern: str) -> str | None:
    return next((found[1] for name in names if (found := re.match(pattern, name))), None)


def _is_half(name: str, prefix: str) -> bool:
    return name.startswith((f"{prefix}encoder.layers.", f"{prefix}decoder.layers."))


def _sub_part(whole: Part, module: nn.Module, prefix: str, names: list[str], label: str) -> Part:
    """The tensors of one part without their prefix, and the part's configuration if it has one of its own."""
    tensors = {name.removeprefix(prefix): whole.file.tensors[name] for name in names}
    config = None
    if prefix:
        config = getattr(module.get_submodule(prefix[:-1]), "config", None)
    values = dict(config) if isinstance(config, Mapping) else None
    own = config if isinstance(config, TinySRConfig) else whole.own
    return Part(mapping_file(tensors, label), values, f"{label}: {prefix}config", own)
