"""The noise schedule of a diffusers folder: how much of the latent is left of the image at a time step.

From scheduler_config.json, of which only the numbers are used: the class named there is the one that the base model was
sampled with. Formula: diffusers schedulers/scheduling_ddpm.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinysr_kernels.checkpoint.read.text import listed
from tinysr_kernels.checkpoint.sd.values import Values
from tinysr_kernels.errors import CheckpointError

FILE = "scheduler_config.json"
BETA_START, BETA_END, STEPS = 0.00085, 0.012, 1000
"""Stable Diffusion's. Not diffusers' defaults, which are another schedule's."""
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("scaled_linear",),
    "prediction_type": ("epsilon",),
    "num_train_timesteps": (STEPS,),
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
}


def alpha_of(timestep: int, beta_start: float = BETA_START, beta_end: float = BETA_END) -> float:
    """The product of 1 - beta_i over i = 0..timestep, the roots of beta_i on a line of 1000 steps."""
    start, end = math.sqrt(beta_start), math.sqrt(beta_end)
    return math.prod(1 - (start + (end - start) * i / (STEPS - 1)) ** 2 for i in range(timestep + 1))


def alpha(timestep: int, configs: Sequence[tuple[Path, Mapping[str, Any]]], notices: list[str]) -> float:
    """`alpha_of` the noise schedule that was found with a checkpoint.

    configs: its JSON files; those named scheduler_config.json count, and without any Stable Diffusion's numbers, which
    is noted. Raises CheckpointError for several that differ, for another prediction than of the noise, and for samples
    that would be clipped.
    """
    found = {path: Values(values, str(path)) for path, values in configs if path.name == FILE}
    if not found:
        notices.append(f"no {FILE} was found: the noise schedule of Stable Diffusion is assumed")
        return alpha_of(timestep)
    results = {}
    for path, values in found.items():
        values.only(_ONLY)
        betas = (values.number("beta_start", BETA_START, 1e-6, 0.999), values.number("beta_end", BETA_END, 1e-6, 0.999))
        results[path] = alpha_of(timestep, *betas)
    if len(set(results.values())) > 1:
        raise CheckpointError(f"expected one noise schedule, found several that differ: {listed(results)}; keep one")
    return next(iter(results.values()))
