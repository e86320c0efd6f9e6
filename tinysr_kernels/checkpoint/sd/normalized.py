"""Stable Diffusion's tensors as networks take them: the time step evaluated, and the prompt if all images share it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels.checkpoint.embeddings import timestep_features
from tinysr_kernels.checkpoint.sd import unet

_PROJECTION = re.compile(r"(.*)\.time_emb_proj\.weight")
_OF_PROMPT = re.compile(r"(.*\.attn2)\.to_([kv])\.weight")


class Normalized(Mapping[str, Tensor]):
    """The tensors as `nets.sd.fold` expects them, each merged and evaluated when it is asked for.

    `unet.*` with `time_bias` in place of the time modules; `attn2.keys` and `values` [heads,T,d] in place of their
    projections, or without an embedding the projections themselves by head, `attn2.to_keys` and `to_values`
    [heads,d,X]; `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`.
    """

    def __init__(
        self,
        network: Mapping[str, Tensor],
        vae: Mapping[str, Tensor],
        size: unet.Size,
        timestep: int,
        embedding: Tensor | None,
    ) -> None:
        """embedding: of the prompt that all images share, [T,X]; None where each image has its own."""
        self._network, self._vae = network, vae
        self._heads = dict(unet.attention_heads(size))
        self._embedding = None if embedding is None else embedding.double()
        self._temb = F.silu(_temb(network, timestep))
        self._names = list(vae)
        prefix = "" if self._embedding is not None else "to_"
        for name in network:
            if projection := _PROJECTION.fullmatch(name):
                self._names.append(f"unet.{projection[1]}.time_bias")
            elif of_prompt := _OF_PROMPT.fullmatch(name):
                self._names.append(f"unet.{of_prompt[1]}.{prefix}{'keys' if of_prompt[2] == 'k' else 'values'}")
            elif not name.startswith("time_embedding.") and ".time_emb_proj." not in name:
                self._names.append(f"unet.{name}")
        self._known = frozenset(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        if not name.startswith("unet."):
            return self._vae[name]
        name = name.removeprefix("unet.")
        module, _, last = name.rpartition(".")
        if last == "time_bias":
            projection = f"{module}.time_emb_proj"
            return _linear(self._network, projection, self._temb)[0].to(_wide(self._network[f"{projection}.weight"]))
        kind = last.removeprefix("to_")
        if kind in ("keys", "values"):
            weight = self._network[f"{module}.to_{kind[0]}.weight"]
            heads = self._heads[module.removesuffix(".attn2")]
            if self._embedding is None:
                return weight.unflatten(0, (heads, -1))
            features = self._embedding @ weight.double().T
            return features.unflatten(1, (heads, -1)).transpose(0, 1).contiguous().to(_wide(weight))
        return self._network[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double())


def _temb(tensors: Mapping[str, Tensor], timestep: int) -> Tensor:
    """The time step's embedding, float64 [1,E]."""
    features = timestep_features(tensors["time_embedding.linear_1.weight"].shape[1], float(timestep))
    return _linear(tensors, "time_embedding.linear_2", F.silu(_linear(tensors, "time_embedding.linear_1", features)))
