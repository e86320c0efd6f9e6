"""Files that are known and not taken: what they are by their keys, and what to do with them."""

from __future__ import annotations

import re
from collections.abc import Iterable

KNOWN: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"^model\.diffusion_model\.|^first_stage_model\."),
        (
            "this is a Stable Diffusion model in the layout from before diffusers; write its folder with diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        ),
    ),
    (
        re.compile(r"^(control_model|control_cldm)\.input_blocks\."),
        "this is a ControlNet (DiffBIR, SUPIR, StableSR and others), which takes many steps: not supported",
    ),
    (
        re.compile(r"transformer_blocks\.[0-9]+\.attn2?\.norm_(added_)?[qk]\.weight"),
        "this transformer normalizes its queries and keys, as Stable Diffusion 3.5 does: not supported",
    ),
)


def hint(names: Iterable[str]) -> str:
    """What tensors of these names are known to be, after a semicolon; nothing for others."""
    for name in names:
        for pattern, text in KNOWN:
            if pattern.search(name):
                return f"; {text}"
    return ""
