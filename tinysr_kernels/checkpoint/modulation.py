"""The constant modulation of a one-step transformer, evaluated once; the modules that made it are dropped.

TinySR always runs at t = 1000 with one prompt, so norm1.linear(SiLU(temb)) of every block is a constant [6,D] and
norm_out.linear(SiLU(temb)) a constant [2,D]. Evaluated in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels.checkpoint.embeddings import timestep_features

# The order in which norm1.linear's output is split, and the names of the buffers that cache the parts.
BLOCK_PARTS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
# norm_out.linear's: scale first.
OUT_PARTS = ("scale", "shift")
EMBEDDER = "time_text_embed"


def _apply(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double())


def _kept(value: Tensor, *inputs: Tensor) -> Tensor:
    """float32, or float64 where an input is float64."""
    return value if any(t.dtype == torch.float64 for t in inputs) else value.float()


def embed(tensors: dict[str, Tensor], pooled: Tensor) -> Tensor:
    """temb, float64 [1,D], from the pooled prompt embedding [1,P] and the weights under `time_text_embed.`."""
    time, text = f"{EMBEDDER}.timestep_embedder", f"{EMBEDDER}.text_embedder"
    features = timestep_features(tensors[f"{time}.linear_1.weight"].shape[1])
    temb = _apply(tensors, f"{time}.linear_2", F.silu(_apply(tensors, f"{time}.linear_1", features)))
    prompt = _apply(tensors, f"{text}.linear_1", pooled.double())
    return temb + _apply(tensors, f"{text}.linear_2", F.silu(prompt))


def evaluate(tensors: dict[str, Tensor], depth: int, temb: Tensor, source: Tensor) -> None:
    """Replace every norm1.linear and norm_out.linear in `tensors` by its modulation, [6,D] and [2,D].

    `temb` is float64 [1,D] before its SiLU; `source` is the embedding it came from, for its dtype.
    """
    active = F.silu(temb.double())
    names = [(f"transformer_blocks.{i}.norm1.linear", f"transformer_blocks.{i}.modulation", 6) for i in range(depth)]
    for linear, name, parts in [*names, ("norm_out.linear", "norm_out.modulation", 2)]:
        value = _apply(tensors, linear, active).reshape(parts, -1)
        tensors[name] = _kept(value, tensors[f"{linear}.weight"], source)
        del tensors[f"{linear}.weight"], tensors[f"{linear}.bias"]


def stack_cached(tensors: dict[str, Tensor], depth: int) -> None:
    """Replace the filled modulation buffers [1,D] in `tensors` by the stacked modulation, float32 or float64."""
    for prefix, name, parts in [
        *((f"transformer_blocks.{i}.", f"transformer_blocks.{i}.modulation", BLOCK_PARTS) for i in range(depth)),
        ("", "norm_out.modulation", OUT_PARTS),
    ]:
        buffers = [tensors.pop(prefix + part) for part in parts]
        tensors[name] = _kept(torch.cat([b.double() for b in buffers]), *buffers)
