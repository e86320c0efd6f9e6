"""The two embeddings of a prompt that Stable Diffusion 3's transformer takes: every token's, and the pooled one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.embeddings import Candidate
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sources import candidates
from tinysr_kernels.errors import CheckpointError

DEFAULT = "default"
"""The folder whose embeddings a release means, where it holds several."""


def embeddings(
    named: Sequence[TensorFile], beside: Sequence[TensorFile], features: int, pooled: int, where: str
) -> tuple[Tensor, Tensor]:
    """The prompt's embedding [T,features] and the pooled one [1,pooled], both the caller's or both of those beside.

    Of several beside, those in a folder called "default". CheckpointError where one is missing, several differ, or a
    tensor of the caller's is neither.
    """
    kinds: tuple[tuple[str, Callable[[Tensor], bool]], ...] = (
        (f"a prompt's embedding [1,T,{features}]", lambda t: _is_prompt(t, features)),
        (f"a pooled embedding [1,{pooled}]", lambda t: _is_pooled(t, pooled)),
    )
    if named:
        where, known = "embeddings", candidates(named)
        for one in known:
            if not any(fits(one.tensor) for _, fits in kinds):
                wanted = " or ".join(kind for kind, _ in kinds)
                raise CheckpointError(f"{one.where}: expected {wanted}, found {list(one.tensor.shape)}")
    else:
        of_default = candidates([file for file in beside if file.path.parent.name == DEFAULT])
        # Never the one of the two from there and the other from elsewhere: they belong to one prompt.
        known = of_default if any(fits(one.tensor) for one in of_default for _, fits in kinds) else candidates(beside)
    found = []
    for kind, fits in kinds:
        fitting = [one for one in known if fits(one.tensor)]
        if not fitting:
            raise CheckpointError(
                f"{where}: expected {kind}, found none; put both prompt_embeds.pt and pool_embeds.pt of TSD-SR's "
                "dataset/default into the folder, or pass both with embeddings="
            )
        found.append(_only(fitting, kind, where))
    return found[0].flatten(0, -2), found[1].reshape(1, -1)


def _is_prompt(tensor: Tensor, features: int) -> bool:
    """[1,T,X], or [T,X] of several tokens."""
    whole = tensor.ndim == 3 and tensor.shape[0] == 1
    return (whole or (tensor.ndim == 2 and tensor.shape[0] > 1)) and _ends(tensor, features)


def _is_pooled(tensor: Tensor, pooled: int) -> bool:
    """[1,L] or [L]."""
    return (tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[0] == 1)) and _ends(tensor, pooled)


def _ends(tensor: Tensor, features: int) -> bool:
    return tensor.shape[-1] == features and tensor.numel() > 0 and tensor.is_floating_point()


def _only(found: list[Candidate], kind: str, where: str) -> Tensor:
    first = found[0]
    if not all(torch.equal(one.tensor.flatten(), first.tensor.flatten()) for one in found[1:]):
        raise CheckpointError(
            f"{where}: expected {kind} of one prompt, found several: {listed(one.where for one in found)}; pass one "
            "with embeddings="
        )
    return Weights({first.name: first.tensor}, lambda _: first.where).take(first.name, [None] * first.tensor.ndim)
