"""Merging a low-rank adaptation into the weights it adapts (arXiv 2106.09685), as TinySR's release stores it.

Keys are `transformer.<module>.lora_A.weight` and `.lora_B.weight`; alpha equals the rank, so the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from model.reference.tinysr_dit import CONTEXT_LEFTOVER

PREFIX = "transformer."
CONDITIONING = re.compile(r"(^|\.)(norm1\.linear|norm_out\.linear|time_text_embed\..*)$")
"""Modules that are gone once their result is cached; what would adapt them no longer has a target."""


def merge_lora(state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with W += B A for every pair in `lora`, in float32 or wider; other tensors as they were.

    A [r,...] and B [D,r,...] are flattened to matrices, which covers linear layers and patch convolutions
    alike. Pairs for SD3's context stream, and for conditioning modules that are no longer there, are passed
    over. Raises KeyError for a pair without its other half or without a target, ValueError for a key that is
    not part of a pair.
    """
    merged = dict(state)
    for key, down in lora.items():
        module, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or part not in ("A.weight", "B.weight"):
            raise ValueError(f"{key!r} is no LoRA key of the transformer")
        up = lora[f"{PREFIX}{module}.lora_{'B' if part[0] == 'A' else 'A'}.weight"]
        if part[0] == "B" or CONTEXT_LEFTOVER.search(f"{module}."):
            continue
        name = f"{module}.weight"
        if name not in merged and CONDITIONING.search(module):
            continue
        weight = merged[name]
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = up.to(wide).flatten(1) @ down.to(wide).flatten(1)
        merged[name] = weight.to(wide) + change.reshape(weight.shape)
    return merged
