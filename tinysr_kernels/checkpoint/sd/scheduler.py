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
USUAL: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
"""Stable Diffusion's."""
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("scaled_linear",),
    "prediction_type": ("epsilon",),
    "num_train_timesteps": (1000,),
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
}


def alpha(timestep: int, configs: Sequence[tuple[Path, Mapping[str, Any]]], notices: list[str]) -> float:
    """The product of 1 - beta_i over i = 0..timestep.

    configs: the JSON files found with a checkpoint; those named scheduler_config.json count, and without any Stable
    Diffusion's numbers, which is noted. Raises CheckpointError for several that differ, for another prediction than of
    the noise, and for samples that would be clipped.
    """
    found = [(path, values) for path, values in configs if path.name == FILE]
    results = {path: _alpha(timestep, Values(values, str(path))) for path, values in found}
    if len(set(results.values())) > 1:
        raise CheckpointError(f"expected one noise schedule, found several that differ: {listed(results)}; keep one")
    if not found:
        notices.append(f"no {FILE} was found: the noise schedule of Stable Diffusion is assumed")
        return _alpha(timestep, Values(USUAL, ""))
    return next(iter(results.values()))


def _alpha(timestep: int, values: Values) -> float:
    values.only(_ONLY)
    # Not diffusers' defaults, which are another schedule's.
    start, end = (math.sqrt(values.number(name, USUAL[name], 1e-6, 0.999)) for name in ("beta_start", "beta_end"))
    steps = 1000
    return math.prod(1 - (start + (end - start) * i / (steps - 1)) ** 2 for i in range(timestep + 1))
