"""Embeddings of prompts for single images, from a call's argument or from what is called with each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.errors import InputError, shorten
from tinysr_kernels.nets import Network

Embed = Callable[[Tensor], Tensor]
"""embed(image) -> its prompt's embedding [T,X] or [1,T,X] in floating point; image: RGB [3,H,W], uint8 or in [0,1]."""
MOST_TOKENS = 1 << 14


class Prompts:
    """The embeddings of a call's images, taken in their order."""

    def __init__(self, embeddings: Any, width: int) -> None:
        """embeddings: an `Embed`; a tensor [T,X] or [1,T,X] for every image, or [N,T,X]; or a list of one for each."""
        self._width = width
        self._embed = embeddings if callable(embeddings) and not isinstance(embeddings, Tensor) else None
        self._shared: Tensor | None = None
        self._left: list[Any] = []
        if self._embed is not None:
            return
        several = isinstance(embeddings, Tensor) and embeddings.ndim == 3 and len(embeddings) != 1
        if several or isinstance(embeddings, (list, tuple)):
            self._left = list(embeddings)
        else:
            self._shared = self._checked(embeddings, "embeddings")

    def take(self, images: Tensor) -> list[Tensor]:
        """The embeddings [T,X] of the next images [N,3,H,W]. InputError where there are not as many."""
        if self._shared is not None:
            return [self._shared] * len(images)
        if self._embed is not None:
            with torch.inference_mode(False), torch.no_grad():
                return [self._checked(self._embed(image), "embeddings, called with an image") for image in images]
        if len(self._left) < len(images):
            raise InputError(f"embeddings: expected one for each image, found {len(self._left)} for {len(images)} more")
        given, self._left = self._left[: len(images)], self._left[len(images) :]
        return [self._checked(one, f"embeddings[{i}]") for i, one in enumerate(given)]

    def finish(self) -> None:
        """InputError for embeddings without an image."""
        if self._left:
            raise InputError(f"embeddings: expected one for each image, found {len(self._left)} too many")

    def _checked(self, found: Any, where: str) -> Tensor:
        """[T,X]; InputError with what was expected and found."""
        expected = f"{where}: expected a tensor [T,{self._width}] or [1,T,{self._width}] in floating point"
        if not isinstance(found, Tensor):
            raise InputError(f"{expected}, found {shorten(type(found).__name__, 100)}")
        tensor = found.detach()
        tensor = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
        fits = tensor.ndim == 2 and 0 < len(tensor) <= MOST_TOKENS and tensor.shape[1] == self._width
        if not fits or not tensor.is_floating_point():
            raise InputError(f"{expected}, found {list(found.shape)} of {found.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: expected finite values, found NaN or infinity")
        return tensor


def prompts_of(embeddings: Any, embed: Embed | None, network: Network) -> Prompts | None:
    """A call's embeddings, before those that the model was compiled with; None for a network that takes none.

    InputError where there are some and the network takes none, or where it takes some and there are none.
    """
    if network.prompt_width is None:
        if embeddings is not None:
            raise InputError(
                "embeddings: this model takes none with an image, its conditioning is folded into the weights; compile "
                "the checkpoint with embeddings=a callable that gives those of each image"
            )
        return None
    chosen = embed if embeddings is None else embeddings
    if chosen is None:
        raise InputError("each image of this model needs an embedding; pass embeddings= with it, or to compile")
    return Prompts(chosen, network.prompt_width)


def per_prompt(embeddings: Sequence[Tensor] | None, begin: int, end: int) -> int:
    """Where a batch from `begin` ends at most: images of different prompts do not run together."""
    if embeddings is None:
        return end
    stop = begin + 1
    while stop < end and embeddings[stop] is embeddings[begin]:
        stop += 1
    return stop
