"""Files that are known and not taken: what they are by their keys, and what to do with them.

The keys are those of the public codes: SeedVR2 (models/dit), FlashVSR (WanVSR), InvSR (noise predictor), S3Diff
(s3diff.py), ResShift and SinSR (models/unet.py), SUPIR, DiffBIR, StableSR, BasicSR's networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_STEPS = "which takes many steps: not supported; OSEDiff, TSD-SR, TinySR and their kin take one"
_PASS = (
    "a network of another kind, of one forward pass and without diffusion: not supported; spandrel runs it: "
    "pip install spandrel, spandrel.ModelLoader().load_from_file(FILE)"
)
_FRAMES = "not supported; `tinysr upscale` takes videos, with a model for images"
KNOWN: tuple[tuple[str, str], ...] = (
    (r"^model\.control_model\.|^first_stage_model\.denoise_encoder", f"this is SUPIR, {_STEPS}"),
    (r"^structcond_stage_model\.", f"this is StableSR, {_STEPS}"),
    (
        r"^(control_model|control_cldm)\.input_blocks\.|^zero_convs\.[0-9]+\.",
        f"this is a ControlNet, as DiffBIR has it, {_STEPS}",
    ),
    (
        r"^model\.diffusion_model\.|^first_stage_model\.",
        (
            "this is a Stable Diffusion model in the layout from before diffusers; write its folder with diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        ),
    ),
    (
        r"transformer_blocks\.[0-9]+\.attn2?\.norm_(added_)?[qk]\.weight",
        (
            "this transformer normalizes its queries and keys, as Stable Diffusion 3.5 does: not supported; TSD-SR is "
            "made for stable-diffusion-3-medium"
        ),
    ),
    (
        r"^state_dict_(vae|unet)_(de|block|fuse)_mlp\.",
        (
            "this is S3Diff, whose LoRA change with each image and so cannot be folded: not supported; OSEDiff is a "
            "model of the same kind"
        ),
    ),
    (
        r"^encoder\.(down_blocks|mid_block)\..*\.time_emb_proj\.|^encoder\.time_embedding\.",
        f"this is a noise predictor, as InvSR has it, {_STEPS}",
    ),
    (
        r"^(module\.)?blocks\.[0-9]+\.attn\.proj_qkv\.(vid|all)\.",
        f"this is SeedVR2, a video transformer of its own kind: {_FRAMES}",
    ),
    (
        r"^blocks\.[0-9]+\.(self_attn|cross_attn)\.[qkvo]\.weight",
        f"this is a video transformer of Wan 2.1, as FlashVSR has it: {_FRAMES}",
    ),
    (
        r"^(module\.)?input_blocks\.[0-9]+\.[0-9]+\.",
        f"this is a UNet in guided-diffusion's layout, as ResShift and SinSR have it, {_STEPS}",
    ),
    (r"^params(_ema)?$|^params(_ema)?\.", f"this is one of BasicSR's networks (Real-ESRGAN and others), {_PASS}"),
    (
        r"\.rdb[123]\.conv[1-5]\.|\.RDB[123]\.conv[1-5]\.|^layers\.[0-9]+\.residual_group\.",
        f"this is a GAN or restoration transformer (ESRGAN, SwinIR and others), {_PASS}",
    ),
)
"""Patterns in the order in which they are tried: what is more special first."""
_PATTERNS = tuple((re.compile(pattern), text) for pattern, text in KNOWN)


def hint(names: Iterable[str]) -> str:
    """What a file with tensors, or other entries, of these names is known to be, after a semicolon; else nothing."""
    listed = list(names)
    for pattern, text in _PATTERNS:
        if any(pattern.search(name) for name in listed):
            return f"; {text}"
    return ""
