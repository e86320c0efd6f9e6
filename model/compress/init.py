"""The student of a real teacher, before training: `python -m model.compress init`.

Reads a TSD-SR checkpoint in diffusers' layout (teacher_files.py) and writes TinySR's released layout (released.py):
the blocks of the mask, the image's stream alone, LoRA merged; the VAE pruned to 64 channels, without attention, tiny,
its encoder separable. The transformer is never in memory as a whole; the VAE (84 M parameters) is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.compress.conditions import check_pooled, check_teacher, check_window, student_config, student_tensors
from model.compress.released import SHARD, write_transformer, write_vae
from model.compress.teacher_files import LazyTensors, lora_in, part, transformer_config, weights_in
from model.compress.vae.prune import prune_kl
from model.compress.vae.separable import separable_state
from model.compress.vae.tiny import tiny_from_kl
from model.demo import synthetic
from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.sd3_transformer import SD3Config
from tinysr_kernels.families import TinySRConfig

WIDTH, WINDOW = 64, 64
CALIBRATION, CALIBRATION_SIDE = 4, 128
Report = Callable[[str], None]


def init(
    teacher: Path,
    mask: Sequence[bool],
    out: Path,
    *,
    lora: Path | None = None,
    pooled: Path | None = None,
    width: int = WIDTH,
    window: int = WINDOW,
    separable_decoder: bool = False,
    encoder_blocks: tuple[int, ...] = TinySRConfig.encoder_blocks,
    decoder_blocks: tuple[int, ...] = TinySRConfig.decoder_blocks,
    shard: int = SHARD,
    report: Report = lambda line: None,
) -> None:
    """Write the untrained student into `out`; ValueError names what is wrong with teacher, LoRA, mask or width."""
    folder, values = part(teacher, "transformer", "SD3Transformer2DModel")
    config = transformer_config(values, str(folder / "config.json"))
    weights = weights_in(folder)
    shapes = {name: weights.shape(name) for name in weights}
    check_teacher(shapes, config, str(folder))
    adaptation = lora_in(lora, "transformer")
    adaptation.check(shapes)
    check_window(config, window)
    embedding = None if pooled is None else pooled_embedding(pooled)
    if embedding is not None:
        check_pooled(embedding, config.pooled_projection_dim)
    state, tiny_config = start_vae(
        teacher,
        lora,
        config,
        width=width,
        separable_decoder=separable_decoder,
        encoder_blocks=encoder_blocks,
        decoder_blocks=decoder_blocks,
    )
    tensors = student_tensors(weights, config, mask, window=window, pooled=embedding, lora=adaptation)
    place = write_transformer(out, tensors, student_config(config, mask), shard)
    weights.close()
    report(f"{place}: {sum(mask)} of {config.num_layers} blocks, {len(adaptation.pairs)} LoRA pairs merged")
    if embedding is None:
        report("no pooled embedding given: the modules of the modulation stay; give it to compile() or to training")
    place = write_vae(out, state, tiny_config)
    report(f"{place}: {width} channels, started from the teacher's; train it before use")


def start_vae(
    teacher: Path,
    lora: Path | None,
    config: SD3Config,
    *,
    width: int = WIDTH,
    separable_decoder: bool = False,
    encoder_blocks: tuple[int, ...] = TinySRConfig.encoder_blocks,
    decoder_blocks: tuple[int, ...] = TinySRConfig.decoder_blocks,
) -> tuple[dict[str, Tensor], TinySRConfig]:
    """(the compressed VAE's weights before training, their configuration)."""
    vae, scaling = read_vae(teacher, lora)
    own = TinySRConfig(
        head_dim=config.attention_head_dim,
        patch_size=config.patch_size,
        encoder_blocks=encoder_blocks,
        decoder_blocks=decoder_blocks,
        scaling_factor=scaling,
    )
    images = calibration_images()
    state = tiny_from_kl(prune_kl(vae, width, images), own, images).state_dict()
    keep = [] if separable_decoder else [n.rpartition(".")[0] for n in state if n.startswith("decoder.")]
    return separable_state(state, keep), own


def pooled_embedding(path: Path) -> Tensor:
    """The embedding, pooled [1,P] or of the whole prompt [1,T,J], from a .pt or safetensors file."""
    if path.suffix == ".safetensors":
        found: Any = list(LazyTensors([path]).values())
    else:
        found = torch.load(path, weights_only=True, map_location="cpu")
        found = list(found.values()) if isinstance(found, dict) else [found]
    if len(found) != 1 or not isinstance(found[0], Tensor):
        raise ValueError(f"{path}: expected one tensor, an embedding of the prompt")
    return found[0]


def read_vae(teacher: Path, lora: Path | None) -> tuple[KLVAE, float]:
    """(the teacher's AutoencoderKL in float32, its LoRA merged; its scaling factor)."""
    folder, values = part(teacher, "vae", "AutoencoderKL")
    where = str(folder / "config.json")
    if values.get("use_quant_conv", True) or values.get("use_post_quant_conv", True):
        raise ValueError(f"{where}: 1x1 convolutions about the latent (use_quant_conv) are not SD3's VAE")
    tensors = weights_in(folder)
    shapes = {name: tensors.shape(name) for name in tensors}
    channels, layers = tuple(values["block_out_channels"]), int(values["layers_per_block"])
    wanted = kl_vae_shapes(channels, int(values["latent_channels"]), layers)
    for name, shape in wanted.items():
        if shapes.get(name) != tuple(shape):
            raise ValueError(f"{folder}: {name}: expected {list(shape)}, found {shapes.get(name, 'nothing')}")
    adaptation = lora_in(lora, "vae")
    adaptation.check(shapes)
    state = {name: adaptation.merged(name, tensors[name]).float() for name in wanted}
    tensors.close()
    vae = KLVAE.from_state(state, kl_config(int(values.get("norm_num_groups", 32))))
    return vae.requires_grad_(False), float(values.get("scaling_factor", 1.0))


def calibration_images() -> Tensor:
    """[4,3,128,128] in [-1,1]: procedural images, seeds fixed."""
    images = [synthetic.image(np.random.default_rng([21, k]), CALIBRATION_SIDE) for k in range(CALIBRATION)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
