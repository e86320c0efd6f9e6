"""The embedding of a prompt by the text encoder of a diffusers folder, evaluated once by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read.text import listed
from tinysr_kernels.errors import CheckpointError, shorten

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


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
