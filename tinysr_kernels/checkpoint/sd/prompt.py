"""The embedding of a prompt: given, found beside a checkpoint, or evaluated once by its text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.embeddings import Candidate
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sources import candidates
from tinysr_kernels.errors import CheckpointError, shorten

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


def fixed_embedding(
    source: str,
    features: int,
    *,
    named: Sequence[TensorFile],
    prompt: str | None,
    beside: Sequence[TensorFile],
    models: Sequence[tuple[Path, Mapping[str, Any]]],
    notices: list[str],
) -> Tensor:
    """The embedding [T,X] that all images share: the caller's, that of a prompt given, the one beside, of no prompt.

    features: X. named, beside: files of embeddings that the caller named, and that lie with the checkpoint. models: see
    `checkpoint.detect.Folder`. CheckpointError where there is none, several, or one of another width.
    """
    if named:
        if prompt is not None:
            notices.append("the prompt given is ignored: embeddings are given too")
        return _only(candidates(named), features, "embeddings", strict=True)
    fitting = [one for one in candidates(beside) if _fits(one.tensor, features)]
    if fitting and prompt is None:
        return _only(fitting, features, source)
    encoder = text_encoder(models)
    if encoder is None:
        asked = "" if prompt is None else f" to evaluate the prompt {quoted(prompt)}"
        raise CheckpointError(
            f"{source}: expected the embedding of a prompt, found neither a file of one tensor [1,T,{features}] "
            f"nor a text encoder{asked}; put text_encoder/ and tokenizer/ of Stable Diffusion 2.1-base into the "
            'folder, or save the last_hidden_state of its text encoder with torch.save(P, "prompt_embeds.pt") and put '
            "that there, or pass it as embeddings="
        )
    text = prompt or ""
    embedding = evaluate(encoder, text)
    notices.append(f"the prompt {quoted(text)} was evaluated by the text encoder {encoder}")
    return _only([Candidate("prompt", embedding, str(encoder))], features, str(encoder), strict=True)


def _fits(tensor: Tensor, features: int) -> bool:
    """Whether a tensor may be the embedding of a prompt, [1,T,X] or [T,X]."""
    shape = tuple(tensor.shape[1:] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor.shape)
    return len(shape) == 2 and shape[0] > 0 and shape[1] == features and tensor.is_floating_point()


def _only(found: list[Candidate], features: int, where: str, strict: bool = False) -> Tensor:
    """The one embedding among candidates, [T,X] and checked."""
    for one in found:
        if strict and not _fits(one.tensor, features):
            raise CheckpointError(
                f"{one.where}: expected the embedding of a prompt, [1,T,{features}] or [T,{features}] in floating "
                f"point, found {list(one.tensor.shape)} of {one.tensor.dtype}"
            )
    if not all(torch.equal(one.tensor.flatten(), found[0].tensor.flatten()) for one in found[1:]):
        raise CheckpointError(
            f"{where}: expected the embedding of one prompt, found several: {listed(one.where for one in found)}; pass "
            "one with embeddings="
        )
    if not found:
        raise CheckpointError(f"{where}: expected the embedding of a prompt, found none")
    tensor = found[0].tensor.flatten(0, -2)
    return Weights({found[0].name: tensor}, lambda _: found[0].where).take(found[0].name, [None, features])


def text_encoder(models: Sequence[tuple[Path, Mapping[str, Any]]]) -> Path | None:
    """The folder of the one CLIP text model among these config.json; None without any, CheckpointError for several."""
    found = [path.parent for path, values in models if _architecture(values) in ENCODERS]
    if len(found) > 1:
        raise CheckpointError(f"expected one text encoder, found {listed(found)}; pass embeddings=")
    return found[0] if found else None


def _architecture(values: Mapping[str, Any]) -> object:
    names = values.get("architectures")
    return names[0] if type(names) is list and len(names) == 1 else None


def evaluate(encoder: Path, prompt: str) -> Tensor:
    """The encoder's last hidden state after its final norm for a prompt, float32 [1,T,X].

    T is what the tokenizer pads to, 77 in Stable Diffusion; the tokenizer lies in the folder `tokenizer` beside the
    encoder's. Raises CheckpointError if either cannot be loaded, or transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer, CLIPTextModel
    except ImportError as error:
        raise CheckpointError(
            f"{encoder}: evaluating a prompt needs transformers; pip install transformers, or pass embeddings="
        ) from error
    tokenizer_folder = encoder.parent / "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        length = min(int(tokenizer.model_max_length), 1 << 10)
        ids = tokenizer(prompt, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids
        model = CLIPTextModel.from_pretrained(encoder, local_files_only=True, dtype=torch.float32).eval()
        with torch.no_grad():
            embedding = model(ids).last_hidden_state
    except Exception as error:  # whatever a library says about files that somebody else made
        raise CheckpointError(
            f"{encoder}: the text encoder and its tokenizer ({tokenizer_folder}) cannot be used: {shorten(error)}; "
            "fetch both again, or pass embeddings="
        ) from error
    return embedding.detach().clone()
